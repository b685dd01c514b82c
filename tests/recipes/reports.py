"""What a report says, read from its file."""

from __future__ import annotations

import base64
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from deep_implicit_attention.recipes import report_run


class Page(HTMLParser):
    """What stands in a report: exact values by kind and name, text, notices, descriptions of
    figures, the script's data."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.values: dict[str, dict[str, Any]] = {}
        self.notices: list[str] = []
        self.titles: list[str] = []
        self.references: list[str] = []
        self.ids: list[str] = []
        self.figures: list[str] = []
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
        if tag == "svg" and "aria-label" in given:
            self.figures.append(str(given["aria-label"]))

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


def reported(folder: Path) -> Page:
    return Page(report_run(folder))


def configure(folder: Path, **settings: Any) -> None:
    """Other settings in a run's file; `...` for none."""
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **settings}
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))


def rescale(path: Path, part: str, factor: float) -> None:
    """Multiply the weights in a file whose names hold `part`."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    weights = load_file(path)
    changed = [name for name in weights if part in name and weights[name].is_floating_point()]
    assert changed
    for name in changed:
        weights[name] = weights[name] * factor
    save_file(weights, path, metadata=metadata)
