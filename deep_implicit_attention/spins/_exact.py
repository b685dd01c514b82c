"""Exact answers: enumeration of discrete systems, the closed form of Gaussian ones."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..solvers._validate import check_count
from ._blocks import block_diagonal, cholesky_inverse
from ._gaussian import GaussianPrior
from ._ising import IsingPrior
from ._potts import PottsPrior
from ._response import Later, Response
from ._system import SpinSystem, check_system

# Entries of the tables, of states and fields or states and pairs, that are worked on at a time.
_TABLE = 2**22


class Exact:
    """The exact response, `method(system, fields) -> Response`.

    Ising and Potts systems are enumerated, 2^N or q^N states in chunks; a Gaussian one has

        m = χ (x + Pμ),   χ = (blockdiag P − J)⁻¹

    Covariance and susceptibility are the same. Cost: O(states N² d² + B states N d) time,
    O(B states N² d²) for the covariance, and, with gradients, each chunk is computed again instead
    of kept; Gaussian O(N³ d³).

    Args:
        max_states: states at most, 2^24 by default.
        chunk: states at a time; fewer where the table of states and fields, or of states and pairs
            of components, would have more than 2^22 entries.

    Raises:
        ValueError: for more states than that, and for a Gaussian system with P − J not positive
            definite.
        TypeError: for a prior that is neither discrete nor Gaussian, and for a subclass with
            weights of its own.
    """

    def __init__(self, *, max_states: int = 2**24, chunk: int = 2**14) -> None:
        check_count("max_states", max_states)
        check_count("chunk", chunk)
        self.max_states, self.chunk = max_states, chunk

    def __call__(self, system: SpinSystem, fields: Tensor) -> Response:
        """The answer for fields `(*batch, N, *event)`."""
        check_system(system)
        system.check_fields(fields)
        event = (system.num_spins, *system.event_shape)
        batch = fields.shape[: fields.dim() - len(event)]
        x = fields.reshape(math.prod(batch), math.prod(event))
        if isinstance(system.prior, GaussianPrior):
            log, m, chi = _gaussian(system, system.prior, x)
            second = chi + m.unsqueeze(2) * m.unsqueeze(1)
            energy = -0.5 * (system.matrix() * second).sum(dim=(1, 2)) - (x * m).sum(dim=1)
            make = Later(lambda: chi, chi)
        elif _weighs_equally(system.prior):
            log, m, energy, make = self._enumerate(system, x)
        else:
            raise TypeError(f"Exact has no answer for {type(system.prior).__name__}")
        covariance = functools.partial(_shaped, make, (*batch, *event, *event))
        return Response(
            magnetization=m.reshape(fields.shape),
            log_partition=log.reshape(batch),
            energy=energy.reshape(batch),
            cavity_variance=None,
            solution=None,
            method="Exact",
            _covariance=covariance,
            _susceptibility=covariance,
        )

    def _enumerate(self, system: SpinSystem, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Later]:
        """log Z, means, energies and covariances (when called) by summation over all states."""
        n, matrix = system.num_spins, system.matrix()
        levels = _levels(system, x)
        count = len(levels) ** n
        if count > self.max_states:
            raise ValueError(
                f"{count:.3g} states are more than max_states = {self.max_states}: use "
                "GibbsSampler, a mean-field method such as AdaptiveTAP, or fewer spins"
            )
        prior = -n * math.log(len(levels))
        chunk = max(1, min(self.chunk, _TABLE // max(len(x), len(matrix) ** 2)))

        def weights(first: int, x: Tensor, matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            states = _states(levels, n, first, min(chunk, count - first))
            own = 0.5 * ((states @ matrix) * states).sum(dim=1)
            return states, own, own + x @ states.mT + prior

        with torch.no_grad():
            log = x.new_full((x.shape[0],), -torch.inf)
            for first in range(0, count, chunk):
                log = torch.logaddexp(log, weights(first, x, matrix)[2].logsumexp(dim=1))

        def sums(first: int, x: Tensor, matrix: Tensor) -> tuple[Tensor, ...]:
            states, own, exponent = weights(first, x, matrix)
            p = torch.exp(exponent - log[:, None])
            return p.sum(dim=1), p @ states, p @ own

        def pairs(first: int, x: Tensor, matrix: Tensor) -> tuple[Tensor, ...]:
            """Of all pairs of components, how probable it is that both, none and the first only
            have the upper of their two values."""
            states, _, exponent = weights(first, x, matrix)
            p = torch.exp(exponent - log[:, None])
            up = (states == levels.max()).to(p)
            down = 1 - up
            three = (up, up), (down, down), (up, down)
            if len(x) < len(matrix):
                return tuple(torch.einsum("bk,ki,kj->bij", p, a, b) for a, b in three)
            # Products of all pairs once for all fields, which are more than components.
            tables = ((a.unsqueeze(2) * b.unsqueeze(1)).flatten(1) for a, b in three)
            return tuple((p @ table).unflatten(1, matrix.shape) for table in tables)

        def over_all(part: Callable[..., tuple[Tensor, ...]]) -> list[Tensor]:
            graph = torch.is_grad_enabled() and (x.requires_grad or matrix.requires_grad)
            out: list[Tensor] = []
            for first in range(0, count, chunk):
                if graph:
                    more = checkpoint(part, first, x, matrix, use_reentrant=False)
                else:  # the first checkpoint of a process takes seconds of imports
                    more = part(first, x, matrix)
                out = [a + b for a, b in zip(out, more, strict=True)] if out else list(more)
            return out

        total, mean, own = over_all(sums)
        low, high = levels.aminmax()
        m = (mean / total[:, None]).clamp(low, high)  # beyond them by rounding only

        def covariance() -> Tensor:
            # Not second moments less squared means, which leave nothing of a small variance.
            both, none, first = (part / total[:, None, None] for part in over_all(pairs))
            return (high - low) ** 2 * (both * none - first * first.mT)

        energy = -own / total - (x * m).sum(dim=1)
        return log + total.log(), m, energy, Later(covariance, x, matrix)


def _shaped(make: Later, shape: tuple[int, ...]) -> Tensor:
    return make().reshape(shape)


def _weighs_equally(prior: Any) -> bool:
    """Whether it is Ising or Potts spins with equal weights; a subclass may have others."""
    for kind in (IsingPrior, PottsPrior):
        if isinstance(prior, kind):
            return type(prior).log_partition is kind.log_partition
    return False


def _levels(system: SpinSystem, like: Tensor) -> Tensor:
    """The values of a single spin, `(levels, k)`."""
    if isinstance(system.prior, IsingPrior):
        return like.new_tensor([[-1.0], [1.0]])
    return torch.eye(system.event_shape[0]).to(like)


def _states(levels: Tensor, n: int, first: int, size: int) -> Tensor:
    """States number `first` to `first + size`, `(size, n·k)`; the last spin varies fastest."""
    number = torch.arange(first, first + size, device=levels.device)
    digits = []
    for _ in range(n):
        digits.append(number % len(levels))
        number = number // len(levels)
    return levels[torch.stack(digits[::-1], dim=1)].flatten(1)


def _gaussian(system: SpinSystem, prior: GaussianPrior, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    n = system.num_spins
    precision = prior.precision().to(x)
    factor = factorise(system, precision)
    location = prior.location.to(x)
    b = x + (precision @ location).repeat(n)
    m = torch.cholesky_solve(b.mT, factor).mT
    covariance = cholesky_inverse(factor).expand(len(x), -1, -1)
    log = (
        -n * prior.log_diagonal.to(x).sum()
        - factor.diagonal().log().sum()
        + 0.5 * (b * m).sum(dim=1)
        - 0.5 * n * location @ precision @ location
    )
    return log, m, covariance


def factorise(system: SpinSystem, precision: Tensor) -> Tensor:
    """The Cholesky factor of blockdiag P − J of a Gaussian system, or `ValueError`."""
    operator = block_diagonal(precision.expand(system.num_spins, -1, -1)) - system.matrix()
    factor, failed = torch.linalg.cholesky_ex(operator)
    if int(failed):
        smallest = torch.linalg.eigvalsh(operator.detach())[0].item()
        raise ValueError(
            f"P − J must be positive definite, or there is no distribution; its smallest "
            f"eigenvalue is {smallest:.4g}"
        )
    return factor
