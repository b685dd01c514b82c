"""`dia boltzmann`: its figures are those of the machines, chosen without the test images."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits

from deep_implicit_attention.cli import main
from deep_implicit_attention.recipes import Boltzmann, _boltzmann


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


@pytest.mark.parametrize(
    "flags", ["--methods tapp", "--l2 -1", "--num-hidden 0", "--samples -1", "--threads -1"]
)
def test_settings_out_of_range(
    flags: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["boltzmann", "--run-dir", str(tmp_path / "run"), *flags.split()]) == 1
    assert capsys.readouterr().err.startswith("dia: ")
    assert not (tmp_path / "run").exists()
