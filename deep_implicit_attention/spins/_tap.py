"""TAP: the mean field without the spin's own echo, to second order in the couplings."""

from __future__ import annotations

import copy
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
# As many again where this much of the residual is left or more, and less than that: so states
# leave a saddle, or pass where one has just vanished, slowly and on their way to a solution.
_LEFT, _DRIFT = 0.3, 0.1


@functools.wraps(anderson, assigned=())  # the options are those of anderson
def damped_then_anderson(
    f: Map, z0: Tensor, *, tol: float, max_iter: int, stop_mode: str = "rel", **options: Any
) -> Solution:
    """Damped Picard steps; what has not converged goes on from where it has come to by `anderson`.

    Damped steps settle in stable solutions, but at strong random couplings in none; Anderson finds
    one there, but where there is an order it finds a saddle, unless it begins nearby.
    """
    general: dict[str, Any] = {"tol": tol, "stop_mode": stop_mode}
    if max_iter < 2 or not len(z0):
        return anderson(f, z0, max_iter=max_iter, **general, **options)
    half = max_iter // 2
    state, steps, first = z0, 0, None
    drifts = z0.new_ones(len(z0), dtype=torch.bool)
    while first is None or (steps < half and bool(drifts.any())):
        asked = _Asked(f, state)
        part = picard(asked, state, max_iter=min(_DAMPED, half - steps), damping=0.5, **general)
        first = part if first is None else first.followed_by(part.rows(drifts), drifts)
        state = torch.where(drifts[:, None], asked.last, state)
        begun, now = part.trace[0], part.trace[-1]
        drifts = drifts & ~first.converged & (now > _LEFT * begun) & (now < _DRIFT)
        steps += _DAMPED
    failed = ~first.converged
    if not bool(failed.any()):
        return first
    sound = torch.isfinite(state).all(dim=1, keepdim=True)
    begin = torch.where(sound, state, z0)
    # The same for all, whoever of them took how many damped steps.
    second = anderson(f, begin, max_iter=max_iter - half, **general, **options)
    second = second.rows(failed).unless_better(first.rows(failed))
    return first.followed_by(second, failed)


class _Asked:
    """f, and at which state it was asked `last` of every sample."""

    def __init__(self, f: Map, z: Tensor) -> None:
        self.f, self.last = f, z.clone()
        self.rows: Any = slice(None)

    def __call__(self, z: Tensor) -> Tensor:
        self.last[self.rows] = z
        return self.f(z)

    @property
    def of_samples(self) -> Any:
        """What makes the map of some samples, if f knows."""
        select = getattr(self.f, "of_samples", None)
        return select and functools.partial(self._alone, select)

    def _alone(self, select: Any, index: Tensor) -> _Asked:
        alone = copy.copy(self)
        alone.f, alone.rows = select(index), index
        return alone


class TAP(Closure):
    """The equations of Thouless, Anderson and Palmer (1977, Phil. Mag. 35, 593), in Plefka's form
    (1982, J. Phys. A 15, 1971) for any prior whose V is a matrix:

        m_i = mean(h_i, V_i),   h_i = x_i + Σ_j J_ij m_j − V_i m_i,   V_i = Σ_j J_ij C_j J_ijᵀ
        log Z = Σ_i log Z0(h_i, V_i) − ½ mᵀJm + ½ Σ_i m_iᵀ V_i m_i − ¼ Σ_i tr(V_i C_i)

    Derivatives of `log_partition` are the magnetization (fields) and m_i m_jᵀ + C_i J_ij C_j
    (couplings); χ is its second derivative, ∂m/∂x. Fails, and says so, at strong couplings. Cost:
    O(B N² d³) a step; `covariance` one backward solve for every component.

    Options are those of `IteratedMethod`; call it as ``method(system, fields, start=None)``. The
    default takes 300 damped Picard steps, which settle in stable solutions, and up to half of
    `max_iter` for samples still on their way; those on which they fail go on by `anderson`, whose
    options can be given. ``solver=anderson`` takes fewer steps, but where spins order may find
    saddles. Raises `TypeError` for a `SphericalPrior`.
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
