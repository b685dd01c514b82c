"""The estimator: codings, weights, gaps, batches, likelihoods, samples, completions."""

from __future__ import annotations

import itertools
import warnings

import numpy as np
import pytest
import torch

from deep_implicit_attention.boltzmann import BoltzmannMachine, EstimateWarning, FitWarning
from deep_implicit_attention.boltzmann._enumeration import Enumeration
from deep_implicit_attention.boltzmann._likelihood import log_partition
from deep_implicit_attention.boltzmann._parameters import pack
from deep_implicit_attention.deq import ConvergenceWarning
from deep_implicit_attention.spins import Exact, IsingPrior, SpinSystem, sherrington_kirkpatrick

DIRECT = ["exact", "independent", "naive", "tap", "adaptive_tap"]
ALL = [*DIRECT, "pseudolikelihood", "pcd"]


def states(n: int) -> np.ndarray:
    return np.array(list(itertools.product((-1.0, 1.0), repeat=n)))


def weights(machine: BoltzmannMachine, S: np.ndarray) -> np.ndarray:
    J, h = machine.couplings_, machine.fields_
    return np.exp(0.5 * np.einsum("ki,ij,kj->k", S, J, S) + S @ h)


# --- codings ----------------------------------------------------------------------------------


@pytest.mark.parametrize("coding", ["spins", "binary", "boolean"])
@pytest.mark.parametrize("method", ALL)
def test_codings_are_the_same_spins(method: str, coding: str, X: np.ndarray) -> None:
    data = {"spins": X.astype(int), "binary": (X + 1) / 2, "boolean": X > 0}[coding]
    machine = BoltzmannMachine(method, num_updates=5).fit(data)
    same = BoltzmannMachine(method, num_updates=5).fit(X)
    assert machine.coding_ == coding
    assert (machine.couplings_ == same.couplings_).all()
    assert (machine.fields_ == same.fields_).all()
    drawn = machine.sample(20)
    assert set(np.unique(drawn)) == set(np.unique(data))
    assert (drawn.dtype == bool) == (coding == "boolean")
    assert machine.score(data) == same.score(X)
    observed = np.array([True] * 3 + [False] * 3)
    completed = machine.complete(data, observed).X
    assert set(np.unique(completed)) <= set(np.unique(data))
    assert (completed[:, :3] == data[:, :3]).all()


def test_parameters_of_zeros_and_ones_are_the_same_distribution(X: np.ndarray) -> None:
    machine = BoltzmannMachine("exact").fit(X)
    W, b = machine.binary_parameters()
    S = states(6)
    x = (S + 1) / 2
    log = 0.5 * np.einsum("ki,ij,kj->k", x, W, x) + x @ b
    assert log - np.logaddexp.reduce(log) == pytest.approx(machine.score_samples(S), abs=1e-10)


def test_lists_frames_and_tensors(X: np.ndarray) -> None:
    expected = BoltzmannMachine().fit(X).couplings_
    assert (BoltzmannMachine().fit(X.tolist()).couplings_ == expected).all()
    assert (BoltzmannMachine().fit(torch.from_numpy(X)).couplings_ == expected).all()
    assert BoltzmannMachine().fit(X.astype(np.int8)).couplings_ == pytest.approx(expected)


# --- weights, batches, gaps ---------------------------------------------------------------------


@pytest.mark.parametrize("method", ALL)
def test_a_weight_is_a_repetition(method: str, X: np.ndarray) -> None:
    repeats = np.arange(len(X)) % 3
    X[5, 2] = np.nan if method in DIRECT else X[5, 2]  # the others draw it, for each row anew
    options = {"pseudocount": 2.0, "num_updates": 20}
    weighed = BoltzmannMachine(method, **options).fit(X, sample_weight=repeats)
    repeated = BoltzmannMachine(method, **options).fit(np.repeat(X, repeats, axis=0))
    assert weighed.couplings_ == pytest.approx(repeated.couplings_, abs=1e-6)
    assert weighed.fields_ == pytest.approx(repeated.fields_, abs=1e-6)


