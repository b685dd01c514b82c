"""Linear maps of states, and their transposes: of preconditioners, and of derivatives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..solvers._scale import norms, select
from ._state import Layout


class LinearMap(NamedTuple):
    """v ↦ A v with its transpose, v ↦ Aᵀ v, for states: what `preconditioner` of a `DEQModule`
    returns.

    A preconditioner A ≈ (1 − L)⁻¹ of an update F may know its `remainder`, z ↦ F(z) − L z or what
    is near it, where that costs less than F: then z ↦ A remainder(z) is a step without an update.
    """

    apply: Callable[[Any], Any]
    transposed: Callable[[Any], Any]
    remainder: Callable[[Any], Any] | None = None

    def __call__(self, v: Any) -> Any:
        return self.apply(v)


class Pullback(NamedTuple):
    """v ↦ (∂F/∂z)ᵀ v, with (∂F/∂θ)ᵀ v for the tensors of a context: what `vjp` of a `DEQModule`
    returns.

    In `by_context(v, needed)`, `needed` is the context with booleans in place of its tensors, True
    where a derivative is wanted; the result has the derivatives in their place. With several
    arguments each has its own. `remainder` is v ↦ (∂R/∂z)ᵀ v for the remainder R of the
    preconditioner, if that has any.
    """

    by_state: Callable[[Any], Any]
    by_context: Callable[..., Any]
    remainder: Callable[[Any], Any] | None = None

    def __call__(self, v: Any) -> Any:
        return self.by_state(v)


# A step that leads less far than this part of where it begins has left little out.
_SHORT = 0.25


def nearer(start: Tensor, after: Tensor) -> Tensor:
    """`after`, a preconditioned step of the remainder from `start` `(B, n)`, where it is short.

    Where the remainder is large, as with strong corrections, the step may lead astray.
    """
    moved, length = norms(after - start, start)
    return select(moved <= _SHORT * length, after, start)


def on_vectors(linear: Callable[[Any], Any], layout: Layout) -> Callable[[Tensor], Tensor]:
    """A map of states as a map of vectors `(B, n)`."""

    def flat(f: Callable[[Any], Any]) -> Callable[[Tensor], Tensor]:
        return lambda v: layout.pack(f(layout.unpack(v)))

    if isinstance(linear, LinearMap):
        return LinearMap(flat(linear.apply), flat(linear.transposed))
    return flat(linear)


def transpose(linear: Callable[[Tensor], Tensor], like: Tensor) -> Callable[[Tensor], Tensor]:
    """v ↦ Aᵀ v for a linear map of vectors `like`; by autograd where it does not know its own."""
    if isinstance(linear, LinearMap):
        return linear.transposed
    with torch.enable_grad():
        v = torch.zeros_like(like).requires_grad_()
        image = linear(v)
    if not image.requires_grad:
        raise RuntimeError(
            "the preconditioner computes without gradients, so its transpose, which backward "
            "needs, cannot be found: leave out no_grad and detach, or return a LinearMap, which "
            "has both"
        )
    return lambda u: vjp(image, v, u)


def vjp(image: Tensor, z: Tensor, v: Tensor, create_graph: bool = False) -> Tensor:
    """(∂image/∂z)ᵀ v, which keeps the graph; zero where `image` does not depend on `z`."""
    if not image.requires_grad:
        return torch.zeros_like(v)
    (product,) = torch.autograd.grad(
        image, z, v, retain_graph=True, create_graph=create_graph, allow_unused=True
    )
    return torch.zeros_like(v) if product is None else product
