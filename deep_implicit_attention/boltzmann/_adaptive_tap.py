"""Inverse Ising by adaptive TAP, which is naive mean field with diagonal weights."""

from __future__ import annotations

import torch

from ._moments import Moments, inverse_covariance
from ._parameters import Learned, pack


def adaptive_tap(moments: Moments, l2: float, shrinkage: float | None) -> Learned:
    """The couplings and fields whose adaptive TAP response has the moments m and C of the data,

        J_ij = −(C⁻¹)_ij (i ≠ j),   h_i = atanh m_i − Σ_j J_ij m_j + V_i m_i
        V_i = (C⁻¹)_ii − 1/(1 − m_i²)

    From χ = (diag Λ − J)⁻¹ with Λ_i = V_i + 1/(1 − m_i²) (Opper, Winther 2001). The same equations
    are naive mean field with self-couplings J_ii = −V_i, the diagonal weights of Kappen and
    Rodríguez (1998, Neural Computation 10, 1137): they give naive mean field the response that
    matches C on the diagonal as well. Cost: O(N³).
    """
    precision, rho = inverse_covariance(moments, l2, shrinkage)
    J = precision.diagonal().diag() - precision
    m = moments.mean
    V = precision.diagonal() - 1 / (1 - m.square())
    return Learned(pack(J, torch.atanh(m) - J @ m + V * m), shrinkage=rho)
