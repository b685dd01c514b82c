"""Rows with gaps: what is learned from them, beside complete data, plain loops and maxima."""

from __future__ import annotations

import itertools
import re
import warnings

import numpy as np
import pytest
import torch

from deep_implicit_attention.boltzmann import BoltzmannMachine, FitWarning, _gaps
from deep_implicit_attention.boltzmann._clamped import means
from deep_implicit_attention.boltzmann._data import Data
from deep_implicit_attention.boltzmann._settings import Settings
from deep_implicit_attention.deq import ConvergenceWarning
from deep_implicit_attention.spins import sherrington_kirkpatrick

RESPONSES = ["naive", "tap", "adaptive_tap"]
ALL = [*RESPONSES, "exact", "independent", "pseudolikelihood", "pcd"]


def states(n: int) -> np.ndarray:
    return np.array(list(itertools.product((-1.0, 1.0), repeat=n)))


def correlated(rows: int, n: int, seed: int, missing: float) -> tuple[np.ndarray, np.ndarray]:
    """Signs of normal numbers with a common part, complete and with gaps.

    Not by `multivariate_normal`: its factor of the covariance, whose eigenvalues are equal, is
    another one on other processors.
    """
    rng = np.random.default_rng(seed)
    common = 0.2**0.5 * rng.standard_normal((rows, 1))
    X = np.where(rng.standard_normal((rows, n)) + common > 0, 1.0, -1.0)
    return X, np.where(rng.random(X.shape) < missing, np.nan, X)


def test_gaps_are_filled_to_the_maximum_of_the_likelihood_of_what_is_seen(X: np.ndarray) -> None:
    """Expectation maximisation of the exact method: no other parameters are better nearby."""
    rng = np.random.default_rng(0)
    X = X[:, :4].copy()
    X[rng.random(X.shape) < 0.2] = np.nan
    machine = BoltzmannMachine("exact", max_iter=500).fit(X)
    S = states(4)

    def likelihood(J: np.ndarray, h: np.ndarray) -> float:
        p = np.exp(0.5 * np.einsum("ki,ij,kj->k", S, J, S) + S @ h)
        p /= p.sum()
        fits = ((X[:, None] == S) | np.isnan(X)[:, None]).all(axis=2)
        return np.log(fits @ p).mean()

    best = likelihood(machine.couplings_, machine.fields_)
    assert best == pytest.approx(machine.score(X), abs=1e-10)
    for i, j in itertools.combinations(range(4), 2):
        for step in (-0.01, 0.01):
            J = machine.couplings_.copy()
            J[[i, j], [j, i]] += step
            assert likelihood(J, machine.fields_) < best
    for i, step in itertools.product(range(4), (-0.01, 0.01)):
        h = machine.fields_.copy()
        h[i] += step
        assert likelihood(machine.couplings_, h) < best


@pytest.mark.quick("naive", "tap", "adaptive_tap", "pseudolikelihood")
@pytest.mark.parametrize("method", ["naive", "tap", "adaptive_tap", "pseudolikelihood", "pcd"])
def test_gaps_bias_little(method: str, X: np.ndarray) -> None:
    """A fifth of the entries missing at random: nearer to the fit of all than ones in the gaps."""
    X = X[:300, :4]
    holes = X.copy()
    holes[np.random.default_rng(0).random(X.shape) < 0.2] = np.nan
    options = {"num_updates": 500, "num_chains": 2000, "l2": 0.1}
    full = BoltzmannMachine(method, **options).fit(X)
    seen = BoltzmannMachine(method, **options).fit(holes)
    ones = BoltzmannMachine(method, **options).fit(np.where(np.isnan(holes), 1, holes))
    error = np.abs(seen.couplings_ - full.couplings_).mean()
    assert error < 0.5 * np.abs(ones.couplings_ - full.couplings_).mean()


