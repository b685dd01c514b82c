"""Every Python block in the README and in docs/ runs, and prints what the page says it prints."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```$)?", re.DOTALL | re.MULTILINE)


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


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_blocks_run_and_print_what_they_say(page):
    run(page)


def test_the_readme_is_not_empty():
    assert len(blocks(ROOT / "README.md")) >= 3


def test_the_readme_survives_a_batch_fifty_times_as_large():
    names = run(ROOT / "README.md", lambda code: code.replace("randn(4,", "randn(200,"))
    assert len(names["z"]) == 200
    assert bool(torch.isfinite(names["z"]).all())
