"""`dia report` in a browser: it opens, moves, and is readable."""

from __future__ import annotations

import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from .chromium import Browser, chromium, found
from .reports import Page, configure, reported, rescale, unpacked

pytestmark = pytest.mark.drawn

needs_browser = pytest.mark.skipif(
    found() is None,
    reason="NOT TESTED: the report in a browser; there is no Chromium on the path, and none is "
    "named by the variable CHROMIUM",
)
RIGHT, LEFT, HOME, END, TAB = (
    ("ArrowRight", 39), ("ArrowLeft", 37), ("Home", 36), ("End", 35), ("Tab", 9),
)  # fmt: skip


@pytest.fixture(scope="module")
def page(run: Path) -> Page:
    return Page(run / "report.html")


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


# --- what is not finite, or not in equilibrium, is said to be so --------------------------------


def every_status(browser: Browser) -> list[str]:
    """What is said at every place of the slider, for the example that is chosen."""
    last = int(browser.value("document.getElementById('step').max"))
    found = []
    for step in range(last + 1):
        browser.value(f"go({step})")
        found.append(words(browser, "status"))
    return found


@needs_browser
def test_steps_that_run_away(copy: Path, browser: Browser) -> None:
    """Couplings that are much too strong: plain steps grow past what float32 can hold."""
    rescale(copy / "model.safetensors", "_weight", 200.0)
    page = reported(copy)
    assert re.search(r"run away from \d+ of these \d+ images: from step \d+ on", page.source)
    browser.open(copy / "report.html")
    far = every_status(browser)
    # Whether the last step is still within float32 depends on the weights, by a factor of ten.
    assert re.search(r"[\d.]+e\+\d+ times its length away|no equilibrium", far[-4])
    assert re.search(r"e\+\d+ times|no equilibrium|equilibrium is not finite", far[-2])
    assert "relative residual not finite" in far[-2]
    assert not any("NaN" in words or "undefined" in words for words in far)
    assert "and beyond" in words(browser, "lengths-legend")
    assert not browser.complaints()


@needs_browser
def test_a_solver_that_fails_is_not_in_equilibrium(copy: Path, browser: Browser) -> None:
    configure(copy, max_iter=1, tol=1e-6)
    page = reported(copy)
    assert page.data["solved"] == [False] * len(page.data["examples"])
    assert "The solver reached no equilibrium for" in page.source
    browser.open(copy / "report.html")
    for said in every_status(browser):
        assert "the solver reached no equilibrium" in said
        assert "away from equilibrium" not in said
    assert not browser.complaints()


@needs_browser
def test_probabilities_that_are_not_finite_are_read_as_nothing(
    copy: Path, browser: Browser
) -> None:
    rescale(copy / "model.safetensors", "head", math.nan)
    page = reported(copy)
    assert {one["read"] for one in page.data["examples"]} == {None}
    assert "are not finite: they count as wrong, and stand in no column" in page.source
    assert "accuracy 0.00%" in page.source
    browser.open(copy / "report.html")
    for said in every_status(browser):
        assert "not read, the probabilities are not finite" in said
    assert "not read" in words(browser, "example")
    assert "0.0 %" not in words(browser, "bars")
    assert "not finite" in words(browser, "bars")
    assert not browser.complaints()


@needs_browser
def test_a_loss_that_is_not_finite(said: Path, tmp_path: Path, browser: Browser) -> None:
    copy = Path(shutil.copytree(said, tmp_path / "copy"))
    rescale(copy / "model.safetensors", "norm.", math.nan)
    reported(copy)
    browser.open(copy / "report.html")
    for words_said in every_status(browser):
        assert "mean loss of the window not finite" in words_said
        assert "the probabilities are not finite" in words_said
    browser.value("document.getElementById('place').focus()")
    browser.press(*HOME)
    assert "at position 1 " in words(browser, "status")
    assert not browser.complaints()


@needs_browser
def test_readers_who_want_no_motion_see_the_last_couplings(run: Path, browser: Browser) -> None:
    shown = "document.querySelector('img.gif').currentSrc.slice(0, 15)"
    browser.shape(1200, 900)
    for wish, kind in (("no-preference", "data:image/gif;"), ("reduce", "data:image/png;")):
        motion = {"name": "prefers-reduced-motion", "value": wish}
        browser.ask("Emulation.setEmulatedMedia", features=[motion])
        browser.open(run / "report.html")
        assert browser.value(shown) == kind
