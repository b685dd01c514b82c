"""The attention of transformers, with couplings from queries and keys of the input."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..deq._linear_map import LinearMap, Pullback
from ..solvers._validate import check_counts
from ._normalize import normalized, normalized_vjp
from ._parts import (
    FeedForward,
    FeedForwardVJP,
    Weights,
    accumulates,
    feed_forward,
    feed_forward_at_zero,
    feed_forward_slope,
    for_sums,
    hide,
    inverse_or_identity,
    less_feed_forward,
    linear_weights,
    merge_heads,
    split_heads,
)
from ._pooling import Couplings, couple
from ._products import linear, linear_by_bias, linear_by_weight, narrow_pays, narrowed, plus
from ._rotary import ROTARY_BASE
from ._softmax_couplings import Memory, SoftmaxCouplings

# Of the weights behind a normalised state at the start, relative to a Linear's own; below 32
# components smaller, in proportion. The fewer there are, the more often those of a site happen to
# lie close together, and the more normalisation then magnifies a change of the state.
_START = 0.5
_NARROW = 32

# On a GPU, components from which on narrow products are to spare time. Reckoned, not measured.
_WIDE = 256


class _Context(NamedTuple):
    x: Any  # (B, N, d), with the field of sites whose states are known
    couplings: Couplings
    w_out: Any
    b_out: Any
    correction: Weights | None
    mask: Tensor | None  # (B, N), True = keep
    kept: Tensor | None  # (2, B, N, d), dropout of the pooled states and of f
    memory: Memory | None


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
            solve returns does, within the tolerance, since it stops by the residual of the whole
            sample). Then `append` adds sites one by one.
        normalize: queries and keys of the normalised x, and z normalised where the couplings and
            f act on it (mean 0, variance 1 over the components):

                z_i = W_O [ Σ_j J_ij(x̂) ẑ_j ]_heads − f(ẑ_i) + x_i

            One step from z = x is then the pre-normalised block, and what the sum and f add is
            bounded whatever the size of z. Sources should have components of order one.
        correction_width: hidden width of f, default 4d.
        rotary: queries and keys are rotated by an angle that grows with their site, so that J_ij
            depends on i − j as well as x.
        rotary_base: the slowest pair turns by about 1 / base per site, the fastest by 1. Choose a
            low one where only near sites matter.
        dropout: of the components of the pooled states and of f(z_i), while training. Drawn once
            for each solve, so that its map does not change.

    Cost: O(B N² d) for the couplings and for each update; memory O(B heads N²). From 2,048
    sites on, without a mask and with the default `dim_head`, it is O(B N d), gradients included.

    Raises:
        TypeError, ValueError: for sizes that do not fit each other, and for x or a mask of another
            shape, dtype or device.
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
        normalize: bool = False,
        correction_width: int | None = None,
        rotary: bool = False,
        rotary_base: float = ROTARY_BASE,
        dropout: float = 0.0,
    ) -> None:
        check_counts(num_spins=num_spins, dim=dim, heads=heads)
        if dim % heads:
            raise ValueError(f"dim must be divisible by heads, got dim={dim}, heads={heads}")
        dim_head = dim // heads if dim_head is None else dim_head
        check_counts(dim_head=dim_head)
        if correction_width is not None:
            check_counts(correction_width=correction_width)
            if not lin_response:
                raise ValueError(
                    "correction_width is the width of f, which lin_response=False drops"
                )
        super().__init__(
            dim, heads, dim_head, scale, causal, normalize, rotary, rotary_base, dropout
        )
        self.num_spins = num_spins
        self.to_out = nn.Linear(dim, dim)
        self.lin_response = lin_response
        self.correction = FeedForward(dim, correction_width) if lin_response else None
        if normalize:
            # ẑ has unit variance however small z is, so the map contracts from the start only if
            # what it adds is small beside x.
            outer = [self.to_out] + ([] if self.correction is None else [self.correction.contract])
            with torch.no_grad():
                for layer in outer:
                    layer.weight.mul_(_START * min(1.0, dim / _NARROW))
                if self.correction is not None:
                    # A Linear's own weights give hidden units a deviation of 1/√3, where a GELU
                    # is almost linear; with deviation 1 the network learns faster.
                    self.correction.expand.weight.mul_(3**0.5)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, heads={self.heads}, scale={self.scale:g}, causal={self.causal}"

    def prepare(self, x: Tensor, mask: Tensor | None = None) -> _Context:
        q, k = self.queries_and_keys(x)
        return _Context(
            x,
            couple(q, k, self.dim // self.heads, self.scale, mask, self.causal),
            *linear_weights(self.to_out),
            None if self.correction is None else for_sums(self.correction.weights()),
            mask,
            self.draw_dropout(x.expand(2, *x.shape)),
            Memory(k, None, mask) if self.causal else None,
        )

    def update(self, z: Tensor, context: _Context) -> Tensor:
        acting = self._acting(z.to(context.w_out.dtype))
        pooled = merge_heads(context.couplings.act(split_heads(acting, self.heads)))
        correction, w_out, b_out = context.correction, context.w_out, context.b_out
        parts = acting, pooled, context.x, w_out, b_out
        if correction is not None and context.kept is None and accumulates(correction, *parts):
            field = plus(linear(pooled, w_out, b_out - correction.b_out), context.x)
            return hide(less_feed_forward(field, acting, correction), context.mask)
        response = linear(pooled, w_out, b_out)
        f = None if correction is None else feed_forward(acting, correction)
        return self._sum(context, response, f)

    def select_samples(self, index: Tensor, context: _Context) -> _Context:
        """The context of some samples."""
        return context._replace(
            x=context.x[index],
            couplings=context.couplings.rows(index),
            mask=None if context.mask is None else context.mask[index],
            kept=None if context.kept is None else context.kept[:, index],
            memory=None,  # no part of the update
        )

    def first_step(self, context: _Context) -> Tensor:
        """x + b_O − f(0), the update from z = 0, which needs no couplings."""
        correction = context.correction
        f = None if correction is None else feed_forward_at_zero(correction)
        return self._sum(context, context.b_out, f)

    def _sum(self, context: _Context, response: Tensor, f: Tensor | None) -> Tensor:
        """`response` + x − `f`; a `response` in the shape of x is written over if it may be."""
        if context.kept is not None:
            response = context.kept[0] * response
        field = plus(response, context.x)
        if f is not None:
            f = f if context.kept is None else context.kept[1] * f
            field = plus(field, f, alpha=-1)
        return hide(field, context.mask)

    def vjp(self, z: Tensor, context: _Context) -> Pullback:
        """v ↦ (∂F/∂z)ᵀ v at `z`, and the derivatives by the context."""
        acting, back = normalized_vjp(z) if self.normalize else (z, None)
        correction = context.correction
        correct = None if correction is None else FeedForwardVJP(acting, correction)
        transposed, w_out = context.couplings.transposed(), context.w_out.mT

        def parts(v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            """`v` where nothing is hidden, as it reaches W_O, and as it reaches f."""
            v = hide(v, context.mask)
            if context.kept is None:
                return v, v, v
            return v, context.kept[0] * v, context.kept[1] * v

        def by_state(v: Tensor) -> Tensor:
            _, response, corrected = parts(v)
            out = merge_heads(transposed(split_heads(linear(response, w_out), self.heads)))
            if correct is not None:
                out = correct.taken_from(out, corrected)
            return out if back is None else back(out.to(z.dtype))

        def by_context(v: Tensor, needed: _Context) -> _Context:
            v, response, corrected = parts(v)
            heads = split_heads(acting, self.heads)
            pooled, by_couplings = context.couplings.pullback(heads, needed.couplings)
            by_pooled = split_heads(linear(response, w_out), self.heads)
            if correct is not None:
                by_weights = correct.by_context(-corrected, needed.correction)
                needed = needed._replace(correction=by_weights)
            return needed._replace(
                x=v if needed.x else None,
                couplings=by_couplings(by_pooled),
                w_out=linear_by_weight(response, merge_heads(pooled)) if needed.w_out else None,
                b_out=linear_by_bias(response) if needed.b_out else None,
            )

        pullback = Pullback(by_state, by_context)
        if correction is None or correct is None:
            return pullback

        def remainder(v: Tensor) -> Tensor:
            v, _, corrected = parts(v)
            linear_part = linear(v, feed_forward_slope(correction).mT)
            return plus(linear_part, correct(corrected), alpha=-1)

        return pullback._replace(remainder=remainder)

    def rough(self, context: _Context) -> _Context | None:
        """The context with weights and couplings in bfloat16, where products with them are faster.

        None without `normalize`: the preconditioner leaves no steps to save. None on a GPU for few
        components, where starting kernels takes most of the time.
        """
        small = not context.x.is_cpu and self.dim < _WIDE
        if not self.normalize or small or not narrow_pays(context.x):
            return None
        correction = context.correction
        return context._replace(
            couplings=context.couplings.narrowed(),
            w_out=context.w_out.bfloat16(),
            b_out=context.b_out.bfloat16(),
            correction=None if correction is None else narrowed(correction._replace(turned=None)),
        )

    def preconditioner(self, context: _Context) -> LinearMap | None:
        """r ↦ P r with f linearised where its hidden units are at their biases, D = ∂f/∂z.

        Rows of J sum to one, so it maps what is common to all sites to itself: there P is
        (1 + D − W_O)⁻¹. What couplings average out is left to (1 + D)⁻¹. None with `normalize`,
        where slopes depend on the size of z.
        """
        if self.normalize:
            return None
        one, slope = torch.eye(self.dim, dtype=context.x.dtype, device=context.x.device), None
        correction = context.correction
        if correction is not None:
            slope = feed_forward_slope(correction)
            one = one + slope
        apart, both = inverse_or_identity(torch.stack([one, one - context.w_out])).unbind()
        common = both - apart
        # A row vector for each sample, whose product with a state is its mean.
        kept = one.new_ones(()).expand(len(context.x), 1, context.x.shape[1])
        if context.mask is not None:
            kept = context.mask.to(one)[:, None]
        mean = kept / kept.sum(dim=2, keepdim=True).clamp_min(1)

        def apply(r: Tensor, apart: Tensor, common: Tensor) -> Tensor:
            mixed = mean @ r @ common.mT
            return linear(r, apart).add_(mixed if context.mask is None else kept.mT * mixed)

        linear_map = LinearMap(
            lambda r: apply(r, apart, common), lambda r: apply(r, apart.mT, common.mT)
        )
        if correction is None or slope is None:
            return linear_map

        def remainder(z: Tensor) -> Tensor:
            """The update less what the mean and the slope of f make of z, if sums are the mean."""
            rest = self._sum(context, context.b_out, feed_forward(z, correction))
            return plus(linear(z, slope), rest)

        return linear_map._replace(remainder=remainder)

    def append(self, context: _Context, state: Tensor, x_new: Tensor) -> _Context:
        """The context of one more site, given the equilibrium of those before it.

        They do not depend on it, so the new equation has one unknown site: the field of the
        others is a constant of it.

        Args:
            context: of the sites so far, from `prepare` or `append`.
            state: the equilibrium `(B, n, d)` of the sites that `context` solves for.
            x_new: the source of the new site, `(B, 1, d)`.

        Cost: O(B t d) for t sites so far, and O(B d²) for an update.
        """
        pooled, own, memory = self.one_more(context.memory, self._acting(state), x_new)
        kept = self.draw_dropout(x_new.expand(2, *x_new.shape))
        field = linear(merge_heads(pooled), context.w_out)
        if kept is not None:
            field = kept[0] * field
        return context._replace(
            x=x_new + field, couplings=Couplings(own), mask=None, kept=kept, memory=memory
        )

    def _acting(self, z: Tensor) -> Tensor:
        """What the couplings and f act on."""
        return normalized(z) if self.normalize else z
