"""Free couplings between a fixed number of sites, shared by two mechanisms."""

from __future__ import annotations

import math
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from ..deq import DEQModule
from ..deq._map import without_autocast
from ..deq._state import full_precision
from ..deq._watched import transformed, watched
from ..solvers._validate import check_counts, check_number
from ..spins._blocks import block_diagonal, diagonal_blocks
from ._linear import Factor, solve
from ._memory import empty
from ._parts import check_no_inputs, check_sources


class SiteCouplings(DEQModule):
    """A module with free parameters J_ij, one d×d matrix for each ordered pair of sites.

    The raw parameter `_weight` is `(N, N, d, d)`, initialised N(0, `weight_init_std`²), by
    default with variance 1/(N d²), so that fields of unit norm give responses of order one (Bal
    2021).
    """

    def __init__(
        self,
        num_spins: int,
        dim: int,
        weight_init_std: float | None,
        weight_training: bool,
        weight_sym_internal: bool,
        weight_sym_sites: bool,
    ) -> None:
        super().__init__()
        check_counts(num_spins=num_spins, dim=dim)
        if weight_init_std is None:
            weight_init_std = 1 / math.sqrt(num_spins * dim**2)
        else:
            check_number("weight_init_std", weight_init_std, minimum=0.0)
        self.num_spins, self.dim = num_spins, dim
        self.weight_sym_internal = weight_sym_internal
        self.weight_sym_sites = weight_sym_sites
        weight = torch.randn(num_spins, num_spins, dim, dim) * float(weight_init_std)
        if weight_training:
            self._weight = nn.Parameter(weight)
        else:
            self.register_buffer("_weight", weight)

    def extra_repr(self) -> str:
        return f"num_spins={self.num_spins}, dim={self.dim}"

    def weight(self) -> Tensor:
        """The couplings `(N, N, d, d)`: symmetrised as asked, J_ii = 0.

        `weight_sym_internal` makes each J_ij a symmetric matrix, `weight_sym_sites` makes
        J_ij = J_ji; together J_ij = J_jiᵀ, as a spin system needs.
        """
        return _plain(full_precision(self._weight), self._symmetries, 1.0)

    def count_params(self) -> int:
        """Number of free parameters in the couplings, which symmetries and J_ii = 0 reduce."""
        pairs = self.num_spins * (self.num_spins - 1)
        entries = self.dim**2
        if self.weight_sym_sites:
            pairs //= 2
        if self.weight_sym_internal:
            entries = self.dim * (self.dim + 1) // 2
        return pairs * entries

    @property
    def _symmetries(self) -> tuple[bool, bool]:
        return self.weight_sym_internal, self.weight_sym_sites

    def coupling_matrix(self) -> Tensor:
        """`weight()` as one matrix `(N·d, N·d)` that acts on flattened states."""
        size = self.num_spins * self.dim
        return self.coupling_blocks().view(size, size)

    def coupling_blocks(self) -> Tensor:
        """`coupling_matrix()` with its indices apart, `(N, d, N, d)`."""
        weight = full_precision(self._weight)
        if watched(weight) or self._overrides("weight"):
            return self.weight().transpose(1, 2).contiguous()
        if not (torch.is_grad_enabled() and weight.requires_grad):
            return _ordered(weight, self._symmetries, 1.0)
        return _Matrix.apply(weight, self._symmetries, 1.0)

    def coupling_operator(self, precision: Tensor) -> Tensor:
        """blockdiag P − `coupling_matrix()` `(N·d, N·d)`, for P `(N, d, d)`, in one pass."""
        weight = full_precision(self._weight)
        own = self._overrides("weight", "coupling_matrix", "coupling_blocks")
        if own or watched(weight, precision):
            return block_diagonal(precision) - self.coupling_matrix()
        if not (torch.is_grad_enabled() and (weight.requires_grad or precision.requires_grad)):
            return _operator(weight, precision, self._symmetries)
        return _Operator.apply(weight, precision, self._symmetries)

    def _overrides(self, *names: str) -> bool:
        """Whether a subclass or the instance has one of these methods of its own."""
        kind, own = type(self), vars(self)
        for name in names:  # not `any`: a generator takes as long as what it does
            if name in own or getattr(kind, name) is not getattr(SiteCouplings, name):
                return True
        return False

    def couplings(self, x: Tensor) -> Tensor:
        """‖J_ij‖_F, `(B, 1, N, N)`, the same for every sample of `x`."""
        self.sources(full_precision(x))
        norms = torch.linalg.matrix_norm(self.weight())
        return norms.expand(x.shape[0], 1, *norms.shape)

    def sources(self, x: Tensor, *inputs: Any) -> Tensor:
        check_no_inputs(self, inputs)
        # As torch.nn.utils.prune leaves it. Replicas of a data-parallel module have no parameters.
        if self._forward_pre_hooks and self._parameters and "_weight" in vars(self):
            raise RuntimeError(
                f"the couplings of {type(self).__name__} are made by a hook on it, which a solve "
                "does not call: use torch.nn.utils.parametrize, or torch.nn.utils.prune.remove"
            )
        check_sources(x, self.dim, self.num_spins, self._weight_like(x))
        return x

    def _weight_like(self, x: Tensor) -> Tensor:
        """A tensor to hold the sources against, without asking a parametrisation for the couplings.

        Replicas of a data-parallel module have no parameters.
        """
        for table in (self._parameters, self._buffers):
            if (weight := table.get("_weight")) is not None:
                return weight
        return next(self.parameters(), x)


