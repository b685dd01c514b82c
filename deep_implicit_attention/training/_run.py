"""The folder of a run: configuration, metrics, best weights; written so that none is torn."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from ._checkpoint import Checkpoints, load_model, whole_tensors
from ._files import check_readable, locked, named, unfinished, write_whole

CONFIG, WEIGHTS, METRICS = "config.json", "model.safetensors", "metrics.jsonl"
# What else recipes and reports make in the folder: any other file in it is the user's.
_MADE = re.compile(
    r"(learning_curves|confusion_matrix|(convergence|couplings)(_\d+)?|ising|completions|samples)"
    r"\.png|couplings\.gif|report\.html|vocabulary\.json|sample\.txt|(machine|answers)\.npz"
)


class Run:
    """A run's files in `folder`.

    `config.json` holds the recipe and its settings, `metrics.jsonl` one JSON object a line,
    `model.safetensors` the weights of the best epoch so far, `checkpoints/` what a killed training
    needs to go on. A file appears whole or not at all.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self.checkpoints = Checkpoints(self.folder / "checkpoints")

    @contextmanager
    def alone(self) -> Iterator[None]:
        """A context in which no other process may write, on systems that lock folders; makes the
        folder.

        Raises:
            ValueError: if another process writes, or the folder is a file.
        """
        self._make_folder()
        with locked(self.folder) as got:
            if not got:
                raise ValueError(
                    f"another process writes to {self.folder}: wait until it has ended, or name "
                    "another folder"
                )
            yield

    def start(self, config: dict[str, Any]) -> None:
        """Make the folder anew: the configuration, and no metrics, weights and checkpoints of an
        earlier run, nor what recipes and reports made of it. Other files stay.

        Paths in the configuration become strings.

        Raises:
            ValueError: for a folder with files in it that is not one of a run, and for a file.
        """
        self._make_folder()
        path = self.folder / CONFIG
        # Without the configuration it is no run, so a crash in here leaves none, and not the old;
        # the unfinished one tells that the folder is a run's all the same.
        if self.is_started():
            if self._holds_model():
                raise self._foreign(f"{WEIGHTS} but no {METRICS}")
            path.replace(unfinished(path))
        elif not unfinished(path).exists() and self._holds_files():
            raise self._foreign(f"no {CONFIG}")
        names = {path: path.name.removesuffix(".part") for path in self.folder.iterdir()}
        made = [path for path, name in names.items() if _MADE.fullmatch(name)]
        for old in (self.folder / METRICS, self.folder / WEIGHTS, *made):
            old.unlink(missing_ok=True)
        self.checkpoints.clear()
        write_whole(path, (json.dumps(plain(config), indent=2) + "\n").encode())

    def log(self, **record: Any) -> None:
        """Append one line of metrics; a number that is not finite becomes null, as JSON needs."""
        finite = json.loads(json.dumps(record), parse_constant=lambda _: None)
        path = self.folder / METRICS
        with named(path), path.open("a") as file:
            file.write(json.dumps(finite) + "\n")
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
                "that were written before the checkpoint: it was changed or lost; put it back, or "
                "start anew in another folder"
            )
        if self.metrics_size() > size:
            os.truncate(self.folder / METRICS, size)

    def metrics(self) -> list[dict[str, Any]]:
        """All lines of metrics; `ValueError` for one that is damaged."""
        records = []
        for number, line in enumerate(self._lines(), start=1):
            try:
                records.append(_object(line))
            except ValueError as error:
                path = self.folder / METRICS
                raise ValueError(f"{path} is damaged: line {number}: {error}") from error
        return records

    def last_metrics(self) -> dict[str, Any] | None:
        """The last line of metrics; None if there is none, or one that a crash has torn."""
        try:
            return _object(self._lines()[-1])
        except (IndexError, ValueError):
            return None

    def config(self) -> dict[str, Any]:
        """The configuration; `ValueError` if there is none, or it is damaged."""
        path = self.folder / CONFIG
        try:
            return _object(path.read_bytes())
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
        """Put the best weights into `model`; `ValueError` for another model's and damaged ones."""
        path = self.folder / WEIGHTS
        if not path.exists():
            raise FileNotFoundError(f"{self.folder} has no checkpoint ({WEIGHTS})")
        check_readable(path)
        try:
            tensors = load_file(path)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path} is damaged: {error}") from error
        load_model(model, tensors, path)

    def _make_folder(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            there = "a link that leads nowhere" if self.folder.is_symlink() else "a file"
            raise ValueError(f"{self.folder} cannot be a folder: there is {there}") from error

    def _lines(self) -> list[bytes]:
        path = self.folder / METRICS
        return path.read_bytes().splitlines() if path.exists() else []

    def _holds_files(self) -> bool:
        """Whether there is anything in the folder, but for what systems hide in it."""
        return any(not path.name.startswith(".") for path in self.folder.iterdir())

    def _holds_model(self) -> bool:
        """Whether these are the files of a model that `save_pretrained` wrote: a run has metrics
        before it has weights."""
        return (self.folder / WEIGHTS).exists() and not (self.folder / METRICS).exists()

    def _foreign(self, why: str) -> ValueError:
        return ValueError(
            f"{self.folder} holds files but no run ({why}), and was left as it is: name a folder "
            "that is new or empty"
        )

    def _saved(self, name: str) -> int | None:
        path = self.folder / WEIGHTS
        if not path.exists():
            return None
        check_readable(path)
        try:
            with safe_open(path, "pt") as file:
                saved = _object((file.metadata() or {}).get("saved", "{}"))
        except (SafetensorError, ValueError) as error:
            raise ValueError(
                f"{path} is damaged: {error}; delete it, and a training that is resumed makes it "
                "anew from its checkpoint"
            ) from error
        return saved.get(name)


def _object(text: str | bytes) -> dict[str, Any]:
    """The JSON object that `text` is; `ValueError` for anything else."""
    found = json.loads(text)
    if not isinstance(found, dict):
        raise ValueError(f"it must be an object, got {type(found).__name__}")
    return found


def plain(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration as a JSON file gives it back: paths are strings, tuples are lists."""
    return json.loads(json.dumps(config, default=str))
