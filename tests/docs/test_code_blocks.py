"""Every Python block in the README and in docs/ runs, and prints what the page says it prints.

Pictures and links are there.
"""

from __future__ import annotations

import contextlib
import io
import re
import runpy
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```$)?", re.DOTALL | re.MULTILINE)


# Their examples take several seconds.
LONG = ("free-energy.md", "training.md")


def program(page: Path):
    """A page as the variant of a test that runs its blocks."""
    return pytest.param(page, marks=pytest.mark.slow if page.name in LONG else ())


def blocks(page: Path) -> list[tuple[str, str]]:
    return [(code, output) for code, output in BLOCK.findall(page.read_text())]


def run(page: Path, edit=None) -> dict:
    """Run the blocks of a page one after the other in one namespace, comparing what they print.

    With `edit`, run them edited, when they print something else.
    """
    names: dict = {}
    for number, (code, expected) in enumerate(blocks(page), start=1):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(edit(code) if edit else code, page.name, "exec"), names)
        if edit is None:
            assert printed.getvalue() == expected, f"{page.name}, block {number}"
    return names


@pytest.mark.parametrize("page", [*map(program, PAGES)], ids=lambda p: p.name)
def test_blocks_run_and_print_what_they_say(page):
    run(page)


def test_the_readme_is_not_empty():
    assert len(blocks(ROOT / "README.md")) >= 3


def test_every_method_page_has_an_example_and_a_picture():
    pages = sorted((ROOT / "docs" / "methods").glob("*.md"))
    assert len(pages) == 9
    for page in pages:
        assert blocks(page), page.name
        assert re.search(r"^!\[.+\]\(\.\./pictures/[a-z-]+\.png\)$", page.read_text(), re.M), (
            page.name
        )


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_to_files_of_the_repository(page):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        assert (page.parent / target).resolve().is_relative_to(ROOT)
        assert (page.parent / target).exists(), target


def test_pictures_are_small_and_all_in_use():
    text = "".join(page.read_text() for page in PAGES)
    pictures = sorted((ROOT / "docs" / "pictures").iterdir())
    assert pictures
    for picture in pictures:
        assert f"pictures/{picture.name}" in text
        assert picture.stat().st_size < 60_000


@pytest.mark.slow
def test_the_script_makes_every_picture(tmp_path):
    """In a few minutes; what the pictures show is computed with fixed seeds."""
    module = runpy.run_path(str(ROOT / "docs" / "pictures.py"))
    module["main"]([], tmp_path)
    made = {picture.name for picture in tmp_path.iterdir()}
    assert made == {picture.name for picture in (ROOT / "docs" / "pictures").iterdir()}


@pytest.mark.slow
def test_the_readme_survives_a_batch_fifty_times_as_large():
    names = run(ROOT / "README.md", lambda code: code.replace("randn(4,", "randn(200,"))
    assert len(names["z"]) == 200
    assert bool(torch.isfinite(names["z"]).all())
