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
    batches: int = 0
    residual: float = 0.0
    seconds: float = 0.0
    best: float = math.inf
    best_step: int | None = None
    stale: int = 0
    ending: str = ""
    signs: list[str] = field(default_factory=list)
    metrics_size: int = 0

    def start_anew(self) -> None:
        """Forget what belongs to the steps before an evaluation."""
        self.sums, self.batches, self.residual, self.seconds, self.signs = {}, 0, 0.0, 0.0, []
