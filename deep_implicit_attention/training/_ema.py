"""A moving average of the weights while they are trained."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class MovingAverage:
    """e ← d e + (1 − d) θ after every step of the optimizer, from e = θ at the start.

    Holds a copy of every parameter; buffers are the model's own. Works on sharded parameters, too,
    which `torch.optim.swa_utils.AveragedModel`, a deep copy of the model, does not.

    Args:
        model: the model whose parameters θ are averaged.
        decay: d, from 0 to below 1; the average looks back about 1/(1 − d) steps.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._parameters = list(model.parameters())
        self._average = [p.detach().clone() for p in self._parameters]
        self.decay = decay

    @torch.no_grad()
    def update(self) -> None:
        """Take in the parameters as they are."""
        for average, parameter in zip(self._average, self._parameters, strict=True):
            average.lerp_(parameter, 1 - self.decay)

    @contextmanager
    def in_model(self) -> Iterator[None]:
        """The average in the place of the parameters, which come back unchanged at the end."""
        own = [p.detach().clone() for p in self._parameters]
        self._fill(self._average)
        try:
            yield
        finally:
            self._fill(own)

    @torch.no_grad()
    def assign(self) -> None:
        """Make the parameters, as they are, the average."""
        for average, parameter in zip(self._average, self._parameters, strict=True):
            average.copy_(parameter)

    @torch.no_grad()
    def _fill(self, values: list[Tensor]) -> None:
        for parameter, value in zip(self._parameters, values, strict=True):
            parameter.copy_(value)