@pytest.mark.parametrize("method", [*DIRECT, "pcd"])
def test_batches_give_the_fit_of_all(method: str, X: np.ndarray) -> None:
    machine = BoltzmannMachine(method, num_updates=5)
    for part in np.array_split(X, 3):
        machine.partial_fit(part)
    whole = BoltzmannMachine(method, num_updates=5).fit(X)
    assert machine.couplings_ == pytest.approx(whole.couplings_, abs=1e-7)
    assert machine.fields_ == pytest.approx(whole.fields_, abs=1e-7)


def test_columns_of_gaps_only(X: np.ndarray) -> None:
    X[:, 3] = np.nan
    with pytest.raises(ValueError, match="no entry in column 3"):
        BoltzmannMachine().fit(X)


def test_batches_go_on_from_a_fit_and_not_from_one_that_kept_no_sums(X: np.ndarray) -> None:
    machine = BoltzmannMachine().fit(X[:200]).partial_fit(X[200:])
    assert machine.couplings_ == pytest.approx(BoltzmannMachine().fit(X).couplings_)
    X[0, 0] = np.nan
    machine = BoltzmannMachine().fit(X)
    with pytest.raises(ValueError, match="no sums are kept"):
        machine.partial_fit(X[1:])


def test_the_coding_is_decided_by_the_first_batch_that_shows_it(X: np.ndarray) -> None:
    ones = np.ones((20, 6))
    with pytest.warns(FitWarning, match="never change"):
        machine = BoltzmannMachine().partial_fit(ones)
    assert machine.coding_ is None
    assert machine.partial_fit((X + 1) / 2).coding_ == "binary"
    with pytest.raises(ValueError, match="fitted on"):
        machine.partial_fit(X)


# --- likelihoods --------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ALL)
def test_scores_are_normalised(method: str, X: np.ndarray) -> None:
    machine = BoltzmannMachine(method, num_updates=10).fit(X)
    S = states(6)
    p = weights(machine, S)
    assert np.exp(machine.score_samples(S)) == pytest.approx(p / p.sum(), rel=1e-9)
    assert machine.score(X) == pytest.approx(machine.score_samples(X).mean())


def test_scores_with_hidden_units_and_gaps(X: np.ndarray) -> None:
    machine = BoltzmannMachine("exact", num_hidden=2, num_updates=20, learning_rate=0.1).fit(X)
    S = states(8)
    p = weights(machine, S)
    p /= p.sum()
    row = np.array([[1.0, np.nan, -1.0, np.nan, np.nan, 1.0]])
    seen = np.isfinite(row[0])
    alike = (S[:, :6][:, seen] == row[0, seen]).all(axis=1)
    assert machine.score_samples(row) == pytest.approx(np.log(p[alike].sum()), rel=1e-10)
    whole = np.exp(machine.score_samples(states(6))).sum()
    assert whole == pytest.approx(1)


@pytest.mark.parametrize("n", [1, 2, 5, 8])
def test_enumeration_is_that_of_the_spin_systems(n: int) -> None:
    J, h = sherrington_kirkpatrick(n, 1.0, 0.3, 0)
    theta, exact = pack(J, h), Exact()(SpinSystem(J, IsingPrior()), h)
    whole = Enumeration(n)
    log, p = whole.distribution(theta)
    assert log.item() == pytest.approx(exact.log_partition.item() + n * np.log(2))
    assert whole.log_partition(theta).item() == pytest.approx(log.item())
    second = whole.second_moments(p)
    C = exact.covariance + torch.outer(exact.magnetization, exact.magnetization)
    assert second[1:, 1:].numpy() == pytest.approx(C.numpy())
    assert second[0, 1:].numpy() == pytest.approx(exact.magnetization.numpy())
    assert (whole.states(torch.arange(2**n)) @ h).numpy() == pytest.approx(
        (torch.from_numpy(states(n)) @ h).numpy()
    )


