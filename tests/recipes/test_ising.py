"""`dia ising`: its numbers are those of the methods, and nothing else is passed off as one."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from deep_implicit_attention import plots, spins
from deep_implicit_attention.cli import main
from deep_implicit_attention.deq import ConvergenceWarning
from deep_implicit_attention.recipes import Ising, _compare, _ising, run_ising

Command = Callable[..., Any]
CLASSES = {
    "naive": spins.NaiveMeanField,
    "tap": spins.TAP,
    "adaptive-tap": spins.AdaptiveTAP,
    "self-averaging-tap": spins.SelfAveragingTAP,
    "expectation-propagation": spins.ExpectationPropagation,
}


@pytest.fixture
def no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_compare, "_draw", lambda *_, **__: None)


def reference_system(n: int, beta: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The systems of the theory page's tables, drawn here as they are described there."""
    rng = np.random.default_rng(seed)
    upper = np.triu(rng.normal(size=(n, n)), 1)
    return beta / np.sqrt(n) * (upper + upper.T), 0.3 * rng.normal(size=n)


def enumerated(J: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """m, C and log Z by summation over all states, each spin value with weight ½."""
    states = np.array(list(itertools.product((-1.0, 1.0), repeat=len(x))))
    weight = np.exp(0.5 * np.einsum("ki,ij,kj->k", states, J, states) + states @ x)
    p = weight / weight.sum()
    m = p @ states
    return m, (states.T * p) @ states - np.outer(m, m), np.log(weight.mean())


def weiss(J: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """Naive mean field: m, (1/(1 − m²) − J)⁻¹ and the variational bound."""
    m = np.tanh(x)
    for _ in range(5000):
        m = 0.5 * m + 0.5 * np.tanh(x + J @ m)
    chance = np.stack([(1 + m) / 2, (1 - m) / 2])
    entropy = -(chance * np.log(chance)).sum() - len(x) * np.log(2)
    return m, np.linalg.inv(np.diag(1 / (1 - m**2)) - J), entropy + 0.5 * m @ J @ m + x @ m


def library(name: str, J: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    system = spins.SpinSystem(torch.tensor(J), spins.IsingPrior())
    response = CLASSES[name]()(system, torch.tensor(x))
    covariance = response.covariance.detach().numpy()
    return response.magnetization.numpy(), covariance, response.log_partition.item()


def errors(answer: Any, exact: Any) -> tuple[float, float, float]:
    n = len(exact[0])
    m = sum(abs(answer[0] - exact[0])) / n
    pairs = [(i, j) for i in range(n) for j in range(n) if i != j]
    covariance = sum(abs(answer[1][p] - exact[1][p]) for p in pairs) / len(pairs)
    return m, covariance, abs(answer[2] - exact[2])


def three(record: dict[str, Any]) -> tuple[float, float, float]:
    return tuple(
        record[f"{name}_error"] for name in ("magnetization", "covariance", "log_partition")
    )  # type: ignore


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def rows(out: str) -> dict[str, list[str]]:
    """The lines of the table, by method."""
    lines = [line.split() for line in out.splitlines()]
    return {line[0]: line[1:] for line in lines if line and line[0] in _ising.METHODS}


FRUSTRATED = np.array([[0, 1, -1, 0], [1, 0, 1, 1], [-1, 1, 0, 0], [0, 1, 0, 0]])


# --- the numbers ----------------------------------------------------------------------------


def test_the_table_shows_the_errors_of_the_methods(ising: Command) -> None:
    run = ising("--num-spins", "7", "--beta", "0.5", "--seed", "3", "--betas", "0.3")
    assert run.status == 0
    assert run.err == ""
    table = rows(run.out)
    assert set(CLASSES) <= set(table)
    for beta in (0.3, 0.5):
        J, x = reference_system(7, beta, 3)
        exact = enumerated(J, x)
        expected = {name: errors(library(name, J, x), exact) for name in CLASSES}
        assert expected["naive"] == pytest.approx(errors(weiss(J, x), exact), rel=1e-6)
        at = {r["method"]: r for r in records(run.folder) if r["beta"] == beta}
        for name, numbers in expected.items():
            assert three(at[name]) == pytest.approx(numbers, rel=1e-6)
            assert at[name]["status"] == "converged"
            assert at[name]["residual"] <= 1e-10
        assert at["exact"]["log_partition"] == pytest.approx(exact[2], rel=1e-12)
        assert three(at["exact"]) == (0, 0, 0)
    for name in CLASSES:
        shown = table[name]
        assert shown[:3] == [f"{number:.1e}" for number in three(at[name])]
        assert shown[3:6] == [str(at[name]["steps"]), f"{at[name]['residual']:.1e}", "converged"]
    assert f"log Z {exact[2]:.4g}" in run.out
    assert f"mean |m| {abs(exact[0]).mean():.4g}" in run.out


@pytest.mark.slow
@pytest.mark.usefixtures("no_figure")
def test_the_table_of_the_theory_page(tmp_path: Path) -> None:
    """N = 12, β = 0.5, medians over seeds 0 to 7, to the two digits given there."""
    columns: dict[str, list] = {"naive": [], "tap": [], "adaptive-tap": []}
    for seed in range(8):
        recipe = Ising(beta=0.5, betas=(), seed=seed, methods=tuple(columns), run_dir=tmp_path)
        for record in run_ising(recipe):
            columns.get(record["method"], []).append(three(record))
    median = {name: np.median(np.array(column), axis=0) for name, column in columns.items()}
    m, covariance, log = np.stack(list(median.values())).T
    assert m == pytest.approx([8.3e-2, 6.7e-3, 3.4e-3], rel=0.02)
    assert covariance == pytest.approx([4.2e-2, 3.5e-3, 6.6e-3], rel=0.02)
    assert log[[0, 2]] == pytest.approx([4.9e-1, 1.3e-2], rel=0.03)


@pytest.mark.quick("uint16")
@pytest.mark.usefixtures("no_figure")
@pytest.mark.parametrize("dtype", [np.int8, np.uint16, np.float32, ">f8"])
def test_a_system_from_files(dtype: Any, ising: Command, saved: Callable) -> None:
    J = abs(FRUSTRATED) if dtype == np.uint16 else FRUSTRATED
    x = np.array([1, 0, 2, 1])
    run = ising(*saved(np.asfortranarray(J.astype(dtype)), x.astype(dtype)), "--betas", "0.25")
    assert run.status == 0, run.err
    assert "J.npy" in run.out
    for beta in (0.25, 1.0):  # couplings and fields are scaled
        exact = enumerated(beta * J, beta * x)
        expected = errors(weiss(beta * J, beta * x), exact)
        (naive,) = (r for r in records(run.folder) if (r["beta"], r["method"]) == (beta, "naive"))
        assert three(naive) == pytest.approx(expected, rel=1e-6)
    halved = ising(*saved(J.astype(dtype), x.astype(dtype)), "--beta", "0.5", "--betas")
    assert halved.status == 0
    answers = np.load(run.folder / "answers.npz")
    np.testing.assert_array_equal(answers["couplings"], 0.5 * J)
    np.testing.assert_array_equal(answers["fields"], 0.5 * x)
    np.testing.assert_allclose(
        answers["exact magnetization"], enumerated(0.5 * J, 0.5 * x)[0], rtol=1e-12
    )


@pytest.mark.usefixtures("no_figure")
def test_answers_are_saved(ising: Command) -> None:
    run = ising("--num-spins", "5", "--beta", "0.4", "--betas")
    answers = np.load(run.folder / "answers.npz")
    J, x = reference_system(5, 0.4, 0)
    np.testing.assert_allclose(answers["couplings"], J, rtol=1e-12)
    np.testing.assert_array_equal(answers["fields"], x)
    expected = {"exact": enumerated(J, x), **{name: library(name, J, x) for name in CLASSES}}
    for name, (m, covariance, _) in expected.items():
        np.testing.assert_allclose(answers[f"{name} magnetization"], m, atol=1e-9)
        np.testing.assert_allclose(answers[f"{name} covariance"], covariance, atol=1e-8)
    assert {record["beta"] for record in records(run.folder)} == {0.4}


@pytest.mark.usefixtures("no_figure")
def test_ensembles(ising: Command) -> None:
    def drawn(*flags: str) -> tuple[np.ndarray, np.ndarray]:
        run = ising(*flags, "--beta", "0.3", "--betas", "--field", "0.2", "--methods", "naive")
        assert run.status == 0, run.err
        answers = np.load(run.folder / "answers.npz")
        return answers["couplings"], answers["fields"]

    couplings, x = drawn("--ensemble", "lattice", "--num-spins", "3", "4", "--seed", "1")
    np.testing.assert_array_equal(couplings, spins.lattice((3, 4), 0.3).numpy())
    assert x.std() == pytest.approx(0.2, rel=0.5)
    couplings, _ = drawn("--ensemble", "ferromagnet", "--num-spins", "6")
    np.testing.assert_allclose(couplings, 0.05 * (1 - np.eye(6)))
    couplings, x = drawn("--ensemble", "hopfield", "--num-spins", "11", "--patterns", "3")
    hebb = couplings * 11 / 0.3 + 3 * np.eye(11)  # Σ_p ξ_p ξ_pᵀ
    np.testing.assert_allclose(hebb, hebb.round(), atol=1e-9)
    assert np.linalg.matrix_rank(hebb, tol=1e-6) == 3
    again, same = drawn("--ensemble", "hopfield", "--num-spins", "11", "--patterns", "3")
    np.testing.assert_array_equal(again, couplings)
    np.testing.assert_array_equal(same, x)
    other, different = drawn(
        "--ensemble", "hopfield", "--num-spins", "11", "--patterns", "3", "--seed", "1"
    )
    assert not np.array_equal(other, couplings)
    assert not np.array_equal(different, x)


def test_methods_that_are_not_iterated(ising: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(_ising.METHODS, "enumeration", lambda _: spins.Exact())
    run = ising("--num-spins", "4", "--methods", "enumeration", "--betas", "0.5")
    assert run.status == 0
    assert rows(run.out)["enumeration"][:6] == ["0.0e+00", "0.0e+00", "0.0e+00", "-", "-", "done"]


@pytest.mark.usefixtures("no_figure")
def test_a_spin_alone_has_no_pairs(ising: Command) -> None:
    run = ising("--num-spins", "1")
    assert run.status == 0
    assert "mean |C| -" in run.out
    assert all(row[1] == "-" and float(row[0]) < 1e-9 for row in rows(run.out).values())
    assert all(record["covariance_error"] is None for record in records(run.folder))


# --- what did not converge ------------------------------------------------------------------


def test_no_numbers_without_convergence(ising: Command) -> None:
    run = ising("--num-spins", "6", "--max-iter", "30", "--beta", "0.5", "--betas", "0.01")
    assert run.status == 0
    assert run.err == ""
    table, at = rows(run.out), {r["method"]: r for r in records(run.folder) if r["beta"] == 0.5}
    assert table["naive"][:4] == ["-", "-", "-", "30"]
    assert table["naive"][5] == at["naive"]["status"] == "max_iter"
    assert float(table["naive"][4]) > 1e-10
    assert three(at["naive"]) == (None, None, None)
    assert at["naive"]["log_partition"] is None
    assert table["tap"][5] == at["tap"]["status"] == "converged"
    assert None not in three(at["tap"])
    answers = np.load(run.folder / "answers.npz")
    assert np.isnan(answers["naive magnetization"]).all()
    assert np.isnan(answers["naive covariance"]).all()
    assert np.isfinite(answers["tap covariance"]).all()
    assert "--max-iter" in run.out


def test_nothing_converged(ising: Command) -> None:
    run = ising("--num-spins", "4", "--max-iter", "1", "--betas")
    assert run.status == 0
    table = rows(run.out)
    assert set(table) == set(CLASSES)
    for name, row in table.items():  # expectation propagation has two ways, one step of each
        steps = "2" if name == "expectation-propagation" else "1"
        assert row[:4] == ["-", "-", "-", steps]
    assert "ising.png" in run.files()


@pytest.mark.usefixtures("no_figure")
def test_a_response_that_does_not_exist(ising: Command, saved: Callable) -> None:
    """Two spins at the critical point of naive mean field: 1 − C J is singular there only."""
    run = ising(*saved(np.array([[0, 1], [1, 0]]), np.zeros(2)), "--betas")
    assert run.status == 0
    table = rows(run.out)
    assert table["naive"][:3] == ["-", "-", "-"]
    assert table["naive"][5:7] == ["no", "covariance"]
    golden = (1 + 5**0.5) / 2  # Λ of adaptive TAP: Λ/(Λ² − 1) = 1
    (adaptive,) = (r for r in records(run.folder) if r["method"] == "adaptive-tap")
    expected = np.tanh(1) - 1 / (golden**2 - 1)
    assert adaptive["covariance_error"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.usefixtures("no_figure")
@pytest.mark.parametrize("where", ["solve", "response"])
def test_warnings_become_marks(where: str, ising: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def method(system: spins.SpinSystem, x: torch.Tensor) -> Any:
        answer = spins.Exact()(system, x)

        def covariance() -> torch.Tensor:
            warnings.warn("adjoint", ConvergenceWarning, stacklevel=2)
            return answer.covariance

        if where == "response":
            return dataclasses.replace(answer, _covariance=covariance)
        warnings.warn("solve", ConvergenceWarning, stacklevel=2)
        return answer

    monkeypatch.setitem(_ising.METHODS, "odd", lambda _: method)
    run = ising("--num-spins", "4", "--methods", "odd", "tap", "--betas")
    assert run.status == 0
    assert run.err == ""
    assert rows(run.out)["odd"][:3] == ["-", "-", "-"]
    assert "not converged" in " ".join(rows(run.out)["odd"])
    assert rows(run.out)["tap"][5] == "converged"
    (odd,) = (r for r in records(run.folder) if r["method"] == "odd")
    assert odd["note"] == ("adjoint" if where == "response" else "solve")


@pytest.mark.usefixtures("no_figure")
def test_a_solution_without_covariance_says_why(ising: Command) -> None:
    """Without fields m = 0 solves the naive equations; at β = 1 it is no maximum of the bound."""
    run = ising("--field", "0", "--methods", "naive", "tap", "--betas")
    table, at = rows(run.out), {r["method"]: r for r in records(run.folder)}
    assert table["naive"][:5] == ["-", "-", "-", "1", "0.0e+00"]
    assert at["naive"]["status"] == "no covariance"
    assert "not stable, its covariance has the negative eigenvalue" in at["naive"]["note"]
    assert f"naive: {at['naive']['note']}" in run.out
    assert at["tap"]["status"] == "converged"
    assert "note" not in at["tap"]


@pytest.mark.usefixtures("no_figure")
def test_other_warnings_are_passed_on(ising: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def method(system: spins.SpinSystem, x: torch.Tensor) -> Any:
        warnings.warn("old", FutureWarning, stacklevel=1)
        return spins.Exact()(system, x)

    monkeypatch.setitem(_ising.METHODS, "odd", lambda _: method)
    with pytest.warns(FutureWarning, match="old"):
        run = ising("--num-spins", "4", "--methods", "odd", "--betas")
    assert rows(run.out)["odd"][5] == "done"


@pytest.mark.usefixtures("no_figure")
def test_numbers_that_are_not_finite(ising: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def method(system: spins.SpinSystem, x: torch.Tensor) -> Any:
        answer = spins.Exact()(system, x)
        return dataclasses.replace(answer, log_partition=answer.log_partition * torch.inf)

    monkeypatch.setitem(_ising.METHODS, "odd", lambda _: method)
    run = ising("--num-spins", "4", "--methods", "odd", "--betas")
    assert rows(run.out)["odd"][:6] == ["-", "-", "-", "-", "-", "nonfinite"]


# --- too many spins -------------------------------------------------------------------------


@pytest.fixture
def few_states(monkeypatch: pytest.MonkeyPatch) -> None:
    """Enumeration, where it is the reference, ends at 2^5 states."""
    monkeypatch.setattr(_compare, "Exact", lambda: spins.Exact(max_states=2**5))


@pytest.mark.slow
@pytest.mark.usefixtures("few_states")
def test_errors_against_the_sampler(ising: Command) -> None:
    """With more spins than can be enumerated; here they can, by the test."""
    run = ising(
        *("--num-spins", "6", "--beta", "0.7", "--betas", "0.3", "--samples", "400"),
        *("--methods", "naive", "adaptive-tap", "gibbs"),
    )
    assert run.status == 0
    assert run.err == ""
    assert "2^6 states are too many" in run.out
    assert run.files() == {"config.json", "metrics.jsonl", "answers.npz", "ising.png"}
    J, x = reference_system(6, 0.7, 0)
    exact = enumerated(J, x)
    at = {r["method"]: r for r in records(run.folder) if r["beta"] == 0.7}
    told, table = at["gibbs reference"], rows(run.out)
    assert set(table) == {"naive", "adaptive-tap", "gibbs"}
    noise = told["magnetization_standard_error"]
    assert 1e-3 < noise < 3e-2
    assert f"R-hat {told['r_hat']:.3f}, standard errors of m {noise:.1e}" in run.out
    answers = np.load(run.folder / "answers.npz")
    sampled = answers["gibbs reference magnetization"]
    assert 0 < abs(sampled - exact[0]).max() < 5 * noise
    gap = told["log_partition"] - exact[2]
    assert 0 < abs(gap) < 4 * told["log_partition_standard_error"]
    assert 0 < at["gibbs"]["magnetization_error"] < 5 * noise  # another seed: not the same draws
    reference = sampled, answers["gibbs reference covariance"], told["log_partition"]
    for name in ("naive", "adaptive-tap"):
        expected = errors(library(name, J, x), reference)
        assert three(at[name]) == pytest.approx(expected, rel=1e-6)
        assert table[name][:3] == [f"{number:.1e}" for number in expected]


@pytest.mark.usefixtures("few_states")
def test_chains_that_do_not_agree(ising: Command) -> None:
    assert ising("--num-spins", "4", "--betas", "0.5", "--methods", "naive").status == 0
    run = ising("--num-spins", "8", "--samples", "4", "--methods", "naive", "tap", "--betas")
    assert run.status == 0
    assert "do not agree" in run.out
    assert run.files() == {"config.json", "metrics.jsonl", "answers.npz"}  # no figure of before
    assert "figure" not in run.out.splitlines()[-1]
    J, x = reference_system(8, 1.0, 0)
    for name, row in rows(run.out).items():
        m, covariance, log = library(name, J, x)
        apart = covariance[~np.eye(8, dtype=bool)]
        expected = [abs(m).mean(), abs(apart).mean(), log]
        assert [float(number) for number in row[:3]] == pytest.approx(expected, rel=1e-3)
    for record in records(run.folder):
        assert three(record) == (None, None, None)
        if record["method"] != "gibbs reference":
            assert record["log_partition"] == pytest.approx(
                library(record["method"], J, x)[2], rel=1e-6
            )


def test_what_can_be_enumerated() -> None:
    (exact,) = _compare._reference(24, Ising()).values()
    assert isinstance(exact, spins.Exact)
    (sampler,) = _compare._reference(25, Ising(samples=77, seed=3)).values()
    assert isinstance(sampler, spins.GibbsSampler)
    assert sampler.num_samples == 77
    (method,) = Ising(methods=("gibbs",), samples=66, seed=3).build().values()
    assert sampler.seed != method.seed == 3  # type: ignore
    assert method.num_samples == 66  # type: ignore


@pytest.mark.usefixtures("no_figure")
def test_a_looser_tolerance_takes_fewer_steps(ising: Command) -> None:
    def steps(*flags: str) -> dict[str, int]:
        found = records(ising("--num-spins", "5", "--beta", "0.5", "--betas", *flags).folder)
        return {r["method"]: r["steps"] for r in found if r["method"] != "exact"}

    tight, loose = steps(), steps("--tol", "1e-2")
    assert set(tight) == set(CLASSES)
    assert all(0 < loose[name] < tight[name] for name in CLASSES)


@pytest.mark.usefixtures("no_figure")
def test_threads(ising: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    for threads in ("1", "0"):  # 0 leaves it to PyTorch
        flags = ("--num-spins", "2", "--betas", "--methods", "tap", "--threads", threads)
        assert ising(*flags).status == 0
    assert asked == [1]


@pytest.mark.usefixtures("no_figure")
def test_the_sampler_as_a_method(ising: Command) -> None:
    run = ising("--num-spins", "5", "--methods", "gibbs", "--samples", "300", "--betas")
    assert run.status == 0
    (record,) = (r for r in records(run.folder) if r["method"] == "gibbs")
    m, _, log = three(record)
    assert 0 < m < 5 * record["magnetization_standard_error"]
    assert 0 < log < 4 * record["log_partition_standard_error"]
    J, x = map(torch.tensor, reference_system(5, 1.0, 0))
    sampler = spins.GibbsSampler(num_samples=300, seed=0)
    sampling = sampler(spins.SpinSystem(J, spins.IsingPrior()), x).sampling
    assert sampling is not None
    mean = sum(sampling.standard_error.tolist()) / 5
    assert record["magnetization_standard_error"] == pytest.approx(mean)
    assert rows(run.out)["gibbs"][3:6] == ["-", "-", "done"]
    assert "gibbs" not in Ising().methods  # it takes longer than all others together


# --- files, figure, output ------------------------------------------------------------------


def test_a_run_leaves_its_files(ising: Command) -> None:
    run = ising("--num-spins", "4", "--betas", "0.5", "--seed", "2")
    assert run.files() == {"config.json", "metrics.jsonl", "answers.npz", "ising.png"}
    assert (run.folder / "ising.png").read_bytes().startswith(b"\x89PNG")
    assert run.out.splitlines()[-1] == f"metrics, answers and figure are in {run.folder}/"
    config = json.loads((run.folder / "config.json").read_text())
    assert config.pop("recipe") == "ising"
    assert set(config) == {field.name for field in dataclasses.fields(Ising)}
    assert (config["num_spins"], config["betas"], config["seed"]) == ([4], [0.5], 2)
    assert config["run_dir"] == str(run.folder)


def test_the_figure_shows_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: dict[str, Any] = {}

    def figure(*arguments: Any, **named: Any) -> Any:
        drawn.update(arguments=arguments, **named)
        return SimpleNamespace(savefig=lambda *_, **__: None)

    monkeypatch.setattr(plots, "approximation_errors", figure)
    found = run_ising(
        Ising(num_spins=(5,), beta=0.6, betas=(0.9, 0.01), max_iter=40, run_dir=tmp_path)
    )
    exact_m, m, exact_C, C, betas, error = drawn["arguments"]
    J, x = reference_system(5, 0.6, 0)
    expected = enumerated(J, x)
    pairs = np.triu_indices(5, 1)
    np.testing.assert_allclose(exact_m, expected[0])
    np.testing.assert_allclose(exact_C, expected[1][pairs])
    assert "naive" not in m
    assert "naive" not in C
    tap = library("tap", J, x)
    np.testing.assert_allclose(m["tap"], tap[0], atol=1e-8)
    np.testing.assert_allclose(C["tap"], tap[1][pairs], atol=1e-8)
    assert betas == [0.01, 0.6, 0.9]
    assert drawn["beta"] == 0.6
    assert list(error) == list(Ising().methods)
    assert drawn["reference"] == "exact"
    assert drawn["reference_error"] == ()
    for name, values in error.items():
        told = {r["beta"]: r["magnetization_error"] for r in found if r["method"] == name}
        np.testing.assert_array_equal(values, [told[beta] for beta in betas])
    assert np.isfinite(error["naive"]).tolist() == [True, False, False]
    assert "magnetizations" in drawn["error_label"]
    assert "fields fixed" in drawn["beta_label"]

    run_ising(Ising(num_spins=(5,), beta=0.6, betas=(), field=0.0, run_dir=tmp_path))
    assert "covariances" in drawn["error_label"]
    tap = library("tap", J, 0 * x)
    assert drawn["arguments"][5]["tap"][0] == pytest.approx(
        errors(tap, enumerated(J, 0 * x))[1], rel=1e-6
    )

    monkeypatch.setattr(_compare, "Exact", lambda: spins.Exact(max_states=2**4))
    found = run_ising(Ising(num_spins=(5,), beta=0.6, betas=(0.3,), samples=50, run_dir=tmp_path))
    assert drawn["reference"] == "Gibbs sampling"
    noise = [r["magnetization_standard_error"] for r in found if r["method"] == "gibbs reference"]
    assert drawn["reference_error"] == noise
    assert "gibbs reference" not in drawn["arguments"][5]


def test_piped_output_is_plain(ising: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "30")
    run = ising("--num-spins", "6", "--beta", "2", "--betas", "0.5", "--max-iter", "20")
    assert max(len(line) for line in run.out.splitlines() if line.split()[0] in CLASSES) <= 80
    assert set(run.out) - {"\n"} <= set(map(chr, range(32, 127)))
    assert {len(row) for row in rows(run.out).values()} == {7}  # no cell is cut or wrapped


@pytest.mark.usefixtures("no_figure")
def test_the_same_seed_says_the_same(ising: Command) -> None:
    def said() -> list[Any]:
        run = ising("--num-spins", "6", "--betas", "--methods", "tap")
        return [{k: v for k, v in r.items() if k != "seconds"} for r in records(run.folder)]

    assert said() == said()


def test_help_names_every_setting_and_method(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as stop:
        main(["ising", "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for field in dataclasses.fields(Ising):
        assert re.search(rf"--{field.name.replace('_', '-')}\b", text), field.name
    for name in (*_ising.METHODS, "sk", "ferromagnet", "hopfield", "lattice"):
        assert name in text
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "dia ising" in capsys.readouterr().out
