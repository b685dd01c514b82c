"""The options that all iterated inference methods share."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..deq import Implicit
from ..deq._failure import OnFailure, check_on_failure
from ..deq._fixed_point import check_fixed_point_solver, solve_and_attach
from ..deq._step import selected, selection
from ..solvers import Solution, newton_krylov, picard
from ..solvers._validate import check_count, check_number, check_options
from ._response import Response
from ._system import SpinSystem

# Magnetizations of less than this part of the variances beside them are solved for once more.
_SMALL = 0.1


class IteratedMethod:
    """What the inference methods that solve a fixed point have in common: their options.

    A method is called with a system and fields `(*batch, N, *event)`, and with `start`,
    magnetizations of the shape of `fields` to begin with (by default those of spins without
    couplings); it returns a `Response`.

    Args:
        tol: relative residual at which a sample is solved. The default is for float64; in float32
            residuals stop falling at 1e-7 or above: pass about 1e-5. Variances do not hide small
            magnetizations: where fields are weak these count in units of their own size. For Potts
            spins it is the difference from 1/q that is small. It counts in its own units down to
            the rounding limit, for the default 4e-6 (√(N(q − 1)) times that with
            `SelfAveragingTAP`, where V is one number); with `NaiveMeanField` and `TAP`, which solve
            for m itself, it counts relative to 1/q: in fields of 1e-8 it is right to a per cent.
        max_iter: solver steps at most, of each solve; there is a second one where fields are so
            weak that magnetizations must be solved for in their own units.
        solver: a solver of `deep_implicit_attention.solvers`; by default the method's own, for
            most damped Picard iteration, which settles in stable solutions.
        on_failure: ``"warn"``, ``"raise"`` or ``"ignore"``.
        **options: further options of the solver.

    Raises:
        TypeError, ValueError: for unknown options and values out of range.
    """

    default_solver: ClassVar[dict[str, Any]] = {"solver": picard, "damping": 0.5}

    def __init__(
        self,
        *,
        tol: float = 1e-10,
        max_iter: int = 2000,
        solver: Callable[..., Solution] | None = None,
        on_failure: OnFailure = "warn",
        **options: Any,
    ) -> None:
        check_number("tol", tol, minimum=0.0)
        check_count("max_iter", max_iter)
        check_on_failure(on_failure)
        if solver is not None:
            check_fixed_point_solver(solver)
        chosen = self.default_solver if solver is None else {"solver": solver}
        check_options(chosen["solver"], options, owner=type(self).__name__)
        self.options = {"tol": tol, "max_iter": max_iter, **chosen, **options}
        self.on_failure: OnFailure = on_failure

    def fixed_point(
        self,
        step: Callable,
        start: tuple[Tensor, ...],
        *args: Any,
        solver: Callable[..., Solution] | None = None,
        rounding: float = 0.0,
    ) -> Solution:
        """Solve `step` for magnetizations, or they and variances, given fields and other `args`.

        The report on the forward solve is left to the method. A `solver` given here stands for the
        method's own and all of its options. `rounding`, in units of the dtype's, is the error that
        magnetizations have however small they are.
        """

        def solve(
            step: Callable, start: tuple[Tensor, ...], args: Sequence[Any], options: dict[str, Any]
        ) -> Solution:
            return solve_and_attach(
                step, start, args, adjoint=Implicit(), on_failure=self.on_failure, **options
            )

        general = {"tol": self.options["tol"], "max_iter": self.options["max_iter"]}
        own = self.options if solver is None else general | {"solver": solver}
        first = solve(step, start, args, own)
        if self.options.get("stop_mode", "rel") != "rel" or not len(args[0]):
            return first
        m, V = first.value
        # In a smaller unit this error would be more than the tolerance. Its norm grows with the
        # number of magnetizations, that of the state may not: V can be one number for all.
        many = math.sqrt(max(1.0, m[0].numel() / V[0].numel()))
        least = many * rounding * torch.finfo(m.dtype).eps / (general["tol"] or 1.0)
        small = _hidden(first, args[0], least)
        if not bool(small.any()):
            return first
        # So weak, they are a linear response to the fields: Newton's method has a step to go. Their
        # mates would go on with theirs, those that failed to the limit.
        rows = small.nonzero()[:, 0]
        args = tuple(selected(selection(step), rows, args))
        with torch.no_grad():
            begin = m[rows], V[rows]
            measured = _InUnits(step, _size(begin[0], least))
            start = measured.scaled(begin)
            second = solve(measured, start, args, general | {"solver": newton_krylov})
            value = measured.natural(second.value)
        if torch.is_grad_enabled():
            # Not in these units, in which derivatives by variances hide those by magnetizations.
            value = self.attached(step, value, *args)
        return first.followed_by(second.with_value(value), small)

    def attached(
        self, step: Callable, solution: tuple[Tensor, ...], *args: Any
    ) -> tuple[Tensor, ...]:
        """A `solution` of `step` as it is, with its implicit derivatives by `args`.

        A solve that begins there could end in another one, where there are several.
        """
        tol, max_iter = self.options["tol"], self.options["max_iter"]
        stays = solve_and_attach(
            step,
            tuple(part.detach() for part in solution),
            args,
            solver=picard,
            adjoint=Implicit(max_iter=max_iter),
            on_failure=self.on_failure,
            tol=tol,
            max_iter=1,
        )
        return stays.value


def _hidden(solution: Solution, fields: Tensor, least: float) -> Tensor:
    """Which samples `(B,)` have magnetizations that variances hide, taken to be `least` or more.

    Without fields m = 0 is a solution, beside which nothing is small.
    """
    m, V = (part.detach().flatten(1) for part in solution.value)
    size, beside = m.abs().amax(dim=1), V.abs().amax(dim=1)
    hidden = solution.converged & (fields.detach() != 0).flatten(1).any(dim=1)
    hidden &= size > torch.finfo(m.dtype).tiny
    return hidden & (size.clamp_min(least) < _SMALL * beside)


def _size(m: Tensor, least: float) -> Tensor:
    """A power of two next to the largest magnetization of each sample, or `least`, `(B, 1, …)`."""
    size = m.flatten(1).abs().amax(dim=1).clamp_min(least)
    unit = torch.ldexp(torch.ones_like(size), torch.frexp(size).exponent)
    return unit.view(-1, *[1] * (m.dim() - 1))


class _InUnits(nn.Module):
    """A step for the state (m / unit, V)."""

    def __init__(self, step: Callable, unit: Tensor) -> None:
        super().__init__()
        self.step, self.unit = step, unit

    def forward(self, state: tuple[Tensor, Tensor], *args: Any) -> tuple[Tensor, Tensor]:
        return self.scaled(self.step(self.natural(state), *args))

    def scaled(self, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return state[0] / self.unit, state[1]

    def natural(self, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return state[0] * self.unit, state[1]


def check_start(start: Tensor | None, fields: Tensor) -> None:
    """Raise `ValueError` unless `start` is None or finite magnetizations for these fields."""
    if start is None:
        return
    if not isinstance(start, Tensor) or start.shape != fields.shape or start.dtype != fields.dtype:
        got: Any = type(start).__name__
        if isinstance(start, Tensor):
            got = f"{start.dtype} {tuple(start.shape)}"
        raise ValueError(
            f"start must be magnetizations like fields, {fields.dtype} {tuple(fields.shape)}, "
            f"got {got}"
        )
    if not bool(torch.isfinite(start).all()):
        raise ValueError("start must be finite")


def on_ordinary_tensors(call: Callable[..., Response]) -> Callable[..., Response]:
    """A method's `__call__` outside inference mode, with copies of tensors that were made in it.

    The response is differentiated when its susceptibility is asked for, and such tensors cannot
    stand in a graph.
    """

    @functools.wraps(call)
    def ordinary(
        method: Any, system: SpinSystem, fields: Tensor, *, start: Tensor | None = None
    ) -> Response:
        graph = torch.is_grad_enabled()
        with torch.inference_mode(False), torch.set_grad_enabled(graph):
            if isinstance(system, SpinSystem) and system.couplings.is_inference():
                system = SpinSystem.unchecked(system.couplings.clone(), system.prior)
            return call(method, system, _copied(fields), start=_copied(start))

    return ordinary


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) and value.is_inference() else value
