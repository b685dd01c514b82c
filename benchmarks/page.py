"""The page of results: every benchmark writes the section with its own title."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from deep_implicit_attention.training._files import check_writable


def command_line(description: str | None) -> argparse.ArgumentParser:
    """A command line with `--out`, the page to write to."""
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawTextHelpFormatter
    )
    made.add_argument("--out", type=_writable, default="docs/benchmarks.md", help="the page")
    return made


def parse_out(description: str | None) -> Path:
    """The page to write to, from a command line that has no more than that."""
    return command_line(description).parse_args().out


def _writable(name: str) -> Path:
    """The path `name`, refused here if it could not be written after minutes of measuring."""
    page = Path(name)
    if page.is_dir():
        raise argparse.ArgumentTypeError(f"{page} is a folder: give a file, {page / 'page.md'}")
    try:
        check_writable(page)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{page} cannot be written: {error.strerror}") from None
    return page


def provenance(command: str = "make bench") -> str:
    """With what the figures were made."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    return (
        f"`{command}`; torch {torch.__version__}, Python {platform.python_version()}, commit "
        f"{commit or 'unknown'}"
    )


def machine() -> str:
    """Processor, cores and threads, and the versions of the rivals."""
    named = [
        line.partition(":")[2].strip()
        for line in _lines(Path("/proc/cpuinfo"))
        if line.startswith("model name")
    ]
    processor = named[0] if named else platform.processor() or platform.machine()
    return (
        f"{processor}, {os.cpu_count()} cores, {torch.get_num_threads()} thread(s), "
        f"{torch.backends.cpu.get_cpu_capability()}; torchdeq {version('torchdeq')}"
    )


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def write_results(page: Path, title: str, results: Any, command: str = "make bench") -> None:
    """Put `results` under `title` of the JSON file beside `page`."""
    path = page.with_suffix(".json")
    everything = json.loads(path.read_text()) if path.exists() else {}
    made = {"provenance": provenance(command), "machine": machine(), "results": results}
    everything[title] = made
    path.write_text(json.dumps(everything, indent=1) + "\n")


def write_section(page: Path, title: str, body: str) -> None:
    """Put `body` under the heading `title` of `page`, in the place of what stands there."""
    old = page.read_text() if page.exists() else "# Benchmarks\n"
    head, *sections = old.split("\n## ")
    bodies = dict(section.split("\n", 1) for section in sections)
    bodies[title] = f"\n{body.strip()}\n"
    page.write_text(head + "".join(f"\n## {name}\n{text}" for name, text in bodies.items()))
    print(f"\nwritten to {page}")
