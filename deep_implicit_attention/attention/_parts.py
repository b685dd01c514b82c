"""What several mechanisms share: the two-layer network, softmax couplings, checks at the door."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..deq._state import full_precision


class Weights(NamedTuple):
    """The parameters of a `FeedForward`, as tensors of a context."""

    w_in: Tensor
    b_in: Tensor
    w_out: Tensor
    b_out: Tensor


class FeedForward(nn.Module):
    """x ↦ W₂ GELU(W₁ x + b₁) + b₂ on the last axis, hidden width `mult` times the outer one."""

    def __init__(self, dim: int, mult: int = 4) -> None:
        super().__init__()
        self.expand = nn.Linear(dim, mult * dim)
        self.contract = nn.Linear(mult * dim, dim)

    def weights(self) -> Weights:
        """The parameters, each touched once and with gradients."""
        tensors = (self.expand.weight, self.expand.bias, self.contract.weight, self.contract.bias)
        return Weights(*map(full_precision, tensors))

    def forward(self, x: Tensor) -> Tensor:
        return feed_forward(x, self.weights())


def feed_forward(x: Tensor, weights: Weights) -> Tensor:
    """The network of `FeedForward` with the given weights."""
    hidden = F.gelu(F.linear(x, weights.w_in, weights.b_in))
    return F.linear(hidden, weights.w_out, weights.b_out)


def check_positive(**sizes: int) -> None:
    """Raise unless every size is a positive integer."""
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int):
            raise TypeError(f"{name} must be an integer, got {type(size).__name__}")
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")


def check_sources(x: Tensor, dim: int, num_spins: int | None, weight: Tensor) -> None:
    """Raise unless `x` is `(B, N, d)` of the right sizes, dtype and device."""
    sites = "N" if num_spins is None else str(num_spins)
    if x.dim() != 3 or x.shape[2] != dim or num_spins not in (None, x.shape[1]):
        raise ValueError(f"x must have shape (batch, {sites}, {dim}), got {tuple(x.shape)}")
    if x.dtype != full_precision(weight).dtype:
        raise TypeError(
            f"x has dtype {x.dtype}, the weights have {weight.dtype}: convert one of them"
        )
    if x.device != weight.device:
        raise ValueError(f"x is on {x.device}, the weights are on {weight.device}")


def check_key_mask(mask: Tensor | None, x: Tensor) -> None:
    """Raise unless `mask` is None or a boolean `(B, N)` on the device of `x`."""
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"mask must be a boolean tensor, True = keep, got {kind}")
    if mask.shape != x.shape[:2]:
        raise ValueError(f"mask must have shape {tuple(x.shape[:2])}, got {tuple(mask.shape)}")
    if mask.device != x.device:
        raise ValueError(f"mask is on {mask.device}, x is on {x.device}")


def split_heads(x: Tensor, heads: int) -> Tensor:
    """`(B, N, h·k)` -> `(B, h, N, k)`."""
    batch, sites, width = x.shape
    return x.reshape(batch, sites, heads, width // heads).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """`(B, h, N, k)` -> `(B, N, h·k)`."""
    batch, heads, sites, width = x.shape
    return x.transpose(1, 2).reshape(batch, sites, heads * width)


def softmax_couplings(
    q: Tensor, k: Tensor, scale: float, mask: Tensor | None, causal: bool
) -> Tensor:
    """J = softmax(scale · q kᵀ) over the keys that a query may see, `(B, h, N, N)`.

    Rows sum to one, or to zero where a query sees no key at all.
    """
    logits = (q * scale) @ k.mT
    sites = logits.shape[-1]
    allowed = None
    if causal:
        allowed = torch.ones(sites, sites, dtype=torch.bool, device=q.device).tril()[None, None]
    if mask is not None:
        keys = mask[:, None, None, :]
        allowed = keys if allowed is None else allowed & keys
    if allowed is None:
        return logits.softmax(dim=-1)
    # The lowest number, not −inf: a row without keys must not become 0/0.
    lowest = torch.finfo(logits.dtype).min
    return logits.masked_fill(~allowed, lowest).softmax(dim=-1).masked_fill(~allowed, 0.0)


def hide(z: Tensor, mask: Tensor | None) -> Tensor:
    """`z` `(B, N, d)`, zero at the sites that `mask` hides."""
    return z if mask is None else z.masked_fill(~mask[:, :, None], 0.0)
