"""Hidden units: gradient ascent, its batches, and what it returns."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from deep_implicit_attention.boltzmann import BoltzmannMachine
from deep_implicit_attention.boltzmann._ascent import _batches
from deep_implicit_attention.boltzmann._data import Data


def states(n: int) -> np.ndarray:
    return np.array(list(itertools.product((-1.0, 1.0), repeat=n)))


def means(machine: BoltzmannMachine, n: int) -> np.ndarray:
    return np.exp(machine.score_samples(states(n))) @ states(n)


# --- batches ------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["exact", "pcd"])
@pytest.mark.parametrize("size", [1, 20])
def test_batches_see_rows_as_often_as_their_weights_say(
    method: str, size: int, X: np.ndarray
) -> None:
    X = X[:, :4]
    weights = np.where(X[:, 0] > 0, 9.0, 1.0)
    expected = weights @ X / weights.sum()
    assert np.abs(expected - X.mean(axis=0)).max() > 0.5
    machine = BoltzmannMachine(
        method, num_hidden=1, batch_size=size, num_updates=1500, learning_rate=0.02, l2=0.3
    ).fit(X, sample_weight=weights)
    assert means(machine, 4) == pytest.approx(expected, abs=0.12 if size == 1 else 0.06)


@pytest.mark.parametrize("method", ["exact", "pcd"])
@pytest.mark.parametrize("gaps", [False, True])
def test_batches_leave_out_rows_without_weight(method: str, gaps: bool, X: np.ndarray) -> None:
    weights = np.zeros(500)
    weights[:10] = 1
    options = {"num_hidden": 1, "batch_size": 4, "num_updates": 200}
    if gaps:
        X[::3, 1] = np.nan
    machine = BoltzmannMachine(method, **options).fit(X, sample_weight=weights)
    assert np.isfinite(machine.couplings_).all()
    X[10:] *= -1  # so they cannot have had a part
    again = BoltzmannMachine(method, **options).fit(X, sample_weight=weights)
    assert (machine.couplings_ == again.couplings_).all()


def test_a_pass_through_the_batches_holds_each_row_in_proportion() -> None:
    generator = torch.Generator().manual_seed(0)
    weights = torch.tensor([0.0, 1.0, 2.0, 0.5, 3.5, 1.0, 0.0, 0.0]).double()
    spins = torch.arange(8.0).double()[:, None]
    drawn = torch.zeros(8)
    passes = 500
    batches = _batches(Data(spins, None, weights), 2, generator)
    for _, (part, rows) in zip(range(4 * passes), batches, strict=False):
        assert part.weights is not None
        assert part.weights.sum() == 2
        assert (part.spins[:, 0] == rows).all()
        drawn.index_add_(0, rows, part.weights.float())
    assert (drawn[weights == 0] == 0).all()
    assert drawn.numpy() / passes == pytest.approx(weights.numpy(), abs=0.1)
    equal = _batches(Data(spins, None, torch.full((8,), 0.3).double()), 4, generator)
    once = [next(equal)[1] for _ in range(2)]
    assert sorted(torch.cat(once).tolist()) == list(range(8))
