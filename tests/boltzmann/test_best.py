"""The judge of an ascent: what it compares, what it says, and how often it is asked."""

from __future__ import annotations

import itertools
import re

import numpy as np
import pytest
import torch
from torch import Tensor

from deep_implicit_attention.boltzmann import BoltzmannMachine, _best
from deep_implicit_attention.boltzmann._best import Best
from deep_implicit_attention.boltzmann._data import Data
from deep_implicit_attention.boltzmann._likelihood import LogPartition
from deep_implicit_attention.boltzmann._moments import join, pseudo_rows
from deep_implicit_attention.boltzmann._parameters import pack
from deep_implicit_attention.deq import ConvergenceWarning

ROWS = torch.tensor([[1.0, 1.0, 1.0], [1.0, -1.0, 1.0], [-1.0, 1.0, 1.0]]).double()


def parameters(scale: float) -> Tensor:
    J = scale * torch.tensor([[0.0, 0.5, -0.2], [0.5, 0.0, 0.3], [-0.2, 0.3, 0.0]]).double()
    return pack(J, scale * torch.tensor([0.1, -0.2, 0.4]).double())


def stub(monkeypatch: pytest.MonkeyPatch, *errors: float) -> list[Tensor]:
    """log Z = 2 with these standard errors in turn; the list is of what it was asked for."""
    asked: list[Tensor] = []

    def log_partition(theta: Tensor, base: Tensor, **_: int) -> LogPartition:
        asked.append(theta.clone())
        return LogPartition(2.0, errors[(len(asked) - 1) % len(errors)], "a stub")

    monkeypatch.setattr(_best, "log_partition", log_partition)
    return asked


def exponents(theta: Tensor, rows: Tensor) -> np.ndarray:
    J, h, S = theta[1:, 1:].numpy(), theta[0, 1:].numpy(), rows.numpy()
    return 0.5 * np.einsum("ki,ij,kj->k", S, J, S) + S @ h


@pytest.mark.parametrize("pseudocount", [0.0, 4.0])
def test_two_standard_errors_and_the_penalty_go_to_the_bad_side(
    pseudocount: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub(monkeypatch, 0.25)
    theta, weights = parameters(1.0), torch.tensor([1.0, 2.0, 3.0]).double()
    data = Data(ROWS, None, weights)
    if pseudocount:
        data = join(data, pseudo_rows(3, pseudocount))
    best = Best(data, 3, theta, 0.3, 10, 0)
    likelihood = np.average(exponents(theta, ROWS), weights=[1, 2, 3]) - 2.0
    assert data.weights is not None
    joint = np.average(exponents(theta, data.spins), weights=data.weights.numpy()) - 2.0
    penalty = 0.15 * (0.5**2 + 0.2**2 + 0.3**2)
    assert best.first.doubt == 0.5
    assert best.first.likelihood == pytest.approx(likelihood)
    assert best.first.objective == pytest.approx(joint - penalty - 0.5)


def test_of_equal_estimates_the_surer_one_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    stub(monkeypatch, 0.2, 0.1, 0.3)
    theta = parameters(1.0)
    best = Best(Data(ROWS, None, None), 3, theta, 0.0, 10, 0)
    for update in range(3):
        best.see(theta, update, float(update))
    with pytest.warns(ConvergenceWarning, match="those after 1 updates"):
        learned = best.learned(3, broken=True)
    assert learned.residual == 1


@pytest.mark.quick("199")
@pytest.mark.parametrize("updates", [1, 10, 199, 250])
def test_an_ascent_is_judged_at_most_a_hundred_times_and_its_end(
    updates: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = stub(monkeypatch, 0.0)
    X = np.where(np.random.default_rng(0).normal(size=(50, 3)) > 0.3, 1.0, -1.0)
    BoltzmannMachine("tap", num_hidden=1, num_updates=updates, learning_rate=1e-3).fit(X)
    assert min(updates, 83) <= len(asked) - 1 <= 100
    assert all((one != other).any() for one, other in itertools.pairwise(asked))


@pytest.mark.quick("options0")
@pytest.mark.parametrize("options", [{"l2": 0.02}, {"pseudocount": 100.0}, {}])
def test_what_is_said_is_the_log_likelihood_of_the_rows(options: dict[str, float]) -> None:
    rng = np.random.default_rng(0)
    X = np.where(rng.random((1000, 2)) < 0.5, 1, -1)
    X = np.c_[X, X.prod(axis=1) * np.where(rng.random(1000) < 0.1, -1, 1)]
    machine = BoltzmannMachine("tap", num_hidden=3, num_updates=300, learning_rate=0.2, **options)
    with pytest.warns(ConvergenceWarning, match="The parameters returned are") as caught:
        machine.fit(X)
    message = str(caught[-1].message)
    found = re.search(r"The log-likelihood per row is (\S+); it was", message)
    assert found is not None
    assert float(found[1]) == pytest.approx(machine.score(X), abs=1e-4)
    assert ("the penalty of l2" in message) == ("l2" in options)


def test_pseudo_rows_alone_do_not_judge(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = stub(monkeypatch, 0.0)
    X = np.where(np.random.default_rng(0).normal(size=(60, 3)) > 0.3, 1.0, -1.0)
    X[np.arange(60), np.arange(60) % 3] = np.nan
    machine = BoltzmannMachine("tap", num_hidden=1, num_updates=3, pseudocount=2.0).fit(X)
    assert not asked
    assert machine.n_iter_ == 3


def test_rows_with_gaps_leave_the_pseudocount_out_of_the_likelihood(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of three rows one has a gap: the two that are whole are named, and no pseudo-row with them.

    What is compared is of the pseudo-rows too.
    """
    stub(monkeypatch, 0.0)
    spins = ROWS.clone()
    spins[1, 2] = 0
    data = join(Data(spins, spins != 0, None), pseudo_rows(3, 4.0))
    theta = parameters(1.0)
    best = Best(data, 3, theta, 0.0, 10, 0)
    whole = exponents(theta, data.spins[[0, *range(2, 11)]])
    likelihood = whole[:2].mean() - 2.0
    with pytest.warns(ConvergenceWarning, match=f"per row is {likelihood:.5g}; it was"):
        best.learned(1, broken=True)
    weights = [1.0] * 2 + [0.5] * 8
    assert best.first.objective == pytest.approx(np.average(whole, weights=weights) - 2.0)
