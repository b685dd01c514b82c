"""A moving average of the weights while they are trained."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class MovingAverage:
    """e ← d_n e + (1 − d_n) θ after step n of the optimizer, with d_n = min(d, n / (9 + n)).

    So the average first looks back over about a tenth of the steps there have been, and soon
    forgets the weights of the start.

    θ are the parameters and the buffers of real numbers, such as the running statistics of batch
    normalisation: those of other weights would not fit the averaged ones. Holds a copy of each.
    Works on sharded parameters, too, which `torch.optim.swa_utils.AveragedModel`, a deep copy of
    the model, does not.

    Args:
        model: the model that is averaged.
        decay: d, from 0 to below 1; in the end the average looks back about 1/(1 − d) steps.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        buffers = (buffer for buffer in model.buffers() if buffer.is_floating_point())
        self._live = [*model.parameters(), *buffers]
        self._average = [t.detach().clone() for t in self._live]
        self.decay = decay

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the model as it is after `step` steps, counted from 1."""
        decay = min(self.decay, step / (9 + step))
        for average, live in zip(self._average, self._live, strict=True):
            average.lerp_(live, 1 - decay)

    @contextmanager
    def in_model(self) -> Iterator[None]:
        """The average in the place of the model's own, which comes back unchanged at the end."""
        own = [t.detach().clone() for t in self._live]
        self._fill(self._average)
        try:
            yield
        finally:
            self._fill(own)

    @torch.no_grad()
    def assign(self) -> None:
        """Make the model, as it is, the average."""
        for average, live in zip(self._average, self._live, strict=True):
            average.copy_(live)

    @torch.no_grad()
    def _fill(self, values: list[Tensor]) -> None:
        for live, value in zip(self._live, values, strict=True):
            live.copy_(value)
