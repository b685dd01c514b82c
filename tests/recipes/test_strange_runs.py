"""`dia report` of a damaged or strange run: what is missing is named, and the rest is shown."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pooch
import pytest
from PIL import Image

from deep_implicit_attention import plots
from deep_implicit_attention.training import Run

from .conftest import invoke
from .reports import Page, configure, records, reported, rescale, unpacked

# --- what is missing is named, and the rest is shown ------------------------------------------


def test_a_run_without_weights(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    page = reported(copy)
    assert any("model.safetensors" in notice for notice in page.notices)
    assert page.values["metric"] == records(copy)[-1]
    assert "Training" in page.titles
    assert "Watch it settle" not in page.titles
    assert page.data is None


def test_a_run_that_is_being_written(copy: Path) -> None:
    lines = (copy / "metrics.jsonl").read_text().splitlines()
    (copy / "metrics.jsonl").write_text("\n".join(lines[:2]) + '\n{"epoch": 3, "tra')
    page = reported(copy)
    assert any("1 line(s)" in notice for notice in page.notices)
    assert any("not ended" in notice for notice in page.notices)
    assert page.values["metric"] == json.loads(lines[1])
    assert {"Watch it settle", "Couplings"} <= set(page.titles)
    (copy / "metrics.jsonl").unlink()
    (copy / "model.safetensors").unlink()
    page = reported(copy)
    assert any("no metrics" in notice for notice in page.notices)
    assert page.titles == ["Configuration", "How this was made"]


def test_a_run_of_another_version(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    del config["zoom"]
    (copy / "config.json").write_text(json.dumps({**config, "colour": "blue"}))
    page = reported(copy)
    assert any("colour" in notice and "left out" in notice for notice in page.notices)
    assert any("zoom" in notice and "defaults" in notice for notice in page.notices)
    assert "Watch it settle" in page.titles
    (copy / "config.json").write_text(json.dumps({**config, "dim": 4}))
    page = reported(copy)
    assert any("is of another model" in notice for notice in page.notices)
    assert "Training" in page.titles
    assert "Couplings" not in page.titles
    (copy / "config.json").write_text(json.dumps({**config, "recipe": "of tomorrow"}))
    page = reported(copy)
    assert any("'of tomorrow' is unknown" in notice for notice in page.notices)
    assert page.values["metric"] == records(copy)[-1]


@pytest.mark.slow
def test_metrics_of_another_version(run: Path, copy: Path) -> None:
    """Names that are not there, and values of another kind."""
    lines = [{**record, "train_loss": "low"} for record in records(copy)]
    del lines[-1]["best_epoch"]
    (copy / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = reported(copy)
    assert any("summed up" in notice and "best_epoch" in notice for notice in page.notices)
    undrawn = [notice for notice in page.notices if "cannot be drawn" in notice]
    assert undrawn == [
        "The curve of cross-entropy (nats) cannot be drawn: train_loss must be numbers, got 'low'"
    ]
    assert page.values["metric"] == lines[-1]
    assert {"Watch it settle", "Couplings", "Errors"} <= set(page.titles)
    lost = {"Loss by epoch; training images are augmented"}
    assert set(page.figures) == set(Page(run / "report.html").figures) - lost


def test_a_run_that_was_interrupted_and_a_damaged_checkpoint(copy: Path) -> None:
    lines = [json.dumps({**record, "interrupted": True}) if "ending" in record else
             json.dumps(record) for record in records(copy)]  # fmt: skip
    (copy / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    step = Run(copy).checkpoints.steps()[0]
    Run(copy).checkpoints.path(step).write_bytes(b"nothing")
    page = reported(copy)
    assert any("interrupted" in notice for notice in page.notices)
    assert any(f"checkpoint of step {step}" in notice for notice in page.notices)
    assert Image.open(copy / "couplings.gif").n_frames == 3  # type: ignore[attr-defined]


def test_a_run_without_checkpoints_to_make_a_film_of(copy: Path) -> None:
    shutil.rmtree(copy / "checkpoints")
    (copy / "couplings.gif").unlink()
    page = reported(copy)
    assert "at least 3 checkpoints" in page.source
    assert "Watch it settle" in page.titles
    assert not page.notices
    assert not (copy / "couplings.gif").exists()


def test_data_that_is_not_there(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    lost = {**config, "recipe": "mnist", "data_dir": str(copy / "nowhere")}
    (copy / "config.json").write_text(json.dumps(lost))
    page = reported(copy)
    assert any("images cannot be read" in notice for notice in page.notices)
    assert "Training" in page.titles


def test_no_run(tmp_path: Path) -> None:
    outcome = invoke(tmp_path, "report", str(tmp_path / "nothing"))
    assert "holds no run" in outcome.complaint()


def test_a_file_is_no_run(copy: Path) -> None:
    for command in ("report", "evaluate"):
        complaint = invoke(copy, command, str(copy / "config.json")).complaint()
        assert "config.json holds no run: it is a file, not a folder" in complaint


@pytest.mark.parametrize("content", ["", '{"recipe": "dig', "[]"])
def test_settings_that_are_damaged(content: str, copy: Path) -> None:
    """The metrics are there, so the curves are."""
    (copy / "config.json").write_text(content)
    page = reported(copy)
    assert any("config.json" in notice and "settings are lost" in notice for notice in page.notices)
    assert page.titles[:2] == ["Results", "Training"]
    assert page.values["metric"] == records(copy)[-1]


@pytest.mark.quick("None", "of tomorrow")
@pytest.mark.parametrize("recipe", [..., None, ["digits"], "of tomorrow"])
def test_a_recipe_that_is_not_known_has_curves(recipe: object, copy: Path) -> None:
    configure(copy, recipe=recipe)
    page = reported(copy)
    named = "names no recipe" if recipe in (..., None) else f"{recipe!r} is unknown"
    assert any(named in notice for notice in page.notices)
    assert page.titles[:2] == ["Results", "Training"]


@pytest.mark.quick("settings0-*")
@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"seed": None, "threads": "two", "tol": "x"},
            ["seed must be int, got None", "threads must be int, got 'two'", "tol must be float"],
        ),
        ({"seed": "a"}, ["seed must be int, got 'a'"]),
        ({"threads": -3}, ["threads must be from 0 to"]),
    ],
)
def test_settings_that_cannot_be_used(
    settings: dict[str, Any], said: list[str], copy: Path
) -> None:
    configure(copy, **settings)
    page = reported(copy)
    assert len(page.notices) == len(said)
    for words in said:
        assert any(words in notice for notice in page.notices), words
    assert {"Watch it settle", "Convergence", "Couplings", "Errors"} <= set(page.titles)


@pytest.mark.quick("10000.0")
@pytest.mark.parametrize("factor", [100.0, 1e4])
def test_couplings_that_make_plain_steps_run_away(factor: float, copy: Path) -> None:
    """What is finite is shown, on a scale on which the first step and the answer are seen; what is
    not finite is said to be so."""
    rescale(copy / "model.safetensors", "_weight", factor)
    page = reported(copy)
    assert not page.notices
    assert re.search(r"run away from \d+ of these \d+ images: from step \d+ on", page.source)
    shown = page.data
    z = unpacked(shown["z"])
    broken = z <= -32768 / 32767
    assert not broken[:, [0, -1]].any()
    assert shown["clipped"]
    assert np.abs(z[:, [0, -1]]).max() >= 0.49
    assert np.abs(z[~broken]).max() == 1
    # Distances do not overflow where the numbers themselves do not.
    finite = ~broken.any(axis=(2, 3))
    solved = np.array(shown["solved"])
    distances = np.array(shown["distances"], dtype=float)
    assert np.isfinite(distances[solved][finite[solved]]).all()


@pytest.mark.quick("_weight")
@pytest.mark.parametrize("part", ["", "head", "_weight"])
def test_weights_that_are_not_finite(part: str, copy: Path) -> None:
    rescale(copy / "model.safetensors", part, math.nan)
    page = reported(copy)
    assert {"Watch it settle", "Training", "Convergence", "Errors"} <= set(page.titles)
    if part != "head":
        assert any("couplings cannot be drawn" in notice for notice in page.notices)
    assert page.values["metric"] == records(copy)[-1]


def test_a_checkpoint_that_is_not_finite(copy: Path) -> None:
    """A training that diverged late: one frame less, and nothing else is lost."""
    step = Run(copy).checkpoints.steps()[-1]
    rescale(Run(copy).checkpoints.path(step), "_weight", math.nan)
    page = reported(copy)
    left_out = [f"step {step} is left out: its couplings are not finite" in n for n in page.notices]
    assert left_out == [True]
    assert Image.open(copy / "couplings.gif").n_frames == 3  # type: ignore[attr-defined]
    assert {"Watch it settle", "Couplings", "Errors"} <= set(page.titles)


def test_files_that_are_folders(copy: Path) -> None:
    (copy / "couplings.gif").unlink()
    (copy / "couplings.gif").mkdir()
    (copy / "metrics.jsonl").unlink()
    (copy / "metrics.jsonl").mkdir()
    page = reported(copy)
    for said in ("couplings.gif cannot be written", "metrics cannot be read"):
        assert any(said in notice for notice in page.notices)
    assert "data:image/gif" in page.source
    assert {"Watch it settle", "Couplings", "Errors"} <= set(page.titles)


@pytest.mark.quick("coupling_graph*")
@pytest.mark.parametrize(
    ("name", "lost"),
    [
        ("confusion_matrix", "True and predicted classes"),
        ("coupling_graph", "Couplings between patches, as a matrix"),
        ("couplings_over_image", "Couplings between patches"),
        ("convergence", "Residuals of"),
        ("relaxation_horizon", "Error on"),
        ("curves", "Loss by epoch"),
    ],
)
def test_one_part_that_fails_costs_no_other(
    name: str, lost: str, run: Path, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever stands beside it, or below it, is there: all that a whole report has, but one."""
    works: Callable[..., Any] = getattr(plots, name)
    calls = []

    def fail_at_first(*given: object, **options: object) -> object:
        calls.append(name)
        if len(calls) == 1:
            raise RuntimeError("of all things")
        return works(*given, **options)

    whole = Page(run / "report.html")
    monkeypatch.setattr(plots, name, fail_at_first)
    page = reported(copy)
    assert ["of all things" in notice for notice in page.notices] == [True]
    (gone,) = set(whole.figures) - set(page.figures)
    assert gone.startswith(lost)
    assert page.figures == [figure for figure in whole.figures if figure != gone]
    assert set(whole.titles) - set(page.titles) <= {"Errors"}  # which has no other figure
    assert page.values["metric"] == records(copy)[-1]


def test_metrics_without_evaluations(copy: Path) -> None:
    (copy / "metrics.jsonl").write_text(json.dumps(records(copy)[-1]) + "\n")
    page = reported(copy)
    assert any("no evaluations" in notice for notice in page.notices)
    (copy / "metrics.jsonl").write_text("")
    assert any("is empty" in notice for notice in reported(copy).notices)


def test_nothing_is_downloaded(
    copy: Path, said: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        pytest.fail("the network was asked")

    monkeypatch.delenv("DIA_DATA", raising=False)
    monkeypatch.setattr(pooch, "os_cache", lambda project: tmp_path / "cache" / project)
    monkeypatch.setattr(pooch, "retrieve", fail)
    configure(copy, recipe="mnist", data_dir=None)
    page = reported(copy)
    assert any("train-images-idx3-ubyte" in notice for notice in page.notices)
    assert "Training" in page.titles
    other = Path(shutil.copytree(said, tmp_path / "other"))
    configure(other, text=None, data_dir=None)
    page = reported(other)
    assert any("does not hold tinyshakespeare.txt" in notice for notice in page.notices)
    assert "Training" in page.titles
