"""Expectation propagation: Gaussian site terms, matched to single spins until nothing moves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

from ..deq._failure import OnFailure
from ..deq._state import Layout
from ..solvers import Solution, Status
from ..solvers._books import GROWTH
from ..solvers._iterate import Map, Norms, iterate
from ..solvers._validate import check_number
from ._consistency import AdaptiveTAPStep, ConsistentMethod
from ._double_loop import DoubleLoop
from ._frames import Frame, Local
from ._site_terms import Cavities, Terms, begin, cavity, parallel, sequential, terms_of

Schedule = Literal["auto", "parallel", "sequential", "double loop"]
Update = Callable[[Tensor, Tensor], Terms]

# Parallel updates that have not converged by then are left to the double loop (schedule "auto").
_AUTO_LIMIT = 300
# Steps after which it is asked on which samples the double loop still goes down.
_PART = 25


class ExpectationPropagation(ConsistentMethod):
    """Expectation propagation (Minka 2001) in the form of expectation consistency (Opper, Winther
    2005, JMLR 6): each ρ_i is replaced by a Gaussian term exp(g_iᵀS − ½ SᵀΛ_i S),

        r(S) ∝ exp( ½ SᵀJS + xᵀS + gᵀS − ½ SᵀΛS ),   χ = (Λ − J)⁻¹,   μ = χ (x + g)

    and for every spin the term is taken out of its marginal, the prior put in its place, and a new
    term chosen such that the moments agree:

        h_i = (χ_ii)⁻¹μ_i − g_i,   V_i = Λ_i − (χ_ii)⁻¹,   m_i, C_i = moments of ρ_i at (h_i, V_i)
        Λ_i ← V_i + C_i⁻¹,   g_i ← C_i⁻¹m_i − h_i

    The fixed points are those of `AdaptiveTAP`, and so are `log_partition`, `covariance` and the
    derivatives. Exact for a Gaussian prior. Potts and spherical spins as in `AdaptiveTAP`.

    Args:
        schedule: how to get there.
            ``"parallel"``: all terms at once.
            ``"sequential"``: one spin after the other.
            ``"double loop"``: the free energy of expectation consistency is minimised; every step
            solves a convex problem and goes downhill (`Response.objective`).
            ``"auto"``: at most 300 parallel updates, then the double loop for the samples on which
            they failed; the answer with the smaller residual is returned.
        damping: part of the old terms kept in parallel and sequential updates.
        tol: relative residual of the equations of `AdaptiveTAP` at which a sample is solved. The
            default is for float64; in float32 residuals stop falling at 1e-7 or above: pass about
            1e-5.
        max_iter: updates of all terms at most, of each schedule.
        on_failure: ``"warn"``, ``"raise"`` or ``"ignore"``.

    Sequential updates and the double loop work with the terms. Those of an Ising spin in a field h
    grow as e^{2|h|}, and V_i = Λ_i − (χ_ii)⁻¹ loses as many digits: in a field from about 8 on in
    float64, 4 in float32, where the spin is as good as fixed, these schedules end above the
    tolerance and say so. Parallel updates do not.

    Cost: O(B N³ d³) a step, for the double loop with a larger constant that grows as d⁶, since it
    works with all second moments of a spin of d components.
    """

    def __init__(
        self,
        *,
        schedule: Schedule = "auto",
        damping: float = 0.5,
        tol: float = 1e-10,
        max_iter: int = 2000,
        on_failure: OnFailure = "warn",
    ) -> None:
        if schedule not in get_args(Schedule):
            raise ValueError(f"schedule must be one of {get_args(Schedule)}, got {schedule!r}")
        check_number("damping", damping, minimum=0.0, below=1.0)
        super().__init__(tol=tol, max_iter=max_iter, on_failure=on_failure)
        self.schedule, self.damping = schedule, damping

    def solve(
        self, frame: Frame, x: Tensor, start: Tensor | None
    ) -> tuple[Solution, Tensor | None]:
        local, couplings = frame.local, frame.couplings
        schedule = _Schedule(self, local, x.detach(), couplings.detach(), start)
        solution = self.fixed_point(
            AdaptiveTAPStep(local),
            schedule.state(),
            x,
            couplings,
            solver=schedule,
            rounding=local.rounding,
        )
        return solution, schedule.objective


class _Schedule:
    """A solver for the state (m, V) that moves cavities or terms as it was told.

    Residuals are those of the map it is given, the equations of adaptive TAP.
    """

    def __init__(
        self,
        method: ExpectationPropagation,
        local: Local,
        x: Tensor,
        couplings: Tensor,
        start: Tensor | None,
    ) -> None:
        self.method, self.local, self.x, self.couplings = method, local, x, couplings
        self.cavities = begin(local, x, couplings, start)
        self.objective: Tensor | None = None

    def state(self) -> Cavities:
        """The state (m, V) to begin with."""
        h, V = self.cavities
        return self.local.mean(h, V), V

    def __call__(self, f: Map, z0: Tensor, *, tol: float, max_iter: int) -> Solution:
        everybody = torch.ones_like(z0[:, 0], dtype=torch.bool)
        schedule = self.method.schedule
        if schedule == "sequential":
            return self._terms(f, z0, everybody, self._in_turn(everybody), tol, max_iter)
        if schedule == "double loop":
            return self._descend(f, z0, everybody, tol, max_iter)
        limit = min(max_iter, _AUTO_LIMIT) if schedule == "auto" else max_iter
        first = self._in_parallel(f, z0, tol, limit)
        failed = ~first.converged
        if schedule == "parallel" or not bool(failed.any()):
            return first
        second = self._descend(f, z0, failed, tol, max_iter)
        return first.followed_by(second.unless_better(first.rows(failed)), failed)

    def _in_parallel(self, f: Map, z0: Tensor, tol: float, max_iter: int) -> Solution:
        x, (h, V) = self.x, self.cavities

        def propose(k: int, z: Tensor, fz: Tensor, g: Tensor, norms: Norms) -> Tensor:
            nonlocal h, V
            h, V = parallel(self.local, x, self.couplings, h, V, self.method.damping)
            state = self.local.mean(h, V), V
            return Layout.of(state).pack(state)

        def keep(stay: Tensor) -> None:
            nonlocal x, h, V
            x, h, V = x[stay], h[stay], V[stay]

        return iterate(f, z0, propose, tol=tol, max_iter=max_iter, stop_mode="rel", keep=keep)

    def _in_turn(self, rows: Tensor) -> Update:
        x, damping = self.x[rows], self.method.damping
        return lambda g, total: sequential(self.local, x, self.couplings, g, total, damping)

    def _descend(self, f: Map, z0: Tensor, rows: Tensor, tol: float, max_iter: int) -> Solution:
        """The double loop on the samples `rows`."""
        loop = DoubleLoop(self.local, self.couplings, self.x[rows])
        solution = self._terms(f, z0, rows, loop, tol, max_iter)
        self.objective = z0.new_full((len(loop.objective), len(z0)), torch.nan)
        if loop.objective:
            self.objective[:, rows] = torch.stack(loop.objective)
        return solution

    def _terms(
        self, f: Map, z0: Tensor, rows: Tensor, update: Update, tol: float, max_iter: int
    ) -> Solution:
        """Iterate `update` of the terms on the samples `rows`, each while it gets on."""
        x = self.x[rows]
        h, V = self.cavities
        terms = terms_of(self.local, h[rows], V[rows])
        alone: Map = f.of_samples(rows.nonzero().squeeze(1))  # type: ignore[attr-defined]

        def propose(k: int, z: Tensor, fz: Tensor, g: Tensor, norms: Norms) -> Tensor:
            nonlocal terms
            terms = update(*terms)
            h, V, _ = cavity(self.local, x, self.couplings, *terms)
            state = self.local.mean(h, V), V
            return Layout.of(state).pack(state)

        def part(z: Tensor, limit: int) -> Solution:
            return iterate(alone, z, propose, tol=tol, max_iter=limit, stop_mode="rel")

        if not isinstance(update, DoubleLoop):
            return part(z0[rows], max_iter)
        solution = part(z0[rows], min(max_iter, _PART))
        going = torch.ones_like(solution.converged)
        for left in range(max_iter - _PART, 0, -_PART):
            going = going & ~solution.converged & (solution.codes != Status.NONFINITE.code)
            going = going & update.falls(_PART - 1)
            if not bool(going.any()):
                break
            further = part(solution.value, min(left, _PART))
            solution = solution.followed_by(further.rows(going), going)
        update.conclude(*terms)
        return _judged_as_a_whole(solution)


def _judged_as_a_whole(solution: Solution) -> Solution:
    """Parts begin at the best state, beside which rounding alone may look like growth."""
    settled = (solution.trace[-1:] <= GROWTH * solution.trace[:1]).any(dim=0)
    return solution.with_status((solution.codes == Status.DIVERGED.code) & settled, Status.MAX_ITER)
