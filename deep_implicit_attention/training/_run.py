"""The folder of a run: configuration, metrics, best checkpoint; written so that none is torn."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import nn

CONFIG, WEIGHTS, METRICS = "config.json", "model.safetensors", "metrics.jsonl"


class Run:
    """A run's files in `folder`.

    `config.json` holds the recipe and its settings, `metrics.jsonl` one JSON object a line,
    `model.safetensors` the weights of the best epoch so far. A file appears whole or not at all.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def start(self, config: dict[str, Any]) -> None:
        """Make the folder anew: the configuration, and no metrics, weights or pictures.

        Paths in the configuration become strings.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in (self.folder / METRICS, self.folder / WEIGHTS, *self.folder.glob("*.png")):
            path.unlink(missing_ok=True)
        self._write(CONFIG, (json.dumps(config, indent=2, default=str) + "\n").encode())

    def log(self, **record: Any) -> None:
        """Append one line of metrics; a number that is not finite becomes null, as JSON needs."""
        for name, value in record.items():
            if isinstance(value, float) and not math.isfinite(value):
                record[name] = None
        with (self.folder / METRICS).open("a") as file:
            file.write(json.dumps(record) + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        """All lines of metrics."""
        path = self.folder / METRICS
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def config(self) -> dict[str, Any]:
        """The configuration."""
        return json.loads((self.folder / CONFIG).read_text())

    def save_weights(self, model: nn.Module, epoch: int) -> None:
        """Write the weights beside the old ones, then put them in their place."""
        state = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
        self._write(WEIGHTS, save(state, {"epoch": str(epoch)}))

    def saved_epoch(self) -> int | None:
        """The epoch that the checkpoint is of, or None if there is no checkpoint."""
        path = self.folder / WEIGHTS
        if not path.exists():
            return None
        with safe_open(path, "pt") as file:
            return int(file.metadata()["epoch"])

    def load_weights(self, model: nn.Module) -> None:
        """Put the best weights into `model`."""
        path = self.folder / WEIGHTS
        if not path.exists():
            raise FileNotFoundError(f"{self.folder} has no checkpoint ({WEIGHTS})")
        try:
            model.load_state_dict(load_file(path))
        except (RuntimeError, OSError, SafetensorError) as error:
            raise ValueError(f"{path} does not fit this model: {error}") from error

    def _write(self, name: str, content: bytes) -> None:
        path = self.folder / name
        beside = path.with_name(name + ".part")
        with beside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)


def seed_everything(seed: int) -> None:
    """The same seed gives the same run on one CPU configuration, bit for bit."""
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(True)
