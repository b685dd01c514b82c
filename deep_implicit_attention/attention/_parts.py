"""What several mechanisms share: the two-layer network, heads, checks at the door."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..deq._linear_map import LinearMap
from ..deq._state import full_precision
from ..deq._watched import watched
from ..solvers._scale import is_host
from ..solvers._validate import check_is_tensor
from ._products import (
    gelu_linear,
    in_parts,
    less,
    linear,
    linear_by_bias,
    linear_by_weight,
    linear_term,
    linear_times,
    plus,
    turned,
)


class Weights(NamedTuple):
    """The parameters of a `FeedForward`, as tensors of a context; or their derivatives."""

    w_in: Any
    b_in: Any
    w_out: Any
    b_out: Any
    turned: Any = None  # W₂ᵀ in rows, a constant that solves use, where that is faster


class FeedForward(nn.Module):
    """x ↦ W₂ GELU(W₁ x + b₁) + b₂ on the last axis, hidden width 4d by default."""

    def __init__(self, dim: int, width: int | None = None) -> None:
        super().__init__()
        width = 4 * dim if width is None else width
        self.expand = nn.Linear(dim, width)
        self.contract = nn.Linear(width, dim)

    def weights(self) -> Weights:
        """The parameters, each touched once and with gradients, for an action on the state."""
        _check_hooks(self)
        return Weights(*linear_weights(self.expand), *linear_weights(self.contract))

    def forward(self, x: Tensor) -> Tensor:
        """The network called, as one that acts on the sources only is."""
        layers = self.expand, self.contract
        if all(map(_is_plain, layers)):
            (w_in, b_in), (w_out, b_out) = map(linear_weights, layers)
            return feed_forward(x, Weights(w_in, b_in, w_out, b_out)).contiguous()
        return _call(self.contract, F.gelu(_call(self.expand, x)))


def linear_weights(layer: nn.Linear) -> tuple[Tensor, Tensor]:
    """Weight and bias of a layer that acts on the state, for the context; 0 where it has none.

    During a solve the layer is not called, so hooks and a `forward` of its own would silently do
    nothing.
    """
    _check_hooks(layer)
    if not _is_linear(layer):
        raise RuntimeError(
            f"{layer} acts inside a solve by its weight and bias, where its own `forward` is not "
            "called: use torch.nn.utils.parametrize or torch.nn.utils.parametrizations instead"
        )
    weight, bias = map(full_precision, (layer.weight, layer.bias))
    return weight, weight.new_zeros(len(weight)) if bias is None else bias


def project(layer: nn.Module, x: Tensor) -> Tensor:
    """`layer(x)`, in full precision; for layers that act on the sources only."""
    if _is_plain(layer):
        weight, bias = map(full_precision, (layer.weight, layer.bias))
        return linear(x, weight, bias)
    return _call(layer, x)


def _call(layer: nn.Module, x: Tensor) -> Tensor:
    """`layer(x)` of a layer that may be narrow, in full precision."""
    return full_precision(layer(x.to(next(layer.parameters(), x).dtype)))


def _is_plain(layer: nn.Module) -> bool:
    """Whether to call the layer is to multiply by its weight."""
    return _is_linear(layer) and not _is_hooked(layer)


def _is_linear(layer: nn.Module) -> bool:
    """Whether `forward` is that of `nn.Linear`."""
    return type(layer).forward is nn.Linear.forward and "forward" not in vars(layer)


def _is_hooked(module: nn.Module) -> bool:
    return bool(
        module._forward_pre_hooks
        or module._forward_hooks
        or module._backward_pre_hooks
        or module._backward_hooks
    )


def _check_hooks(module: nn.Module) -> None:
    if _is_hooked(module):
        name = module if isinstance(module, nn.Linear) else type(module).__name__
        raise RuntimeError(
            f"{name} acts inside a solve, where its hooks are not called: use "
            "torch.nn.utils.parametrize or torch.nn.utils.parametrizations instead"
        )


def feed_forward(x: Tensor, weights: Weights) -> Tensor:
    """The network of `FeedForward` with the given weights, as a term of a sum (`linear_term`)."""

    def network(x: Tensor) -> Tensor:
        return linear_term(gelu_linear(x, weights.w_in, weights.b_in), weights.w_out, weights.b_out)

    return in_parts(network, weights.b_in.shape[0], x)


def for_sums(weights: Weights) -> Weights:
    """`weights` for `less_feed_forward` in a solve, where that is faster."""
    return weights._replace(turned=turned(weights.w_out))


def accumulates(weights: Weights, *others: Tensor) -> bool:
    """Whether `less_feed_forward` may be used: nothing of all this needs a gradient."""
    if weights.turned is None or watched(*others):
        return False
    wanted = (t.requires_grad for t in (*weights[:4], *others))
    return not (torch.is_grad_enabled() and any(wanted))


def less_feed_forward(field: Tensor, x: Tensor, weights: Weights) -> Tensor:
    """`field` − W₂ GELU(W₁ x + b₁), over `field`: b₂ is left to be taken from another sum."""
    return less(field, gelu_linear(x, weights.w_in, weights.b_in), weights.turned)


class FeedForwardVJP:
    """v ↦ (∂f/∂z)ᵀ v at `z`, the derivative of the GELU computed once; by the weights, too."""

    def __init__(self, z: Tensor, weights: Weights) -> None:
        self.z, self.weights = z, weights
        self.hidden = linear(z, weights.w_in, weights.b_in)
        self.slope = gelu_slope(self.hidden)

    def __call__(self, v: Tensor) -> Tensor:
        def network(v: Tensor, slope: Tensor) -> Tensor:
            return linear_term(linear_times(v, self.weights.w_out.mT, slope), self.weights.w_in.mT)

        return in_parts(network, self.weights.b_in.shape[0], v, self.slope)

    def taken_from(self, field: Tensor, v: Tensor) -> Tensor:
        """`field` − (∂f/∂z)ᵀ v, over `field`, which nobody else holds, where that may be."""
        weights = self.weights
        if not (field.is_contiguous() and accumulates(weights, field, v, self.slope)):
            return plus(field, self(v), alpha=-1)
        return less(field, linear_times(v, weights.w_out.mT, self.slope), weights.w_in)

    def by_context(self, v: Tensor, needed: Any) -> Weights:
        """(∂f/∂θ)ᵀ v for the weights that need it."""
        weights, by_hidden = self.weights, v
        if needed.w_in or needed.b_in:
            by_hidden = linear_times(v, weights.w_out.mT, self.slope)
        return Weights(
            linear_by_weight(by_hidden, self.z) if needed.w_in else None,
            linear_by_bias(by_hidden) if needed.b_in else None,
            linear_by_weight(v, F.gelu(self.hidden)) if needed.w_out else None,
            linear_by_bias(v) if needed.b_out else None,
            needed.turned,
        )


def feed_forward_at_zero(weights: Weights) -> Tensor:
    """f(0) `(d,)`."""
    hidden = F.gelu(_double(weights.b_in)).to(weights.b_in.dtype)
    return linear(hidden, weights.w_out, weights.b_out)


def feed_forward_slope(weights: Weights) -> Tensor:
    """∂f/∂z `(d, d)` where the hidden units are at their biases, as they are at z = 0."""
    slope = gelu_slope(_double(weights.b_in)).to(weights.b_in.dtype)
    return (weights.w_out * slope) @ weights.w_in


def _double(bias: Tensor) -> Tensor:
    """Few numbers in float64: in float32 torch takes a GELU to oneDNN, and the way is longer."""
    return bias.double() if bias.is_cpu else bias


def gelu_slope(h: Tensor) -> Tensor:
    """GELU′(h)."""
    return torch.ops.aten.gelu_backward(torch.ones_like(h), h)


def inverse_or_identity(matrix: Tensor) -> Tensor:
    """The inverses of `(..., d, d)`; the identity where there is none to be had."""
    inverse, failed = torch.linalg.inv_ex(matrix)
    # Of few numbers that is told at a glance: what is not finite adds up to what is not.
    asked = is_host(matrix) and not watched(matrix)
    if asked and not int(failed.sum()) and math.isfinite(float(inverse.detach().sum())):
        return inverse
    identity = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    sound = (failed == 0) & torch.isfinite(inverse).flatten(-2).all(dim=-1)
    return torch.where(sound[..., None, None], inverse, identity)


def on_sites(matrix: Tensor) -> LinearMap:
    """r ↦ A r_i for every site of `(B, N, d)`."""
    return LinearMap(lambda r: linear(r, matrix), lambda r: linear(r, matrix.mT))


def check_sources(x: Tensor, dim: int, num_spins: int | None, weight: Tensor) -> None:
    """Raise unless `x` is `(B, N, d)` of the right sizes, dtype and device."""
    check_is_tensor("x", x)
    sites = "N" if num_spins is None else str(num_spins)
    if x.dim() != 3 or x.shape[2] != dim or num_spins not in (None, x.shape[1]):
        raise ValueError(f"x must have shape (batch, {sites}, {dim}), got {tuple(x.shape)}")
    if x.dtype != full_precision(weight).dtype:
        raise TypeError(
            f"x has dtype {x.dtype}, the weights have {weight.dtype}: convert one of them"
        )
    if x.device != weight.device:
        raise ValueError(f"x is on {x.device}, the weights are on {weight.device}")


def check_no_inputs(module: nn.Module, inputs: tuple) -> None:
    """Raise if a mechanism that takes nothing but sources was given more."""
    if inputs:
        raise TypeError(
            f"{type(module).__name__} takes no input beside x; a key mask is for "
            "DEQVanillaSoftmaxAttention and DEQVectorSpinAttention"
        )


def split_heads(x: Tensor, heads: int) -> Tensor:
    """`(B, N, h·k)` -> `(B, h, N, k)`."""
    batch, sites, width = x.shape
    return x.reshape(batch, sites, heads, width // heads).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """`(B, h, N, k)` -> `(B, N, h·k)`."""
    batch, heads, sites, width = x.shape
    return x.transpose(1, 2).reshape(batch, sites, heads * width)


def hide(z: Tensor, mask: Tensor | None) -> Tensor:
    """`z` `(B, N, d)`, zero at the sites that `mask` hides."""
    return z if mask is None else z.masked_fill(~mask[:, :, None], 0.0)
