"""What a training run says while it runs."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any

from ._extras import require


class Progress:
    """Live progress on a terminal, one line an epoch elsewhere. Use as a context manager."""

    COLUMNS = (
        ("epoch", "{:>5d}", "epoch"),
        ("train_loss", "{:>10.4f}", "loss"),
        ("train_accuracy", "{:>8.2%}", "accuracy"),
        ("validation_accuracy", "{:>10.2%}", "validation"),
        ("solver_steps", "{:>12.1f}", "solver steps"),
        ("residual", "{:>8.1e}", "residual"),
        ("spectral_radius", "{:>15.2f}", "spectral radius"),
        ("seconds", "{:>7.1f}", "seconds"),
    )

    def __init__(self, quiet: bool = False) -> None:
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

    def start(self, epochs: int, batches: int) -> None:
        """Head of the table."""
        self._epochs = epochs
        self._task = self._bar.add_task("training", total=batches, status="")
        widths = (len(pattern.format(0)) for _, pattern, _ in self.COLUMNS)
        heads = (title for _, _, title in self.COLUMNS)
        self.say("  ".join(h.rjust(w) for h, w in zip(heads, widths, strict=True)))

    def batch(self, epoch: int, means: Mapping[str, float], residual: float) -> None:
        """After each batch: running means of the epoch, and its worst residual."""
        status = (
            f"loss {means['loss']:.3f}  accuracy {means['correct']:.1%}  "
            f"steps {means['steps']:.1f}  residual {residual:.0e}"
        )
        self._bar.update(
            self._task, advance=1, description=f"epoch {epoch}/{self._epochs}", status=status
        )

    def epoch(self, record: Mapping[str, Any]) -> None:
        """After each epoch: its line of the table."""
        self._bar.reset(self._task)
        self.say("  ".join(pattern.format(record[name]) for name, pattern, _ in self.COLUMNS))