def by_regression(X: np.ndarray, weights: np.ndarray, rounds: int, rho: float, pseudocount: float):
    """Expectation maximisation row by row, with C_fo C_oo⁻¹ instead of precisions."""
    n, total = X.shape[1], weights.sum()
    m = np.nansum(weights[:, None] * X, axis=0) / (weights @ ~np.isnan(X))
    C = np.diag(1 - m**2)
    for _ in range(rounds):
        shrunk = (1 - rho) * C + rho * np.diag(C.diagonal())
        first, second = np.zeros(n), pseudocount * np.eye(n)
        for row, weight in zip(X, weights, strict=True):
            f = np.isnan(row)
            slope = shrunk[np.ix_(f, ~f)] @ np.linalg.inv(shrunk[np.ix_(~f, ~f)])
            filled = row.copy()
            filled[f] = m[f] + slope @ (row[~f] - m[~f])
            first += weight * filled
            second += weight * np.outer(filled, filled)
            second[np.ix_(f, f)] += weight * (shrunk[np.ix_(f, f)] - slope @ shrunk[np.ix_(~f, f)])
        m = first / (total + pseudocount)
        C = second / (total + pseudocount) - np.outer(m, m)
    scale = np.sqrt((1 - m**2) / C.diagonal())
    C = C * np.outer(scale, scale)
    return m, (1 - rho) * C + rho * np.diag(C.diagonal())


@pytest.mark.quick("options0-40")
@pytest.mark.parametrize("numbers", [2**22, 40])
@pytest.mark.parametrize("options", [{}, {"shrinkage": 0.2}, {"pseudocount": 3.0}])
def test_gaps_are_filled_by_regression(
    options: dict[str, float], numbers: int, X: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_gaps, "_NUMBERS", numbers)  # in one part, and in many
    rng = np.random.default_rng(0)
    X = X[:100].copy()
    X[rng.random(X.shape) < 0.2] = np.nan
    X[:20, 3:] = np.nan
    weights = rng.integers(0, 3, 100).astype(float)
    machine = BoltzmannMachine("adaptive_tap", max_iter=400, **options)
    machine.fit(X, sample_weight=weights)
    rho, extra = options.get("shrinkage", 0.0), options.get("pseudocount", 0.0)
    m, C = by_regression(X, weights, 120, rho, extra)
    precision = np.linalg.inv(C)
    J = np.diag(precision.diagonal()) - precision
    h = np.arctanh(m) - J @ m + (precision.diagonal() - 1 / (1 - m**2)) * m
    assert machine.couplings_ == pytest.approx(J, abs=1e-4)
    assert machine.fields_ == pytest.approx(h, abs=1e-4)


@pytest.mark.parametrize("at_random", ["completely", "given another spin"])
def test_gaps_cost_little_where_couplings_are_strong(at_random: str) -> None:
    """KL of the truth from what is learned, beside that from complete data."""
    rng = np.random.default_rng(0)
    A = rng.normal(size=(7, 7))
    J = (np.triu(A, 1) + np.triu(A, 1).T) / np.sqrt(7)
    h, S = 0.3 * rng.normal(size=7), states(7)
    exponent = 0.5 * ((S @ J) * S).sum(axis=1) + S @ h
    log_p = exponent - np.logaddexp.reduce(exponent)
    X = S[rng.choice(len(S), 5000, p=np.exp(log_p))]
    chance = np.full((5000, 1), 0.2) if at_random == "completely" else 0.22 + 0.18 * X[:, :1]
    gaps = rng.random(X.shape) < chance
    gaps[:, 0] &= at_random == "completely"

    def divergence(data: np.ndarray) -> float:
        return np.exp(log_p) @ (log_p - BoltzmannMachine().fit(data).score_samples(S))

    assert divergence(np.where(gaps, np.nan, X)) < 1.15 * divergence(X)


@pytest.mark.parametrize("beta", [0.5, 1.0])
@pytest.mark.parametrize("at_random", ["completely", "given another spin"])
def test_what_gaps_cost_where_rows_are_unlimited(at_random: str, beta: float) -> None:
    """All states with all patterns of gaps, weighted by their probabilities."""
    S = states(5)
    couplings, fields = (part.numpy() for part in sherrington_kirkpatrick(5, beta, 0.3, 4))
    p = np.exp(0.5 * ((S @ couplings) * S).sum(axis=1) + S @ fields)
    p /= p.sum()
    gaps, rows = np.tile(S < 0, (32, 1)), np.repeat(S, 32, axis=0)
    chance = np.full(rows.shape, 0.2)
    if at_random != "completely":
        chance[:] = np.where(rows[:, :1] > 0, 0.5, 0.05)
        chance[:, 0] = 0
    weights = np.repeat(p, 32) * np.where(gaps, chance, 1 - chance).prod(axis=1)
    spins, observed = np.where(gaps, 0.0, rows), ~gaps
    data = Data(*(torch.from_numpy(part[weights > 0]) for part in (spins, observed, weights)))
    settings = Settings.of(BoltzmannMachine(max_iter=1000), 0)
    moments = _gaps.fill(settings, data, "abcde").moments
    m = p @ S
    C = S.T @ (p[:, None] * S) - np.outer(m, m)
    assert moments.mean.numpy() == pytest.approx(m, abs=1e-5)
    error = np.abs(moments.covariance.numpy() - C).max()
    assert error < 1e-5 if at_random == "completely" else 0.01 < error < 0.04


