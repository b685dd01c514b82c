"""Naive mean field: every spin in the mean field of the others."""

from __future__ import annotations

from torch import Tensor

from ._closure import Closure, naive_response
from ._system import SpinSystem


class NaiveMeanField(Closure):
    """The Weiss equations, for any prior:

        m_i = mean(x_i + Σ_j J_ij m_j)
        log Z ≥ Σ_i log Z0(h_i) − ½ Σ_ij m_iᵀ J_ij m_j,   χ = (blockdiag C_i⁻¹ − J)⁻¹

    `log_partition` is a lower bound of the exact one (Gibbs–Bogoliubov). Derivatives of it are the
    magnetization (fields) and m_i m_jᵀ (couplings). Cost: O(B N² d²) a step; `covariance`
    O(B N³ d³).

    With strong couplings there are several solutions. Damped Picard iteration, the default, settles
    in stable ones, which are maxima of the bound; accelerated solvers may find saddles.
    """

    def V(self, system: SpinSystem, covariance: Tensor) -> None:
        return None

    def linear_response(
        self, system: SpinSystem, x: Tensor, m: Tensor, covariance: Tensor
    ) -> Tensor:
        return naive_response(system, covariance)