@pytest.mark.slow
def test_annealing_estimates_log_z_within_its_error() -> None:
    errors = []
    for seed in range(6):
        J, h = sherrington_kirkpatrick(26, 0.8, 0.3, seed)
        J[:3] = J[:, :3] = 0  # three spins apart, so that the rest can be enumerated
        estimate = log_partition(
            pack(J, h), torch.zeros(26).double(), particles=200, steps=100, seed=seed
        )
        assert estimate.method == "annealed importance sampling"
        assert not estimate.exact
        rest = Enumeration(23).log_partition(pack(J[3:, 3:], h[3:]))
        exact = rest + torch.logaddexp(h[:3], -h[:3]).sum()
        errors.append((estimate.value - exact.item()) / estimate.standard_error)
        assert estimate.standard_error < 0.2
    assert 0.2 < np.sqrt(np.mean(np.square(errors))) < 2.0


def test_an_estimated_score_says_so() -> None:
    X = np.where(np.random.default_rng(0).normal(size=(200, 30)) > 0, 1, -1)
    machine = BoltzmannMachine().fit(X)
    log_z = machine.log_partition(particles=50, steps=20, keep=True)
    with pytest.warns(EstimateWarning, match=r"annealed importance sampling, standard error"):
        score = machine.score(X)
    rows = 0.5 * np.einsum("ki,ij,kj->k", X, machine.couplings_, X) + X @ machine.fields_
    assert score == pytest.approx(rows.mean() - log_z.value)


# --- samples and completions --------------------------------------------------------------------


def test_samples_have_the_moments_of_the_machine(X: np.ndarray) -> None:
    machine = BoltzmannMachine("exact").fit(X)
    drawn = machine.sample(40_000)
    assert drawn.shape == (40_000, 6)
    assert np.abs(drawn.T @ drawn / 40_000 - X.T @ X / 500).max() < 5 / 200
    assert np.abs(drawn.mean(axis=0) - X.mean(axis=0)).max() < 5 / 200


def test_samples_of_many_spins_come_from_chains() -> None:
    rng = np.random.default_rng(0)
    common = rng.normal(size=(5000, 1))
    X = np.where(rng.normal(size=(5000, 22)) + 0.7 * common > 0.2, 1, -1)
    machine = BoltzmannMachine("pseudolikelihood").fit(X)
    drawn = machine.sample(2000)
    assert drawn.shape == (2000, 22)
    assert np.abs(drawn.mean(axis=0) - X.mean(axis=0)).max() < 0.15
    assert np.abs(np.cov(drawn.T) - np.cov(X.T)).max() < 0.15


@pytest.mark.quick("2")
@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_few_draws_are_no_sign_of_chains_that_disagree(count: int) -> None:
    X = np.random.default_rng(0).choice([-1, 1], size=(200, 60))
    machine = BoltzmannMachine("independent").fit(X)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for seed in range(4):
            assert machine.sample(count, random_state=seed).shape == (count, 60)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("method", ["exact", "adaptive_tap", "tap", "naive", "pcd"])
def test_completions_are_conditional_distributions(
    method: str, shared: bool, X: np.ndarray
) -> None:
    machine = BoltzmannMachine(method, num_updates=100, l2=0.05).fit(X)
    rows = X[:40]
    observed = np.array([True, False, True, False, True, False])
    if not shared:
        observed = np.random.default_rng(0).random(rows.shape) < 0.6
    completion = machine.complete(rows, observed)
    mask = np.broadcast_to(observed, rows.shape)
    S = states(6)
    p = weights(machine, S)
    for row, seen, probability, value in zip(rows, mask, *completion[::-1], strict=True):
        q = p * (S[:, seen] == row[seen]).all(axis=1)
        expected = q @ (S + 1) / 2 / q.sum()
        tolerance = 1e-10 if method == "exact" else {"naive": 0.4}.get(method, 0.08)
        assert np.abs(probability - expected).max() < tolerance
        assert (value[seen] == row[seen]).all()
        assert (value[~seen] == np.where(probability[~seen] > 0.5, 1, -1)).all()


def test_nothing_to_complete(X: np.ndarray) -> None:
    completion = BoltzmannMachine().fit(X).complete(X)
    assert (completion.X == X).all()
    assert (completion.probability == (X + 1) / 2).all()


