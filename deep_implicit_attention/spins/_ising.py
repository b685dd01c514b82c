"""Ising spins: ±1 with equal weight."""

from __future__ import annotations

import math

import torch
from torch import Generator, Size, Tensor

from ._prior import Prior


class IsingPrior(Prior):
    """S = ±1, each with weight ½; fields are `(...)`, V is `(...)`.

        log Z0 = log cosh h + V/2,   mean = tanh h,   covariance = 1 − tanh² h

    With these weights log Z is N log 2 below the sum over the 2^N states.
    """

    event_shape = Size(())

    def log_partition(self, field: Tensor, V: Tensor | None = None) -> Tensor:
        value = torch.logaddexp(field, -field) - math.log(2)
        return value if V is None else value + V / 2

    def mean(self, field: Tensor, V: Tensor | None = None) -> Tensor:
        return torch.tanh(field)

    def covariance(self, field: Tensor, V: Tensor | None = None) -> Tensor:
        # 1/cosh²: the difference 1 − tanh² loses all digits in strong fields.
        return torch.exp(-2 * self.log_partition(field))

    def sample(self, field: Tensor, generator: Generator | None = None) -> Tensor:
        up = torch.rand(
            field.shape, generator=generator, dtype=field.dtype, device=field.device
        ) < torch.sigmoid(2 * field)
        return 2 * up.to(field.dtype) - 1

    def supports(self, spins: Tensor) -> Tensor:
        return spins.abs() == 1
