"""The page of results: every benchmark writes the section with its own title."""

from __future__ import annotations

import argparse
import platform
import subprocess
from pathlib import Path

import torch


def parse_out(description: str | None) -> Path:
    """The page to write to, from the command line."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks.md"))
    return parser.parse_args().out


def provenance() -> str:
    """With what the figures were made."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    return (
        f"`make bench`; torch {torch.__version__}, Python {platform.python_version()}, commit "
        f"{commit or 'unknown'}"
    )


def write_section(page: Path, title: str, body: str) -> None:
    """Put `body` under the heading `title` of `page`, in the place of what stands there."""
    old = page.read_text() if page.exists() else "# Benchmarks\n"
    head, *sections = old.split("\n## ")
    bodies = dict(section.split("\n", 1) for section in sections)
    bodies[title] = f"\n{body.strip()}\n"
    page.write_text(head + "".join(f"\n## {name}\n{text}" for name, text in bodies.items()))
    print(f"\nwritten to {page}")
