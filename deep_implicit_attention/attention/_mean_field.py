"""Attention with free couplings: the mean-field response of a vector spin system."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..deq._linear_map import LinearMap, Pullback
from ..deq._watched import transformed, watched
from ..solvers._scale import is_host
from ._memory import empty
from ._parts import (
    FeedForward,
    FeedForwardVJP,
    Weights,
    feed_forward,
    feed_forward_at_zero,
    feed_forward_slope,
    inverse_or_identity,
    on_sites,
)
from ._products import for_transposed, linear, narrow_pays, plus
from ._site_couplings import SiteCouplings

# Up to this N·d the couplings are inverted, in less time than the updates take that it spares. (The
# size of the batch does not decide, or samples would depend on their mates.)
_INVERTED = 256
# Where ‖A⁴‖_F is less, as some rows tell, four or eight terms of its series serve as an inverse:
# what they leave out, A⁴ or A⁸, is less than a quarter.
_FOUR = 0.25
_EIGHT = 0.5
_ROWS = 16
# Up to so many samples the derivative by the couplings is made in the order of the raw ones.
_FEW = 8
# So many couplings are worth a copy in bfloat16 on a GPU: one of N·d = 8192 has them. Reckoned, not
# measured: with 64 samples a product in float32 takes as long as the copy.
_LARGE = 1 << 26


class _Context(NamedTuple):
    x: Any  # (B, N, d)
    couplings: Any  # (N, d, N, d)
    correction: Weights | None


class DEQMeanFieldAttention(SiteCouplings):
    """Mean-field equations with free couplings and a learned self-correction:

        z_i = Σ_j J_ij z_j − f(z_i) + x_i

    J_ij are free d×d matrices (J_ii = 0) and f is a two-layer GELU network of width 4d, the same
    for all sites, in the role of the Onsager term (Bal 2021, *Deep Implicit Attention*). Without
    the symmetries there is a fixed point but no Boltzmann distribution behind it. Sources should
    have ‖x_i‖ of order one.

    Wrap it in `DEQFixedPoint`; x and z are `(B, N, d)`.

    Args:
        num_spins: number of sites N.
        dim: components d of a spin.
        weight_init_std: standard deviation of the raw couplings at the start, default 1/√(N d²);
            each symmetry divides that of the couplings by about √2.
        weight_training: False makes the couplings a buffer.
        weight_sym_internal: symmetrise each J_ij.
        weight_sym_sites: symmetrise J_ij = J_ji.
        lin_response: False drops f.

    Cost of an update: O(B N² d² + B N d²); N² d² parameters.

    Raises:
        TypeError, ValueError: for sizes below 1, and for x of another shape, dtype or device.
    """

    def __init__(
        self,
        num_spins: int,
        dim: int,
        weight_init_std: float | None = None,
        weight_training: bool = True,
        weight_sym_internal: bool = False,
        weight_sym_sites: bool = False,
        lin_response: bool = True,
    ) -> None:
        super().__init__(
            num_spins, dim, weight_init_std, weight_training, weight_sym_internal, weight_sym_sites
        )
        self.lin_response = lin_response
        self.correction = FeedForward(dim) if lin_response else None

    def prepare(self, x: Tensor) -> _Context:
        correction = None if self.correction is None else self.correction.weights()
        if self._overrides("coupling_matrix"):
            shape = self.num_spins, self.dim, self.num_spins, self.dim
            couplings = self.coupling_matrix().view(shape)
        else:  # not by way of a matrix, as which the derivative would have to be copied
            couplings = self.coupling_blocks()
        return _Context(x, couplings, correction)

    def update(self, z: Tensor, context: _Context) -> Tensor:
        couplings = context.couplings
        graph = torch.is_grad_enabled() and (z.requires_grad or couplings.requires_grad)
        product = _Field.apply if graph and not transformed(z, couplings) else _product
        field = plus(product(z, couplings), context.x)
        if context.correction is None:
            return field
        return plus(field, feed_forward(z, context.correction), alpha=-1)

    def select_samples(self, index: Tensor, context: _Context) -> _Context:
        """The context of some samples."""
        return context._replace(x=context.x[index])

    def first_step(self, context: _Context) -> Tensor:
        """x − f(0), the update from z = 0, which needs no couplings."""
        if context.correction is None:
            return context.x
        return context.x - feed_forward_at_zero(context.correction)

    def vjp(self, z: Tensor, context: _Context) -> Pullback:
        """v ↦ (∂F/∂z)ᵀ v at `z`, and the derivatives by the context."""
        transposed = for_transposed(_matrix(context.couplings), len(z)).mT
        correction = context.correction
        corrected = None if correction is None else FeedForwardVJP(z, correction)

        def by_state(v: Tensor) -> Tensor:
            pulled = linear(v.flatten(1), transposed).view_as(v)
            return pulled if corrected is None else plus(pulled, corrected(v), alpha=-1)

        def by_context(v: Tensor, needed: _Context) -> _Context:
            return _Context(
                v if needed.x else None,
                _by_couplings(v, z) if needed.couplings else None,
                None if corrected is None else corrected.by_context(-v, needed.correction),
            )

        pullback = Pullback(by_state, by_context)
        if correction is None or corrected is None or not self._inverts:
            return pullback

        def remainder(v: Tensor) -> Tensor:
            linear_part = linear(v, feed_forward_slope(correction).mT)
            return plus(linear_part, corrected(v), alpha=-1)

        return pullback._replace(remainder=remainder)

    def rough(self, context: _Context) -> _Context | None:
        """The context with couplings in bfloat16, of which a GPU adds up the products in float32.

        None for few of them, and on the host, where the copy takes as long as it would spare.
        """
        couplings = context.couplings
        if couplings.is_cpu or couplings.numel() < _LARGE or not narrow_pays(context.x):
            return None
        return context._replace(couplings=couplings.bfloat16())

    @property
    def _inverts(self) -> bool:
        """Whether the preconditioner inverts the couplings, too."""
        return self.num_spins * self.dim <= _INVERTED

    def preconditioner(self, context: _Context) -> LinearMap:
        """r ↦ (1 − J + ∂f/∂z)⁻¹ r, with f linearised where its hidden units are at their biases.

        J is left out where the inverse would cost more than the updates it saves.
        """
        dim, correction = self.dim, context.correction
        slope = context.x.new_zeros(dim, dim)
        if correction is not None:
            slope = feed_forward_slope(correction)
        if not self._inverts:
            one = torch.eye(dim, dtype=slope.dtype, device=slope.device)
            return on_sites(inverse_or_identity(one + slope))
        feedback = context.couplings.clone()
        feedback.diagonal(dim1=0, dim2=2).sub_(slope[..., None])
        inverse = _inverse(_matrix(feedback))
        apply = LinearMap(
            lambda r: linear(r.flatten(1), inverse).view_as(r),
            lambda r: linear(r.flatten(1), inverse.mT).view_as(r),
        )
        if correction is None:
            return apply

        def remainder(z: Tensor) -> Tensor:
            """The update without J z, and of f what its slope leaves."""
            linear_part = plus(linear(z, slope), context.x)
            return plus(linear_part, feed_forward(z, correction), alpha=-1)

        return apply._replace(remainder=remainder)


def _inverse(feedback: Tensor) -> Tensor:
    """(1 − A)⁻¹, or what a preconditioner may have in its place, for `feedback` A `(n, n)`.

    The first four terms Σ_k Aᵏ are two products and leave out A⁴ of it, the first eight are four
    products and leave out A⁸.
    """
    size = len(feedback)
    if is_host(feedback):
        two = linear(feedback, feedback.mT)
        rows = two[:: -(-size // _ROWS)]
        norm = torch.linalg.vector_norm(linear(rows, two.mT)) * (size / len(rows)) ** 0.5
        largest = float(norm.detach())
        if largest < _EIGHT:
            feedback.diagonal().add_(1.0)
            terms = linear(feedback, two.mT).add_(feedback)
            if largest < _FOUR:
                return terms
            return linear(terms, linear(two, two.mT).mT).add_(terms)
    return inverse_or_identity(
        torch.eye(size, dtype=feedback.dtype, device=feedback.device) - feedback
    )


def _matrix(couplings: Tensor) -> Tensor:
    return couplings.view(couplings.shape[0] * couplings.shape[1], -1)


def _product(z: Tensor, couplings: Tensor) -> Tensor:
    """Σ_j J_ij z_j."""
    return linear(z.flatten(1), _matrix(couplings)).view_as(z)


class _Field(torch.autograd.Function):
    """Σ_j J_ij z_j for `z` `(B, N, d)`; the derivative by J is as large as J."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, couplings: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(z, couplings)
        return _product(z, couplings)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple:  # type: ignore[override]
        z, couplings = ctx.saved_tensors
        if transformed(g):
            rows = g.reshape(len(z), -1)
            by_couplings = (rows.mT @ z.flatten(1)).reshape(couplings.shape)
            return (rows @ _matrix(couplings)).reshape(z.shape), by_couplings
        by_z, by_couplings = None, None
        if ctx.needs_input_grad[0]:
            by_z = linear(g.flatten(1), _matrix(couplings).mT).view_as(z)
        if ctx.needs_input_grad[1]:
            by_couplings = _by_couplings(g, z)
        return by_z, by_couplings


