"""Adaptive TAP with a Gaussian prior: the exact response of a Gaussian vector spin system."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..spins._blocks import block_diagonal, diagonal_blocks
from ._site_couplings import SiteCouplings

State = tuple[Tensor, Tensor]


class _Context(NamedTuple):
    x: Tensor  # (B, N, d)
    couplings: Tensor  # (N·d, N·d)
    precision: Tensor  # (N, d, d), P_i
    operator: Tensor  # (N·d, N·d), blockdiag P − J


class DEQAdaTAPMeanFieldAttention(SiteCouplings):
    """Adaptive TAP equations of spins with a Gaussian prior N(0, P_i⁻¹):

        z_i = C_i (x_i + Σ_j J_ij z_j − V_i z_i),   C_i = (P_i − V_i)⁻¹
        V_i = Λ_i − (χ_ii)⁻¹,   Λ_i = V_i + C_i⁻¹,   χ = (blockdiag Λ − J)⁻¹

    V_i is the variance of the cavity field, the self-correction that the other mechanisms learn
    (Opper, Winther 2001, Phys. Rev. E 64, 056131). With this prior Λ = P and the equations have
    the closed form that `DEQFixedPoint` returns,

        z = (P − J)⁻¹ x,   V_i = P_i − ([(P − J)⁻¹]_ii)⁻¹,

    which is the exact mean of the Gaussian system; V never changes z, and is computed only if it
    is among the output elements. `update` iterates the equations themselves and is the reference
    for it. There is a distribution behind the fixed point only if the couplings have both
    symmetries and P − J is positive definite; where it is not, the layer still returns the
    solution of the equations and says so as `on_failure` tells it.

    Wrap it in `DEQFixedPoint`; x is `(B, N, d)`, the state is (z `(B, N, d)`, V `(B, N, d, d)`).

    Args:
        num_spins: number of sites N.
        dim: components d of a spin.
        weight_init_std: standard deviation of the couplings at the start, default 1/√(N d²).
        weight_training: False makes the couplings a buffer.
        weight_sym_internal: symmetrise each J_ij.
        weight_sym_sites: symmetrise J_ij = J_ji.
        lin_response: False is naive mean field, V = 0 (and the same z).

    Cost: O(N³ d³ + B N² d²) once, no iteration; an `update` costs O(B N³ d³).
    """

    spin_prior_inv_var: Tensor

    def __init__(
        self,
        num_spins: int,
        dim: int,
        weight_init_std: float | None = None,
        weight_training: bool = True,
        weight_sym_internal: bool = True,
        weight_sym_sites: bool = True,
        lin_response: bool = True,
    ) -> None:
        super().__init__(
            num_spins, dim, weight_init_std, weight_training, weight_sym_internal, weight_sym_sites
        )
        self.lin_response = lin_response
        self.register_buffer("spin_prior_inv_var", torch.eye(dim).repeat(num_spins, 1, 1))

    def initial_state(self, x: Tensor) -> State:
        return torch.zeros_like(x), x.new_zeros(*x.shape, x.shape[-1])

    def prepare(self, x: Tensor) -> _Context:
        couplings = self.coupling_matrix()
        precision = self.spin_prior_inv_var.to(couplings)
        return _Context(x, couplings, precision, block_diagonal(precision) - couplings)

    def solve(self, context: _Context, wanted: tuple[int, ...]) -> tuple[Tensor, Tensor | None]:
        """The closed form; V only if element 1 is wanted."""
        x, operator = context.x, context.operator
        z = torch.linalg.solve_ex(operator, x.flatten(1).mT).result.mT.reshape_as(x)
        if 1 not in wanted:
            return z, None
        if not self.lin_response:
            return z, self.initial_state(x)[1]
        response = torch.linalg.inv_ex(operator).inverse
        blocks = diagonal_blocks(response, self.num_spins)
        cavity_variance = context.precision - torch.linalg.inv_ex(blocks).inverse
        return z, cavity_variance.expand(x.shape[0], *cavity_variance.shape)

    def residual(self, context: _Context, state: State) -> tuple[Tensor, Tensor]:
        """‖f(z) − z‖, relative to ‖f(z)‖ and absolute, of f(z) = P⁻¹ (x + J z).

        That is the update at V = 0; V has no influence on the fixed point.
        """
        z = state[0]
        field = (context.x.flatten(1) + z.flatten(1) @ context.couplings.mT).view_as(z)
        image = torch.linalg.solve_ex(context.precision, field.unsqueeze(-1)).result.squeeze(-1)
        norm = torch.linalg.vector_norm((image - z).flatten(1), dim=1)
        size = torch.linalg.vector_norm(image.flatten(1), dim=1)
        return norm / size.clamp_min(torch.finfo(z.dtype).tiny), norm

    def judge(self, context: _Context) -> str:
        """Names the smallest eigenvalue of P − J if the matrix is not positive definite."""
        if not (self.weight_sym_internal and self.weight_sym_sites):
            return ""
        operator = context.operator.detach()
        if int(torch.linalg.cholesky_ex(operator).info) == 0:
            return ""
        if not bool(torch.isfinite(operator).all()):
            return "The couplings are not finite."
        smallest = torch.linalg.eigvalsh(operator)[0].item()
        return f"The smallest eigenvalue of P − J is {smallest:.4g}."

    def update(self, z: State, context: _Context) -> State:
        mean, cavity = z
        inverse = context.precision - cavity  # C_i⁻¹, (B, N, d, d)
        field = (context.x.flatten(1) + mean.flatten(1) @ context.couplings.mT).view_as(mean)
        field = field - (cavity @ mean.unsqueeze(-1)).squeeze(-1)
        new_mean = torch.linalg.solve_ex(inverse, field.unsqueeze(-1)).result.squeeze(-1)
        if not self.lin_response:
            return new_mean, torch.zeros_like(cavity)
        total = cavity + inverse  # Λ_i
        response = torch.linalg.inv_ex(block_diagonal(total) - context.couplings).inverse
        blocks = diagonal_blocks(response, self.num_spins)
        return new_mean, total - torch.linalg.inv_ex(blocks).inverse