class _Matrix(torch.autograd.Function):
    """`scale` times `weight()` of the raw `(N, N, d, d)`, in the order `(N, d, N, d)`.

    Couplings can be most of the memory there is, so they are copied once, and not masked, permuted
    and reshaped one after the other. Symmetrising and masking are their own transposes.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, symmetries: tuple, scale: float) -> Tensor:  # type: ignore[override]
        ctx.how = symmetries, scale
        return _ordered(weight, *ctx.how)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple:  # type: ignore[override]
        raw = _Raw.apply if torch.is_grad_enabled() else _raw
        return raw(g, *ctx.how), None, None


class _Raw(torch.autograd.Function):
    """The transpose of `_Matrix`."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, symmetries: tuple, scale: float) -> Tensor:  # type: ignore[override]
        ctx.how = symmetries, scale
        return _raw(g, symmetries, scale)

    @staticmethod
    def backward(ctx: Any, h: Tensor) -> tuple:  # type: ignore[override]
        return _Matrix.apply(h, *ctx.how), None, None


def _raw(g: Tensor, symmetries: tuple[bool, bool], scale: float) -> Tensor:
    """What takes a derivative by `scale` · J to that by the raw couplings."""
    if watched(g):
        return _plain(g.transpose(1, 2), symmetries, scale)
    internal, sites = symmetries
    count, dim, _, _ = g.shape
    raw = empty(count, count, dim, dim, like=g)
    blocks = g.transpose(1, 2)
    other = blocks.mT if internal else blocks.transpose(0, 1) if sites else None
    _write(blocks, other, raw)
    if internal and sites:
        raw = raw + raw.transpose(0, 1)
    factor = scale * 0.5 ** (internal + sites)
    if factor != 1:
        raw.mul_(factor)
    raw.diagonal(dim1=0, dim2=1).zero_()
    return raw


