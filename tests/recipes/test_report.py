"""`dia report`: its numbers are the run's, it needs nothing else, and says what is missing."""

from __future__ import annotations

import base64
import json
import math
import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from deep_implicit_attention.models import SiteClassifier
from deep_implicit_attention.recipes import _report_text, load_recipe, report_run
from deep_implicit_attention.training import Run, text_data, windows

from .chromium import Browser, chromium, found
from .conftest import Outcome, call, invoke

PHRASE = "the quick brown fox jumps over the lazy dog.\n"


class Page(HTMLParser):
    """What stands in a report: exact values by kind and name, text, notices, the script's data."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.values: dict[str, dict[str, Any]] = {}
        self.notices: list[str] = []
        self.titles: list[str] = []
        self.references: list[str] = []
        self.ids: list[str] = []
        self.data: Any = None
        self._inside: list[tuple[str, dict[str, str | None]]] = []
        self.feed(self.source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self._inside.append((tag, given))
        for name in ("metric", "setting"):
            if f"data-{name}" in given:
                key = given[f"data-{name}"]
                self.values.setdefault(name, {})[str(key)] = json.loads(str(given["data-value"]))
        self.references += [
            str(given[name]) for name in ("src", "href", "xlink:href") if name in given
        ]
        if given.get("id"):
            self.ids.append(str(given["id"]))
        if given.get("class") == "notice":
            self.notices.append("")

    def handle_endtag(self, tag: str) -> None:
        while self._inside and self._inside.pop()[0] != tag:
            pass

    def handle_data(self, data: str) -> None:
        tag, given = self._inside[-1] if self._inside else ("", {})
        if given.get("class") == "notice":
            self.notices[-1] += data
        if tag == "h2":
            self.titles.append(data)
        if given.get("id") == "data":
            self.data = json.loads(data)


def unpacked(packed: dict[str, Any]) -> np.ndarray:
    codes = np.frombuffer(base64.b64decode(packed["codes"]), "<i2")
    return codes.reshape(packed["shape"]) / 32767


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run on the digits, with four checkpoints, and its report."""
    folder = tmp_path_factory.mktemp("runs") / "digits"
    flags = ("--epochs", "4", "--keep-checkpoints", "4", "--seed", "1", "--batch-size", "64")
    assert call(folder, "digits", *flags).status == 0
    assert invoke(folder, "report", str(folder)).status == 0
    return folder


@pytest.fixture(scope="module")
def page(run: Path) -> Page:
    return Page(run / "report.html")


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    """A run that may be damaged."""
    return Path(shutil.copytree(run, tmp_path / "copy"))


def reported(folder: Path) -> Page:
    return Page(report_run(folder))


# --- a whole run ----------------------------------------------------------------------------


def test_the_numbers_are_those_of_the_files(run: Path, page: Page) -> None:
    assert page.values["metric"] == records(run)[-1]
    assert page.values["setting"] == json.loads((run / "config.json").read_text())
    assert not page.notices
    accuracy = records(run)[-1]["test_accuracy"]
    assert f"Test accuracy {accuracy:.2%}" in page.source


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


def test_looking_changes_nothing(run: Path, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in run.iterdir() if path.is_file()}
    out = tmp_path / "elsewhere.html"
    outcome = invoke(run, "report", str(run), "--out", str(out))
    assert outcome.out.startswith(str(out))
    assert {path: path.read_bytes() for path in run.iterdir() if path.is_file()} == before
    assert out.read_bytes() == (run / "report.html").read_bytes()


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
    assert any("does not fit this model" in notice for notice in page.notices)
    assert "Training" in page.titles
    assert "Couplings" not in page.titles
    (copy / "config.json").write_text(json.dumps({**config, "recipe": "of tomorrow"}))
    page = reported(copy)
    assert any("'of tomorrow' is unknown" in notice for notice in page.notices)
    assert page.values["metric"] == records(copy)[-1]


def test_metrics_of_another_version(copy: Path) -> None:
    """Names that are not there, and values of another kind."""
    lines = [{**record, "train_loss": "low"} for record in records(copy)]
    del lines[-1]["best_epoch"]
    (copy / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = reported(copy)
    assert any("summed up" in notice and "best_epoch" in notice for notice in page.notices)
    assert any("cannot be drawn" in notice for notice in page.notices)
    assert page.values["metric"] == lines[-1]
    assert {"Watch it settle", "Couplings", "Errors"} <= set(page.titles)
    assert "Training" not in page.titles
    (copy / "config.json").write_text("[]")
    outcome = invoke(copy, "report", str(copy))
    assert "must hold an object" in outcome.complaint()


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


def test_text_of_strangers_is_not_markup(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "a<script>alert(1)</script>": "</td>"}))
    page = reported(copy)
    assert "<script>alert" not in page.source
    assert page.values["setting"]["a<script>alert(1)</script>"] == "</td>"


# --- runs that train no network ---------------------------------------------------------------


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "boltzmann"
    flags = ["--methods", "tap", "--l2", "0.01", "0.1", "--samples", "3"]
    assert invoke(folder, "boltzmann", "--run-dir", str(folder), *flags).status == 0
    return folder


