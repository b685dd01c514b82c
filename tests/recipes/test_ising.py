"""`dia ising`: its numbers are those of the methods, and nothing else is passed off as one."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from deep_implicit_attention import plots, spins
from deep_implicit_attention.cli import main
from deep_implicit_attention.recipes import Ising, _compare, _ising, run_ising

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
    weiss,
)

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