@pytest.mark.quick("10-15-*", "20-15-*", "40-24-adaptive_tap")
@pytest.mark.parametrize("method", RESPONSES)
@pytest.mark.parametrize(
    ("rows", "n"),
    [(10, 15), (20, 15), (40, 24), (25, 30)],  # the last without enumeration
)
def test_few_rows_with_gaps_are_shrunk_and_said(method: str, rows: int, n: int) -> None:
    new, _ = correlated(500, n, 99, 0.0)
    gains = []

    def gain(fitted: BoltzmannMachine, data: np.ndarray) -> float:
        """What couplings add to the likelihood of new rows; what fields do has other errors."""
        p = (1 + new * np.nanmean(data, axis=0)) / 2
        return fitted.score(new) - np.log(p).sum(axis=1).mean()

    for seed in range(8):
        whole, holes = correlated(rows, n, seed, 0.1)
        if np.any(np.abs(np.nanmean(holes, axis=0)) == 1):
            continue  # to a constant column other values are impossible
        with pytest.warns(FitWarning, match=r"too few to fill in .* it is shrunk by"):
            machine = BoltzmannMachine(method).fit(holes)
        assert 0 < machine.shrinkage_ <= 1
        assert np.abs(machine.couplings_).max() < 0.5
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            same = BoltzmannMachine(method, shrinkage=machine.shrinkage_).fit(whole)
            gains.append((gain(machine, holes), gain(same, whole)))
    with_gaps, complete = np.mean(gains, axis=0)
    assert len(gains) >= 6
    assert with_gaps > -0.1
    assert with_gaps > complete - 0.05


def test_the_shrinkage_is_that_of_the_pairs_that_are_observed() -> None:
    _, X = correlated(20, 8, 0, 0.2)
    with pytest.warns(FitWarning, match="shrunk by"):
        machine = BoltzmannMachine("naive").fit(X)
    m = np.nanmean(X, axis=0)
    counts, pairs = [], []
    for i, j in itertools.combinations(range(8), 2):
        both = ~np.isnan(X[:, i]) & ~np.isnan(X[:, j])
        counts.append(both.sum())
        pairs.append((i, j, np.cov(X[both, i], X[both, j], bias=True)[0, 1]))
    count = len(counts) / np.sum(1 / np.array(counts))
    variances = squares = 0.0
    for i, j, c in pairs:
        scale = (1 - m[i] ** 2) * (1 - m[j] ** 2)
        variances += (scale + 4 * m[i] * m[j] * c - c**2) / scale / (count - 1)
        squares += c**2 / scale
    assert machine.shrinkage_ == pytest.approx(min(1.0, variances / squares))


def test_gaps_that_do_not_settle_are_shrunk_unless_the_user_regularised() -> None:
    _, X = correlated(400, 10, 0, 0.5)
    with pytest.warns(FitWarning, match="max_iter=20 rounds do not suffice"):
        machine = BoltzmannMachine(max_iter=20).fit(X)
    assert machine.shrinkage_ > 0
    assert BoltzmannMachine(max_iter=500).fit(X).shrinkage_ == 0
    for options in ({"l2": 1e-3}, {"pseudocount": 0.1}, {"shrinkage": 0.001}):
        with pytest.warns(ConvergenceWarning, match="still change"):
            machine = BoltzmannMachine(max_iter=20, **options).fit(X)
        assert machine.shrinkage_ == options.get("shrinkage", 0.0)


