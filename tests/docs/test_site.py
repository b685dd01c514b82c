"""The site builds without a warning, opens without a network, and leads to every public name."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import deep_implicit_attention

ROOT = Path(__file__).parents[2]
PACKAGE = Path(deep_implicit_attention.__file__).parent
ROOMS = sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py"))

pytest.importorskip("mkdocs", reason="pip install 'deep-implicit-attention[docs]'")


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
