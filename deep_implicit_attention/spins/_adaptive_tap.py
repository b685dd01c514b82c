"""Adaptive TAP: the variance of the cavity fields from self-consistency with the response."""

from __future__ import annotations

from torch import Tensor

from ..solvers import Solution
from ._consistency import AdaptiveTAPStep, ConsistentMethod
from ._frames import Frame


class AdaptiveTAP(ConsistentMethod):
    """The equations of Opper and Winther (2001, Phys. Rev. E 64, 056131):

        m_i = mean(h_i, V_i),   h_i = x_i + Σ_j J_ij m_j − V_i m_i,   C_i = covariance(h_i, V_i)
        Λ_i = V_i + C_i⁻¹,   χ = (blockdiag Λ − J)⁻¹,   V_i = Λ_i − (χ_ii)⁻¹

    so that χ_ii = C_i: single spins and linear response agree. With the cavity part
    a_i = Σ_j J_ij m_j − V_i m_i and g = (Λ − J) m,

        log Z = Σ_i log Z0(a_i + x_i, V_i) − ½ log det(Λ − J) + ½ gᵀm
                − Σ_i { ½ log det C_i + ½ m_iᵀ C_i⁻¹ m_i }

    Derivatives of `log_partition` are the magnetization (fields) and m_i m_jᵀ + χ_ij (couplings).
    `covariance` is χ, the response at fixed V; `susceptibility`, ∂m/∂x, also moves V and differs.
    Exact for a Gaussian prior, where nothing is iterated. Potts spins are treated in the q − 1
    dimensions across (1, …, 1); on the sphere only the traces of C_i and χ_ii are matched, and
    the error of m is of second order in J instead of third.

    Damped Picard iteration, the default, converges for weak and moderate couplings (all of the SK
    systems with N = 12 up to β = 1 in the tests); where it does not, that is reported, and
    `ExpectationPropagation` descends to a solution of the same equations, unless some spins are all
    but fixed. Cost: O(B N³ d³) a step, one Cholesky factorisation and its inverse.

    Options are those of `IteratedMethod`; call it as ``method(system, fields, start=None)``.
    """

    def solve(
        self, frame: Frame, x: Tensor, start: Tensor | None
    ) -> tuple[Solution, Tensor | None]:
        local = frame.local
        zero = x.new_zeros(*x.shape, x.shape[-1])
        m = local.mean(x, zero) if start is None else start
        solution = self.fixed_point(
            AdaptiveTAPStep(local), (m, zero), x, frame.couplings, rounding=local.rounding
        )
        return solution, None
