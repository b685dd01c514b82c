"""Inverse Ising by TAP and its linear response."""

from __future__ import annotations

import torch

from ._moments import Moments, inverse_covariance
from ._parameters import Learned, pack
from ._warnings import FitWarning, warn


def tap(moments: Moments, l2: float, shrinkage: float | None) -> Learned:
    """The couplings and fields whose TAP has the means m of the data and, for i ≠ j, their C⁻¹ as
    the inverse of its response,

        2 m_i m_j J_ij² + J_ij + (C⁻¹)_ij = 0,   h_i = atanh m_i − Σ_j J_ij m_j
                                                       + m_i Σ_j J_ij² (1 − m_j²)

    J_ij is the root that vanishes with (C⁻¹)_ij (Tanaka 1998, Phys. Rev. E 58, 2302; Kappen,
    Rodríguez 1998). Pairs without a real root get −(C⁻¹)_ij and a `FitWarning`. Cost: O(N³).
    """
    precision, rho = inverse_covariance(moments, l2, shrinkage)
    m = moments.mean
    precision = precision - precision.diagonal().diag()
    discriminant = 1 - 8 * torch.outer(m, m) * precision
    real = discriminant >= 0
    # 2c/(1 + √) instead of (1 − √)/2a, which cancels where m vanishes.
    J = torch.where(real, -2 * precision / (1 + discriminant.clamp(min=0).sqrt()), -precision)
    if not bool(real.all()):
        pairs = len(m) * (len(m) - 1) // 2
        warn(
            f"TAP: the equation of {int((~real).sum()) // 2} of {pairs} couplings has no real "
            "root; they are those of naive mean field. The data are correlated too strongly for "
            "this method.",
            FitWarning,
        )
    V = J.square() @ (1 - m.square())
    return Learned(pack(J, torch.atanh(m) - J @ m + V * m), shrinkage=rho)
