"""TAP: the mean field without the spin's own echo, to second order in the couplings."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from ..solvers import anderson
from ._closure import Closure
from ._prior import Prior
from ._spherical import SphericalPrior
from ._system import SpinSystem


class TAP(Closure):
    """The equations of Thouless, Anderson and Palmer (1977, Phil. Mag. 35, 593), in Plefka's form
    (1982, J. Phys. A 15, 1971) for any prior whose V is a matrix:

        m_i = mean(h_i, V_i),   h_i = x_i + Σ_j J_ij m_j − V_i m_i,   V_i = Σ_j J_ij C_j J_ijᵀ
        log Z = Σ_i log Z0(h_i, V_i) − ½ mᵀJm + ½ Σ_i m_iᵀ V_i m_i − ¼ Σ_i tr(V_i C_i)

    Derivatives of `log_partition` are the magnetization (fields) and m_i m_jᵀ + C_i J_ij C_j
    (couplings); χ is its second derivative, ∂m/∂x. Fails, and says so, at strong couplings. Cost:
    O(B N² d³) a step; `covariance` one backward solve for every component.

    Options are those of `IteratedMethod`, the default solver is `anderson`; call it as
    ``method(system, fields, start=None)``. Raises `TypeError` for a `SphericalPrior`.
    """

    default_solver: ClassVar[dict[str, Any]] = {"solver": anderson}

    def check(self, prior: Prior) -> None:
        if isinstance(prior, SphericalPrior):
            raise TypeError(
                "TAP has no closed form on the sphere, whose V would not be isotropic; "
                "NaiveMeanField has"
            )

    def V(self, system: SpinSystem, covariance: Tensor) -> Tensor:
        return system.reaction(covariance)
