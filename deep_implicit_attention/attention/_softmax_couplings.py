"""Couplings from queries and keys of the input, shared by two mechanisms."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..deq import DEQModule
from ..deq._state import full_precision
from ..solvers._validate import check_number
from ._parts import check_sources, hide, project, split_heads


class SoftmaxCouplings(DEQModule):
    """A module with J_ij(x) = softmax_j( (W_Q x_i)·(W_K x_j) · scale ) for each head.

    Works for any number of sites, with a key mask, and causally. A site that the mask hides has
    x = z = 0.
    """

    def __init__(self, dim: int, heads: int, dim_head: int, scale: float | None, causal: bool):
        super().__init__()
        if scale is not None:
            check_number("scale", scale, minimum=-math.inf)
        self.dim, self.heads, self.causal = dim, heads, causal
        self.scale = dim_head**-0.5 if scale is None else float(scale)
        self.to_q = nn.Linear(dim, heads * dim_head, bias=False)
        self.to_k = nn.Linear(dim, heads * dim_head, bias=False)

    def sources(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        check_sources(x, self.dim, None, self.to_q.weight)
        check_key_mask(mask, x)
        return hide(x, mask)

    def couplings(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """J_ij of each head, `(B, heads, N, N)`; rows sum to one (zero without any key)."""
        x = self.sources(full_precision(x), mask)
        q = split_heads(project(self.to_q, x), self.heads)
        k = split_heads(project(self.to_k, x), self.heads)
        return softmax_couplings(q, k, self.scale, mask, self.causal)


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
