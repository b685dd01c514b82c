"""The adjoint equation as a solver takes it, and the same of some samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ._linear_map import vjp
from ._map import TracedMap


class AdjointMap:
    """u ↦ (∂f/∂z)ᵀ u + g, and the same of some samples alone."""

    def __init__(self, product: Callable[[Tensor], Tensor], g: Tensor, rows: Any) -> None:
        self.product, self.g = product, g
        self.of_samples = rows and (lambda index: AdjointMap(rows(index), g[index], None))

    def __call__(self, u: Tensor) -> Tensor:
        return self.product(u) + self.g


def product_of_some(
    f: TracedMap, z: Tensor, tensors: Sequence[Tensor], by_hand: bool, rows: Tensor
) -> Callable[[Tensor], Tensor]:
    """v ↦ (∂f/∂z)ᵀ v of the samples `rows` alone, `by_hand` if f has a product of its own."""
    if by_hand:
        product = f.vjp(z[rows], tensors, rows=rows)
        assert product is not None
        return product
    with torch.enable_grad():
        at = z[rows].requires_grad_()
        image = f(at, [t.detach() for t in f.kept(tensors)], rows)
    return lambda v: vjp(image, at, v)