def test_entries_that_are_not_observed_have_no_effect(X: np.ndarray) -> None:
    machine = BoltzmannMachine().fit(X)
    observed = np.arange(6) < 3
    holes = X.copy()
    holes[:, 3:] = np.nan
    first, second = (
        machine.complete(X, observed),
        machine.complete(-X * (1 - 2 * observed), observed),
    )
    assert (first.probability == second.probability).all()
    assert (machine.complete(holes).probability == first.probability).all()


# --- regularisation that is said ----------------------------------------------------------------


@pytest.mark.parametrize("method", ALL)
def test_a_constant_column_is_named_and_left_alone(method: str, X: np.ndarray) -> None:
    X[:, 2] = -1.0
    with pytest.warns(FitWarning, match=r"2 \(always down\)"):
        machine = BoltzmannMachine(method, num_updates=5).fit(X)
    others = [0, 1, 3, 4, 5]
    alone = BoltzmannMachine(method, num_updates=5).fit(X[:, others])
    assert machine.couplings_[others][:, others] == pytest.approx(alone.couplings_)
    assert not machine.couplings_[2].any()
    assert machine.fields_[2] == pytest.approx(np.arctanh(-500 / 501))
    assert machine.constant_columns_.tolist() == [False, False, True, False, False, False]


def test_a_constant_column_by_name(X: np.ndarray) -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(X, columns=list("abcdef"))
    frame["c"] = 1.0
    with pytest.warns(FitWarning, match=r"c \(always up\)"):
        BoltzmannMachine().fit(frame)


def test_with_a_pseudocount_nothing_is_constant(X: np.ndarray) -> None:
    X[:, 4] = 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        regular = BoltzmannMachine(pseudocount=1.0).fit(X)
    assert np.isfinite(regular.fields_).all()


@pytest.mark.parametrize("method", ["naive", "tap", "adaptive_tap"])
def test_fewer_rows_than_spins_are_shrunk_and_said(method: str) -> None:
    X = np.where(np.random.default_rng(0).normal(size=(15, 20)) > 0, 1, -1)
    with pytest.warns(FitWarning, match="singular; it is shrunk by"):
        machine = BoltzmannMachine(method).fit(X)
    assert 0 < machine.shrinkage_ <= 1
    assert np.isfinite(machine.couplings_).all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        BoltzmannMachine(method, l2=0.1).fit(X)
        BoltzmannMachine(method, pseudocount=5).fit(X)
        fixed = BoltzmannMachine("adaptive_tap", shrinkage=machine.shrinkage_).fit(X)
    C = np.cov(X.T, bias=True)
    shrunk = (1 - fixed.shrinkage_) * C + fixed.shrinkage_ * np.diag(C.diagonal())
    J = -np.linalg.inv(shrunk)
    assert fixed.couplings_[0, 1:] == pytest.approx(J[0, 1:])


@pytest.mark.parametrize("method", ["exact", "pseudolikelihood"])
def test_a_maximum_at_infinity_is_reported(method: str) -> None:
    X = np.where(np.random.default_rng(0).normal(size=(8, 9)) > 0, 1, -1)
    with (
        pytest.warns(FitWarning, match="8 rows are too few for 9 spins"),
        pytest.warns(ConvergenceWarning, match="no finite maximum"),
    ):
        BoltzmannMachine(method).fit(X)


@pytest.mark.parametrize("method", ["naive", "tap", "adaptive_tap"])
def test_weights_that_are_all_alike_do_not_change_the_shrinkage(method: str) -> None:
    """Twelve rows are twelve observations, whatever the unit of their weights."""
    common = np.random.default_rng(0).normal(size=(12, 1))
    X = np.where(np.random.default_rng(1).normal(size=(12, 14)) + common > 0, 1, -1)
    with pytest.warns(FitWarning, match="of 12 observations"):
        plain = BoltzmannMachine(method).fit(X)
    with pytest.warns(FitWarning, match="of 12 observations"):
        shares = BoltzmannMachine(method).fit(X, sample_weight=np.full(12, 0.1))
    assert 0 < plain.shrinkage_ < 1
    assert shares.shrinkage_ == pytest.approx(plain.shrinkage_)
