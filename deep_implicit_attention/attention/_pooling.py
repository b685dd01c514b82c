"""How softmax couplings act on a state: by their matrix, or without one where there are many sites.

The matrix is made once for a solve and costs O(N²) memory. Fused attention
(`scaled_dot_product_attention`) makes it anew in every update, in blocks that stay in the cache,
and takes O(N). Which of them is the faster depends on N, on the number of updates and on whether
a gradient follows; `couple` chooses.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..deq._map import without_autocast
from ..deq._watched import transformed, watched
from ._memory import empty
from ._products import sums

# From here on fused attention gives the gradient by queries and keys, which takes half the memory
# and (measured on one core) an eighth more time, and the few updates of a solve that no backward
# pass follows, in a tenth less.
_FUSED = 1024
# From here on no matrix is made at all.
_LONG = 2048
# States of so many components a head, of fewer sites than these, are faster as they stand.
_NARROW = 16
_WIDE = 128


class Couplings(NamedTuple):
    """J = softmax(scale · q kᵀ) for each head, as a matrix, as queries and keys, or both.

    With both, the matrix is a constant that solves use, and gradients go to queries and keys.
    """

    matrix: Tensor | None  # (B, h, N, N)
    queries: Tensor | None = None  # (B, h, N, k)
    keys: Tensor | None = None
    scale: float = 1.0
    mask: Tensor | None = None  # (B, N), True = keep
    causal: bool = False
    fused: bool = False  # whether gradients are by fused attention

    def act(self, z: Tensor) -> Tensor:
        """Σ_j J_ij z_j for `z` `(B, h, N, k)`."""
        if self.matrix is not None and (self.queries is None or not torch.is_grad_enabled()):
            return _times(self.matrix.mT, z)
        assert self.queries is not None
        assert self.keys is not None
        how = self.scale, self.mask, self.causal
        if transformed(self.queries, self.keys, z):
            return _times(softmax_couplings(self.queries, self.keys, *how).mT, z)
        matrix = None if self.fused else self.matrix
        return _Pooled.apply(self.queries, self.keys, z, matrix, how)

    def rows(self, index: Tensor) -> Couplings:
        """Those of some samples."""
        parts = self.matrix, self.queries, self.keys, self.mask
        matrix, queries, keys, mask = (None if t is None else t[index] for t in parts)
        return self._replace(matrix=matrix, queries=queries, keys=keys, mask=mask)

    def narrowed(self) -> Couplings:
        """In bfloat16."""
        if self.matrix is not None:
            return Couplings(self.matrix.bfloat16())
        assert self.queries is not None
        assert self.keys is not None
        return self._replace(queries=self.queries.bfloat16(), keys=self.keys.bfloat16())

    def pullback(
        self, z: Tensor, needed: Couplings
    ) -> tuple[Tensor, Callable[[Tensor], Couplings]]:
        """`act(z)`, and what takes ∂L/∂ of it to the derivatives by what is `needed` of these."""
        if self._by_hand(z, needed):
            return self._pulled_back(z, needed)
        leaves = {
            name: getattr(self, name).detach().requires_grad_()
            for name in ("matrix", "queries", "keys")
            if getattr(needed, name)
        }
        with torch.enable_grad():
            pooled = self._replace(**leaves).act(z)

        def by_couplings(g: Tensor) -> Couplings:
            if not leaves:
                return needed
            found = torch.autograd.grad(pooled, list(leaves.values()), g)
            return needed._replace(**dict(zip(leaves, found, strict=True)))

        return pooled.detach(), by_couplings

    def _by_hand(self, z: Tensor, needed: Couplings) -> bool:
        """Whether it is about a matrix made of queries and keys, and without a graph."""
        made = self.matrix is not None and self.queries is not None
        given = self.fused or needed.matrix
        return made and not (given or torch.is_grad_enabled() or watched(z))

    def _pulled_back(
        self, z: Tensor, needed: Couplings
    ) -> tuple[Tensor, Callable[[Tensor], Couplings]]:
        """`pullback` with the matrix at hand and no graph around it."""
        q, k, matrix = self.queries, self.keys, self.matrix
        assert q is not None
        assert k is not None
        assert matrix is not None

        def by_couplings(g: Tensor) -> Couplings:
            if not (needed.queries or needed.keys):
                return needed
            by_q, by_k = _by_queries_and_keys(q, k, z, matrix, self.scale, g)
            return needed._replace(
                queries=by_q if needed.queries else None, keys=by_k if needed.keys else None
            )

        return _times(matrix.mT, z), by_couplings

    def transposed(self) -> Callable[[Tensor], Tensor]:
        """v ↦ Σ_i J_ij v_i."""
        if self.matrix is not None:
            matrix = self.matrix
            return lambda v: _times(matrix, v)
        assert self.queries is not None
        assert self.keys is not None
        q, k = self.queries.detach(), self.keys.detach()
        with torch.enable_grad():
            z = torch.zeros_like(q).requires_grad_()
            pooled = _fused(q, k, z, self.scale, self.causal)
        return lambda v: torch.autograd.grad(pooled, z, v.contiguous(), retain_graph=True)[0]


def _times(transposed: Tensor, z: Tensor) -> Tensor:
    """J z, given Jᵀ: by zᵀ Jᵀ, states of a few components as rows, or as it stands.

    Measured with 64 sites in float32: as rows 4 components take a third of the time, and 32 take
    1.2 times as long. In float64 rows were the faster at 16 and 32 components as well.
    """
    sites, width = z.shape[-2:]
    stands = transposed.dtype == torch.float32 and width >= _NARROW
    if stands and (torch.compiler.is_compiling() or sites < _WIDE):  # compiled for any N
        return transposed.mT @ z.to(transposed.dtype)
    return sums(z.mT.to(transposed.dtype).contiguous(), transposed).mT


def couple(
    q: Tensor, k: Tensor, width: int, scale: float, mask: Tensor | None, causal: bool
) -> Couplings:
    """The couplings of `q`, `k` `(B, h, N, k)`, to act on states of `width` components a head."""
    sites = q.shape[2]
    # Fused attention knows no row without a key, and its fast form wants equal widths. N is asked
    # for last: to a compiler a size that is looked at is no longer any size.
    fused = mask is None and q.shape[3] == width and sites >= _FUSED
    if transformed(q, k) or (torch.compiler.is_compiling() and not fused):
        return Couplings(softmax_couplings(q, k, scale, mask, causal))
    matrix = None
    if not fused or (sites < _LONG and torch.is_grad_enabled()):
        matrix = softmax_couplings(q.detach(), k.detach(), scale, mask, causal)
    return Couplings(matrix, q, k, scale, mask, causal, fused)


def softmax_couplings(
    q: Tensor, k: Tensor, scale: float, mask: Tensor | None, causal: bool
) -> Tensor:
    """J = softmax(scale · q kᵀ) over the keys that a query may see, `(B, h, N, N)`.

    Rows sum to one, or to zero where a query sees no key at all.
    """
    # Where nothing is allowed it is the lowest number, not −inf: a row without keys must not become
    # 0/0. It becomes zero in the end; only a key mask can leave such rows.
    allowed = _allowed(q, mask, causal)
    if watched(q, k) or (torch.is_grad_enabled() and (q.requires_grad or k.requires_grad)):
        logits = (q * scale) @ k.mT
        if allowed is None:
            return logits.softmax(dim=-1)
        lowest = torch.finfo(logits.dtype).min
        weights = logits.masked_fill(~allowed, lowest).softmax(dim=-1)
        return weights if mask is None else weights.masked_fill(~allowed, 0.0)
    # In place: fresh memory for matrices of this size costs more than the exponentials.
    logits = torch.matmul(q * scale, k.mT, out=empty(*q.shape[:-1], k.shape[-2], like=q))
    if allowed is None:
        return torch.softmax(logits, dim=-1, out=logits)
    logits.masked_fill_(~allowed, torch.finfo(logits.dtype).min)
    torch.softmax(logits, dim=-1, out=logits)
    return logits if mask is None else logits.masked_fill_(~allowed, 0.0)


def _allowed(q: Tensor, mask: Tensor | None, causal: bool) -> Tensor | None:
    """Which keys a query may see, broadcast over `(B, h, N, N)`; None if all."""
    allowed = None
    if causal:
        sites = q.shape[2]
        allowed = torch.ones(sites, sites, dtype=torch.bool, device=q.device).tril()[None, None]
    if mask is not None:
        keys = mask[:, None, None, :]
        allowed = keys if allowed is None else allowed & keys
    return allowed


def _fused(q: Tensor, k: Tensor, z: Tensor, scale: float, causal: bool) -> Tensor:
    if scale <= 0:  # torch multiplies by it what is hidden, too, which is −∞
        q, scale = q * scale, 1.0
    return F.scaled_dot_product_attention(q, k, z, is_causal=causal, scale=scale)


class _Pooled(torch.autograd.Function):
    """Σ_j J_ij z_j of queries and keys, by their `matrix` or by fused attention.

    torch has no second derivatives of fused attention: they come from the matrix, made anew.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, q: Tensor, k: Tensor, z: Tensor, matrix: Tensor | None, how: tuple
    ) -> Tensor:
        scale, mask, causal = how
        z = z.to(q.dtype)
        pooled = _fused(q, k, z, scale, causal) if matrix is None else _times(matrix.mT, z)
        ctx.scale, ctx.causal = scale, causal
        ctx.save_for_backward(q, k, z, matrix, mask)
        return pooled

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple:  # type: ignore[override]
        q, k, z, matrix, mask = ctx.saved_tensors
        needed, g = ctx.needs_input_grad[:3], g.to(q.dtype)
        by_q = by_k = by_z = None
        with without_autocast(g):
            if torch.is_grad_enabled() or matrix is None:
                return *_by_autograd(ctx, q, k, z, mask, g), None, None
            if needed[2]:
                by_z = _times(matrix, g)
            if needed[0] or needed[1]:
                by_q, by_k = _by_queries_and_keys(q, k, z, matrix, ctx.scale, g)
        return by_q, by_k, by_z, None, None