class _Operator(torch.autograd.Function):
    """blockdiag P − J of the raw couplings and P `(N, d, d)`."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, weight: Tensor, precision: Tensor, symmetries: tuple
    ) -> Tensor:
        count, _, dim, _ = weight.shape
        ctx.blocks, ctx.symmetries = (count, dim, count, dim), symmetries
        # Not kept alive: what is no parameter but made from one is as large as the operator.
        ctx.made_of = weakref.ref(weight), weakref.ref(precision)
        return _operator(weight, precision, symmetries)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple:  # type: ignore[override]
        by_weight = by_precision = None
        if ctx.needs_input_grad[0]:
            raw = _Raw.apply if torch.is_grad_enabled() else _raw
            by_weight = raw(g.reshape(ctx.blocks), ctx.symmetries, -1.0)
        if ctx.needs_input_grad[1]:
            by_precision = diagonal_blocks(g, ctx.blocks[0])
        return by_weight, by_precision, None


def respond(operator: Tensor, b: Tensor, factor: Factor) -> Tensor:
    """`_linear.solve`, that is A⁻¹ b, for what `coupling_operator` made."""
    node: Any = operator.grad_fn
    if getattr(node, "_forward_cls", None) is _Operator and torch.is_grad_enabled():
        weight, precision = (part() for part in node.made_of)
        looked_at = operator._backward_hooks or operator.retains_grad or transformed(b)
        if not (looked_at or weight is None or precision is None):
            return _Response.apply(weight, precision, b, (operator, factor, node.symmetries))
    return solve(operator, b, factor)


class _Response(torch.autograd.Function):
    """x = A⁻¹ b `(n, r)` of A = blockdiag P − J, in one piece from the raw couplings.

    With u = A⁻ᵀ ∂L/∂x, ∂L/∂J is u xᵀ. Its mean over the symmetries of J is that of the symmetric
    ½ (u xᵀ + x uᵀ), of which J_ij and J_jiᵀ are one, so that for one of the two there is nothing
    left to do. `_Operator` knows ∂L/∂A only as numbers, and goes over them once for each symmetry.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        weight: Tensor,
        precision: Tensor,
        b: Tensor,
        system: tuple[Tensor, Factor, tuple[bool, bool]],  # A with a graph, for derivatives of u
    ) -> Tensor:
        operator, factor, ctx.symmetries = system
        x = factor.solve(b, False)
        ctx.save_for_backward(operator, x, *factor)
        ctx.blocks = weight.shape[0::2] * 2
        return x

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple:  # type: ignore[override]
        operator, x, *factor = ctx.saved_tensors
        again = torch.is_grad_enabled()
        by_weight = by_precision = None
        with without_autocast(x):
            u = solve(operator, g, Factor(*factor), transposed=True)
            if ctx.needs_input_grad[0]:
                left, right, symmetries, scale = u, x, ctx.symmetries, 1.0
                if all(symmetries):
                    part = 0.25 * u  # both means, where there are few numbers
                    left, right = torch.cat((part, x), dim=1), torch.cat((x, part), dim=1)
                    # Of the two, the one that leaves blocks whole.
                    symmetries, scale = (False, True), 2.0
                product = (left @ right.mT).view(ctx.blocks)
                by_weight = (_Raw.apply if again else _raw)(product, symmetries, scale)
            if ctx.needs_input_grad[1]:
                blocks = *ctx.blocks[:2], -1
                by_precision = -u.reshape(blocks) @ x.reshape(blocks).mT
        return by_weight, by_precision, u, None


def _operator(weight: Tensor, precision: Tensor, symmetries: tuple[bool, bool]) -> Tensor:
    """The value of `_Operator`."""
    count, _, dim, _ = weight.shape
    size = count * dim
    operator = empty(size, size, like=weight)
    blocks = operator.view(count, dim, count, dim)
    _order(weight, symmetries, -1.0, blocks)
    blocks.diagonal(dim1=0, dim2=2).copy_(precision.permute(1, 2, 0))
    return operator


def _ordered(weight: Tensor, symmetries: tuple[bool, bool], scale: float) -> Tensor:
    """`scale` · J `(N, d, N, d)` of the raw couplings `(N, N, d, d)`."""
    count, _, dim, _ = weight.shape
    if watched(weight):
        return _plain(weight, symmetries, scale).transpose(1, 2)
    matrix = empty(count, dim, count, dim, like=weight)
    _order(weight, symmetries, scale, matrix)
    matrix.diagonal(dim1=0, dim2=2).zero_()
    return matrix


def _order(weight: Tensor, symmetries: tuple[bool, bool], scale: float, matrix: Tensor) -> None:
    """Fill `matrix` `(N, d, N, d)` with `scale` · J of the raw `(N, N, d, d)`, but for J_ii."""
    internal, sites = symmetries
    factor = scale * 0.5 ** (internal + sites)
    if sites:  # in the order in which the blocks J_ij and J_ji are whole
        weight = (weight + weight.transpose(0, 1)).mul_(factor)
    _write(weight, weight.mT if internal else None, matrix.transpose(1, 2))
    if not sites and factor != 1:
        matrix.mul_(factor)


def _plain(weight: Tensor, symmetries: tuple[bool, bool], scale: float) -> Tensor:
    """`scale` · J `(N, N, d, d)` of the raw couplings by operations that everybody knows."""
    for first, wanted in zip((2, 0), symmetries, strict=True):
        if wanted:
            weight = 0.5 * (weight + weight.transpose(first, first + 1))
    one = torch.eye(len(weight), dtype=weight.dtype, device=weight.device)
    return weight * (scale * (1 - one))[:, :, None, None]


def _write(blocks: Tensor, more: Tensor | None, out: Tensor) -> None:
    """Copy `blocks` `(N, N, d, d)` to `out`, with `more` added."""
    if more is None:
        out.copy_(blocks)
    else:
        torch.add(blocks, more, out=out)
