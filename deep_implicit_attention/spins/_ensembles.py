"""Couplings of the usual ensembles, with the inverse temperature in them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..solvers._validate import check_count, check_is_tensor, check_number


def sherrington_kirkpatrick(
    num_spins: int, beta: float = 1.0, field: float = 0.0, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Couplings `(N, N)` and fields `(N,)` of the SK model, float64.

    J_ij ~ N(0, β²/N), symmetric, and x_i ~ N(0, field²), drawn in this order by
    `numpy.random.default_rng(seed)`, so the same seed means the same system everywhere
    (Sherrington, Kirkpatrick 1975, Phys. Rev. Lett. 35, 1792).

    Args:
        num_spins: number of spins N.
        beta: inverse temperature.
        field: standard deviation of the fields, which are βh: already multiplied by β.
        seed: of the random numbers.

    Raises:
        TypeError, ValueError: for arguments of the wrong kind or out of range.
    """
    check_count("num_spins", num_spins)
    check_number("beta", beta)
    check_number("field", field, minimum=0.0)
    check_count("seed", seed, minimum=0)
    rng = np.random.default_rng(seed)
    upper = np.triu(rng.normal(size=(num_spins, num_spins)), 1)
    couplings = beta / np.sqrt(num_spins) * (upper + upper.T)
    return torch.from_numpy(couplings), torch.from_numpy(field * rng.normal(size=num_spins))


def hopfield(patterns: Tensor, beta: float = 1.0) -> Tensor:
    """Hebbian couplings `(N, N)` of patterns `(P, N)`: J = (β/N) Σ_p ξ_p ξ_pᵀ, J_ii = 0.

    In the dtype of the patterns; float64 for integers (Hopfield 1982, PNAS 79, 2554).

    Args:
        patterns: ξ_p, usually ±1.
        beta: inverse temperature.

    Raises:
        TypeError, ValueError: for patterns that are not real numbers `(P, N)`.
    """
    check_number("beta", beta)
    check_is_tensor("patterns", patterns)
    if patterns.dim() != 2 or not patterns.shape[1]:
        raise ValueError(
            f"patterns must have shape (P, N) with N at least 1, got {tuple(patterns.shape)}"
        )
    if patterns.dtype == torch.bool or patterns.is_complex():
        raise TypeError(f"patterns must be real numbers such as +1 and -1, got {patterns.dtype}")
    if not patterns.is_floating_point():
        patterns = patterns.double()
    couplings = beta / patterns.shape[1] * patterns.mT @ patterns
    return couplings - couplings.diagonal().diag()


def ferromagnet(num_spins: int, beta: float = 1.0) -> Tensor:
    """The Curie–Weiss model `(N, N)`, float64: J_ij = β/N for i ≠ j.

    Args:
        num_spins: number of spins N.
        beta: inverse temperature; for Ising spins β = 1 is critical as N grows.

    Raises:
        TypeError, ValueError: for arguments of the wrong kind or out of range.
    """
    check_count("num_spins", num_spins)
    check_number("beta", beta)
    ones = torch.ones(num_spins, num_spins, dtype=torch.float64)
    return beta / num_spins * (ones - torch.eye(num_spins, dtype=torch.float64))


def lattice(shape: Sequence[int], beta: float = 1.0, periodic: bool = True) -> Tensor:
    """Couplings β between nearest neighbours of a cubic lattice of any dimension, float64.

    Sites are numbered in row-major order.

    Args:
        shape: lengths of the sides; their product is N.
        beta: inverse temperature.
        periodic: whether opposite sides meet. A side of length 2 has one bond all the same.

    Raises:
        TypeError, ValueError: for a shape that is no sequence of positive integers.
    """
    if not isinstance(shape, Sequence) or isinstance(shape, str) or not shape:
        raise TypeError(f"shape must be the sides of the lattice, as in (4, 4), got {shape!r}")
    check_number("beta", beta)
    for size in shape:
        check_count("shape", size)
    sites = torch.arange(int(np.prod(shape))).reshape(tuple(shape))
    couplings = torch.zeros(sites.numel(), sites.numel(), dtype=torch.float64)
    for axis, size in enumerate(shape):
        here, there = sites, sites.roll(-1, axis)
        if not periodic:
            here, there = here.narrow(axis, 0, size - 1), there.narrow(axis, 0, size - 1)
        if size > 1:
            couplings[here.flatten(), there.flatten()] = beta
            couplings[there.flatten(), here.flatten()] = beta
    return couplings
