"""What a training run says while it runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

from ._extras import require

Columns = Sequence[tuple[str, str, str]]

_LIVE = {
    "loss": "loss {:.3f}",
    "accuracy": "accuracy {:.1%}",
    "solver_steps": "steps {:.1f}",
    "failed": "failed {:.0%}",
}


class Progress:
    """Live progress on a terminal, one line an epoch elsewhere. Use as a context manager.

    Args:
        quiet: say nothing.
        columns: of the table: name in the record of an epoch, format, title.
        unit: what lies between two lines.
    """

    COLUMNS: Columns = (
        ("epoch", "{:>5d}", "epoch"),
        ("train_loss", "{:>10.4f}", "loss"),
        ("train_accuracy", "{:>8.2%}", "accuracy"),
        ("validation_accuracy", "{:>10.2%}", "validation"),
        ("solver_steps", "{:>12.1f}", "solver steps"),
        ("residual", "{:>8.1e}", "residual"),
        ("spectral_radius", "{:>15.2f}", "spectral radius"),
        ("seconds", "{:>7.1f}", "seconds"),
    )

    def __init__(
        self, quiet: bool = False, columns: Columns = COLUMNS, unit: str = "epoch"
    ) -> None:
        self._columns, self._unit = columns, unit
        console = require("rich.console", "train")
        bars = require("rich.progress", "train")
        self.console = console.Console(quiet=quiet, highlight=False)
        self._bar = bars.Progress(
            bars.TextColumn("{task.description}"),
            bars.BarColumn(bar_width=24),
            bars.TextColumn("{task.completed}/{task.total} batches"),
            bars.TextColumn("{task.fields[status]}"),
            bars.TimeRemainingColumn(),
            console=self.console,
            transient=True,
            disable=quiet or not self.console.is_terminal,
        )
        self._task: Any = None
        self._epochs = 0

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def say(self, text: str) -> None:
        """One line."""
        self.console.print(text, soft_wrap=True, markup=False, emoji=False)

    def start(self, epochs: int, batches: int, done: int = 0) -> None:
        """Head of the table; `done` batches of the first epoch were trained before."""
        self._epochs = epochs
        self._task = self._bar.add_task("training", total=batches, completed=done, status="")
        widths = (len(pattern.format(0)) for _, pattern, _ in self._columns)
        heads = (title for _, _, title in self._columns)
        self.say("  ".join(h.rjust(w) for h, w in zip(heads, widths, strict=True)))

    def batch(self, epoch: int, means: Mapping[str, float], residual: float) -> None:
        """After each batch: running means of the epoch, and its worst residual."""
        shown = [
            _LIVE.get(name, name + " {:.3g}").format(value)
            for name, value in means.items()
            if name != "failed" or value
        ]
        self._bar.update(
            self._task,
            advance=1,
            description=f"{self._unit} {epoch}/{self._epochs}",
            status="  ".join([*shown, f"residual {residual:.0e}"]),
        )

    def epoch(self, record: Mapping[str, Any]) -> None:
        """After each epoch: its line of the table."""
        self._bar.reset(self._task)
        cells = []
        for name, pattern, _ in self._columns:
            cell = pattern.format(record.get(name, 0))
            cells.append(cell if name in record else "-".rjust(len(cell)))
        self.say("  ".join(cells))
