"""Small systems and data drawn from them."""

from __future__ import annotations

import itertools

import numpy as np
import pytest


def states(n: int) -> np.ndarray:
    return np.array(list(itertools.product((-1.0, 1.0), repeat=n)))


def log_weights(J: np.ndarray, h: np.ndarray, S: np.ndarray) -> np.ndarray:
    return 0.5 * np.einsum("ki,ij,kj->k", S, J, S) + S @ h


@pytest.fixture
def system() -> tuple[np.ndarray, np.ndarray]:
    """Couplings and fields of six spins."""
    rng = np.random.default_rng(7)
    J = 0.4 * np.triu(rng.normal(size=(6, 6)), 1)
    return J + J.T, 0.3 * rng.normal(size=6)


@pytest.fixture
def X(system: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """500 rows of them."""
    weight = np.exp(log_weights(*system, states(6)))
    choice = np.random.default_rng(1).choice(64, size=500, p=weight / weight.sum())
    return states(6)[choice]