@pytest.mark.parametrize("method", RESPONSES)
def test_one_gap_among_many_rows_changes_little(method: str, X: np.ndarray) -> None:
    whole = BoltzmannMachine(method).fit(X)
    X[3, 2] = np.nan
    change = np.abs(BoltzmannMachine(method).fit(X).couplings_ - whole.couplings_)
    assert 0 < change.mean() < 5e-3


@pytest.mark.parametrize("method", [*RESPONSES, "exact", "pseudolikelihood"])
def test_a_constant_column_beside_a_gap_with_a_pseudocount(method: str, X: np.ndarray) -> None:
    X[:, 2] = 1.0
    whole = BoltzmannMachine(method, pseudocount=2.0).fit(X)
    X[3, 0] = np.nan
    machine = BoltzmannMachine(method, pseudocount=2.0).fit(X)
    assert machine.fields_ == pytest.approx(whole.fields_, abs=0.05)
    assert machine.couplings_ == pytest.approx(whole.couplings_, abs=0.05)


@pytest.mark.quick("[!p]*", "pseudo*", "pcd-1")
@pytest.mark.parametrize(
    ("method", "hidden"), [*((m, 0) for m in ALL), *((m, 1) for m in ("tap", "exact", "pcd"))]
)
def test_gaps_in_a_constant_column_alone_change_nothing_else(
    method: str, hidden: int, X: np.ndarray
) -> None:
    options = {"num_hidden": hidden, "num_updates": 5, "num_chains": 20}
    X[:, 2] = 1.0
    with pytest.warns(FitWarning, match=r"2 \(always up\)"):
        whole = BoltzmannMachine(method, **options).fit(X)
    X[3, 2] = np.nan
    with pytest.warns(FitWarning, match=r"2 \(always up\)"):
        machine = BoltzmannMachine(method, **options).fit(X)
    assert machine.couplings_ == pytest.approx(whole.couplings_, abs=1e-12)
    others = np.arange(len(whole.fields_)) != 2
    assert machine.fields_[others] == pytest.approx(whole.fields_[others], abs=1e-12)
    assert machine.fields_[2] == pytest.approx(np.arctanh(499 / 500), rel=1e-12)


@pytest.mark.parametrize(("column", "every"), [(2, 11), (0, 3), (0, 2)])
@pytest.mark.parametrize("method", RESPONSES)
def test_equal_columns_with_gaps_are_shrunk_and_said(
    method: str, column: int, every: int, X: np.ndarray
) -> None:
    """Also where gaps are in one of the two, and the rounds approach a C without inverse slowly."""
    X = np.c_[X, X[:, 0]]
    X[::every, column] = np.nan
    with pytest.warns(FitWarning, match="follow from others too closely .* it is shrunk by"):
        machine = BoltzmannMachine(method).fit(X)
    assert 0 < machine.shrinkage_ < 0.2
    assert np.abs(machine.couplings_).max() < 100
    with pytest.raises(ValueError, match="singular with shrinkage=0"):
        BoltzmannMachine(method, shrinkage=0.0).fit(X)


def extrapolating(sure: float) -> np.ndarray:
    """S_0 is mostly down only where both others are down, and missing where both are up."""
    rng = np.random.default_rng(0)
    others = rng.random((4000, 2)) < 0.8
    first = rng.random(4000) < np.where(others.any(axis=1), sure, 1 - sure)
    X = np.where(np.c_[others, first], 1.0, -1.0)[:, [2, 0, 1]]
    X[others.all(axis=1), 0] = np.nan
    return X


@pytest.mark.quick("options0-*", "options[12]-tap")
@pytest.mark.parametrize("method", RESPONSES)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("options", [{}, {"max_iter": 2000}, {"pseudocount": 0.1, "l2": 0.01}])
def test_means_that_regressions_take_beyond_one_are_refused_by_name(
    method: str, options: dict[str, float]
) -> None:
    holes = np.c_[np.ones(4000), extrapolating(0.97)]
    column = 0 if "pseudocount" in options else 1  # then the first is constant, and left out
    said = rf"the mean of columns to ±1 or beyond: {column} \([12]\.\d+\)\."
    with pytest.raises(ValueError, match=said):
        BoltzmannMachine(method, **options).fit(holes[:, 1 - column :])


