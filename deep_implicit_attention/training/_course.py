"""Where a training stands, as numbers that a JSON file holds."""

from __future__ import annotations

import math
from dataclasses import dataclass, field


@dataclass
class Course:
    """Where a training stands, apart from tensors.

    Sums, largest residual and seconds are those since the last evaluation. `ending` says why no
    step follows: "finished", "early" (no improvement) or "diverged"; it is empty before.
    """

    step: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)  # of steps that gave the name
    batches: int = 0
    residual: float = 0.0
    seconds: float = 0.0
    best: float = math.inf
    best_step: int | None = None
    bests: list[int] = field(default_factory=list)  # the steps that were the best in their time
    stale: int = 0
    ending: str = ""
    signs: list[str] = field(default_factory=list)
    metrics_size: int = 0

    def __post_init__(self) -> None:
        if not self.bests and self.best_step is not None:
            self.bests = [self.best_step]  # all that an earlier version's checkpoint knows

    def start_anew(self) -> None:
        """Forget what belongs to the steps before an evaluation."""
        self.sums, self.counts, self.signs = {}, {}, []
        self.batches, self.residual, self.seconds = 0, 0.0, 0.0

    def best_until(self, step: int) -> int | None:
        """The best step of those up to `step`."""
        return max((best for best in self.bests if best <= step), default=self.best_step)

    def add(self, found: dict[str, float]) -> None:
        """Take in the means of a step."""
        for name, value in found.items():
            # An earlier version counted steps, all of which gave the same names.
            before = self.counts.get(name, self.batches if name in self.sums else 0)
            self.counts[name] = before + 1
            self.sums[name] = self.sums.get(name, 0.0) + value
        self.batches += 1

    def means(self) -> dict[str, float]:
        """Over the steps that gave a name."""
        return {
            name: total / self.counts.get(name, self.batches) for name, total in self.sums.items()
        }
