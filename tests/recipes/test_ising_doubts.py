"""`dia ising` where a method does not converge, warns, or nothing exact is at hand."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from deep_implicit_attention import spins
from deep_implicit_attention.deq import ConvergenceWarning
from deep_implicit_attention.recipes import Ising, _compare, _ising

from .ising import (
    CLASSES,
    Command,
    enumerated,
    errors,
    library,
    records,
    reference_system,
    rows,
    three,
)


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
