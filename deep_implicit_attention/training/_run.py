"""The folder of a run: configuration, metrics, best weights; written so that none is torn."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from ._checkpoint import Checkpoints, whole_tensors
from ._files import write_whole

CONFIG, WEIGHTS, METRICS = "config.json", "model.safetensors", "metrics.jsonl"
_PICTURES = (".png", ".gif", ".html")


class Run:
    """A run's files in `folder`.

    `config.json` holds the recipe and its settings, `metrics.jsonl` one JSON object a line,
    `model.safetensors` the weights of the best epoch so far, `checkpoints/` what a killed training
    needs to go on. A file appears whole or not at all.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.checkpoints = Checkpoints(folder / "checkpoints")

    def start(self, config: dict[str, Any]) -> None:
        """Make the folder anew: the configuration, and no metrics, weights or pictures.

        Paths in the configuration become strings.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        # Without the configuration it is no run, so a crash in here leaves none, and not the old.
        (self.folder / CONFIG).unlink(missing_ok=True)
        pictures = (path for kind in _PICTURES for path in self.folder.glob(f"*{kind}"))
        for path in (self.folder / METRICS, self.folder / WEIGHTS, *pictures):
            path.unlink(missing_ok=True)
        self.checkpoints.clear()
        write_whole(self.folder / CONFIG, (json.dumps(plain(config), indent=2) + "\n").encode())

    def log(self, **record: Any) -> None:
        """Append one line of metrics; a number that is not finite becomes null, as JSON needs."""
        for name, value in record.items():
            if isinstance(value, float) and not math.isfinite(value):
                record[name] = None
        with (self.folder / METRICS).open("a") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def metrics_size(self) -> int:
        """Bytes of metrics."""
        path = self.folder / METRICS
        return path.stat().st_size if path.exists() else 0

    def cut_metrics(self, size: int) -> None:
        """Forget all metrics after the first `size` bytes."""
        if self.metrics_size() < size:
            raise ValueError(
                f"{self.folder / METRICS} has {self.metrics_size()} bytes, fewer than the {size} "
                "that were written before the checkpoint: it was changed or lost"
            )
        if self.metrics_size() > size:
            os.truncate(self.folder / METRICS, size)

    def metrics(self) -> list[dict[str, Any]]:
        """All lines of metrics."""
        path = self.folder / METRICS
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def config(self) -> dict[str, Any]:
        """The configuration; `ValueError` if there is none."""
        path = self.folder / CONFIG
        try:
            return json.loads(path.read_text())
        except FileNotFoundError as error:
            raise ValueError(f"{self.folder} holds no run: it has no {CONFIG}") from error
        except NotADirectoryError as error:
            raise ValueError(f"{self.folder} holds no run: it is a file, not a folder") from error
        except ValueError as error:
            raise ValueError(f"{path} is damaged: {error}") from error

    def is_started(self) -> bool:
        """Whether there is a run in the folder."""
        return (self.folder / CONFIG).exists()

    def save_weights(
        self, model: nn.Module | Mapping[str, Tensor], epoch: int, step: int | None = None
    ) -> None:
        """Write the weights beside the old ones, then put them in their place."""
        state = model.state_dict() if isinstance(model, nn.Module) else model
        # One entry: safetensors writes several in an order of chance, and files must be the same.
        metadata = {"saved": json.dumps({"epoch": epoch, "step": step})}
        write_whole(self.folder / WEIGHTS, save(whole_tensors(state), metadata))

    def saved_epoch(self) -> int | None:
        """The epoch that the weights are of, or None if there are none."""
        return self._saved("epoch")

    def saved_step(self) -> int | None:
        """The step that the weights are of, or None."""
        return self._saved("step")

    def remove_weights(self) -> None:
        """Delete the weights, if there are any."""
        (self.folder / WEIGHTS).unlink(missing_ok=True)

    def load_weights(self, model: nn.Module) -> None:
        """Put the best weights into `model`."""
        path = self.folder / WEIGHTS
        if not path.exists():
            raise FileNotFoundError(f"{self.folder} has no checkpoint ({WEIGHTS})")
        try:
            model.load_state_dict(load_file(path))
        except (RuntimeError, OSError, SafetensorError) as error:
            raise ValueError(f"{path} does not fit this model: {error}") from error

    def _saved(self, name: str) -> int | None:
        path = self.folder / WEIGHTS
        if not path.exists():
            return None
        try:
            with safe_open(path, "pt") as file:
                saved = (file.metadata() or {}).get("saved", "{}")
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged: {error}") from error
        return json.loads(saved).get(name)


def plain(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration as a JSON file gives it back: paths are strings, tuples are lists."""
    return json.loads(json.dumps(config, default=str))
