"""Spin systems of every kind, small enough for exact answers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from deep_implicit_attention.spins import (
    GaussianPrior,
    IsingPrior,
    PottsPrior,
    SphericalPrior,
    SpinSystem,
    lattice,
    sherrington_kirkpatrick,
)


def randn(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def full_couplings(sites: int, d: int, scale: float) -> Tensor:
    couplings = scale * randn(sites, sites, d, d, seed=7)
    couplings = (couplings + couplings.permute(1, 0, 3, 2)) / 2
    return couplings * (1 - torch.eye(sites, dtype=torch.float64))[:, :, None, None]


def gaussian_prior(d: int) -> GaussianPrior:
    root = randn(d, d, seed=3) / 3
    covariance = root @ root.T + 0.7 * torch.eye(d, dtype=torch.float64)
    return GaussianPrior(randn(d, seed=4), covariance).double()


SYSTEMS = {
    "ising": lambda: SpinSystem(sherrington_kirkpatrick(8, 1.0)[0], IsingPrior()),
    "ising-lattice": lambda: SpinSystem(lattice((2, 4), 0.4), IsingPrior()),
    "potts": lambda: SpinSystem(full_couplings(5, 3, 1.0), PottsPrior(3)),
    "potts-scalar": lambda: SpinSystem(sherrington_kirkpatrick(5, 2.0)[0], PottsPrior(3)),
    "gaussian": lambda: SpinSystem(full_couplings(4, 2, 0.25), gaussian_prior(2)),
    "gaussian-scalar": lambda: SpinSystem(sherrington_kirkpatrick(4, 0.3)[0], gaussian_prior(2)),
    "sphere": lambda: SpinSystem(full_couplings(4, 3, 0.7), SphericalPrior(3, 1.3)),
    "circle": lambda: SpinSystem(sherrington_kirkpatrick(4, 0.9)[0], SphericalPrior(2)),
}


@pytest.fixture(params=list(SYSTEMS))
def system(request) -> SpinSystem:
    """Each of them in turn, or those named by `indirect` parameters."""
    return SYSTEMS[request.param]()
