"""TAP: the mean field without the spin's own echo, to second order in the couplings."""

from __future__ import annotations

import functools
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..solvers import Solution, anderson, picard
from ..solvers._iterate import Map
from ._closure import Closure
from ._prior import Prior
from ._spherical import SphericalPrior
from ._system import SpinSystem

# Damped Picard steps, if they may be half of all, before what they have not solved goes on with
# Anderson acceleration.
_DAMPED = 300


@functools.wraps(anderson, assigned=())  # the options are those of anderson
def damped_then_anderson(
    f: Map, z0: Tensor, *, tol: float, max_iter: int, stop_mode: str = "rel", **options: Any
) -> Solution:
    """At most 300 damped Picard steps; what has not converged goes on from there by `anderson`.

    Damped steps settle in stable solutions, but at strong random couplings in none; Anderson finds
    one there, but where there is an order it finds a saddle, unless it begins nearby.
    """
    general: dict[str, Any] = {"tol": tol, "stop_mode": stop_mode}
    damped = min(max_iter // 2, _DAMPED)
    if damped == 0:
        return anderson(f, z0, max_iter=max_iter, **general, **options)
    first = picard(f, z0, max_iter=damped, damping=0.5, **general)
    failed = ~first.converged
    if not bool(failed.any()):
        return first
    sound = torch.isfinite(first.value).all(dim=1, keepdim=True)
    begin, left = torch.where(sound, first.value, z0), max_iter - damped
    second = anderson(f, begin, max_iter=left, **general, **options)
    second = second.rows(failed).unless_better(first.rows(failed))
    return first.followed_by(second, failed)


class TAP(Closure):
    """The equations of Thouless, Anderson and Palmer (1977, Phil. Mag. 35, 593), in Plefka's form
    (1982, J. Phys. A 15, 1971) for any prior whose V is a matrix:

        m_i = mean(h_i, V_i),   h_i = x_i + Σ_j J_ij m_j − V_i m_i,   V_i = Σ_j J_ij C_j J_ijᵀ
        log Z = Σ_i log Z0(h_i, V_i) − ½ mᵀJm + ½ Σ_i m_iᵀ V_i m_i − ¼ Σ_i tr(V_i C_i)

    Derivatives of `log_partition` are the magnetization (fields) and m_i m_jᵀ + C_i J_ij C_j
    (couplings); χ is its second derivative, ∂m/∂x. Fails, and says so, at strong couplings. Cost:
    O(B N² d³) a step; `covariance` one backward solve for every component.

    Options are those of `IteratedMethod`; call it as ``method(system, fields, start=None)``. By
    default at most 300 damped Picard steps, which settle in stable solutions; samples on which they
    fail go on by `anderson`, whose options can be given. With ``solver=anderson`` there are fewer
    steps, and where spins order, saddles. Raises `TypeError` for a `SphericalPrior`.
    """

    default_solver: ClassVar[dict[str, Any]] = {"solver": damped_then_anderson}

    def check(self, prior: Prior) -> None:
        if isinstance(prior, SphericalPrior):
            raise TypeError(
                "TAP has no closed form on the sphere, whose V would not be isotropic; "
                "NaiveMeanField has"
            )

    def V(self, system: SpinSystem, covariance: Tensor) -> Tensor:
        return system.reaction(covariance)
