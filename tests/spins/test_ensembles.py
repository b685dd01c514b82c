"""Ensembles of couplings against their definitions."""

from __future__ import annotations

import math

import pytest
import torch

from deep_implicit_attention.spins import (
    Exact,
    IsingPrior,
    NaiveMeanField,
    SpinSystem,
    ferromagnet,
    hopfield,
    lattice,
    sherrington_kirkpatrick,
)


class TestEnsembles:
    def test_sherrington_kirkpatrick_statistics(self):
        couplings, x = sherrington_kirkpatrick(300, beta=0.7, field=0.3, seed=1)
        assert torch.equal(couplings, couplings.T)
        off = couplings[~torch.eye(300, dtype=torch.bool)]
        assert off.std().item() == pytest.approx(0.7 / math.sqrt(300), rel=0.02)
        assert x.std().item() == pytest.approx(0.3, rel=0.15)

    def test_hopfield_retrieves_its_patterns(self):
        torch.manual_seed(0)
        patterns = torch.randint(0, 2, (3, 60), dtype=torch.float64) * 2 - 1
        system = SpinSystem(hopfield(patterns, beta=3.0), IsingPrior())
        cue = patterns[0] * torch.where(torch.arange(60) < 15, -0.3, 0.3)
        m = NaiveMeanField()(system, cue * 0.3).magnetization
        overlaps = patterns @ m / 60
        assert overlaps[0] > 0.9
        assert overlaps[1:].abs().max() < 0.4

    def test_lattice_neighbours(self):
        square = lattice((3, 4), beta=0.5)
        assert torch.equal((square != 0).sum(dim=1), torch.full((12,), 4))
        chain = lattice((5,), periodic=False)
        expected = torch.diag(torch.ones(4), 1) + torch.diag(torch.ones(4), -1)
        assert torch.equal(chain, expected.double())
        assert lattice((2,)).tolist() == [[0, 1], [1, 0]]
        # A periodic Ising chain has Z = λ₊^N + λ₋^N over 2^N.
        n, beta = 7, 0.8
        log = Exact()(SpinSystem(lattice((n,), beta), IsingPrior()), torch.zeros(n).double())
        z = (2 * math.cosh(beta)) ** n + (2 * math.sinh(beta)) ** n
        assert log.log_partition.item() == pytest.approx(math.log(z) - n * math.log(2), rel=1e-12)

    def test_hopfield_of_integers(self):
        patterns = torch.tensor([[1, -1, 1], [1, 1, -1]])
        assert torch.equal(hopfield(patterns, 0.5), hopfield(patterns.double(), 0.5))


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: hopfield([[1, -1]]), TypeError, "patterns must be a tensor, got list"),
        (lambda: hopfield(torch.ones(2, 3).bool()), TypeError, "patterns must be.*torch.bool"),
        (lambda: hopfield(torch.ones(3)), ValueError, r"patterns must.*\(P, N\).*\(3,\)"),
        (lambda: hopfield(torch.ones(3, 0)), ValueError, r"patterns must.*\(3, 0\)"),
        (lambda: sherrington_kirkpatrick(3, math.nan), ValueError, "beta must be finite, got nan"),
        (lambda: sherrington_kirkpatrick(3, 1, -1), ValueError, "field must be at least 0, got -1"),
        (lambda: sherrington_kirkpatrick(3, seed=-1), ValueError, "seed must be at least 0, got"),
        (lambda: sherrington_kirkpatrick(3, seed=1.0), TypeError, "seed must be an integer"),
        (lambda: ferromagnet(3, math.inf), ValueError, "beta must be finite, got inf"),
        (lambda: lattice(4), TypeError, r"shape must be the sides.*\(4, 4\), got 4"),
        (lambda: lattice((4, 0)), ValueError, "shape must be at least 1, got 0"),
    ],
)
def test_ensembles_that_are_none(make, error, says):
    with pytest.raises(error, match=says):
        make()
