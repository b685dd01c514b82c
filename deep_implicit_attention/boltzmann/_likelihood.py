"""log Z and log-likelihoods: by enumeration where there are few states, else by annealing."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from ..spins import BlockGibbs, Exact, IsingPrior, SpinSystem
from ._clamped import patterns_of
from ._data import Data
from ._enumeration import Enumeration
from ._parameters import unpack

MAX_ENUMERATED = 24
# Rows whose missing spins are summed over at a time.
_ROWS = 2**12


@dataclass(frozen=True)
class LogPartition:
    """log Z = log Σ_S exp(½ Σ_ij S_i J_ij S_j + Σ_i h_i S_i), hidden units summed over too.

    Attributes:
        value: log Z in nats.
        standard_error: of the value; 0 if it is exact.
        method: "enumeration", or "annealed importance sampling".
        effective_size: of the particles of annealed importance sampling; infinite if exact.
    """

    value: float
    standard_error: float
    method: str
    effective_size: float = math.inf

    @property
    def exact(self) -> bool:
        """Whether the value is no estimate."""
        return self.method == "enumeration"


def log_partition(
    theta: Tensor, base: Tensor, *, particles: int, steps: int, seed: int
) -> LogPartition:
    """log Z, exact up to 24 spins; beyond, annealed from independent spins in fields `base`."""
    n = len(theta) - 1
    if n <= MAX_ENUMERATED:
        value = Enumeration(n, theta.device).log_partition(theta).item()
        return LogPartition(value, 0.0, "enumeration")
    base = base.to(theta.device)
    log_weights = anneal(theta, base, particles=particles, steps=steps, seed=seed)
    w = (log_weights - log_weights.max()).exp()
    mean = w.mean()
    value = log_weights.max() + mean.log() + _log_two_cosh(base).sum()
    error = w.std() / mean / math.sqrt(particles)
    effective = w.sum() ** 2 / w.square().sum()
    return LogPartition(
        value.item(), error.item(), "annealed importance sampling", effective.item()
    )


def anneal(theta: Tensor, base: Tensor, *, particles: int, steps: int, seed: int) -> Tensor:
    """Log weights `(particles,)` of annealed importance sampling, whose mean weight is Z/Z_0.

    From independent spins in fields b, p_β ∝ exp(β (½ SᵀJS + h·S) + (1 − β) b·S) with β from 0 to 1
    in even steps and a block sweep at each (Neal 2001, Stat. Comput. 11, 125; the start from
    independent spins as Salakhutdinov, Murray 2008, ICML). Cost: O(particles · steps · N²).
    """
    J, h = unpack(theta)
    generator = Generator(theta.device).manual_seed(seed)
    blocks = BlockGibbs(SpinSystem.unchecked(J, IsingPrior()))
    spins = IsingPrior().sample(base.expand(particles, -1), generator)
    packed = blocks.pack(spins)
    start, end = (blocks.pack(field.expand_as(spins)) for field in (base, h))
    gain = end - start
    log_weight = torch.zeros_like(packed[0, 0])
    for step in range(1, steps + 1):
        log_weight += blocks.log_weight(packed, gain) / steps
        if step < steps:
            beta = step / steps
            blocks.sweep(packed, end + (1 - beta) / beta * start, beta, generator)
    return log_weight


def log_weights(theta: Tensor, data: Data) -> Tensor:
    """log Σ exp(½ sᵀΘs) over hidden units and missing entries of each row, `(M,)`.

    A closed form where free spins have no couplings among each other, else enumeration of theirs.

    Raises:
        ValueError: for more than 24 free spins in a row that are coupled.
    """
    J, h = unpack(theta)
    n, visible = len(h), data.spins.shape[1]
    spins = torch.nn.functional.pad(data.spins, (0, n - visible))
    free = spins == 0
    out = spins.new_empty(len(spins))
    patterns, group = patterns_of(free)
    parts = (
        (pattern, rows)
        for number, pattern in enumerate(patterns)
        for rows in (group == number).nonzero().flatten().split(_ROWS)
    )
    for pattern, rows in parts:
        sites = pattern.nonzero().flatten()
        known = spins[rows]
        field = h + known @ J
        value = 0.5 * (known * (field + h)).sum(dim=1)
        inner = J[sites][:, sites]
        if not bool(inner.any()):
            out[rows] = value + _log_two_cosh(field[:, sites]).sum(dim=1)
            continue
        if len(sites) > MAX_ENUMERATED:
            raise ValueError(
                f"row {int(rows[0])} of X has {len(sites)} spins that are missing or hidden and "
                f"coupled; its likelihood can be summed up to {MAX_ENUMERATED}"
            )
        log = Exact()(SpinSystem.unchecked(inner, IsingPrior()), field[:, sites]).log_partition
        out[rows] = value + log + len(sites) * math.log(2)  # there each state has weight 2^−n
    return out


def _log_two_cosh(field: Tensor) -> Tensor:
    return torch.logaddexp(field, -field)