def _by_couplings(g: Tensor, z: Tensor) -> Tensor:
    """Σ_b g_bic z_bjd `(N, d, N, d)`, into memory in use where no graph is wanted."""
    rows, columns = g.flatten(1).mT, z.flatten(1)
    if torch.is_grad_enabled() or watched(g, z):
        found = rows @ columns
    elif z.is_cpu and 0 < len(z) <= _FEW:  # an accelerator would start N kernels
        return _outer(g, z)
    else:
        found = torch.mm(rows, columns, out=empty(len(rows), len(rows), like=z))
    return found.view(*z.shape[1:], *z.shape[1:])


def _outer(g: Tensor, z: Tensor) -> Tensor:
    """Σ_b g_bic z_bjd `(N, d, N, d)`, laid out as the raw couplings `(N, N, d, d)` are.

    Of few samples it is writing that takes the time, and the order of the raw couplings is what
    the next derivative wants.
    """
    batch, sites, dim = z.shape
    raw = empty(sites, sites, dim, dim, like=z)
    columns = z.transpose(0, 1).contiguous()  # (N, B, d)
    for rows, out in zip(g.permute(1, 2, 0).contiguous(), raw, strict=True):
        torch.bmm(rows.expand(sites, dim, batch), columns, out=out)
    return raw.transpose(1, 2)
