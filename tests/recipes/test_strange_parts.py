"""`dia report` of texts, spins and faults of the program: what is missing is named."""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deep_implicit_attention.recipes import report_run
from deep_implicit_attention.recipes._report_page import Story
from deep_implicit_attention.training import Run

from .conftest import Outcome
from .reports import Page, configure, reported, rescale


def test_text_of_strangers_is_not_markup(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "a<script>alert(1)</script>": "</td>"}))
    page = reported(copy)
    assert "<script>alert" not in page.source
    assert page.values["setting"]["a<script>alert(1)</script>"] == "</td>"


def test_a_text_that_is_gone(said: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(said, tmp_path / "copy"))
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "text": str(tmp_path / "gone.txt")}))
    page = reported(copy)
    assert any("text cannot be read" in notice for notice in page.notices)
    assert {"A sample", "Training"} <= set(page.titles)
    (tmp_path / "gone.txt").write_text("another text, " * 20)
    page = reported(copy)
    assert any("not the one" in notice for notice in page.notices)


def test_it_tells_what_it_is_at(said: Path, tmp_path: Path) -> None:
    told: list[str] = []
    page = Page(report_run(said, tmp_path / "other.html", tell=told.append))
    assert {"Watch it settle", "Training", "Convergence"} <= set(told) <= set(page.titles)


def test_parts_of_a_text_run(said: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(said, tmp_path / "copy"))
    (copy / "sample.txt").unlink()
    rescale(copy / "model.safetensors", "", math.nan)
    page = reported(copy)
    assert any("no sample.txt" in notice for notice in page.notices)
    assert any("strengths must be finite, got nan" in notice for notice in page.notices)
    assert {"Watch it settle", "Training", "Convergence"} <= set(page.titles)
    configure(copy, length=10**7)
    page = reported(copy)
    assert any("too short for length 10000000" in notice for notice in page.notices)
    assert "Training" in page.titles
    (copy / "vocabulary.json").write_text('["a", "b"]')
    page = reported(copy)
    assert any("strings characters and text_sha256" in notice for notice in page.notices)


def test_answers_of_another_form(ising: Callable[..., Outcome]) -> None:
    folder = ising("--num-spins", "5", "--betas", "0.5", "1.0", "--beta", "1.0").folder
    table = "At β = 1.0:"
    assert table in reported(folder).source
    for couplings, said in (
        ([1.0, 2.0, 3.0], "must have shape (N, N), got (3,)"),
        ([[0.0, math.nan], [math.nan, 0.0]], "must be finite"),
    ):
        np.savez(folder / "answers.npz", couplings=couplings)
        page = reported(folder)
        assert any(said in notice for notice in page.notices)
        assert {"Results", "Pictures"} <= set(page.titles)
    (folder / "ising.png").write_bytes(b"")
    configure(folder, beta=..., colour="blue")
    page = reported(folder)
    for said in ("ising.png is damaged: it is empty", "settings beta are not in it",
                 "settings colour are not known", "no beta"):  # fmt: skip
        assert any(said in notice for notice in page.notices), said
    assert table not in page.source
    assert "data:image/png" not in page.source
    assert "Results" in page.titles  # the answers at every beta


def test_a_machine_of_another_size(machines: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(machines, tmp_path / "copy"))
    np.savez(copy / "machine.npz", couplings=np.zeros((2, 2)), fields=np.zeros(2))
    configure(copy, l2=...)
    page = reported(copy)
    for said in ("shape (N,) of at least 64 units, got (2,)", "at least 64 units, got (2, 2)"):
        assert any(said in notice for notice in page.notices)
    assert any("settings l2 are not in it" in notice for notice in page.notices)
    assert {"Results", "Pictures"} <= set(page.titles)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (TypeError("f() takes 2"), "TypeError: f() takes 2"),
        (AssertionError(), "AssertionError"),
        (NameError("name 'z' is not defined"), "NameError: name 'z' is not defined"),
        (RuntimeError("a (2) and b (3)"), "RuntimeError: a (2) and b (3)"),
        (KeyError("step"), "KeyError: 'step'"),
        (AttributeError("no 'z'"), "AttributeError: no 'z'"),
        (IndexError(""), "IndexError"),
        (ValueError("tol must be above 0"), "tol must be above 0"),
        (OSError(2, "No such file", "model.safetensors"), "model.safetensors: No such file"),
    ],
)
def test_a_fault_of_the_program_can_be_recognised(
    error: Exception, reason: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its type is in the page, where it was raised is in the log."""

    def raises_it() -> None:
        raise error

    story = Story(Run(tmp_path), {})
    with caplog.at_level(logging.DEBUG, "deep_implicit_attention"):
        assert story.attempt("It cannot be shown", raises_it) is None
    assert story.missing == [f"It cannot be shown: {reason}"]
    (record,) = caplog.records
    assert (record.levelno, record.getMessage()) == (logging.DEBUG, "It cannot be shown")
    assert record.exc_info is not None
    assert record.exc_info[1] is error
    assert "in raises_it" in caplog.text


FIELDS, COUPLINGS = "Blue: rather black. Red: rather white", "Sizes |J_ij| of the couplings"


@pytest.mark.parametrize(
    ("changes", "said", "shown"),
    [
        ({}, [], [FIELDS, COUPLINGS]),
        ({"couplings": math.nan}, ["strengths must be finite, got nan"], [FIELDS]),
        ({"couplings": None}, ["couplings are missing"], [FIELDS]),
        ({"fields": math.nan}, ["must be finite, got nan"], [COUPLINGS]),
        ({"fields": None}, ["fields are missing"], [COUPLINGS]),
        ({"couplings": np.zeros((65, 65))}, ["for 64 fields", "got (65, 65)"], [FIELDS]),
        ({"couplings": np.zeros(()), "fields": None}, ["got ()", "fields are missing"], []),
    ],
)
def test_fields_and_couplings_of_a_machine_are_shown_without_each_other(
    changes: dict[str, Any], said: list[str], shown: list[str], machines: Path, tmp_path: Path
) -> None:
    """An array that is not there, of another shape, or with one number that is not finite."""
    copy = Path(shutil.copytree(machines, tmp_path / "copy"))
    with np.load(copy / "machine.npz") as found:
        arrays = {name: np.array(found[name]) for name in ("couplings", "fields")}
    for name, change in changes.items():
        if change is None:
            del arrays[name]
        elif isinstance(change, float):
            arrays[name].flat[1] = change
        else:
            arrays[name] = change
    np.savez(copy / "machine.npz", **arrays)
    page = reported(copy)
    for words in said:
        assert any(words in notice for notice in page.notices), words
    assert len(page.notices) <= len(said)
    assert len(page.figures) == len(shown)
    assert ("Couplings" in page.titles) == bool(shown)  # no heading of nothing
    for figure, start in zip(page.figures, shown, strict=True):
        assert figure.startswith(start)
