"""Adaptive TAP: the variance of the cavity fields from self-consistency with the response."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..solvers import Solution
from ._consistency import ConsistentMethod, Whitened, apply, inverse, mismatch, pull, whiten
from ._frames import Frame, Local

State = tuple[Tensor, Tensor]


class AdaptiveTAP(ConsistentMethod):
    """The equations of Opper and Winther (2001, Phys. Rev. E 64, 056131), for any prior:

        m_i = mean(h_i, V_i),   h_i = x_i + Σ_j J_ij m_j − V_i m_i,   C_i = covariance(h_i, V_i)
        Λ_i = V_i + C_i⁻¹,   χ = (blockdiag Λ − J)⁻¹,   V_i = Λ_i − (χ_ii)⁻¹

    so that χ_ii = C_i: single spins and linear response agree. With the cavity part
    a_i = Σ_j J_ij m_j − V_i m_i and g = (Λ − J) m,

        log Z = Σ_i log Z0(a_i + x_i, V_i) − ½ log det(Λ − J) + ½ gᵀm
                − Σ_i { ½ log det C_i + ½ m_iᵀ C_i⁻¹ m_i }

    Derivatives of `log_partition` are the magnetization (fields) and m_i m_jᵀ + χ_ij (couplings).
    `covariance` is χ, the response at fixed V; `susceptibility`, ∂m/∂x, also moves V and differs.
    Exact for a Gaussian prior, where nothing is iterated. Potts spins are treated in the q − 1
    dimensions across (1, …, 1); on the sphere only the traces of C_i and χ_ii are matched.

    Damped Picard iteration, the default, converges for weak and moderate couplings (all of the SK
    systems with N = 12 up to β = 1 in the tests); where it does not, that is reported, and
    `ExpectationPropagation` has a descent to the same equations, for systems without spins that are
    all but fixed. Cost: O(B N³ d³) a step, one Cholesky factorisation and its inverse.

    Options are those of `IteratedMethod`; call it as ``method(system, fields, start=None)``.
    """

    def solve(
        self, frame: Frame, x: Tensor, start: Tensor | None
    ) -> tuple[Solution, Tensor | None]:
        local = frame.local
        zero = x.new_zeros(*x.shape, x.shape[-1])
        m = local.mean(x, zero) if start is None else start
        return self.fixed_point(AdaptiveTAPStep(local), (m, zero), x, frame.couplings), None


class AdaptiveTAPStep(nn.Module):
    """One step of the equations, from fields `(B, N, k)` and couplings `(N·k, N·k)`."""

    local: Local

    def __init__(self, local: Local) -> None:
        super().__init__()
        self.local = local

    def forward(self, state: State, x: Tensor, couplings: Tensor) -> State:
        m, V = state
        field = x + pull(couplings, m) - apply(V, m)
        covariance = self.local.covariance(field, V)
        return self.local.mean(field, V), next_variance(self.local, covariance, V, couplings)[0]


def next_variance(
    local: Local, covariance: Tensor, V: Tensor, couplings: Tensor
) -> tuple[Tensor, Tensor, Whitened]:
    """V_i = Λ_i − (χ_ii)⁻¹ from covariances C_i, and Q_i with χ_ii = C_i Q_i.

    Written as V_i − Q_i⁻¹T_i, Q_i = 1 − T_i C_i, in which nothing is large.
    """
    white = whiten(covariance, V, couplings)
    gap = mismatch(local, white, V)
    k = V.shape[-1]
    Q = torch.eye(k, dtype=V.dtype, device=V.device) - gap @ covariance
    # What matching does not determine (antisymmetric parts; on the sphere all but the trace)
    # would stay as it is for ever and make the equations singular.
    new_V = local.match(V - inverse(Q) @ gap)
    new_V = 0.5 * (new_V + new_V.mT)
    # Where Λ − J is not positive definite on the way, V grows, slowly: m has time to move, and no
    # such state is a fixed point.
    sound = white.sound[:, None, None, None]
    typical = covariance.diagonal(dim1=-2, dim2=-1).flatten(1).mean(dim=1)[:, None, None, None]
    # Saturated spins have none, and the derivative of 1/0 is NaN even where it is not wanted.
    typical = torch.where(sound, 1.0, typical)
    grown = V + 0.1 / typical * torch.eye(k, dtype=V.dtype, device=V.device)
    return torch.where(sound, new_V, grown), Q, white
