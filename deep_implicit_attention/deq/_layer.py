"""`DEQFixedPoint`: the layer that returns the fixed point of a module."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..solvers import Solution, Status, anderson
from ..solvers._validate import check_count, check_number, check_options
from ._adjoints import Adjoint, Implicit
from ._failure import OnFailure, check_on_failure, report
from ._fixed_point import solve_and_attach
from ._map import in_autocast, without_autocast
from ._relax import closed_form, relax
from ._state import State, full_precision

_LEFT_OUT = (
    "The gradients of shared parameters are not finite for this batch unless the nonfinite "
    "samples are left out of the loss."
)


@dataclass(frozen=True)
class _Settings:
    """The options of one call, checked."""

    adjoint: Adjoint
    steps: int | None
    on_failure: OnFailure
    initial_state: str | Callable[[Tensor], State]
    tol: float
    max_iter: int
    solver_options: dict[str, Any]


class DEQFixedPoint(nn.Module):
    """Returns the fixed point z = fun.update(z, context) driven by the input, with gradients.

    `fun` is any module with `initial_state` and `update` (see `DEQModule`). With ``steps=None``
    the layer solves to equilibrium and differentiates implicitly; with ``steps=K`` it relaxes K
    explicit steps and differentiates through them, so the same weights are a K-layer network
    with shared weights.

    Args:
        fun: the module; kept as `.fun`.
        solver: forward solver, and backward solver unless `adjoint` is given.
        output_elements: which elements of the state to return: one as a tensor, several as a
            list.
        adjoint: how to differentiate; by default `Implicit` with `solver` and `solver_bwd_*`.
        steps: number of explicit steps, or None for equilibrium.
        on_failure: ``"warn"``, ``"raise"`` or ``"ignore"``, forward and backward.
        initial_state: ``"zeros"`` (the module's own), ``"input"`` (z = x) or a callable x -> z.
            One step from the input is the transformer block, one step from zeros mixes nothing.
        solver_fwd_max_iter, solver_fwd_tol, solver_bwd_max_iter, solver_bwd_tol: step limits
            (default 30) and tolerances (default 1e-4), forward and backward.
        **options: ``solver_fwd_NAME`` and ``solver_bwd_NAME`` for any other keyword NAME of
            `solver`.

    Raises:
        TypeError: for an unknown option, or `adjoint` together with ``solver_bwd_*``.
        ValueError: for an option out of range.

    Cost: that of the solve; memory for backward is that of one update, however many steps.
    """

    fun: Any  # an nn.Module, of which methods are asked for by name

    def __init__(
        self,
        fun: nn.Module,
        solver: Callable[..., Solution] = anderson,
        output_elements: Sequence[int] = (0,),
        *,
        adjoint: Adjoint | None = None,
        steps: int | None = None,
        on_failure: OnFailure = "warn",
        initial_state: str | Callable[[Tensor], State] = "zeros",
        solver_fwd_max_iter: int = 30,
        solver_fwd_tol: float = 1e-4,
        solver_bwd_max_iter: int | None = None,
        solver_bwd_tol: float | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        for method in ("initial_state", "update"):
            if not callable(getattr(fun, method, None)):
                raise TypeError(f"fun must have a method {method!r}; {type(fun).__name__} has none")
        if not callable(solver):
            raise TypeError(f"solver must be callable, got {type(solver).__name__}")
        self.fun = fun
        self.solver = solver
        self.output_elements = tuple(output_elements)
        self.options: dict[str, Any] = {
            "adjoint": adjoint,
            "steps": steps,
            "on_failure": on_failure,
            "initial_state": initial_state,
            "solver_fwd_max_iter": solver_fwd_max_iter,
            "solver_fwd_tol": solver_fwd_tol,
            "solver_bwd_max_iter": solver_bwd_max_iter,
            "solver_bwd_tol": solver_bwd_tol,
            **options,
        }
        self._defaults = self._settings(self.options)

    def extra_repr(self) -> str:
        given = {name: value for name, value in self.options.items() if value is not None}
        shown = ", ".join(f"{name}={value!r}" for name, value in given.items())
        return f"solver={getattr(self.solver, '__name__', self.solver)}, {shown}"

    def forward(
        self,
        x: Tensor,
        *inputs: Any,
        state: State | None = None,
        return_solution: bool = False,
        debug: bool = False,
        **overrides: Any,
    ) -> Any:
        """The equilibrium driven by `x`.

        Args:
            x: sources, `(B, N, d)` for the attention mechanisms.
            *inputs: what else the module's `prepare` takes, a key mask for instance.
            state: warm start: a state, or what an earlier call returned.
            return_solution: return the `Solution`, whose `value` is what this call would return
                otherwise. It unpacks: ``z, solution = layer(x, return_solution=True)``.
            debug: print the first and the last residual.
            **overrides: any option of the constructor, for this call only.

        Returns:
            The state elements in `output_elements`, or a `Solution`.

        A sample whose input or map is not finite is NaN in the output and leaves the others, and
        their gradients, as they would be without it.
        """
        settings = self._settings({**self.options, **overrides}) if overrides else self._defaults
        self._check_input(x)
        if torch.compiler.is_compiling():
            if settings.steps is not None and not return_solution:
                return self._compiled(x, inputs, state, settings)
            # A solve is a loop on data, which a compiler can only unroll or recompile.
            eager: Any = torch.compiler.disable(self._forward)
            return eager(x, inputs, state, settings, return_solution, debug)
        return self._forward(x, inputs, state, settings, return_solution, debug)

    def _compiled(self, x: Tensor, inputs: tuple, state: State | None, settings: _Settings) -> Any:
        """A fixed number of steps without control flow on data, for compilers and exporters."""
        fields = self.fun.sources(x, *inputs) if hasattr(self.fun, "sources") else x
        parts = self._solve(fields, inputs, state, settings, False).value
        return parts[0] if len(parts) == 1 else parts

    def _forward(
        self,
        x: Tensor,
        inputs: tuple,
        state: State | None,
        settings: _Settings,
        return_solution: bool,
        debug: bool,
    ) -> Any:
        narrow = x.dtype if full_precision(x) is not x and not in_autocast(x) else None
        want_evidence = return_solution or debug
        with without_autocast(x):
            fields = full_precision(x)
            if hasattr(self.fun, "sources"):
                fields = self.fun.sources(fields, *inputs)
            solution = self._solve(fields, inputs, state, settings, want_evidence)
            broken = solution.codes == Status.NONFINITE.code
            poisoned = bool(broken.any())
            if poisoned and not bool(broken.all()):
                # NaN in one sample spoils the gradients of shared parameters for all, since
                # 0 · NaN is NaN. Solve the others without it and put the NaN back at the end.
                clean = fields.masked_fill(_like(broken, fields), 0.0)
                solution = self._solve(clean, inputs, state, settings, want_evidence)
                solution = solution.with_status(broken, Status.NONFINITE)
            parts = solution.value
            if poisoned:
                parts = [_Poison.apply(part, _like(broken, part)) for part in parts]
            if narrow is not None:
                parts = [part.to(narrow) for part in parts]
        if settings.steps is None:
            report(
                solution,
                settings.on_failure,
                type(self.fun).__name__,
                settings.tol,
                _LEFT_OUT if poisoned else "",
                stacklevel=5,
            )
        if debug and solution.trace.numel():
            first, last = solution.trace[0].max().item(), solution.residual.max().item()
            print(f"residual: {first:.3e} -> {last:.3e} in {len(solution.trace)} steps")
        output = parts[0] if len(parts) == 1 else parts
        return solution.with_value(output) if return_solution else output

    def _solve(
        self,
        fields: Tensor,
        inputs: tuple,
        state: State | None,
        settings: _Settings,
        want_evidence: bool,
    ) -> Solution:
        """The solution for the sources `fields`; `value` is the list of output elements."""
        fun = self.fun
        context = fun.prepare(fields, *inputs) if hasattr(fun, "prepare") else fields
        start = self._start(fields, state, settings)
        elements = 1 if isinstance(start, Tensor) else len(start)
        if not all(0 <= i < elements for i in self.output_elements):
            raise ValueError(
                f"output_elements must be among 0 to {elements - 1} for "
                f"{type(fun).__name__}, got {self.output_elements}"
            )
        if settings.steps is None and hasattr(fun, "solve"):
            return closed_form(fun, context, self.output_elements, settings.tol)
        if settings.steps is not None:
            solution = relax(
                fun.update, start, context, settings.steps, settings.tol, want_evidence
            )
        else:
            solution = solve_and_attach(
                _Update(fun),
                start,
                (context,),
                solver=self.solver,
                adjoint=settings.adjoint,
                on_failure=settings.on_failure,
                tol=settings.tol,
                max_iter=settings.max_iter,
                **settings.solver_options,
            )
        value = solution.value
        parts = (value,) if isinstance(value, Tensor) else value
        return solution.with_value([parts[i] for i in self.output_elements])

    def _start(self, x: Tensor, state: State | None, settings: _Settings) -> State:
        """The initial state: the module's, with what the caller gave put in its place."""
        initial = settings.initial_state
        own = initial(x) if callable(initial) else self.fun.initial_state(x)
        bare = isinstance(own, Tensor)
        parts = [own] if isinstance(own, Tensor) else list(own)
        if initial == "input":
            parts[0] = x
        if state is not None:
            given = [state] if isinstance(state, Tensor) else list(state)
            whole = len(given) == len(parts)
            places = range(len(parts)) if whole else self.output_elements
            if len(given) != len(places):
                raise ValueError(
                    f"state must have {len(parts)} elements, or the {len(places)} that this layer "
                    f"returns; got {len(given)}"
                )
            for place, part in zip(places, given, strict=True):
                if part.shape != parts[place].shape:
                    raise ValueError(
                        f"state element {place} must have shape {tuple(parts[place].shape)}, "
                        f"got {tuple(part.shape)}"
                    )
                parts[place] = part.to(parts[place])
        return parts[0] if bare else tuple(parts)

    def _settings(self, options: dict[str, Any]) -> _Settings:
        """Check the options and sort them."""
        forward: dict[str, Any] = {}
        backward: dict[str, Any] = {}
        own: dict[str, Any] = {}
        for name, value in options.items():
            if name.startswith("solver_fwd_"):
                forward[name.removeprefix("solver_fwd_")] = value
            elif name.startswith("solver_bwd_"):
                if value is not None:
                    backward[name.removeprefix("solver_bwd_")] = value
            elif name in ("adjoint", "steps", "on_failure", "initial_state"):
                own[name] = value
            else:
                raise TypeError(
                    f"DEQFixedPoint: unknown option {name!r}; options are adjoint, steps, "
                    "on_failure, initial_state, solver_fwd_NAME and solver_bwd_NAME"
                )
        check_options(self.solver, forward, "solver_fwd_", "DEQFixedPoint")
        check_options(self.solver, backward, "solver_bwd_", "DEQFixedPoint")
        tol, max_iter = forward.pop("tol"), forward.pop("max_iter")
        check_number("solver_fwd_tol", tol, minimum=0.0)
        check_count("solver_fwd_max_iter", max_iter)
        adjoint = own["adjoint"]
        if adjoint is None:
            adjoint = Implicit(self.solver, **{"tol": 1e-4, "max_iter": 30, **backward})
        elif backward:
            names = ", ".join("solver_bwd_" + name for name in backward)
            raise TypeError(f"give either adjoint or {names}: the adjoint has its own settings")
        if own["steps"] is not None:
            check_count("steps", own["steps"])
        check_on_failure(own["on_failure"])
        initial: Any = own["initial_state"]
        if initial not in ("zeros", "input") and not callable(initial):
            raise ValueError(
                f"initial_state must be 'zeros', 'input' or a callable, got {initial!r}"
            )
        return _Settings(
            adjoint, own["steps"], own["on_failure"], own["initial_state"], tol, max_iter, forward
        )

    def _check_input(self, x: Tensor) -> None:
        if not isinstance(x, Tensor):
            raise TypeError(f"x must be a tensor, got {type(x).__name__}")
        if not x.is_floating_point():
            raise TypeError(f"x must have a real floating dtype, got {x.dtype}")


def _like(rows: Tensor, x: Tensor) -> Tensor:
    """`rows` `(B,)` shaped to broadcast over `x` `(B, ...)`."""
    return rows.reshape(-1, *[1] * (x.dim() - 1))


class _Update(nn.Module):
    """`fun.update` as the forward of a module, so that its parameters can be substituted."""

    def __init__(self, fun: nn.Module) -> None:
        super().__init__()
        self.fun = fun

    def forward(self, z: State, context: Any) -> State:
        return self.fun.update(z, context)  # type: ignore[operator]


class _Poison(torch.autograd.Function):
    """Puts NaN where `bad`; a gradient that reaches those places through the loss is NaN, too."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, bad: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(bad)
        return z.masked_fill(bad, torch.nan)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple:  # type: ignore[override]
        (bad,) = ctx.saved_tensors
        return torch.where(bad & (g != 0), torch.nan, g), None
