"""The site builds without a warning, opens without a network, and leads to every public name."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

import deep_implicit_attention
from tests.recipes.chromium import Browser, chromium, found

ROOT = Path(__file__).parents[2]
PACKAGE = Path(deep_implicit_attention.__file__).parent
ROOMS = sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py"))

pytest.importorskip("mkdocs", reason="pip install -c constraints.txt -e '.[docs]'")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT, capture_output=True, text=True, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        check=False,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    assert "WARNING" not in built.stderr, built.stderr
    return folder


def links(page: Path) -> set[str]:
    return set(re.findall(r'href="([^"]+)"', page.read_text(encoding="utf-8")))


def test_every_public_name_is_two_clicks_from_the_start(site: Path) -> None:
    assert "reference/index.html" in links(site / "index.html")
    second = links(site / "reference" / "index.html")
    for room in ROOMS:
        module = importlib.import_module(f"deep_implicit_attention.{room}")
        page = (site / "reference" / f"{room}.html").read_text(encoding="utf-8")
        for name in module.__all__:
            anchor = f"deep_implicit_attention.{room}.{name}"
            assert f"{room}.html#{anchor}" in second, name
            assert f'id="{anchor}"' in page, name


def test_nothing_is_fetched(site: Path) -> None:
    for page in site.glob("**/*.html"):
        html = page.read_text(encoding="utf-8")
        assert not re.search(r'\bsrc="(https?:)?//', html), page
        assert not re.search(r'<link[^>]+rel="stylesheet"[^>]+href="(https?:)?//', html), page


def test_a_mechanism_of_ones_own_takes_thirty_lines() -> None:
    text = (ROOT / "docs" / "own-mechanism.md").read_text(encoding="utf-8")
    first = text.split("```python\n")[1].split("```")[0]
    assert "class Ring(DEQModule)" in first
    assert len(first.splitlines()) <= 30


def test_pictures_can_be_enlarged_and_floors_are_for_the_house(site: Path) -> None:
    html = (site / "idea.html").read_text(encoding="utf-8")
    pictures = re.findall(r'<img [^>]*src="(pictures/[^"]*)"', html)
    assert len(pictures) >= 3
    for picture in pictures:
        assert f'<a class="enlarge" href="{picture}"' in html
    for room in ROOMS:
        page = (site / "reference" / f"{room}.html").read_text(encoding="utf-8")
        assert not re.search(r"Floor \d:", page), room


# --- in a browser -----------------------------------------------------------------------------

needs_browser = pytest.mark.skipif(
    found() is None,
    reason="NOT TESTED: the site in a browser; there is no Chromium on the path, and none is named "
    "by the variable CHROMIUM",
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory):
    with chromium(tmp_path_factory.mktemp("profile")) as started:
        yield started


@needs_browser
def test_the_search_works_from_disk(site: Path, browser: Browser) -> None:
    browser.shape(1300, 900)
    for page in ("index.html", "methods/tap.html"):
        browser.open(site / page)
        browser.value("document.querySelector('.md-search__input').focus()")
        for letter in "AdaptiveTAP":
            for kind in ("keyDown", "keyUp"):
                text = letter if kind == "keyDown" else ""
                browser.ask("Input.dispatchKeyEvent", type=kind, key=letter, text=text)
        results = "[...document.querySelectorAll('.md-search-result__item a')].map((a) => a.href)"
        waited = time.monotonic() + 20
        while not browser.value(results) and time.monotonic() < waited:
            time.sleep(0.1)
        assert any("reference/spins.html" in link for link in browser.value(results))
        asked = [e["params"]["request"]["url"] for e in browser.events
                 if e["method"] == "Network.requestWillBeSent"]  # fmt: skip
        assert all(url.startswith(("file:", "data:")) for url in asked)


@needs_browser
def test_formulas_code_and_names_are_whole(site: Path, browser: Browser) -> None:
    """On a screen of 1300 pixels nothing has to be scrolled sideways, and no name is broken."""
    browser.shape(1300, 900)
    wide = (
        "[...document.querySelectorAll('.md-content pre code')]"
        ".filter((e) => e.scrollWidth > e.clientWidth + 1).map((e) => e.textContent)"
    )
    broken = (
        "[...document.querySelectorAll('td code')]"
        ".filter((e) => e.getClientRects().length > 1).map((e) => e.textContent)"
    )
    for page in ("theory", "choosing", "methods/adaptive-tap", "own-mechanism"):
        browser.open(site / f"{page}.html")
        assert browser.value(wide) == [], page
        assert browser.value(broken) == [], page
