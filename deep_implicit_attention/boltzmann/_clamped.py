"""The response of the other spins where some are clamped: by mean field, or by enumeration.

A clamped spin is a spin in a field so strong that nothing else turns it. Rows that share what is
clamped are solved on the free spins alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ..deq import ConvergenceWarning
from ..solvers import Solution, anderson, picard
from ..spins import (
    TAP,
    AdaptiveTAP,
    Exact,
    IsingPrior,
    NaiveMeanField,
    SpinSystem,
)
from ._data import Data
from ._enumeration import Enumeration
from ._parameters import rows_with_one, unpack
from ._warnings import warn

Kind = Literal["exact", "naive", "tap", "adaptive_tap"]

_METHODS: dict[str, Callable[..., Any]] = {
    "naive": NaiveMeanField,
    "tap": TAP,
    "adaptive_tap": AdaptiveTAP,
}

# Rows that must share what is clamped, on average, for groups of them to be faster than one batch.
_SHARED = 8
# So many states of a row take as long as to set up the enumeration for a group of rows.
_STATES = 2**16
# Numbers in the matrices of a batch of rows.
_NUMBERS = 2**22
_TOL, _MAX_ITER, _DAMPING = 1e-9, 500, 0.9


@dataclass(frozen=True)
class Means:
    """Magnetizations `(B, n)`, and their covariance `(B, n, n)` when it is asked for.

    The covariance is None where spins are not coupled: then it is diagonal, 1 − m².
    """

    m: Tensor
    covariance: Callable[[], Tensor] | None
    failed: int = 0  # rows whose iteration did not converge


def clamp(
    kind: Kind, theta: Tensor, spins: Tensor, free: Tensor
) -> Iterator[tuple[Tensor, Tensor, Means]]:
    """The response of the spins `free` `(B, N)` to the others in `spins` `(B, N)`, in parts.

    Yields the rows of a part `(b,)`, the sites it is about `(n,)` and their means; sites that are
    clamped, if there are any among them, have means of ±1 and no covariance.
    """
    if not bool(free.any()):
        return
    patterns, group = patterns_of(free)
    J, h = unpack(theta)
    if kind == "exact" or len(patterns) * _SHARED <= len(free) or len(free) < _SHARED:
        for number, pattern in enumerate(patterns):
            rows = (group == number).nonzero().flatten()
            sites = pattern.nonzero().flatten()
            inner = J[sites][:, sites]
            for part in rows.split(max(1, _NUMBERS // max(len(sites), 1) ** 2)):
                x = (h + torch.where(free[part], 0.0, spins[part]) @ J)[:, sites]
                yield part, sites, means(kind, inner, x)
        return
    sites = torch.arange(len(h), device=J.device)
    # Above every field that the others and the Onsager term can make, by far.
    strong = 40 + h.abs() + J.abs().sum(dim=0) + J.square().sum(dim=0)
    for part in torch.arange(len(free), device=J.device).split(max(1, _NUMBERS // len(h) ** 2)):
        x = torch.where(free[part], h, strong * spins[part])
        yield part, sites, means(kind, J, x)


def patterns_of(free: Tensor) -> tuple[Tensor, Tensor]:
    """The different rows of `free` `(B, N)`, and for each row the number of its own, `(B,)`."""
    if len(free) and bool((free == free[0]).all()):
        return free[:1], torch.zeros(len(free), dtype=torch.long, device=free.device)
    return torch.unique(free, dim=0, return_inverse=True)


def means(kind: Kind, J: Tensor, x: Tensor, start: Tensor | None = None) -> Means:
    """The response of spins with couplings `J` `(n, n)` in fields `x` `(B, n)`."""
    if not bool(J.any()):
        return Means(torch.tanh(x), None)
    system = SpinSystem.unchecked(J, IsingPrior())
    if kind == "exact":
        response = Exact()(system, x)
        return Means(response.magnetization, lambda: response.covariance)
    m, V, failed = _iterate(kind, system, x, start)
    if kind == "naive":
        return Means(m, lambda: covariance(-J, m), failed)
    if kind == "adaptive_tap":
        return Means(m, lambda: covariance(torch.diag_embed(V) - J, m), failed)

    def by_tap() -> Tensor:
        echo = 2 * J.square() * m.unsqueeze(2) * m.unsqueeze(1)
        return covariance(torch.diag_embed(V) - J - echo, m)

    return Means(m, by_tap, failed)


def _iterate(
    kind: Kind, system: SpinSystem, x: Tensor, start: Tensor | None
) -> tuple[Tensor, Tensor, int]:
    """m and V `(B, n)`, and how many did not converge, in whichever way.

    Of those the answer is the one with the smallest residual.
    """

    def attempt(x: Tensor, start: Tensor | None, **how: Any) -> tuple[Tensor, Tensor, Solution]:
        method = _METHODS[kind](on_failure="ignore", tol=_TOL, max_iter=_MAX_ITER, **how)
        response = method(system, x, start=start)
        assert response.solution is not None
        V = response.cavity_variance
        V = torch.zeros_like(x) if V is None else V
        return response.magnetization, V, response.solution

    m, V, solution = attempt(x, start)
    residual = solution.residual
    rows = (~solution.converged).nonzero().flatten()
    # With more damping, if it went round and round; then faster from there, if it was only slow.
    for how, onwards in (
        ({"solver": picard, "damping": _DAMPING}, False),
        ({"solver": anderson}, True),
    ):
        if not len(rows):
            break
        again, variance, solution = attempt(x[rows], m[rows] if onwards else None, **how)
        better = solution.converged | (solution.residual < residual[rows])
        taken = (rows[better],)
        m, V = m.index_put(taken, again[better]), V.index_put(taken, variance[better])
        residual = residual.index_put(taken, solution.residual[better])
        rows = rows[~solution.converged]
    # Anderson's steps are no means of spins: within the tolerance they may be beyond ±1, and by
    # more where they fail.
    return m.clamp(-1, 1), V, len(rows)


def covariance(K: Tensor, m: Tensor) -> Tensor:
    """χ = (1/C + K)⁻¹ with C = 1 − m², `(B, n, n)`.

    Written as c (1 + cKc)⁻¹ c with c² = C, in which spins that are frozen do no harm.
    """
    c = (1 - m.square()).clamp(min=0).sqrt()
    inner = torch.eye(m.shape[1]).to(m) + c.unsqueeze(2) * K * c.unsqueeze(1)
    return c.unsqueeze(2) * torch.linalg.inv(inner) * c.unsqueeze(1)


def filled(kind: Kind, theta: Tensor, data: Data) -> Tensor:
    """The spins of `data` with conditional magnetizations where entries are missing, `(M, N)`."""
    if data.observed is None:
        return data.spins
    spins = data.spins.clone()
    broken = (~data.observed).any(dim=1).nonzero().flatten()
    failed = 0
    for rows, sites, response in clamp(kind, theta, data.spins[broken], ~data.observed[broken]):
        spins[broken[rows][:, None], sites] = response.m
        failed += response.failed
    if failed:
        warn(
            f"of {len(broken)} rows with missing entries {failed} have no converged response by "
            f"{kind}, whose equations are hard to solve where couplings are strong. Complete them "
            "by a machine of method 'exact', or learn with a larger l2 or pseudocount.",
            ConvergenceWarning,
        )
    return torch.where(data.observed, data.spins, spins)


def clamped_phase(kind: Kind, data: Data, n: int) -> Callable[[Tensor, Data], Tensor]:
    """`clamped_moments` of `n` spins, for `data` or parts of it: the faster way, chosen once."""
    if kind == "exact" and data.observed is not None:
        patterns, _ = patterns_of(data.observed)
        if len(data) << n <= len(patterns) * _STATES:
            states = Enumeration(n, data.spins.device)
            return lambda theta, part: _enumerated_moments(states, theta, part)
    return lambda theta, part: clamped_moments(kind, theta, part)


def _enumerated_moments(states: Enumeration, theta: Tensor, data: Data) -> Tensor:
    """`clamped_moments` by the states of all spins, for all rows together."""
    spins = torch.nn.functional.pad(data.spins, (0, states.n - data.spins.shape[1]))
    weights = data.weights if data.weights is not None else torch.ones(len(data)).to(spins)
    second = states.second_moments(states.posterior(theta, spins, weights / weights.sum()))
    second.diagonal().fill_(1.0)
    return second


def clamped_moments(kind: Kind, theta: Tensor, data: Data) -> Tensor:
    """Σ_rows w ⟨s sᵀ⟩ / Σ w given what is observed, `(N+1, N+1)`; the spins are those of `theta`.

    What the columns of `data` are short of, hidden units, is free in every row.
    """
    n = len(theta) - 1
    hidden = n - data.spins.shape[1]
    spins = torch.nn.functional.pad(data.spins, (0, hidden))
    free = torch.ones_like(spins, dtype=torch.bool)
    free[:, : n - hidden] = False if data.observed is None else ~data.observed
    weights = data.weights if data.weights is not None else torch.ones(len(data)).to(spins)
    spins = torch.where(free, 0.0, spins)
    second = theta.new_zeros(n + 1, n + 1)
    broken = free.any(dim=1)
    rows = broken.nonzero().flatten()
    if len(rows):
        for part, sites, response in clamp(kind, theta, spins[rows], free[rows]):
            where = rows[part]
            spins[where[:, None], sites] = response.m
            if response.covariance is not None:
                chi = torch.einsum("b,bij->ij", weights[where], response.covariance())
                second[sites[:, None] + 1, sites + 1] += chi
    ones = rows_with_one(spins)
    second += ones.mT @ (weights[:, None] * ones)
    second /= weights.sum()
    second.diagonal().fill_(1.0)
    return second
