"""What each method learns, against enumeration, published figures and other routes."""

from __future__ import annotations

import itertools
import time
import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from deep_implicit_attention.boltzmann import BoltzmannMachine, FitWarning, _clamped
from deep_implicit_attention.boltzmann._exact import exact
from deep_implicit_attention.boltzmann._moments import Moments
from deep_implicit_attention.deq import ConvergenceWarning
from deep_implicit_attention.spins import TAP, AdaptiveTAP, IsingPrior, NaiveMeanField, SpinSystem

RESPONSES = {"naive": NaiveMeanField, "tap": TAP, "adaptive_tap": AdaptiveTAP}


def reference(n: int, beta: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The systems of the tables, drawn as they are described there."""
    rng = np.random.default_rng(seed)
    A = rng.normal(size=(n, n))
    J = beta / np.sqrt(n) * (np.triu(A, 1) + np.triu(A, 1).T)
    return J, 0.3 * rng.normal(size=n)


def states(n: int) -> np.ndarray:
    return np.array(list(itertools.product((-1.0, 1.0), repeat=n)))


def log_probabilities(J: np.ndarray, h: np.ndarray) -> np.ndarray:
    S = states(len(h))
    exponent = 0.5 * np.einsum("ki,ij,kj->k", S, J, S) + S @ h
    return exponent - np.logaddexp.reduce(exponent)


def divergence(J: np.ndarray, h: np.ndarray, machine: BoltzmannMachine) -> float:
    """KL of what (J, h) says from what the machine says."""
    log_p = log_probabilities(J, h)
    return (np.exp(log_p) * (log_p - log_probabilities(machine.couplings_, machine.fields_))).sum()


def moments(J: np.ndarray, h: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    p, S = np.exp(log_probabilities(J, h)), states(len(h))
    return p @ S, S.T @ (p[:, None] * S)


def learned(method: str, J: np.ndarray, h: np.ndarray, **options) -> BoltzmannMachine:
    """From exact moments: all states, weighted by their probabilities."""
    weights = np.exp(log_probabilities(J, h))
    return BoltzmannMachine(method, **options).fit(states(len(h)), sample_weight=weights)


def drawn(J: np.ndarray, h: np.ndarray, rows: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return states(len(h))[rng.choice(2 ** len(h), size=rows, p=np.exp(log_probabilities(J, h)))]


# Median KL of ten systems of ten spins, from exact moments (PHYSICS table).
TABLE = {
    0.25: (1.3e-1, 1.8e-3, 6.7e-5, 3.0e-5),
    0.50: (5.0e-1, 6.5e-2, 5.9e-3, 2.2e-3),
    0.75: (9.6e-1, 9.2e-1, 7.0e-2, 2.4e-2),
    1.00: (1.4, 4.0, 3.2e-1, 1.6e-1),
}


@pytest.mark.parametrize("beta", TABLE)
@pytest.mark.filterwarnings("ignore:TAP")
def test_published_divergences(beta: float) -> None:
    systems = [reference(10, beta, seed) for seed in range(10)]
    for method, expected in zip(
        ("independent", "naive", "adaptive_tap", "tap"), TABLE[beta], strict=True
    ):
        found = np.median([divergence(*s, learned(method, *s)) for s in systems])
        assert found == pytest.approx(expected, rel=0.05), method


@pytest.mark.parametrize("method", RESPONSES)
def test_the_response_of_what_is_learned_is_the_data(method: str) -> None:
    """The learned system, given back to the inference method, has the moments it was made from."""
    J, h = reference(8, 0.4, 3)
    machine = learned(method, J, h)
    system = SpinSystem(torch.from_numpy(machine.couplings_), IsingPrior())
    response = RESPONSES[method](tol=1e-13)(system, torch.from_numpy(machine.fields_))
    m, second = moments(J, h)
    assert response.magnetization.detach().numpy() == pytest.approx(m, abs=1e-9)
    gap = response.covariance.detach().numpy() - (second - np.outer(m, m))
    if method == "adaptive_tap":
        assert np.abs(gap).max() < 1e-9
    precise = np.linalg.inv(response.covariance.detach().numpy()) - np.linalg.inv(
        second - np.outer(m, m)
    )
    np.fill_diagonal(precise, 0)
    assert np.abs(precise).max() < 1e-8


def test_tap_without_a_root_says_so_and_takes_the_naive_coupling() -> None:
    m = np.array([0.9, 0.9])
    second = np.array([[1, 0.67], [0.67, 1]])  # C_12 = -0.14, C⁻¹_12 > 1/(8 m m)
    S = states(2)
    p = (1 + S @ m + S[:, 0] * S[:, 1] * 0.67) / 4
    p[p < 0] = 0
    p /= p.sum()
    m, second = p @ S, S.T @ (p[:, None] * S)
    precision = np.linalg.inv(second - np.outer(m, m))[0, 1]
    assert 8 * m[0] * m[1] * precision > 1
    with pytest.warns(FitWarning, match="1 of 1 couplings has no real root"):
        machine = BoltzmannMachine("tap").fit(S, sample_weight=p)
    assert machine.couplings_[0, 1] == pytest.approx(-precision)


@pytest.mark.parametrize("n", [1, 2, 9, 15])
def test_exact_has_the_moments_of_the_data(n: int) -> None:
    J, h = reference(n, 1.0, 0)
    X = drawn(J, h, 10_000)
    machine = BoltzmannMachine("exact").fit(X)
    m, second = moments(machine.couplings_, machine.fields_)
    assert np.abs(m - X.mean(axis=0)).max() < 1e-8
    assert np.abs(second - X.T @ X / len(X)).max() < 1e-8


def test_exact_forgives_moments_that_are_symmetric_up_to_rounding() -> None:
    # Some matrix products round S_ij and S_ji apart; the Hessian knows no such direction.
    J, h = reference(8, 0.5, 0)
    m, second = moments(J, h)
    rounding = 1e-12 * np.random.default_rng(0).normal(size=second.shape)
    given = Moments(torch.from_numpy(m), torch.from_numpy(second + rounding - rounding.T), 1000.0)
    learned = exact(given, 0.0, torch.zeros(9, 9, dtype=torch.float64), tol=1e-9, max_iter=50)
    assert learned.converged
    assert np.abs(learned.theta[1:, 1:].numpy() - J).max() < 1e-8


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_exact_couplings_are_symmetric_where_the_likelihood_is_flat(seed: int) -> None:
    rng = np.random.default_rng(seed)
    X = np.where(rng.normal(size=(400, 1)) + rng.normal(size=(400, 7)) > 0, 1, -1)[:3]
    with pytest.warns(ConvergenceWarning, match="within the tolerance, but .* no finite maximum"):
        machine = BoltzmannMachine("exact").fit(X)
    assert (machine.couplings_ == machine.couplings_.T).all()
    SpinSystem(torch.from_numpy(machine.couplings_), IsingPrior())


@pytest.mark.parametrize("method", RESPONSES)
def test_penalised_couplings_are_symmetric_to_the_bit(method: str) -> None:
    for seed in range(10):
        X = drawn(*reference(9, 0.5, seed), 100)
        machine = BoltzmannMachine(method, l2=0.1).fit(X)
        assert (machine.couplings_ == machine.couplings_.T).all()


@pytest.mark.slow
def test_exact_twenty_spins() -> None:
    rng = np.random.default_rng(0)
    X = np.where(rng.normal(size=(4000, 20)) + rng.normal(size=(4000, 1)) > 0.2, 1, -1)
    machine = BoltzmannMachine("exact").fit(X)
    assert machine.residual_ < 1e-8
    from deep_implicit_attention.spins import Exact

    system = SpinSystem(torch.from_numpy(machine.couplings_), IsingPrior())
    response = Exact()(system, torch.from_numpy(machine.fields_))
    assert np.abs(response.magnetization.detach().numpy() - X.mean(axis=0)).max() < 1e-8
    C = np.cov(X, rowvar=False, bias=True)
    assert np.abs(response.covariance.detach().numpy() - C).max() < 1e-8


@pytest.mark.parametrize("method", ["exact", "pseudolikelihood"])
def test_consistent_methods_find_the_model_itself(method: str) -> None:
    J, h = reference(7, 1.0, 1)
    machine = learned(method, J, h)
    assert machine.couplings_ == pytest.approx(J, abs=1e-7)
    assert machine.fields_ == pytest.approx(h, abs=1e-7)


def test_pseudolikelihood_of_two_spins_is_their_conditionals() -> None:
    """Gradient of Besag's objective, by finite differences of a naive sum over rows and sites."""
    J, h = reference(4, 0.8, 5)
    X = drawn(J, h, 300)
    l2 = 0.02
    machine = BoltzmannMachine("pseudolikelihood", l2=l2).fit(X)

    def objective(J: np.ndarray, h: np.ndarray) -> float:
        total = 0.0
        for row in X:
            for i in range(4):
                f = h[i] + J[i] @ row
                total += np.log(np.exp(row[i] * f) / (np.exp(f) + np.exp(-f)))
        return total / len(X) - 2 * l2 / 2 * (np.triu(J, 1) ** 2).sum()

    best = objective(machine.couplings_, machine.fields_)
    for i, j in itertools.combinations(range(4), 2):
        for step in (-1e-3, 1e-3):
            moved = machine.couplings_.copy()
            moved[i, j] += step
            moved[j, i] += step
            assert objective(moved, machine.fields_) < best
    for i in range(4):
        moved = machine.fields_.copy()
        moved[i] += 1e-3
        up = objective(machine.couplings_, moved)
        moved[i] -= 2e-3
        down = objective(machine.couplings_, moved)
        assert abs(up - down) / 2e-3 < 1e-6


def test_pseudolikelihood_is_near_logistic_regressions_but_not_their_average() -> None:
    J, h = reference(6, 0.8, 2)
    X = drawn(J, h, 2000)
    joint = BoltzmannMachine("pseudolikelihood").fit(X).couplings_
    separate = np.zeros((6, 6))
    for i in range(6):
        others = np.arange(6) != i
        fit = LogisticRegression(C=1e10, tol=1e-10, max_iter=1000).fit(X[:, others], X[:, i])
        separate[i, others] = fit.coef_[0] / 2
    average = (separate + separate.T) / 2
    assert np.abs(joint - average).max() < 0.02
    assert np.abs(joint - average).max() > 1e-6


@pytest.mark.parametrize(
    ("method", "objective"),
    [("exact", "likelihood"), ("naive", "gaussian"), ("adaptive_tap", "gaussian")],
)
def test_l2_is_the_maximum_of_the_penalised_objective(method: str, objective: str) -> None:
    J, h = reference(5, 0.8, 4)
    l2 = 0.1
    machine = learned(method, J, h, l2=l2)
    m, second = moments(J, h)
    C = second - np.outer(m, m)
    if objective == "likelihood":
        q_m, q_second = moments(machine.couplings_, machine.fields_)
        gradient = second - q_second - l2 * machine.couplings_
        np.fill_diagonal(gradient, 0)
        assert np.abs(gradient).max() < 1e-8
        assert np.abs(m - q_m).max() < 1e-8
        return
    # Λ⁻¹ − C = l2 (Λ − T) with Λ_ij = −J_ij: from V, which only adaptive TAP has in its fields
    adaptive = learned("adaptive_tap", J, h, l2=l2)
    V = (adaptive.fields_ - np.arctanh(m) + adaptive.couplings_ @ m) / m
    precision = np.diag(V + 1 / (1 - m**2)) - machine.couplings_
    T = np.diag(1 / (1 - m**2))
    assert np.linalg.inv(precision) - C == pytest.approx(l2 * (precision - T), abs=1e-8)


@pytest.mark.parametrize("method", ["exact", "adaptive_tap", "pseudolikelihood"])
def test_strong_l2_leaves_independent_spins(method: str) -> None:
    J, h = reference(6, 0.5, 0)
    machine = learned(method, J, h, l2=1e6)
    assert np.abs(machine.couplings_).max() < 1e-5
    assert machine.fields_ == pytest.approx(learned("independent", J, h).fields_, abs=1e-4)


@pytest.mark.parametrize("method", ["exact", "naive", "adaptive_tap", "pseudolikelihood"])
def test_a_pseudocount_is_further_rows_with_all_states_equally_frequent(method: str) -> None:
    J, h = reference(4, 0.8, 0)
    X = drawn(J, h, 200)
    everything = np.concatenate([X, states(4)])
    weights = np.concatenate([np.ones(200), np.full(16, 5 / 16)])
    fit = BoltzmannMachine(method, pseudocount=5.0).fit(X)
    same = BoltzmannMachine(method).fit(everything, sample_weight=weights)
    assert fit.couplings_ == pytest.approx(same.couplings_, abs=1e-7)
    assert fit.fields_ == pytest.approx(same.fields_, abs=1e-7)


@pytest.mark.parametrize("n", [5, 10])
def test_a_pseudocount_knows_no_order_and_no_sign(n: int) -> None:
    """Columns permuted and reversed give parameters permuted and reversed."""
    J, h = reference(n, 0.8, 0)
    X = drawn(J, h, 100)
    rng = np.random.default_rng(3)
    order, sign = rng.permutation(n), rng.choice([-1.0, 1.0], size=n)
    fit = BoltzmannMachine("pseudolikelihood", pseudocount=20.0).fit(X)
    other = BoltzmannMachine("pseudolikelihood", pseudocount=20.0).fit((X * sign)[:, order])
    turned = (fit.couplings_ * np.outer(sign, sign))[order][:, order]
    assert other.couplings_ == pytest.approx(turned, abs=1e-7)
    assert other.fields_ == pytest.approx((fit.fields_ * sign)[order], abs=1e-7)


@pytest.mark.slow
def test_pcd_comes_near_maximum_likelihood() -> None:
    J, h = reference(6, 1.0, 0)
    X = drawn(J, h, 10_000)
    exact = divergence(J, h, BoltzmannMachine("exact").fit(X))
    machine = BoltzmannMachine("pcd", num_updates=800, num_chains=1000).fit(X)
    assert divergence(J, h, machine) < exact + 2e-3
    _, second = moments(machine.couplings_, machine.fields_)
    assert np.abs(second - X.T @ X / len(X)).max() < 0.02


@pytest.mark.quick("tap", "pcd", "exact")
@pytest.mark.parametrize("method", ["exact", "naive", "tap", "adaptive_tap", "pcd"])
def test_hidden_units_fit_better_than_couplings_alone(method: str) -> None:
    J = np.zeros((4, 4))
    J[3, :3] = J[:3, 3] = 0.6
    X = drawn(J, np.array([0.2, 0.1, 0.2, 0.5]), 2000)[:, :3]
    options = {"num_hidden": 1, "num_updates": 60, "learning_rate": 0.05, "l2": 0.2}
    machine = BoltzmannMachine(method, **options).fit(X)
    assert machine.couplings_.shape == (4, 4)
    alone = BoltzmannMachine("independent").fit(X).score(X)
    best = BoltzmannMachine("exact").fit(X).score(X)
    assert machine.score(X) > alone + 0.5 * (best - alone)


def test_an_ascent_ends_where_its_response_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three spins almost equal: couplings grow until adaptive TAP has no answer, which is said."""
    monkeypatch.setattr(_clamped, "_MAX_ITER", 50)
    X = np.ones((50, 3))
    X[::2] = -1
    X[0, 0] = 1
    with pytest.warns(ConvergenceWarning, match="no stable solution after"):
        machine = BoltzmannMachine("adaptive_tap", num_hidden=1, learning_rate=0.1).fit(X)
    assert 0 < machine.n_iter_ < 2000
    assert np.isfinite(machine.couplings_).all()


def test_hidden_units_learn_what_couplings_cannot() -> None:
    """Parity of three spins: no pair is correlated, so pairwise models see nothing."""
    S = states(3)
    p = np.where(S.prod(axis=1) > 0, 0.9, 0.1) / 4
    pairwise = BoltzmannMachine("exact").fit(S, sample_weight=p)
    machine = BoltzmannMachine(
        "exact", num_hidden=3, num_updates=1500, learning_rate=0.1, random_state=1
    ).fit(S, sample_weight=p)
    entropy = -(p * np.log(p)).sum()
    assert (p * pairwise.score_samples(S)).sum() == pytest.approx(-3 * np.log(2), abs=1e-6)
    assert (p * machine.score_samples(S)).sum() > -entropy - 0.02


ALL = ["exact", "independent", "naive", "tap", "adaptive_tap", "pseudolikelihood", "pcd"]


@pytest.mark.parametrize("method", ALL)
def test_the_same_seed_gives_the_same_bits(method: str) -> None:
    X = drawn(*reference(5, 0.5, 0), 200)
    X[::7, 2] = np.nan

    def fit(seed: int) -> BoltzmannMachine:
        torch.rand(3)
        return BoltzmannMachine(method, num_updates=20, random_state=seed).fit(X)

    first, again, other = fit(3), fit(3), fit(4)
    assert (first.couplings_ == again.couplings_).all()
    assert (first.fields_ == again.fields_).all()
    assert (first.sample(50) == again.sample(50)).all()
    if method == "pcd":
        assert (first.couplings_ != other.couplings_).any()
    assert (first.sample(50, random_state=8) != first.sample(50, random_state=9)).any()


@pytest.mark.parametrize("method", ALL)
def test_permuting_columns_permutes_the_answer(method: str) -> None:
    if method == "pcd":
        pytest.skip("its chains are drawn site by site")
    X = drawn(*reference(5, 0.8, 0), 300)
    order = np.array([3, 0, 4, 1, 2])
    first = BoltzmannMachine(method).fit(X)
    second = BoltzmannMachine(method).fit(X[:, order])
    assert second.couplings_ == pytest.approx(first.couplings_[order][:, order], abs=1e-7)
    assert second.fields_ == pytest.approx(first.fields_[order], abs=1e-7)


@pytest.mark.parametrize("method", ALL[:-1])
def test_flipping_a_spin_flips_its_couplings_and_its_field(method: str) -> None:
    """The gauge symmetry S_i → −S_i, J_ij → −J_ij, h_i → −h_i; a wrong sign breaks it."""
    X = drawn(*reference(5, 0.8, 0), 300)
    sign = np.array([1, -1, 1, 1, -1])
    first = BoltzmannMachine(method).fit(X)
    second = BoltzmannMachine(method).fit(X * sign)
    assert second.couplings_ == pytest.approx(first.couplings_ * np.outer(sign, sign), abs=1e-7)
    assert second.fields_ == pytest.approx(first.fields_ * sign, abs=1e-7)


def fastest(run: Callable[[], object], times: int) -> float:
    seconds = []
    for _ in range(times):
        begin = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - begin)
    return min(seconds)


@pytest.mark.slow
@pytest.mark.parametrize("coding", ["spins", "binary"])
def test_a_fit_takes_little_more_than_its_linear_algebra(coding: str) -> None:
    """N = 100, 10,000 rows: at most five times one covariance matrix and one inverse."""
    up = np.random.default_rng(0).normal(size=(10_000, 100)) > 0
    X = np.where(up, 1.0, -1.0) if coding == "spins" else up.astype(np.int64)
    machine = BoltzmannMachine("adaptive_tap")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        machine.fit(X)
    numbers = X.astype(np.float64)
    unit = fastest(lambda: np.linalg.inv(np.cov(numbers, rowvar=False)), 15)
    assert fastest(lambda: machine.fit(X), 15) < 5 * unit
