"""Benchmarks share a page: each replaces its own section and leaves the others alone."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.page import write_section


def test_a_section_takes_the_place_of_its_predecessor(tmp_path):
    page = tmp_path / "benchmarks.md"
    write_section(page, "First", "one\n\n| a |\n|---|\n")
    write_section(page, "Second", "two")
    write_section(page, "First", "three")
    assert page.read_text() == "# Benchmarks\n\n## First\n\nthree\n\n## Second\n\ntwo\n"


def test_what_others_wrote_stays_to_the_letter(tmp_path):
    page = tmp_path / "benchmarks.md"
    others = "# Benchmarks\n\nIntroduction.\n\n## First\n\n| a |\n|---|\n\n### Detail\n\ntext\n"
    page.write_text(others)
    write_section(page, "Second", "two")
    assert page.read_text() == others + "\n## Second\n\ntwo\n"


def test_page_and_numbers_say_the_same_of_how_they_were_made():
    docs = Path(__file__).parents[2] / "docs"
    page = (docs / "benchmarks.md").read_text()
    for title, made in json.loads((docs / "benchmarks.json").read_text()).items():
        section = page.split(f"\n## {title}\n")[1].split("\n## ")[0]
        assert made["provenance"] in section, title
