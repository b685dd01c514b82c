"""`dia report`: its numbers are the run's, and it needs nothing else."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from deep_implicit_attention.models import SiteClassifier
from deep_implicit_attention.recipes import _report_page, _report_text, load_recipe, report_run
from deep_implicit_attention.training import Run, text_data, windows

from .conftest import PHRASE, Outcome, invoke
from .reports import Page, records, reported, unpacked

pytestmark = pytest.mark.drawn


@pytest.fixture(scope="module")
def page(run: Path) -> Page:
    return Page(run / "report.html")


# --- a whole run ----------------------------------------------------------------------------


def test_the_numbers_are_those_of_the_files(run: Path, page: Page) -> None:
    assert page.values["metric"] == records(run)[-1]
    assert page.values["setting"] == json.loads((run / "config.json").read_text())
    assert not page.notices
    accuracy = records(run)[-1]["test_accuracy"]
    loss = records(run)[-1]["test_loss"]
    assert f"Test accuracy {accuracy:.2%}, loss {loss:.4f} nats" in page.source


def test_it_is_one_file_without_a_network(page: Page) -> None:
    assert len(page.source.encode()) < 3e6
    for reference in page.references:
        assert reference.startswith(("data:", "#")), reference[:80]
    assert not re.search(r"url\((?!#)", page.source)
    assert "@import" not in page.source
    assert len(page.ids) == len(set(page.ids))  # also those of the figures
    targets = {reference[1:] for reference in page.references if reference.startswith("#")}
    assert targets <= set(page.ids)


def test_every_section_is_there(page: Page) -> None:
    assert page.titles == [
        *("Results", "Watch it settle", "Training", "Convergence", "Couplings", "Errors"),
        *("Configuration", "How this was made"),
    ]
    assert page.source.count("<svg ") == 9
    assert page.source.count("<svg ") == page.source.count('role="img" aria-label') - 4


def test_the_moving_part_shows_plain_steps_and_the_equilibrium(run: Path, page: Page) -> None:
    """Against z ← F(z; x) written out."""
    recipe = load_recipe(Run(run))
    data = recipe.load()
    model: SiteClassifier = recipe.model(data)
    Run(run).load_weights(model)
    model.eval()
    shown = page.data
    chosen = [one["index"] for one in shown["examples"]]
    images = data.test.images[chosen]
    assert [one["label"] for one in shown["examples"]] == data.test.labels[chosen].tolist()
    assert set(data.test.labels[chosen].tolist()) == set(range(10))
    p, z, lengths = (unpacked(shown[name]) for name in ("probabilities", "z", "lengths"))
    with torch.no_grad():
        x = model.sources(images)
        step, state = model.attention.map(x), torch.zeros_like(x)
        equilibrium = model.attention(x)
        assert [one["read"] for one in shown["examples"]] == _read(model, equilibrium)
        for k in range(len(shown["steps"]) + 1):
            state = equilibrium if k == len(shown["steps"]) else step(state)
            scores = model.head(state[:, 0]).softmax(dim=1).numpy()
            np.testing.assert_allclose(p[:, k], scores, atol=1e-4)
            np.testing.assert_allclose(shown["size"] * z[:, k], state.numpy(), atol=1e-3)
            np.testing.assert_allclose(
                shown["length"] * lengths[:, k], state.norm(dim=-1).numpy(), atol=1e-3
            )
            image = step(state)
            residual = (image - state).flatten(1).norm(dim=1) / image.flatten(1).norm(dim=1)
            np.testing.assert_allclose(
                [row[k] for row in shown["residuals"]], residual.numpy(), rtol=2e-2, atol=1e-6
            )
            gap = (state - equilibrium).flatten(1).norm(dim=1) / equilibrium.flatten(1).norm(dim=1)
            np.testing.assert_allclose(
                [row[k] for row in shown["distances"]], gap.numpy(), rtol=1e-2, atol=1e-6
            )
    pixels = unpacked(shown["pixels"])[..., 0]
    assert np.corrcoef(pixels.ravel(), images.numpy().ravel())[0, 1] > 1 - 1e-6
    assert (pixels.min(), pixels.max()) == (0, 1)


def _read(model: SiteClassifier, z: Tensor) -> list[int]:
    return model.head(z[:, 0]).argmax(dim=1).tolist()


def test_the_film_has_a_frame_for_every_checkpoint(run: Path) -> None:
    film = Image.open(run / "couplings.gif")
    assert film.n_frames == len(Run(run).checkpoints.steps()) >= 4  # type: ignore[attr-defined]


@pytest.mark.slow
def test_looking_changes_nothing(run: Path, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in run.iterdir() if path.is_file()}
    out = tmp_path / "elsewhere.html"
    outcome = invoke(run, "report", str(run), "--out", str(out))
    assert outcome.out.startswith(str(out))
    assert {path: path.read_bytes() for path in run.iterdir() if path.is_file()} == before
    assert out.read_bytes() == (run / "report.html").read_bytes()
    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    (copy / "couplings.gif").unlink()
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    assert "data:image/gif" in Page(report_run(copy, tmp_path / "other.html")).source
    assert {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()} == before


def test_where_the_page_cannot_be_written(run: Path, tmp_path: Path) -> None:
    for out, why in ((tmp_path / "none" / "x.html", "no folder"), (tmp_path, "is a folder")):
        complaint = invoke(run, "report", str(run), "--out", str(out)).complaint()
        assert f"out must be a file in a folder that exists, got {out}" in complaint
        assert why in complaint


def test_that_a_page_cannot_be_written_is_said_before_it_is_made(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_report_page, "_sections", lambda _: pytest.fail("made all the same"))
    out = tmp_path / f"{248 * 'x'}.html"  # too long only while it is written, as `out`.part
    assert "File name too long" in invoke(run, "report", str(run), "--out", str(out)).complaint()
    assert not list(tmp_path.iterdir())


def test_the_page_replaces_no_file_of_the_run(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    checkpoint = next((run / "checkpoints").iterdir())
    for out in (run / "config.json", run / "model.safetensors", checkpoint):
        with pytest.raises(ValueError, match="out must not replace a file of the run"):
            report_run(run, out)
    monkeypatch.chdir(run)
    with pytest.raises(ValueError, match="out must not replace a file of the run"):
        report_run(".", "metrics.jsonl")
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


# --- runs that train no network ---------------------------------------------------------------


def test_methods_on_a_system(ising: Callable[..., Outcome]) -> None:
    folder = ising("--num-spins", "5", "--betas", "0.5", "1.0", "--beta", "1.0").folder
    outcome = invoke(folder, "report", str(folder))
    size = (folder / "report.html").stat().st_size
    assert outcome.out == f"{folder / 'report.html'}: {size / 1e6:.1f} MB\n"
    page = Page(folder / "report.html")
    assert page.titles == [
        "Results", "Pictures", "Couplings", "Configuration", "How this was made",
    ]  # fmt: skip
    assert not page.notices
    assert "no relaxation to move through" in page.source
    assert "data:image/png;base64," in page.source
    assert_rows([record for record in records(folder) if record["beta"] == 1.0], page, 0)
    assert_rows(records(folder), page, 1)
    (folder / "ising.png").unlink()
    (folder / "answers.npz").write_bytes(b"PK half")
    page = reported(folder)
    assert any("no ising.png" in notice for notice in page.notices)
    assert any("answers.npz is damaged" in notice for notice in page.notices)
    assert page.titles == ["Results", "Configuration", "How this was made"]


def test_machines_that_learned(machines: Path, tmp_path: Path) -> None:
    page = Page(report_run(machines, tmp_path / "report.html"))  # others share that folder
    assert page.titles == [
        "Results", "Pictures", "Couplings", "Configuration", "How this was made",
    ]  # fmt: skip
    assert not page.notices
    found = {record["method"]: record for record in records(machines)}
    assert f"tap, gets {found['tap']['test_error']:.1%} of the pixels" in page.source
    assert page.source.count('class="png" src="data:image/png;base64,') == 2
    assert_rows(records(machines), page, 0)
    copy = Path(shutil.copytree(machines, tmp_path / "copy"))
    for name in ("machine.npz", "completions.png", "samples.png", "metrics.jsonl"):
        (copy / name).unlink()
    page = reported(copy)
    for name in ("machine.npz", "completions.png", "samples.png", "metrics.jsonl"):
        assert any(name in notice for notice in page.notices), name
    assert page.titles == ["Configuration", "How this was made"]


def assert_rows(expected: list[dict[str, Any]], page: Page, number: int) -> None:
    """The table holds these records, to six digits."""
    tables = re.findall(r'<table class="wide">(.*?)</table>', page.source, re.DOTALL)
    head, *rows = re.findall(r"<tr.*?</tr>", tables[number], re.DOTALL)
    names = re.findall(r"<th.*?>(.*?)</th>", head)
    assert len(rows) == len(expected)
    for record, row in zip(expected, rows, strict=True):
        cells = dict(zip(names, re.findall(r"<t[hd].*?>(.*?)</t[hd]>", row), strict=True))
        for name, value in record.items():
            if isinstance(value, float):
                assert float(cells.pop(name)) == pytest.approx(value, rel=1e-5)
            else:
                assert cells.pop(name) == ("–" if value is None else str(value))
        assert set(cells.values()) <= {"–"}


# --- a language model -------------------------------------------------------------------------


def test_windows_of_text_after_each_step(said: Path) -> None:
    page = Page(said / "report.html")
    assert page.values["metric"] == records(said)[-1]
    assert not page.notices
    assert page.titles == [
        *("Results", "Watch it settle", "A sample", "Training", "Convergence", "Couplings"),
        *("Configuration", "How this was made"),
    ]
    shown, recipe = page.data, load_recipe(Run(said))
    data = text_data(20 * PHRASE)
    model = recipe.model(len(data.vocabulary))
    Run(said).load_weights(model)
    model.eval()
    inputs, _ = windows(data.validation, 12)
    inputs = inputs[torch.linspace(0, len(inputs) - 1, min(6, len(inputs))).long()]
    assert all(len(one) == 13 for one in shown["windows"])
    assert [one[:12] for one in shown["windows"]] == [data.vocabulary.decode(i) for i in inputs]
    following, top, ids = unpacked(shown["next"]), unpacked(shown["top"]), np.array(shown["ids"])
    steps: list[int | None] = [*shown["steps"], None]
    for k, count in enumerate(steps):
        with torch.no_grad():
            p = model(inputs, **({} if count is None else {"steps": count})).softmax(dim=-1)
        for e, one in enumerate(shown["windows"]):
            targets = data.vocabulary.encode(one)[1:]
            expected = p[e, range(12), targets].numpy()
            np.testing.assert_allclose(following[e, k], expected, atol=1e-4)
            assert shown["losses"][e][k] == pytest.approx(-np.log(expected).mean(), abs=1e-3)
        np.testing.assert_allclose(
            top[:, k], p.sort(dim=-1, descending=True)[0][..., :6], atol=1e-4
        )
        assert (ids[:, k, :, 0] == p.argmax(dim=-1).numpy()).mean() > 0.99
    couplings = unpacked(shown["couplings"])
    with torch.no_grad():
        _, solutions = model(inputs, return_solution=True)
        last = model.couplings(inputs, solutions)[-1].mean(dim=1).tril(-1)  # of the last block
    largest = last.amax(dim=-1, keepdim=True).clamp_min(1e-12)
    np.testing.assert_allclose(couplings, last / largest, atol=1e-4)
    assert np.all(np.triu(couplings[0]) == 0)  # causal, and not of a character to itself
    assert couplings[0, 1:].max(axis=1) == pytest.approx(1)
    film = Image.open(said / "couplings.gif")
    assert film.n_frames == len(Run(said).checkpoints.steps()) >= 3  # type: ignore[attr-defined]
    assert len(page.source.encode()) < 3e6


@pytest.mark.slow
def test_long_windows_are_cut_short(
    said: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Page(said / "report.html").data
    monkeypatch.setattr(_report_text, "_CHARACTERS", 5)
    monkeypatch.setattr(_report_text, "_NUMBERS", 25 * 5 * 2 + 1)
    part = Page(report_run(said, tmp_path / "part.html")).data
    assert part["windows"] == [one[:6] for one in whole["windows"][:2]]
    assert part["couplings"]["shape"] == [2, 5, 5]
    # Later characters change nothing before them, at a fixed number of steps.
    both = min(len(part["steps"]), len(whole["steps"]))
    np.testing.assert_allclose(
        unpacked(part["next"])[:, :both], unpacked(whole["next"])[:2, :both, :5], atol=2e-4
    )
