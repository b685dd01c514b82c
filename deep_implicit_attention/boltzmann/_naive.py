"""Inverse Ising by naive mean field and its linear response."""

from __future__ import annotations

import torch

from ._moments import Moments, inverse_covariance
from ._parameters import Learned, pack


def naive(moments: Moments, l2: float, shrinkage: float | None) -> Learned:
    """The couplings and fields whose naive mean field has the means m of the data and, for
    i ≠ j, their C⁻¹ as the inverse of its response,

        J_ij = −(C⁻¹)_ij (i ≠ j),   h_i = atanh m_i − Σ_j J_ij m_j

    (Kappen, Rodríguez 1998, Neural Computation 10, 1137). As the diagonals of the two inverses
    differ, the response is C for weak couplings only. Cost: O(N³).
    """
    precision, rho = inverse_covariance(moments, l2, shrinkage)
    J = precision.diagonal().diag() - precision
    m = moments.mean
    return Learned(pack(J, torch.atanh(m) - J @ m), shrinkage=rho)