def _by_queries_and_keys(
    q: Tensor, k: Tensor, z: Tensor, matrix: Tensor, scale: float, g: Tensor
) -> tuple[Tensor, Tensor]:
    logits = _by_logits(scale * g, z, matrix)
    return _times(logits.mT, k), _times(logits, q)


def _by_logits(g: Tensor, z: Tensor, matrix: Tensor) -> Tensor:
    """J ∘ (G − Σ_j J_ij G_ij) with G = g zᵀ, the derivative by J."""
    by_softmax = torch.ops.aten._softmax_backward_data
    if watched(g):
        return by_softmax(g @ z.mT, matrix, -1, matrix.dtype)
    logits = torch.matmul(g, z.mT, out=empty(*matrix.shape, like=g))
    return by_softmax.out(logits, matrix, -1, matrix.dtype, grad_input=logits)


def _by_autograd(
    ctx: Any, q: Tensor, k: Tensor, z: Tensor, mask: Tensor | None, g: Tensor
) -> list[Tensor | None]:
    needed = ctx.needs_input_grad[:3]
    twice = torch.is_grad_enabled()
    with torch.enable_grad():
        if twice:
            q, k, z = (t.view_as(t) for t in (q, k, z))
            pooled = softmax_couplings(q, k, ctx.scale, mask, ctx.causal) @ z
        else:
            q, k, z = (t.detach().requires_grad_() for t in (q, k, z))
            pooled = _fused(q, k, z, ctx.scale, ctx.causal)
        wanted = [t for t, need in zip((q, k, z), needed, strict=True) if need]
        found = iter(torch.autograd.grad(pooled, wanted, g, create_graph=twice))
    return [next(found) if need else None for need in needed]
