"""Vector spins on a sphere, coupled by softmax attention: a bounded, contractive response."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..solvers._validate import check_counts, check_number
from ._normalize import normalized
from ._parts import FeedForward, hide, merge_heads, split_heads
from ._pooling import Couplings, couple
from ._rotary import ROTARY_BASE
from ._softmax_couplings import Memory, SoftmaxCouplings


class _Context(NamedTuple):
    fields: Tensor  # (B, h, N, k): x + f(x), by heads
    couplings: Couplings
    mask: Tensor | None  # (B, N), True = keep
    memory: Memory | None


class DEQVectorSpinAttention(SoftmaxCouplings):
    """The response of spins on a sphere to their fields, one spin per site and head:

        z_i = φ_β( x_i + f(x_i) + Σ_j J_ij(x) z_j ),   φ_β(h) = β h / (1 + √(1 + β² ‖h‖² / R²))

    φ is the large-dimension response of a spin of radius R, R² = k/2 − 1, with k = dim / heads
    components (Bal 2023, *Spin-Model Transformers*). J are the softmax couplings of queries and
    keys of x, f a two-layer GELU network of the input alone. The slope of φ_β is at most β/2 and
    the rows of J sum to one, so the update contracts by β/2 in the maximum over sites and heads
    of the spins' norms: for ``beta < 2`` there is one fixed point and iteration always reaches
    it. `contraction` is that factor. The couplings are not symmetric, so no Boltzmann
    distribution stands behind the fixed point.

    Wrap it in `DEQFixedPoint`; x and z are `(B, N, dim)` with any N, and the layer takes an
    optional boolean key mask `(B, N)`, True = keep: ``layer(x, mask)``. A masked site has z = 0
    and counts in no sum and no residual.

    Args:
        dim: components of a site, divisible by `heads`, at least 3 a head.
        heads: spins per site.
        beta: inverse temperature, > 0; it multiplies couplings and fields.
        scale: factor of the logits, default 1/√(dim / heads).
        causal: J_ij = 0 for j > i, so that no site's equilibrium depends on later ones (what a
            solve returns does, within the tolerance, since it stops by the residual of the whole
            sample). Then `append` adds sites one by one.
        normalize: queries, keys and f of the normalised x (mean 0, variance 1 over components).
        rotary: queries and keys are rotated by an angle that grows with their site, so that J_ij
            depends on i − j as well as x.
        rotary_base: the slowest pair turns by about 1 / base per site, the fastest by 1. Choose a
            low one where only near sites matter.
        dropout: of the components of f(x_i), while training.

    Cost: O(B N² dim) for the couplings and for each update; memory O(B heads N²). From
    2,048 sites on, without a mask, it is O(B N dim), gradients included.

    Raises:
        TypeError, ValueError: for sizes that do not fit each other, and for x or a mask of another
            shape, dtype or device.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        beta: float = 1.0,
        *,
        scale: float | None = None,
        causal: bool = False,
        normalize: bool = False,
        rotary: bool = False,
        rotary_base: float = ROTARY_BASE,
        dropout: float = 0.0,
    ) -> None:
        check_counts(dim=dim, heads=heads)
        if dim % heads or dim // heads < 3:
            raise ValueError(
                f"dim must be divisible by heads with at least 3 components a head, got "
                f"dim={dim}, heads={heads}"
            )
        check_number("beta", beta)
        if beta <= 0:
            raise ValueError(f"beta must be above 0, got {beta}")
        super().__init__(
            dim, heads, dim // heads, scale, causal, normalize, rotary, rotary_base, dropout
        )
        self.beta = float(beta)
        self.radius = (dim // heads / 2 - 1) ** 0.5
        self.source = FeedForward(dim)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, heads={self.heads}, beta={self.beta:g}, causal={self.causal}"

    @property
    def contraction(self) -> float:
        """β/2, which bounds the update's Lipschitz constant in the maximum of spin norms."""
        return self.beta / 2

    def prepare(self, x: Tensor, mask: Tensor | None = None) -> _Context:
        q, k = self.queries_and_keys(x)
        couplings = couple(q, k, self.dim // self.heads, self.scale, mask, self.causal)
        memory = Memory(k, None, mask) if self.causal else None
        return _Context(self._fields(x), couplings, mask, memory)

    def update(self, z: Tensor, context: _Context) -> Tensor:
        field = context.fields + context.couplings.act(split_heads(z, self.heads))
        field = self.beta * field
        stretch = 1 + field.square().sum(dim=-1, keepdim=True) / self.radius**2
        return hide(merge_heads(field / (1 + stretch.sqrt())), context.mask)

    def select_samples(self, index: Tensor, context: _Context) -> _Context:
        """The context of some samples."""
        mask = None if context.mask is None else context.mask[index]
        return _Context(context.fields[index], context.couplings.rows(index), mask, None)

    def append(self, context: _Context, state: Tensor, x_new: Tensor) -> _Context:
        """The context of one more site, given the equilibrium `state` of those before it.

        Arguments and cost as in `DEQVanillaSoftmaxAttention.append`.
        """
        pooled, own, memory = self.one_more(context.memory, state, x_new)
        return _Context(self._fields(x_new) + pooled, Couplings(own), None, memory)

    def _fields(self, x: Tensor) -> Tensor:
        """x + f(x) by heads, `(B, h, N, k)`, at most so long that squares of β h do not overflow.

        In longer ones a spin points along them to all its digits, and others cannot turn it.
        """
        response = self.source(normalized(x) if self.normalize else x)
        response = F.dropout(response, self.dropout, self.training)
        fields = split_heads(x + response, self.heads)
        limit = 1e-6 * torch.finfo(fields.dtype).max ** 0.5 / self.beta
        return fields / (fields.detach().abs().amax(dim=-1, keepdim=True) / limit).clamp_min(1.0)
