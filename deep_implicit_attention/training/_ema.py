"""A moving average of the weights while they are trained."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..deq._state import full_precision
from ..solvers._validate import check_number


class MovingAverage:
    """e ← d_n e + (1 − d_n) θ after step n of the optimizer, with d_n = min(d, n / (9 + n)).

    So the average first looks back over about a tenth of the steps there have been, and soon
    forgets the weights of the start.

    θ are the parameters and the buffers of real numbers, such as the running statistics of batch
    normalisation: those of other weights would not fit the averaged ones. Holds a copy of each, in
    float32 where the model is narrower: in bfloat16 a small step of the average is lost in
    rounding, and it would stand still. Works on sharded parameters, too, which
    `torch.optim.swa_utils.AveragedModel`, a deep copy of the model, does not.

    Args:
        model: the model that is averaged.
        decay: d, from 0 to below 1; in the end the average looks back about 1/(1 − d) steps.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        check_number("decay", decay, minimum=0.0, below=1.0)
        tensors = [*model.named_parameters(), *model.named_buffers()]
        live = {name: t for name, t in tensors if t.is_floating_point() or t.requires_grad}
        self._names, self._live = list(live), list(live.values())
        self._average = [full_precision(t.detach()).clone() for t in self._live]
        self.decay = decay

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the model as it is after `step` steps, counted from 1."""
        decay = min(self.decay, step / (9 + step))
        for average, live in zip(self._average, self._live, strict=True):
            average.lerp_(live.to(average.dtype), 1 - decay)

    @contextmanager
    def in_model(self) -> Iterator[None]:
        """The average in place of the model's weights, which come back unchanged at the end."""
        own = [t.detach().clone() for t in self._live]
        self._fill(self._average)
        try:
            yield
        finally:
            self._fill(own)

    def wide(self) -> dict[str, Tensor]:
        """By name what has more digits here than in the model."""
        return {
            name: average
            for name, average, live in zip(self._names, self._average, self._live, strict=True)
            if average.dtype != live.dtype
        }

    @torch.no_grad()
    def assign(self) -> None:
        """Make the model, as it is, the average; for the digits it lacks there is `wide`."""
        for average, live in zip(self._average, self._live, strict=True):
            average.copy_(live)

    @torch.no_grad()
    def _fill(self, values: list[Tensor]) -> None:
        for live, value in zip(self._live, values, strict=True):
            live.copy_(value)
