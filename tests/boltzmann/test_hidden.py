"""Hidden units: gradient ascent, its batches, and what it returns."""

from __future__ import annotations

import itertools
import re
import warnings

import numpy as np
import pytest
import torch

from deep_implicit_attention.boltzmann import BoltzmannMachine
from deep_implicit_attention.boltzmann._ascent import _batches
from deep_implicit_attention.boltzmann._data import Data
from deep_implicit_attention.deq import ConvergenceWarning


def states(n: int) -> np.ndarray:
    return np.array(list(itertools.product((-1.0, 1.0), repeat=n)))


def means(machine: BoltzmannMachine, n: int) -> np.ndarray:
    return np.exp(machine.score_samples(states(n))) @ states(n)


def test_hidden_units_have_no_couplings_among_each_other(X: np.ndarray) -> None:
    machine = BoltzmannMachine("exact", num_hidden=3, num_updates=5).fit(X[:, :4])
    assert not machine.couplings_[4:, 4:].any()
    assert machine.couplings_[4:, :4].all()
    assert (machine.couplings_ == machine.couplings_.T).all()
    assert not machine.couplings_.diagonal().any()


# --- batches ------------------------------------------------------------------------------------


@pytest.mark.quick("20-exact")
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


@pytest.mark.quick("False-exact")
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


def test_no_batch_is_smaller_than_the_others() -> None:
    generator = torch.Generator().manual_seed(0)
    data = Data(torch.arange(5.0).double()[:, None], None, None)
    batches = list(itertools.islice(_batches(data, 2, generator), 7))
    assert [len(part) for part, _ in batches] == [2] * 7
    assert {row for _, rows in batches for row in rows.tolist()} == set(range(5))


# --- steps of an ascent ---------------------------------------------------------------------------


def test_the_learning_rate_falls_in_the_second_half(
    X: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates = []

    def step(optimizer: torch.optim.Adam) -> None:
        rates.append(optimizer.param_groups[0]["lr"])

    monkeypatch.setattr(torch.optim.Adam, "step", step)
    BoltzmannMachine("exact", num_hidden=1, num_updates=8, learning_rate=0.4).fit(X[:, :3])
    assert rates == pytest.approx([0.4] * 5 + [0.3, 0.2, 0.1])


# --- what an ascent by responses returns ----------------------------------------------------------


def noisy_parity(rows: int = 1000) -> np.ndarray:
    """Three spins, any two of them independent, with an even number of downs in nine tenths."""
    rng = np.random.default_rng(0)
    first = np.where(rng.random((rows, 2)) < 0.5, 1, -1)
    return np.c_[first, first.prod(axis=1) * np.where(rng.random(rows) < 0.1, -1, 1)]


@pytest.mark.slow
def test_an_ascent_returns_the_likeliest_of_its_parameters() -> None:
    X = noisy_parity()
    alone = BoltzmannMachine("independent").fit(X).score(X)
    with pytest.warns(ConvergenceWarning, match="no stable solution") as caught:
        machine = BoltzmannMachine("tap", num_hidden=3, num_updates=1500).fit(X)
    score = machine.score(X)
    assert score > alone + 0.1
    message = str(caught[0].message)
    said = r"after (\d+) updates\. The log-likelihood per row is (\S+); it was (\S+) at the start"
    found = re.search(said, message)
    assert found is not None
    assert 0 < int(found[1]) < machine.n_iter_
    assert score == pytest.approx(float(found[2]), abs=1e-3)
    assert alone == pytest.approx(float(found[3]), abs=1e-3)


@pytest.mark.quick("0.0-tap")
@pytest.mark.parametrize("method", ["naive", "tap", "adaptive_tap"])
@pytest.mark.parametrize("l2", [0.0, pytest.param(0.05, marks=pytest.mark.slow)])
def test_an_ascent_is_no_worse_than_independent_spins(
    method: str, l2: float, X: np.ndarray
) -> None:
    alone = BoltzmannMachine("independent").fit(X).score(X)
    options = {"num_hidden": 2, "num_updates": 100, "learning_rate": 0.1, "l2": l2}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        machine = BoltzmannMachine(method, **options).fit(X)
    assert machine.score(X) > alone - 1e-3
    assert np.isfinite(machine.residual_)


def test_an_ascent_gone_astray_says_so_and_goes_back_to_the_start() -> None:
    """With one step, of a size that no parameters survive, only the start is left."""
    X = noisy_parity()
    with pytest.warns(ConvergenceWarning, match="led away .* which no update made likelier"):
        machine = BoltzmannMachine("tap", num_hidden=1, num_updates=1, learning_rate=9.0).fit(X)
    alone = BoltzmannMachine("independent").fit(X).score(X)
    assert machine.score(X) == pytest.approx(alone, abs=0.01)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::deep_implicit_attention.boltzmann.EstimateWarning")
def test_beyond_enumeration_an_estimate_judges() -> None:
    X = np.where(np.random.default_rng(0).normal(size=(300, 26)) > 0, 1.0, -1.0)
    X[:, 1:4] = np.where(np.random.default_rng(1).random((300, 3)) < 0.1, -X[:, :1], X[:, :1])
    with pytest.warns(ConvergenceWarning, match="The parameters returned are"):
        machine = BoltzmannMachine("naive", num_hidden=1, num_updates=40, learning_rate=0.3).fit(X)
    alone = BoltzmannMachine("independent").fit(X).score(X)
    assert machine.score(X) > alone - 0.05


def test_rows_with_gaps_do_not_judge(X: np.ndarray) -> None:
    X = X[:100, :4].copy()
    X[np.arange(100), np.arange(100) % 4] = np.nan
    options = {"num_hidden": 1, "num_updates": 3, "learning_rate": 0.1}
    none = BoltzmannMachine("tap", **options).fit(X)
    assert none.n_iter_ == 3
    whole = np.concatenate([X, states(4)])
    weights = np.concatenate([np.ones(100), np.zeros(16)])
    same = BoltzmannMachine("tap", **options).fit(whole, sample_weight=weights)
    assert same.couplings_ == pytest.approx(none.couplings_)


def test_from_uniform_data_a_pseudocount_learns_the_uniform_distribution() -> None:
    X = states(4)
    machine = BoltzmannMachine("exact", num_hidden=2, num_updates=500, pseudocount=100.0).fit(X)
    assert np.exp(machine.score_samples(X)) == pytest.approx(1 / 16, rel=0.02)
