"""Attention with free couplings: the mean-field response of a vector spin system."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ._parts import FeedForward, Weights, feed_forward
from ._site_couplings import SiteCouplings


class _Context(NamedTuple):
    x: Tensor  # (B, N·d)
    couplings: Tensor  # (N·d, N·d), transposed
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
        weight_init_std: standard deviation of the couplings at the start, default 1/√(N d²).
        weight_training: False makes the couplings a buffer.
        weight_sym_internal: symmetrise each J_ij.
        weight_sym_sites: symmetrise J_ij = J_ji.
        lin_response: False drops f.

    Cost of an update: O(B N² d² + B N d²); N² d² parameters.
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
        return _Context(x.flatten(1), self.coupling_matrix().mT.contiguous(), correction)

    def update(self, z: Tensor, context: _Context) -> Tensor:
        field = torch.addmm(context.x, z.flatten(1), context.couplings).view_as(z)
        if context.correction is None:
            return field
        return field - feed_forward(z, context.correction)
