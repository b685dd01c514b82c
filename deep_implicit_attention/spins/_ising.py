"""Ising spins: ±1 with equal weight."""

from __future__ import annotations

import math

import torch
from torch import Generator, Size, Tensor

from ._prior import Prior, with_derivatives


class IsingPrior(Prior):
    """S = ±1, each with weight ½; fields are `(...)`, V is `(...)`.

        log Z0 = log cosh h + V/2,   mean = tanh h,   covariance = 1 − tanh² h

    With these weights log Z is N log 2 below the sum over the 2^N states.
    """

    event_shape = Size(())

    def log_partition(self, field: Tensor, V: Tensor | None = None) -> Tensor:
        # Of two forms each is accurate, with all derivatives, where the other is not. The one left
        # out must stay finite, or it would spoil the gradient of the other.
        size = _size(field)
        near = 0.5 * torch.log1p(torch.sinh(field.clamp(-1, 1)).square())
        far = size + (torch.log1p(torch.exp(-2 * size)) - math.log(2))
        value = torch.where(size < 1, near, far)
        return value if V is None else value + V / 2

    def mean(self, field: Tensor, V: Tensor | None = None) -> Tensor:
        field = _broadcast(field, V)

        def differing() -> Tensor:
            return torch.where(field < 0, 2, -2) * torch.sigmoid(-2 * _size(field))

        # 1 − 2σ(−2|h|): torch's derivative of tanh is the difference that loses all digits.
        return with_derivatives(torch.tanh(field), differing, field)

    def covariance(self, field: Tensor, V: Tensor | None = None) -> Tensor:
        # 1/cosh²: the difference 1 − tanh² loses all digits in strong fields.
        decay = torch.exp(-2 * _size(_broadcast(field, V)))
        return 4 * decay / (1 + decay).square()

    def sample(self, field: Tensor, generator: Generator | None = None) -> Tensor:
        up = torch.rand(
            field.shape, generator=generator, dtype=field.dtype, device=field.device
        ) < torch.sigmoid(2 * field)
        return 2 * up.to(field.dtype) - 1

    def supports(self, spins: Tensor) -> Tensor:
        return spins.abs() == 1


def _size(field: Tensor) -> Tensor:
    """|h|, with the derivative 1 at 0, so that even functions have their second derivative."""
    return torch.where(field < 0, -field, field)


def _broadcast(field: Tensor, V: Tensor | None) -> Tensor:
    """The field for every V, which the moments do not depend on."""
    if V is None or V.shape == field.shape:
        return field
    return field.expand(torch.broadcast_shapes(field.shape, V.shape))
