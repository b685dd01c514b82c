"""The linear system of spins with a Gaussian prior: its operator P − J, and the response."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..deq._map import without_autocast
from ..deq._watched import watched
from ..spins._blocks import diagonal_blocks
from ._linear import Factor, solve
from ._memory import empty
from ._site_couplings import RawGradient, freed, ordered, raw_gradient, write

Symmetries = tuple[bool, bool]


def coupling_operator(weight: Tensor, precision: Tensor, symmetries: Symmetries) -> Tensor:
    """blockdiag P − J `(N·d, N·d)`, from raw couplings `(N, N, d, d)` and P `(N, d, d)`."""
    return _Operator.apply(weight, precision, symmetries)


def response(
    weight: Tensor,
    precision: Tensor,
    x: Tensor,
    operator: Tensor,
    factor: Factor,
    symmetries: Symmetries,
) -> Tensor:
    """A⁻¹ x for `x` `(B, N, d)`, where `factor` is that of the `coupling_operator` A = `operator`.

    The same as `solve` with A itself, but that the derivative by the couplings, of rank B, is made
    in fewer passes.
    """
    return _Response.apply(weight, precision, x, operator, *factor, symmetries)


class _Operator(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, precision: Tensor, symmetries: Symmetries) -> Tensor:  # type: ignore[override]
        ctx.symmetries = symmetries
        operator = ordered(weight, symmetries, -1.0)
        ctx.blocks = operator.shape
        operator.diagonal(dim1=0, dim2=2).copy_(precision.permute(1, 2, 0))
        return operator.flatten(2).flatten(0, 1)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple:  # type: ignore[override]
        by_weight = by_precision = None
        if ctx.needs_input_grad[0]:
            by_weight = RawGradient.apply(g.reshape(ctx.blocks), ctx.symmetries, -1.0)
        if ctx.needs_input_grad[1]:
            by_precision = diagonal_blocks(g, ctx.blocks[0])
        return by_weight, by_precision, None


class _Response(torch.autograd.Function):
    """z = A⁻¹ x: with u = A⁻ᵀ ∂L/∂z, ∂L/∂x = u and ∂L/∂A = −u zᵀ.

    The latter goes to what A is made of; A itself is an input for second derivatives.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        weight: Tensor,
        precision: Tensor,
        x: Tensor,
        operator: Tensor,
        matrix: Tensor,
        pivots: Tensor | None,
        inverse: Tensor | None,
        symmetries: Symmetries,
    ) -> Tensor:
        factor = Factor(matrix, pivots, inverse)
        # A copy, for a view could not be changed in place by who gets it.
        z = factor.solve(x.flatten(1).mT, False).mT.reshape_as(x).clone()
        ctx.save_for_backward(z, operator, matrix, pivots, inverse)
        ctx.symmetries = symmetries
        return z

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple:  # type: ignore[override]
        z, operator, *rest = ctx.saved_tensors
        factor, by_weight, by_precision = Factor(*rest), None, None
        for_weight, for_precision = ctx.needs_input_grad[:2]
        plain = torch.is_grad_enabled() or watched(g)
        with without_autocast(z):
            columns = g.reshape(g.shape[0], g.shape[1] * g.shape[2]).mT
            if plain:
                u = solve(operator, columns, factor, transposed=True).mT.reshape(g.shape)
            else:
                u = factor.solve(columns, True).mT.reshape_as(g)
            if for_weight and plain:
                size = z.shape[1] * z.shape[2]
                outer = u.reshape(len(z), size).mT @ z.reshape(len(z), size)
                by_blocks = outer.reshape(*z.shape[1:], *z.shape[1:])
                by_weight = RawGradient.apply(by_blocks, ctx.symmetries, 1.0)
            elif for_weight:
                by_weight = _by_outer_product(u, z, ctx.symmetries)
            if for_precision:
                by_precision = -(u.permute(1, 2, 0) @ z.permute(1, 0, 2))
        return by_weight, by_precision, u, None, None, None, None, None


def _by_outer_product(u: Tensor, z: Tensor, symmetries: Symmetries) -> Tensor:
    """The derivative by the raw couplings where that by J is Σ_b u_b z_bᵀ, without a graph."""
    _, count, dim = z.shape
    left, right, both = u.flatten(1), z.flatten(1), all(symmetries)
    if both:
        # Once components are exchangeable, to exchange sites is to transpose: G + Gᵀ, of rank 2 B.
        left, right = torch.cat([left, right]).mul_(0.25), torch.cat([right, left])
    out = empty(count, dim, count, dim, like=z)
    torch.mm(left.mT, right, out=out.view(count * dim, count * dim))
    if not both:
        return raw_gradient(out, symmetries, 1.0)
    raw = empty(count, count, dim, dim, like=z)
    write(out.transpose(1, 2), True, raw)
    return freed(raw, (0, 1), 1.0)
