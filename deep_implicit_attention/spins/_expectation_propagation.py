"""Expectation propagation: Gaussian site terms, matched to single spins until nothing moves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

from ..deq._failure import OnFailure
from ..deq._state import Layout
from ..solvers import Solution
from ..solvers._iterate import Map, iterate
from ..solvers._validate import check_number
from ._adaptive_tap import AdaptiveTAPStep
from ._consistency import ConsistentMethod
from ._double_loop import DoubleLoop
from ._frames import Frame, Local
from ._site_terms import Terms, begin, cavity, parallel, sequential

Schedule = Literal["auto", "parallel", "sequential", "double loop"]
Update = Callable[[Tensor, Tensor], Terms]


class ExpectationPropagation(ConsistentMethod):
    """Expectation propagation (Minka 2001) in the form of expectation consistency (Opper, Winther
    2005, JMLR 6), for any prior: each ρ_i is replaced by a Gaussian term exp(g_iᵀS − ½ SᵀΛ_i S),

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
            ``"double loop"``: the free energy of expectation consistency is minimised, which always
            goes downhill (`Response.objective`); each step solves a convex problem.
            ``"auto"``: parallel, then the double loop for the samples on which that failed.
        damping: part of the old terms kept in parallel and sequential updates.
        tol: relative residual of the equations of `AdaptiveTAP` at which a sample is solved.
        max_iter: updates of all terms at most, of each schedule.
        on_failure: ``"warn"``, ``"raise"`` or ``"ignore"``.

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
            AdaptiveTAPStep(local), schedule.state(), x, couplings, solver=schedule
        )
        return solution, schedule.objective


class _Schedule:
    """A solver for the state (m, V) that moves site terms as `ExpectationPropagation` was told.

    Residuals are those of the map it is given, the equations of adaptive TAP: beside it terms of
    strongly polarised spins are numbers so large that rounding hides whether they still move.
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
        self.terms = begin(local, x, couplings, start)
        self.objective: Tensor | None = None

    def state(self) -> Terms:
        """The state (m, V) to begin with."""
        return _state(self.local, self.x, self.couplings, self.terms)

    def __call__(self, f: Map, z0: Tensor, *, tol: float, max_iter: int) -> Solution:
        everybody = torch.ones_like(z0[:, 0], dtype=torch.bool)
        limits = {"tol": tol, "max_iter": max_iter}
        local, couplings, damping = self.local, self.couplings, self.method.damping

        def in_parallel(g: Tensor, total: Tensor) -> Terms:
            return parallel(local, self.x, couplings, g, total, damping)

        def in_turn(g: Tensor, total: Tensor) -> Terms:
            return sequential(local, self.x, couplings, g, total, damping)

        if self.method.schedule == "sequential":
            return self._run(f, z0, everybody, in_turn, limits)
        if self.method.schedule == "double loop":
            return self._descend(f, z0, everybody, limits)
        first = self._run(f, z0, everybody, in_parallel, limits)
        failed = ~first.converged
        if self.method.schedule == "parallel" or not bool(failed.any()):
            return first
        return _followed(first, self._descend(f, z0, failed, limits), failed)

    def _descend(self, f: Map, z0: Tensor, rows: Tensor, limits: dict) -> Solution:
        loop = DoubleLoop(self.local, self.couplings, self.x[rows])
        solution = self._run(f, z0, rows, loop, limits)
        self.objective = z0.new_full((len(loop.objective), len(z0)), torch.nan)
        if loop.objective:
            self.objective[:, rows] = torch.stack(loop.objective)
        return solution

    def _run(self, f: Map, z0: Tensor, rows: Tensor, update: Update, limits: dict) -> Solution:
        """Iterate `update` of the terms on the samples `rows`."""
        x = self.x[rows]
        terms = self.terms[0][rows], self.terms[1][rows]
        layout = Layout((terms[0].shape, terms[1].shape), bare=False)

        def embedded(z: Tensor) -> Tensor:
            return f(z0.index_put((rows,), z))[rows]

        def propose(k: int, z: Tensor, fz: Tensor, residual: Tensor) -> Tensor:
            nonlocal terms
            terms = update(*terms)
            return layout.pack(_state(self.local, x, self.couplings, terms))

        return iterate(embedded, z0[rows], propose, stop_mode="rel", **limits)


def _state(local: Local, x: Tensor, couplings: Tensor, terms: Terms) -> Terms:
    """(m, V) of the spins in their cavities."""
    h, V, _ = cavity(local, x, couplings, *terms)
    return local.mean(h, V), V


def _followed(first: Solution, second: Solution, rows: Tensor) -> Solution:
    """The evidence of a solve whose samples `rows` were given to a second one."""

    def put(old: Tensor, new: Tensor) -> Tensor:
        return old.index_put((rows,), new)

    rest = first.trace[-1].expand(len(second.trace), -1).clone()
    rest[:, rows] = second.trace
    return Solution(
        value=put(first.value, second.value),
        residual=put(first.residual, second.residual),
        steps=put(first.steps, first.steps[rows] + second.steps),
        converged=put(first.converged, second.converged),
        codes=put(first.codes, second.codes),
        trace=torch.cat([first.trace, rest]),
        residual_norm=put(first.residual_norm, second.residual_norm),
    )
