"""Couplings from queries and keys of the input, shared by two mechanisms."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..deq import DEQModule
from ..deq._state import full_precision
from ..solvers._validate import check_number
from ._normalize import normalized
from ._parts import check_sources, hide, project, split_heads
from ._pooling import softmax_couplings
from ._rotary import ROTARY_BASE, rotate


class Memory(NamedTuple):
    """What a causal mechanism keeps of its sites for those to come."""

    keys: Tensor  # (B, h, t, k)
    states: Tensor | None  # (B, h, t', d / h), of the sites that are no longer solved for
    mask: Tensor | None  # (B, t), True = keep


class SoftmaxCouplings(DEQModule):
    """A module with J_ij(x) = softmax_j( (W_Q x_i)·(W_K x_j) · scale ) for each head.

    Works for any number of sites, with a key mask, and causally. A site that the mask hides has
    x = z = 0. With `normalize`, queries and keys are those of the normalised x; with `rotary`
    they are turned by angles proportional to the site (see `rotate`), so that J_ij depends on
    i − j beside x.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        dim_head: int,
        scale: float | None,
        causal: bool,
        normalize: bool,
        rotary: bool,
        rotary_base: float,
        dropout: float,
    ) -> None:
        super().__init__()
        if scale is not None:
            check_number("scale", scale, minimum=-math.inf)
        check_number("dropout", dropout, minimum=0.0, below=1.0)
        check_number("rotary_base", rotary_base, minimum=1.0)
        if not rotary and rotary_base != ROTARY_BASE:
            raise ValueError(
                "rotary_base is of rotary positions and does nothing without them, got "
                f"{rotary_base}"
            )
        if rotary and dim_head % 2:
            raise ValueError(f"rotary needs an even width of a head, got {dim_head}")
        self.dim, self.heads, self.causal = dim, heads, causal
        self.normalize, self.rotary, self.dropout = normalize, rotary, float(dropout)
        self.rotary_base = float(rotary_base)
        self.scale = dim_head**-0.5 if scale is None else float(scale)
        self.to_q = nn.Linear(dim, heads * dim_head, bias=False)
        self.to_k = nn.Linear(dim, heads * dim_head, bias=False)

    def sources(self, x: Tensor, mask: Tensor | None = None, *others: Any) -> Tensor:
        if others:
            raise TypeError(
                f"{type(self).__name__} takes x and a key mask, got {len(others)} more: queries "
                "and keys are made of x, and the state serves as the values"
            )
        check_sources(x, self.dim, None, self._weight_like(x))
        check_key_mask(mask, x)
        return hide(x, mask)

    def _weight_like(self, x: Tensor) -> Tensor:
        """A parameter to hold the sources against; replicas of a data-parallel module have none."""
        return next(self.to_q.parameters(), x)

    def couplings(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """J_ij of each head, `(B, heads, N, N)`; rows sum to one (zero without any key)."""
        x = self.sources(full_precision(x), mask)
        q, k = self.queries_and_keys(x)
        return softmax_couplings(q, k, self.scale, mask, self.causal)

    def queries_and_keys(self, x: Tensor, first: int = 0) -> tuple[Tensor, Tensor]:
        """Each `(B, heads, N, dim_head)`, of sites that start at number `first`."""
        if self.normalize:
            x = normalized(x)
        q = split_heads(project(self.to_q, x), self.heads)
        k = split_heads(project(self.to_k, x), self.heads)
        if not self.rotary:
            return q, k
        return rotate(q, self.rotary_base, first), rotate(k, self.rotary_base, first)

    def one_more(
        self, memory: Memory | None, state: Tensor, x_new: Tensor
    ) -> tuple[Tensor, Tensor, Memory]:
        """The field that sites with known states exert on one more site, and its own coupling.

        Args:
            memory: of the sites so far; None where the mechanism is not causal.
            state: what the couplings act on `(B, n, d)`, of the n last of these sites.
            x_new: the source of the new site, `(B, 1, d)`.

        Returns:
            Σ_j J_ij z_j over the known sites, `(B, heads, 1, d / heads)`; J_ii,
            `(B, heads, 1, 1)`; the memory with the new site's key in it. Cost: O(B t d).
        """
        if memory is None:
            raise ValueError(
                f"{type(self).__name__} must be causal to append a site: without causal=True a new "
                "site changes the equilibrium of those before it"
            )
        check_sources(x_new, self.dim, 1, self._weight_like(x_new))
        recent = split_heads(state, self.heads)
        states = recent if memory.states is None else torch.cat([memory.states, recent], dim=2)
        q, k = self.queries_and_keys(x_new, first=memory.keys.shape[2])
        keys = torch.cat([memory.keys, k], dim=2)
        mask = memory.mask
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        row = softmax_couplings(q, keys, self.scale, mask, causal=False)
        return row[..., :-1] @ states, row[..., -1:], Memory(keys, states, mask)

    def draw_dropout(self, like: Tensor) -> Tensor | None:
        """A dropout mask for one solve: 0 or 1 / (1 − p), None where there is no dropout."""
        if not (self.training and self.dropout):
            return None
        return F.dropout(torch.ones_like(like), self.dropout)


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