def test_the_likelihood_has_a_maximum_where_regressions_go_beyond_one() -> None:
    holes = np.c_[np.ones(4000), extrapolating(0.97)]
    assert np.isfinite(BoltzmannMachine("exact").fit(holes[:, 1:]).couplings_).all()


@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_means_that_the_data_have_are_not_refused(scale: float, X: np.ndarray) -> None:
    X[:, 1] = 1.0
    X[0, 1] = -1.0
    X[5, 3] = np.nan
    weights = np.full(500, scale)
    weights[0] *= 1e-3  # its share of the mean is far less than that of an observation
    assert np.isfinite(BoltzmannMachine().fit(X, sample_weight=weights).couplings_).all()


def test_rows_without_a_response_are_counted_where_complete_was_called() -> None:
    rng = np.random.default_rng(0)
    couplings = np.triu(rng.normal(size=(10, 10)), 1) * 8 / 10**0.5
    machine = BoltzmannMachine("adaptive_tap", l2=0.1).fit(
        np.where(rng.uniform(size=(300, 10)) < 0.5, 1, -1)
    )
    machine.couplings_ = couplings + couplings.T
    rows = np.where(rng.uniform(size=(60, 10)) < 0.5, 1.0, -1.0)
    rows[rng.uniform(size=rows.shape) < 0.5] = np.nan
    with pytest.warns(ConvergenceWarning) as caught:
        machine.complete(rows)
    (warning,) = caught
    assert warning.filename == __file__
    gaps = np.isnan(rows).any(axis=1).sum()
    assert re.search(rf"of {gaps} rows with missing entries \d+ have no", str(warning.message))


@pytest.mark.parametrize("pseudocount", [0.0, 5.0])
def test_independent_spins_with_gaps_have_the_means_of_what_is_seen(
    pseudocount: float, X: np.ndarray
) -> None:
    X[np.random.default_rng(0).random(X.shape) < 0.4] = np.nan
    weights = np.linspace(0.5, 2.0, len(X))[:, None]
    seen = (weights * ~np.isnan(X)).sum(axis=0)
    machine = BoltzmannMachine("independent", pseudocount=pseudocount)
    machine.fit(X, sample_weight=weights[:, 0])
    expected = np.arctanh(np.nansum(weights * X, axis=0) / (seen + pseudocount))
    assert machine.fields_ == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("method", ["exact", "independent"])
def test_one_round_of_filling_in(method: str, X: np.ndarray) -> None:
    X[::3, 1] = np.nan
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        BoltzmannMachine(method, max_iter=1).fit(X)
    said = [str(warning.message) for warning in caught]
    assert sum("filled in one round only" in text for text in said) == (method == "exact")
    assert not any("change by inf" in text for text in said)


def test_a_response_that_comes_slowly_is_found() -> None:
    """Naive mean field with a slope of 0.991 at its only solution, beside which it creeps."""
    J = torch.tensor(
        [
            [0.0, 0.53572482, 0.27193017, -0.9549062],
            [0.53572482, 0.0, -0.46430338, 0.37956181],
            [0.27193017, -0.46430338, 0.0, 0.43727786],
            [-0.9549062, 0.37956181, 0.43727786, 0.0],
        ]
    ).double()
    x = torch.tensor([[0.04054606, -0.11064837, -0.18183007, 0.06105995]]).double()
    found = means("naive", J, x)
    assert found.failed == 0
    torch.testing.assert_close(found.m, torch.tanh(x + found.m @ J), rtol=0, atol=1e-8)
    expected = torch.tensor([[0.09333, -0.01333, -0.2, -0.12]]).double()
    torch.testing.assert_close(found.m, expected, rtol=0, atol=1e-4)


def test_chains_of_rows_with_gaps_weigh_their_rows() -> None:
    """Nine tenths of the weight is on rows whose two columns are opposite."""
    first = np.where(np.random.default_rng(0).random(40) < 0.5, 1.0, -1.0)
    X = np.c_[first, np.where(np.arange(40) < 20, -first, first)]
    weights = np.where(np.arange(40) < 20, 9.0, 1.0)
    X[[0, 39], [0, 1]] = np.nan
    machine = BoltzmannMachine("pcd", num_updates=40, learning_rate=0.06, num_chains=100)
    assert machine.fit(X, sample_weight=weights).couplings_[0, 1] < -0.5
