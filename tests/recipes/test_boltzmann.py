"""`dia boltzmann`: its figures are those of the machines, chosen without the test images."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from rich.console import Console
from sklearn.datasets import load_digits

from deep_implicit_attention import plots
from deep_implicit_attention.cli import main
from deep_implicit_attention.recipes import Boltzmann, _boltzmann
from deep_implicit_attention.training import Run


@pytest.fixture(scope="module")
def run(machines: Path) -> Path:
    return machines


def rows(folder: Path) -> dict[str, dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["method"]: line for line in lines}


def test_what_a_run_leaves(run: Path) -> None:
    files = {path.name for path in run.iterdir() if path.is_file()}
    assert files == {
        "config.json",
        "metrics.jsonl",
        "machine.npz",
        "completions.png",
        "samples.png",
    }
    assert json.loads((run / "config.json").read_text())["recipe"] == "boltzmann"


def test_machines_are_better_than_independent_pixels_and_the_nearest_image(run: Path) -> None:
    found = rows(run)
    for method in ("tap", "pseudolikelihood"):
        assert found[method]["test_error"] < found["nearest-neighbour"]["test_error"]
        assert found[method]["test_error"] < found["independent"]["test_error"]


def test_baselines_by_hand(run: Path) -> None:
    """From the raw pixels, image by image."""
    data = _boltzmann.digit_halves(Boltzmann())
    raw = np.where(load_digits().data >= 8, 1.0, -1.0)
    counted = {row.tobytes() for row in raw}
    assert all(row.tobytes() in counted for row in data.test)
    assert len(data.test) == 360
    known = np.concatenate([data.train, data.validation])
    mean = np.where(known.mean(axis=0) > 0, 1, -1)
    wrong = np.mean([(mean[32:] != row[32:]).mean() for row in data.test])
    found = rows(run)
    assert found["independent"]["test_error"] == pytest.approx(wrong)
    nearest = [known[np.abs(known[:, :32] - row[:32]).sum(axis=1).argmin()] for row in data.test]
    wrong = np.mean([a[32:] != b[32:] for a, b in zip(nearest, data.test, strict=True)])
    assert found["nearest-neighbour"]["test_error"] == pytest.approx(wrong)


def test_the_parameters_are_those_of_the_best_on_the_validation_images(run: Path) -> None:
    best = min(
        (row for name, row in rows(run).items() if "neighbour" not in name),
        key=lambda row: row["validation_error"],
    )
    from deep_implicit_attention.boltzmann import BoltzmannMachine

    data = _boltzmann.digit_halves(Boltzmann())
    machine = BoltzmannMachine(best["method"], l2=best["l2"])
    with pytest.warns(Warning, match="never change"):
        machine.fit(data.both)
    saved = np.load(run / "machine.npz")
    assert (saved["couplings"] == machine.couplings_).all()
    assert (saved["fields"] == machine.fields_).all()


@pytest.mark.filterwarnings("ignore")  # pixels that never change
def test_what_is_chosen_does_not_depend_on_the_test_images() -> None:
    recipe, data = Boltzmann(l2=(0.01, 0.3)), _boltzmann.digit_halves(Boltzmann())
    few = _boltzmann.Halves(data.train[:300], data.validation[:100], data.test[:100])
    other = dataclasses.replace(few, test=-few.test)

    def chosen(some: _boltzmann.Halves) -> tuple[list[dict], list[float]]:
        rows = [*_boltzmann._baselines(some), _boltzmann._choose(recipe, "tap", some)[0]]
        names = ("method", "neighbours", "l2", "validation_error")
        tests = [row["test_error"] for row in rows]
        return [{name: row.get(name) for name in names} for row in rows], tests

    one, two = chosen(few), chosen(other)
    assert one[0] == two[0]
    assert all(a != b for a, b in zip(one[1], two[1], strict=True))


def test_settings_reach_the_machines_and_the_data(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = Boltzmann(num_hidden=5, num_updates=7, validation=0.3, seed=4)
    machine = _boltzmann._machine(recipe, "pcd", 0.25)
    options = ("method", "num_hidden", "num_updates", "l2", "random_state")
    assert [getattr(machine, name) for name in options] == ["pcd", 5, 7, 0.25, 4]
    machine = _boltzmann._machine(recipe, "adaptive-tap", 0.25)
    assert (machine.method, machine.num_hidden) == ("adaptive_tap", 0)
    asked = []

    def digits(*given: Any) -> None:
        asked.append(given)
        raise KeyboardInterrupt

    monkeypatch.setattr(_boltzmann, "digits", digits)
    with pytest.raises(KeyboardInterrupt):
        _boltzmann.digit_halves(recipe)
    assert asked == [(0.3, 4)]


def test_a_line_of_the_table() -> None:
    said = []
    row = {"method": "tap", "validation_error": 0.12, "test_error": 0.345, "complete_seconds": 2.0}
    console = SimpleNamespace(print=lambda line, **_: said.append(line.split()))
    _boltzmann._print(console, {**row, "l2": 0.01, "fit_seconds": 1.5})
    expected = "tap validation 12.00% test 34.50% fit 1.50 s, complete 2.00 s l2 0.01"
    assert said == [expected.split()]


def test_the_pictures_show_what_was_completed_and_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[dict[str, np.ndarray]] = []
    monkeypatch.setattr(plots, "image_rows", lambda rows, _: shown.append(rows) or Figure((1, 1)))
    rng = np.random.default_rng(0)
    test, drawn = (rng.choice([-1.0, 1.0], size=(n, 64)) for n in (50, 30))
    row = {"method": "tap", "test_error": 0.123, "validation_error": 0.4, "completed": -test}
    asked = []

    def sample(*given: Any, **named: Any) -> np.ndarray:
        asked.append((given, named))
        return drawn

    machine = SimpleNamespace(method="tap", sample=sample)
    console = Console(quiet=True)
    recipe = Boltzmann(samples=30, seed=4)
    data = _boltzmann.Halves(test[:0], test[:0], test)
    _boltzmann._draw(recipe, Run(tmp_path), data, [row], machine, console)
    completed, whole = shown
    assert list(completed) == ["image", "given", "tap 12.3%"]
    images = completed["image"]
    assert images.shape == (12, 8, 8)
    assert {image.tobytes() for image in images} <= {image.tobytes() for image in test}
    np.testing.assert_array_equal(completed["tap 12.3%"], -images)
    np.testing.assert_array_equal(completed["given"][:, :4], images[:, :4])
    assert np.isnan(completed["given"][:, 4:]).all()
    assert asked == [((30,), {"random_state": 4})]
    digits = np.concatenate(list(whole.values())).reshape(-1, 64)
    np.testing.assert_array_equal(digits[:30], drawn)
    assert np.isnan(digits[30:]).all()  # of the last row of twelve


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--methods tapp", "'tapp'"),
        ("--l2 -1", "l2 must be numbers above 0"),
        ("--l2 0.1 0.2 0.1", "l2 must differ, got 0.1 0.2 0.1"),
        ("--num-hidden 0", "num_hidden"),
        ("--samples -1", "samples"),
        ("--threads -1", "threads"),
        ("--methods tap --num-hidden 3", "--num-hidden has no meaning for methods without pcd"),
        ("--methods naive --num-updates 5", "--num-updates has no meaning"),
    ],
)
def test_settings_out_of_range(
    flags: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["boltzmann", "--run-dir", str(tmp_path / "run"), *flags.split()]) == 1
    line = capsys.readouterr().err
    assert line.startswith("dia: ")
    assert says in line
    assert not (tmp_path / "run").exists()
