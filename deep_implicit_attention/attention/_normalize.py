"""Normalisation over the components of a site, with derivatives of every order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..deq._map import in_autocast
from ..deq._state import full_precision
from ..deq._watched import transformed

_EPS = 1e-5


def normalized(x: Tensor) -> Tensor:
    """`x` with mean 0 and variance 1 over its last axis; zero stays zero.

    Gains and offsets of a LayerNorm would be absorbed by the linear layers that follow.
    """
    if transformed(x):
        return _written_out(x)
    if torch.is_grad_enabled() and x.requires_grad and not torch.compiler.is_compiling():
        return _Normalized.apply(x, None, None)
    return F.layer_norm(x, x.shape[-1:], eps=_EPS)


class LayerNorm(nn.LayerNorm):
    """torch's, of the last axis, with derivatives of every order."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, eps=_EPS)

    def forward(self, x: Tensor) -> Tensor:
        if transformed(x, self.weight, self.bias):
            return _written_out(x) * self.weight + self.bias
        wanted = torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad)
        mixed = in_autocast(x) or x.dtype != self.weight.dtype
        if mixed or not wanted or torch.compiler.is_compiling():
            if x.dtype == self.weight.dtype or full_precision(x) is not x:
                return super().forward(x)
            # After a narrow model's layer under autocast x is float32; torch takes no narrower
            # weights on the host.
            weight, bias = map(full_precision, (self.weight, self.bias))
            return F.layer_norm(x, x.shape[-1:], weight, bias, self.eps)
        return _Normalized.apply(x, self.weight, self.bias)


def _written_out(x: Tensor) -> Tensor:
    centred = x - x.mean(dim=-1, keepdim=True)
    return centred * (centred.square().mean(dim=-1, keepdim=True) + _EPS).rsqrt()


class _Normalized(torch.autograd.Function):
    """`normalized` with a graph, with gains and offsets or without.

    Third derivatives of torch's own are wrong (as of 2.14).
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None
    ) -> Tensor:
        value, mean, rstd = torch.native_layer_norm(x, x.shape[-1:], weight, bias, _EPS)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        return value

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple:  # type: ignore[override]
        x, weight, bias, mean, rstd = ctx.saved_tensors
        needed = ctx.needs_input_grad
        if not torch.is_grad_enabled():
            return _normalized_backward(g, x, mean, rstd, weight, bias, needed)
        # Fresh aliases: x may come from the same weight, and that is not this layer's derivative.
        inputs: Any = [None if t is None else t.view_as(t) for t in (x, weight, bias)]
        x, weight, bias = inputs
        value = _written_out(x)
        value = value if weight is None else value * weight + bias
        wanted = [t for t, need in zip(inputs, needed, strict=True) if need]
        found = iter(torch.autograd.grad(value, wanted, g, create_graph=True))
        return tuple(next(found) if need else None for need in needed)


def _normalized_backward(
    g: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    needed: Sequence[bool] = (True, False, False),
) -> tuple:
    return torch.ops.aten.native_layer_norm_backward(
        g.contiguous(), x, x.shape[-1:], mean, rstd, weight, bias, needed
    )


def normalized_vjp(x: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """`normalized(x)`, and v ↦ its transposed Jacobian at `x` times v; without a graph."""
    value, mean, rstd = torch.native_layer_norm(x, x.shape[-1:], None, None, _EPS)
    return value, lambda v: _normalized_backward(v, x, mean, rstd)[0]
