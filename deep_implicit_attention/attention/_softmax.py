"""The attention of transformers, with couplings from queries and keys of the input."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn
from torch.nn import functional as F

from ._parts import (
    FeedForward,
    Weights,
    check_positive,
    feed_forward,
    hide,
    linear_weights,
    merge_heads,
    split_heads,
)
from ._softmax_couplings import SoftmaxCouplings


class _Context(NamedTuple):
    x: Tensor  # (B, N, d)
    couplings: Tensor  # (B, h, N, N)
    w_out: Tensor
    b_out: Tensor
    correction: Weights | None
    mask: Tensor | None  # (B, N), True = keep


class DEQVanillaSoftmaxAttention(SoftmaxCouplings):
    """Mean-field equations with the couplings of a transformer:

        z_i = W_O [ Σ_j softmax_j( (W_Q x_i)·(W_K x_j) · scale ) z_j ]_heads − f(z_i) + x_i

    The state itself takes the place of the values, split into heads, and f is a two-layer GELU
    network of width 4d (Bal 2021, *Deep Implicit Attention*; Vaswani et al. 2017,
    arXiv:1706.03762). The couplings depend on x and are not symmetric, so there is a fixed point
    but no Boltzmann distribution behind it. One step from z = x is an attention block.

    Wrap it in `DEQFixedPoint`; x and z are `(B, N, d)` with any N, and the layer takes an
    optional boolean key mask `(B, N)`, True = keep: ``layer(x, mask)``. A masked site has z = 0
    and counts in no sum and no residual; a query without any key has J_i = 0.

    Args:
        num_spins: the usual number of sites; the module works for any.
        dim: components d of a spin, divisible by `heads`.
        heads: number of heads.
        dim_head: width of queries and keys, default d / heads.
        scale: factor of the logits, default 1/√dim_head.
        lin_response: False drops f.
        causal: J_ij = 0 for j > i, so that no site's equilibrium depends on later ones (what a
            solve returns does within its tolerance: it stops by the residual of the whole sample).

    Cost: O(B N² d) for the couplings and for each update; memory O(B heads N²).
    """

    def __init__(
        self,
        num_spins: int,
        dim: int,
        heads: int = 1,
        dim_head: int | None = None,
        scale: float | None = None,
        lin_response: bool = True,
        *,
        causal: bool = False,
    ) -> None:
        check_positive(num_spins=num_spins, dim=dim, heads=heads)
        if dim % heads:
            raise ValueError(f"dim must be divisible by heads, got dim={dim}, heads={heads}")
        dim_head = dim // heads if dim_head is None else dim_head
        check_positive(dim_head=dim_head)
        super().__init__(dim, heads, dim_head, scale, causal)
        self.num_spins = num_spins
        self.to_out = nn.Linear(dim, dim)
        self.lin_response = lin_response
        self.correction = FeedForward(dim) if lin_response else None

    def extra_repr(self) -> str:
        return f"dim={self.dim}, heads={self.heads}, scale={self.scale:g}, causal={self.causal}"

    def prepare(self, x: Tensor, mask: Tensor | None = None) -> _Context:
        return _Context(
            x,
            self.couplings(x, mask),
            *linear_weights(self.to_out),
            None if self.correction is None else self.correction.weights(),
            mask,
        )

    def update(self, z: Tensor, context: _Context) -> Tensor:
        pooled = merge_heads(context.couplings @ split_heads(z, self.heads))
        field = F.linear(pooled, context.w_out, context.b_out) + context.x
        if context.correction is not None:
            field = field - feed_forward(z, context.correction)
        return hide(field, context.mask)
