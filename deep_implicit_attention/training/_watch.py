"""Signs that a training starts to diverge, seen before the loss is no number."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any


class DivergenceWarning(UserWarning):
    """A training starts to diverge."""


@dataclass
class Watch:
    """Looks at the loss, the share of failed solves and the spectral radius of the update.

    Loss and share are means m ← m + (x − m)/min(n, 20) over the last twenty steps or so. Three
    signs, each told once in a training:

    - More than half of the solves end above the tolerance, after 3 steps or more.
    - The loss is a tenth above its mean over the first 20 steps, or has risen by half of what it
      had fallen since, where that was more than a fifth; or the loss of a single step is more than
      ten times that of the first, since a training may blow up within a few steps.
    - The spectral radius at an evaluation is above 0.98: at 1 plain iteration no longer contracts
      and the gradient, which holds (1 − ∂F/∂z)⁻¹, can grow without bound.
    """

    count: int = 0
    start: float = math.inf
    loss: float = 0.0
    first: float = 0.0
    lowest: float = 0.0
    failed: float = 0.0
    told: list[str] = field(default_factory=list)

    MEMORY = 20
    FIRST_STEPS = 3
    LARGEST_JUMP = 10
    LARGEST_FAILED = 0.5
    LARGEST_RADIUS = 0.98

    def step(self, loss: float, failed: float, residual: float | None = None) -> str | None:
        """Take in a step; a sentence if there is a sign of divergence.

        `residual`, the step's worst, goes into the sentence on failed solves: where it is rounding,
        the tolerance is to be changed.
        """
        self.count += 1
        if self.count == 1:
            self.start = loss
        weight = 1 / min(self.count, self.MEMORY)
        self.loss += (loss - self.loss) * weight
        self.failed += (failed - self.failed) * weight
        if self.count <= self.MEMORY:
            self.first = self.lowest = self.loss
        self.lowest = min(self.lowest, self.loss)
        if self.count >= self.FIRST_STEPS and self.failed > self.LARGEST_FAILED:
            largest = "" if residual is None else f" (the last with residuals up to {residual:.1e})"
            return self._tell(
                "failed",
                f"{self.failed:.0%} of the equilibria of the last "
                f"{min(self.count, self.MEMORY)} steps were not found to the tolerance{largest}",
            )
        if loss - self.start > (self.LARGEST_JUMP - 1) * abs(self.start):
            return self._tell(
                "loss",
                f"the training loss jumps to {loss:.4g}, it was {self.start:.4g} in the first step",
            )
        if self.count <= self.MEMORY:
            return None
        size, gained = abs(self.first), self.first - self.lowest
        lost = self.loss - self.lowest
        if self.loss > self.first + 0.1 * size or (gained > 0.2 * size and lost > 0.5 * gained):
            return self._tell(
                "loss",
                f"the training loss rises: {self.loss:.4g} in the last {self.MEMORY} steps, "
                f"{self.lowest:.4g} at its lowest",
            )
        return None

    def evaluation(self, radius: float) -> str | None:
        """Take in a spectral radius; a sentence if it is too large. NaN is too large."""
        if radius <= self.LARGEST_RADIUS:
            return None
        return self._tell(
            "radius",
            f"the spectral radius of the update is {radius:.2f}: near 1 and above, equilibria are "
            "hard to find and gradients grow",
        )

    def state(self) -> dict[str, Any]:
        """All of it, for a checkpoint: `Watch(**state)` goes on."""
        return asdict(self)

    def _tell(self, sign: str, sentence: str) -> str | None:
        if sign in self.told:
            return None
        self.told.append(sign)
        return sentence
