"""MLP-mixer attention: a network across sites in place of the sum over couplings."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..deq import DEQModule
from ..deq._state import full_precision
from ..solvers._validate import check_counts
from ._parts import (
    FeedForward,
    Weights,
    check_no_inputs,
    check_sources,
    feed_forward,
    gelu_slope,
)


class _Context(NamedTuple):
    x: Tensor  # (B, N, d)
    mixing: Weights
    correction: Weights | None


class DEQMLPMixerAttention(DEQModule):
    """Mean-field equations whose sum over couplings is amortised by a network:

        z_i = g({z_j})_i − f(z_i) + x_i

    g is a two-layer GELU network across the N sites (hidden width 4N), the same for all
    components; f is one across the d components (width 4d), the same for all sites (Bal 2021,
    *Deep Implicit Attention*; Tolstikhin et al. 2021, arXiv:2105.01601). There is a fixed point
    but no Boltzmann distribution behind it.

    Wrap it in `DEQFixedPoint`; x and z are `(B, N, d)`.

    Args:
        num_spins: number of sites N.
        dim: components d of a spin.
        lin_response: False drops f.

    Cost of an update: O(B N² d + B N d²).

    Raises:
        TypeError, ValueError: for sizes below 1, and for x of another shape, dtype or device.
    """

    def __init__(self, num_spins: int, dim: int, lin_response: bool = True) -> None:
        super().__init__()
        check_counts(num_spins=num_spins, dim=dim)
        self.num_spins, self.dim, self.lin_response = num_spins, dim, lin_response
        self.sum_over_couplings = FeedForward(num_spins)
        self.correction = FeedForward(dim) if lin_response else None

    def extra_repr(self) -> str:
        return f"num_spins={self.num_spins}, dim={self.dim}"

    def sources(self, x: Tensor, *inputs: Any) -> Tensor:
        check_no_inputs(self, inputs)
        # A raw parameter, as a parametrised weight is made once, by `prepare`; replicas of a
        # data-parallel module have none.
        own = next(self.sum_over_couplings.expand.parameters(), x)
        check_sources(x, self.dim, self.num_spins, own)
        return x

    def couplings(self, x: Tensor) -> Tensor:
        """‖J_ij‖_F, `(B, 1, N, N)`, of the couplings that g has at z = x.

        There J_ij = ∂g_i/∂z_j is diagonal in the components, with entries
        W₂ diag(GELU′(W₁ z + b₁)) W₁.
        """
        x = self.sources(full_precision(x))
        g = self.sum_over_couplings.weights()
        slope = gelu_slope(x.mT @ g.w_in.mT + g.b_in)
        jacobian = torch.einsum("ih,bch,hj->bcij", g.w_out, slope, g.w_in)
        return torch.linalg.vector_norm(jacobian, dim=1, keepdim=True)

    def prepare(self, x: Tensor) -> _Context:
        correction = None if self.correction is None else self.correction.weights()
        return _Context(x, self.sum_over_couplings.weights(), correction)

    def update(self, z: Tensor, context: _Context) -> Tensor:
        field = context.x + feed_forward(z.mT, context.mixing).mT
        if context.correction is None:
            return field
        return field - feed_forward(z, context.correction)

    def select_samples(self, index: Tensor, context: _Context) -> _Context:
        """The context of some samples."""
        return context._replace(x=context.x[index])
