"""What the moving part of a report shows of a relaxation, whether or not it settles."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..solvers import Solution

MOST_STEPS = 24
# A scale of colours reaches so many times the first step and the solver's answer at most; without
# a limit, a relaxation that runs away would leave one colour for all that came before.
_REACH = 2.0

Look = Callable[..., tuple[Tensor, Sequence[Solution]]]


@dataclass(frozen=True)
class Settling:
    """A model's answers after 1, 2, … plain steps and, last, by the solver.

    Attributes:
        states: of the last block, `(B, frames, N, d)`.
        scores: `(B, frames, ...)`.
        residuals: the largest of the blocks, `(B, frames)`.
        solved: for which samples every block's solver reached its tolerance, `(B,)`.
    """

    states: Tensor
    scores: Tensor
    residuals: Tensor
    solved: Tensor

    @property
    def finite(self) -> Tensor:
        """Which states are finite in all their numbers, `(B, frames)`."""
        return self.states.isfinite().flatten(2).all(dim=2)

    @property
    def steps(self) -> list[int]:
        """The numbers of the plain steps."""
        return list(range(1, self.states.shape[1]))

    def said(self, what: str) -> list[str]:
        """Sentences on what does not settle among the samples, which are `what`; none if all do."""
        count = len(self.solved)
        # The length of large numbers overflows before they do themselves.
        finite = (self.finite & self.residuals.isfinite())[:, :-1]
        sentences = []
        broken = int((~finite.all(dim=1)).sum())
        if broken:
            first = int((~finite.all(dim=0)).nonzero()[0])
            sentences.append(
                f"Plain steps run away from {broken} of these {count} {what}: from step "
                f"{self.steps[first]} on not all numbers are finite."
            )
        failed = int((~self.solved).sum())
        if failed:
            sentences.append(
                f"The solver reached no equilibrium for {failed} of these {count} {what}; its best "
                "answer stands in the last place."
            )
        return sentences


@torch.no_grad()
def settle(look: Look, tol: float) -> Settling:
    """What `look(steps=k)` and `look()` give: scores and the blocks' solutions.

    Steps are taken until all samples have settled to `tol` or left the finite numbers, 24 at most.
    """

    def frame(**overrides: Any) -> tuple[Tensor, Tensor, Tensor]:
        scores, solutions = look(**overrides)
        residual = torch.stack([solution.residual for solution in solutions]).amax(dim=0)
        return solutions[-1].value, scores, residual

    frames = [frame(steps=1)]
    while len(frames) < MOST_STEPS:
        state, _, residual = frames[-1]
        going = (residual > tol) & state.isfinite().flatten(1).all(dim=1)
        if not bool(going.any()):
            break
        frames.append(frame(steps=len(frames) + 1))
    scores, solutions = look()
    solved = torch.stack([solution.converged for solution in solutions]).all(dim=0)
    worst = torch.stack([solution.residual for solution in solutions]).amax(dim=0)
    frames.append((solutions[-1].value, scores, worst))
    states, scores, residuals = (torch.stack(some, dim=1) for some in zip(*frames, strict=True))
    return Settling(states, scores, residuals, solved)


def scaled(values: Tensor) -> tuple[np.ndarray, float, bool]:
    """`values` `(B, frames, ...)` from −1 to 1, the size that is 1, and whether larger ones were
    cut off. What is not finite stays so."""
    values = values.double()
    sizes = values.abs().where(values.isfinite(), 0.0)
    largest, ends = sizes.max().item(), sizes[:, [0, -1]].max().item()
    size = min(largest, _REACH * ends) if ends else largest
    size = size or 1.0
    cut = (values / size).clamp(-1, 1).where(values.isfinite(), torch.nan)
    return cut.numpy(), size, largest > size


def distances(states: Tensor) -> Tensor:
    """How far states `(B, frames, N, d)` are from the last one, as a part of its length."""
    # Lengths of large numbers overflow in float32.
    states = states.double()
    gap = (states - states[:, -1:]).flatten(2).norm(dim=2)
    return torch.where(gap == 0, 0.0, gap / states[:, -1:].flatten(2).norm(dim=2))


def rounded(numbers: Tensor, digits: int) -> list[list[float]]:
    """Rows of numbers to so many digits."""
    return [[float(f"{number:.{digits}g}") for number in row] for row in numbers.tolist()]