def test_methods_on_a_system(ising: Callable[..., Outcome]) -> None:
    folder = ising("--num-spins", "5", "--betas", "0.5", "1.0", "--beta", "1.0").folder
    page = reported(folder)
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
    page = reported(machines)
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


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    (folder / "text.txt").write_text(20 * PHRASE)
    flags = (
        "--dim 8 --heads 2 --length 12 --batch-size 4 --iterations 6 --warmup 2 --evaluate-every 2 "
        "--sample 14 --evaluate-windows 3 --max-iter 200 --jacobian-penalty 0 --depth 2"
    )
    own = ["--text", str(folder / "text.txt"), "--run-dir", str(folder / "run")]
    outcome = invoke(folder / "run", "train", "shakespeare", *flags.split(), *own)
    assert outcome.status == 0, outcome.err
    report_run(folder / "run")
    return folder / "run"


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
    assert np.all(np.triu(couplings[0]) == 0)  # causal, and not of a character to itself
    assert couplings[0, 1:].max(axis=1) == pytest.approx(1)


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


# --- in a browser -----------------------------------------------------------------------------

needs_browser = pytest.mark.skipif(
    found() is None, reason="no Chromium on the path, and none named by the variable CHROMIUM"
)
RIGHT, LEFT, HOME, END, TAB = (
    ("ArrowRight", 39), ("ArrowLeft", 37), ("Home", 36), ("End", 35), ("Tab", 9),
)  # fmt: skip


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory):
    with chromium(tmp_path_factory.mktemp("profile")) as started:
        yield started


def drawing(browser: Browser, name: str) -> str:
    return browser.value(f"document.getElementById('{name}').toDataURL()")


def words(browser: Browser, name: str) -> str:
    return browser.value(f"document.getElementById('{name}').textContent")


@needs_browser
def test_it_opens_fast_and_the_keyboard_moves_it(run: Path, page: Page, browser: Browser) -> None:
    browser.shape(1200, 900)
    times = []
    for _ in range(3):
        browser.open(run / "report.html")
        times.append(
            browser.value("performance.timing.loadEventEnd - performance.timing.navigationStart")
        )
    assert 0 < min(times) < 1000
    browser.value("document.getElementById('example').focus()")
    browser.press(*TAB)
    assert browser.value("document.activeElement.id") == "step"
    seen = []
    for key in (HOME, RIGHT, RIGHT, END):
        browser.press(*key)
        at = int(browser.value("document.getElementById('step').value"))
        p = unpacked(page.data["probabilities"])[0, at]
        best = page.data["classes"][p.argmax()]
        assert f"read as {best} with {100 * p.max():.1f} %" in words(browser, "status")
        seen.append((at, drawing(browser, "sites"), drawing(browser, "lengths"),
                     drawing(browser, "course"), words(browser, "bars")))  # fmt: skip
    assert [at for at, *_ in seen] == [0, 1, 2, len(page.data["steps"])]
    for column in list(zip(*seen, strict=True))[1:4]:
        assert len(set(column)) == 4  # the pictures change with every step
    assert "equilibrium" in words(browser, "status")
    before = drawing(browser, "image"), words(browser, "status")
    browser.value("document.getElementById('example').focus()")
    browser.press("ArrowDown", 40)
    assert browser.value("document.getElementById('example').value") == "1"
    assert drawing(browser, "image") != before[0]
    assert words(browser, "status") != before[1]
    browser.value("document.getElementById('play').click()")
    assert words(browser, "play") == "Stop"
    assert browser.value("document.getElementById('step').value") == "0"
    browser.value("document.getElementById('play').click()")
    assert not browser.complaints()


@needs_browser
@pytest.mark.parametrize("name", ["run", "said"])
def test_it_is_readable_on_a_phone_and_in_the_dark(
    name: str, browser: Browser, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(name)
    grounds = []
    for dark in (False, True):
        browser.shape(360, 740, dark)
        browser.open(folder / "report.html")
        assert browser.value("document.documentElement.scrollWidth") <= 360
        style = "getComputedStyle(document.body)"
        colours = [browser.value(f"{style}.{part}") for part in ("color", "backgroundColor")]
        assert contrast(*colours) > 7
        grounds.append(colours[1])
        small = "Math.min(...[...document.querySelectorAll('p, td, th, label')]"
        assert browser.value(f"{small}.map((e) => parseFloat(getComputedStyle(e).fontSize)))") >= 13
        assert not browser.complaints()
    assert grounds[0] != grounds[1]


def contrast(*colours: str) -> float:
    """That of WCAG 2, of colours as `rgb(r, g, b)`."""
    light = []
    for colour in colours:
        parts = np.array([int(part) for part in re.findall(r"\d+", colour)[:3]]) / 255
        linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
        light.append(float(linear @ [0.2126, 0.7152, 0.0722]))
    return (max(light) + 0.05) / (min(light) + 0.05)


@needs_browser
def test_a_text_moves_by_step_and_by_position(said: Path, browser: Browser) -> None:
    page = Page(said / "report.html")
    browser.shape(1200, 900)
    browser.open(said / "report.html")
    browser.value("document.getElementById('place').focus()")
    browser.press(*HOME)
    browser.press(*RIGHT)
    assert browser.value("document.getElementById('place').value") == "1"
    top, ids = unpacked(page.data["top"]), page.data["ids"]
    likeliest = page.data["vocabulary"][ids[0][0][1][0]]
    said_so = words(browser, "status")
    assert f"{100 * top[0, 0, 1, 0]:.1f} %" in said_so
    assert f"likeliest is {likeliest.replace(' ', '␣')}" in said_so
    current = "document.querySelector('#text [aria-current]').textContent"
    assert browser.value(current) == page.data["windows"][0][1].replace(" ", "␣")
    before = drawing(browser, "course")
    browser.value("document.getElementById('step').focus()")
    browser.press(*END)
    assert drawing(browser, "course") != before
    loss = page.data["losses"][0][-1]
    assert math.isfinite(loss)
    assert f"{loss:.3f} nats" in words(browser, "status")
    assert not browser.complaints()
