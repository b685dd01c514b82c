"""`DEQFixedPoint`: the layer that returns the fixed point of a module."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..solvers import Solution, Status, anderson
from ..solvers._scale import is_host
from ..solvers._validate import check_is_tensor
from ._adjoints import Adjoint
from ._failure import OnFailure, report
from ._fixed_point import check_fixed_point_solver, refuse_transformations, solve_and_attach
from ._map import TracedMap, in_autocast, outside_inference_mode, without_autocast
from ._module import of_its_update
from ._relax import closed_form, relax
from ._settings import Settings, check_elements, check_reach, override, parse
from ._state import Layout, State, finite_samples, full_precision, per_sample, replaced, widen
from ._update import Update, count, solver_option, start_near

_LEFT_OUT = (
    "The gradients of shared parameters are not finite for this batch unless the samples whose "
    "input is nonfinite are left out of the loss. Layers before this one need them left out of "
    "the batch."
)


def _exporting() -> bool:
    """`torch.compiler.is_exporting`, true to the compiler of torch 2.11 wherever it traces."""
    return getattr(torch.compiler, "_is_exporting_flag", False)


class DEQFixedPoint(nn.Module):
    """Returns the fixed point z = fun.update(z, context) driven by the input, with gradients.

    `fun` is any module with `initial_state` and `update` (see `DEQModule`). With ``steps=None``
    the layer solves to equilibrium and differentiates implicitly; with ``steps=K`` it relaxes K
    explicit steps and differentiates through them, so the same weights are a K-layer network
    with shared weights.

    A module that has its fixed point in closed form (`solve`, see `DEQModule`) is not iterated to
    equilibrium: gradients are exact, and solver, `adjoint`, initial state and options change
    nothing, except the forward tolerance, by which the solution is judged.

    Args:
        fun: the module; kept as `.fun`.
        solver: forward solver, and backward solver unless `adjoint` is given.
        output_elements: which elements of the state to return, increasing indices: one as a
            tensor, several as a tuple.
        adjoint: how to differentiate; by default `Implicit` with `solver` and `solver_bwd_*`.
        steps: number of explicit steps, or None for equilibrium.
        on_failure: ``"warn"``, ``"raise"`` or ``"ignore"``, forward and backward.
        initial_state: ``"zeros"`` (the module's own), ``"input"`` (z = x) or a callable x -> z.
            One step from the input is the transformer block, one step from zeros mixes nothing.
        solver_fwd_max_iter, solver_fwd_tol, solver_bwd_max_iter, solver_bwd_tol: step limits
            (default 30) and tolerances (default 1e-4), forward and backward.
        **options: ``solver_fwd_NAME`` and ``solver_bwd_NAME`` for any other keyword NAME of
            `solver`. Their defaults are `solver`'s own, except ``period=3`` for `anderson`.

    Raises:
        TypeError: for an unknown option, or `adjoint` together with ``solver_bwd_*``.
        ValueError: for an option out of range.

    Cost: that of the solve. Memory for backward is that of one update, however many steps the
    solver takes; of `steps` updates for an explicit horizon.

    The layer calls the methods of `fun`, so forward and backward hooks on it do not run. If a batch
    has samples that are not finite, `prepare` runs a second time, without them.
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
        if isinstance(fun, type):
            raise TypeError(f"fun must be a mechanism, got the class {fun.__name__}")
        for method in ("initial_state", "update"):
            if not callable(getattr(fun, method, None)):
                raise TypeError(f"fun must have a method {method!r}; {type(fun).__name__} has none")
        check_fixed_point_solver(solver)
        self.fun = fun
        self.solver = solver
        self.output_elements = check_elements(output_elements)
        self._options: dict[str, Any] = {
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
        self._settings = parse(solver, self._options)

    def extra_repr(self) -> str:
        given = {name: value for name, value in self._options.items() if value is not None}
        shown = ", ".join(f"{name}={value!r}" for name, value in given.items())
        return f"solver={getattr(self.solver, '__name__', self.solver)}, {shown}"

    def forward(
        self,
        x: Tensor,
        *inputs: Any,
        state: State | None = None,
        return_solution: bool = False,
        measure: bool = True,
        debug: bool = False,
        **overrides: Any,
    ) -> Any:
        """The equilibrium driven by `x`.

        Args:
            x: sources, `(B, N, d)` for the attention mechanisms.
            *inputs: what else the module's `prepare` takes, a key mask for instance.
            state: warm start: a state, or what an earlier call returned, a `Solution` included. It
                gets no gradient, and a sample of it that is not finite starts afresh.
            return_solution: return the `Solution`, whose `value` is what this call would return
                otherwise. It unpacks: ``z, solution = layer(x, return_solution=True)``.
            measure: False spares a fixed number of steps the evaluation that measures the residual
                of the `Solution`, which is then NaN: for states that only start another call. A
                solve to tolerance has its residual anyway.
            debug: print the first and the last residual, which are then measured.
            **overrides: ``steps``, ``adjoint`` (which replaces the constructor's ``solver_bwd_*``),
                ``on_failure``, ``initial_state``, ``solver_fwd_NAME`` or ``solver_bwd_NAME`` for
                this call only.

        Returns:
            The state elements in `output_elements`, or a `Solution`. Under autocast they are
            float32; narrow x without autocast gives narrow values, rounded after the residual was
            measured.

        A sample whose x, or whose map at a finite x, is not finite is NaN in the output and leaves
        the others, and their gradients, as they would be without it. For that, further inputs have
        to be finite.
        """
        settings = self._settings
        if overrides:
            settings = parse(self.solver, override(self._options, overrides))
        check_is_tensor("x", x)
        if not x.is_floating_point():
            raise TypeError(f"x must have a real floating dtype, got {x.dtype}")
        evidence = (return_solution and measure) or debug
        compiling = torch.compiler.is_compiling()
        if x.is_meta and settings.steps is None:
            raise ValueError(
                "x is on the meta device, where there are no numbers to solve for: only a fixed "
                "number of steps, steps=K, has shapes without them"
            )
        transformed = compiling or x.is_meta or torch._C._are_functorch_transforms_active()
        if settings.steps is not None and transformed:
            solution = self._respond_traceably(x, inputs, state, settings, evidence)
        elif not compiling:
            solution = self._respond(x, inputs, state, settings, evidence)
        elif settings.steps is None and _exporting():
            raise RuntimeError(
                "a solve to tolerance, which is a loop on data, cannot be exported: use a layer "
                "with a fixed number of steps, DEQFixedPoint(..., steps=K)"
            )
        else:
            # A solve is a loop on data, which a compiler can only unroll or recompile.
            eager: Any = torch.compiler.disable(self._respond)
            solution = eager(x, inputs, state, settings, evidence)
        if debug and solution.trace.numel():
            first, last = solution.trace[0].max().item(), solution.residual.max().item()
            print(f"residual: {first:.3e} -> {last:.3e} in {len(solution.trace)} steps")
        parts = solution.value
        output = parts[0] if len(parts) == 1 else tuple(parts)
        return solution.with_value(output) if return_solution else output

    def map(self, x: Tensor, *inputs: Any) -> Callable[[State], State]:
        """The update z ↦ fun.update(z, context) that `x` drives, for the diagnostics."""
        with without_autocast(x):
            context = self._prepare(self._fields(x, inputs), inputs)

        def update(z: State) -> State:
            with without_autocast(x):
                return self.fun.update(z, context)

        return update

    @outside_inference_mode
    def _respond(
        self, x: Tensor, inputs: tuple, state: State | None, settings: Settings, evidence: bool
    ) -> Solution:
        """The solution for `x`; `value` is the list of output elements."""
        how = {"evidence": evidence, "rough": is_host(x) or in_autocast(x)}
        with without_autocast(x):
            fields = self._fields(x, inputs)
            solution = self._solve(fields, self._prepare(fields, inputs), state, settings, **how)
            poisoned = False
            # A bounded response to what is not finite may be finite. The sum is a first look.
            converged = solution.all_converged()
            if not (converged and math.isfinite(float(fields.detach().sum()))):
                broken = (solution.codes == Status.NONFINITE.code) | ~finite_samples(fields)
                poisoned = bool(broken.any())
            if poisoned:
                # NaN in one sample spoils the gradients of shared parameters for all, since
                # 0 · NaN is NaN. Solve with another in its place and put the NaN back at the end.
                clean = replaced(broken, fields)
                solution = self._solve(clean, self._prepare(clean, inputs), state, settings, **how)
                solution = solution.with_status(broken, Status.NONFINITE)
                solution = solution.with_value(
                    [_Poison.apply(part, per_sample(broken, part)) for part in solution.value]
                )
        if (settings.steps is None and not converged) or poisoned:
            report(
                solution,
                settings.on_failure,
                type(self.fun).__name__,
                settings.tol,
                _LEFT_OUT if poisoned else "",
                stacklevel=7,
                in_a_layer="solver_fwd_",
            )
        return self._narrowed(solution, x)

    def _respond_traceably(
        self, x: Tensor, inputs: tuple, state: State | None, settings: Settings, evidence: bool
    ) -> Solution:
        """The same at a fixed number of steps, without control flow on data."""
        with without_autocast(x):
            fields = self._fields(x, inputs)
            broken = ~finite_samples(fields)
            fields = replaced(broken, fields)
            context = self._prepare(fields, inputs)
            solution = self._solve(fields, context, state, settings, evidence, traceable=True)
            solution = solution.with_status(broken, Status.NONFINITE)
            parts = [
                part.masked_fill(per_sample(broken, part), torch.nan) for part in solution.value
            ]
        return self._narrowed(solution.with_value(parts), x)

    def _fields(self, x: Tensor, inputs: tuple) -> Tensor:
        fields = full_precision(x)
        return self.fun.sources(fields, *inputs) if hasattr(self.fun, "sources") else fields

    def _prepare(self, fields: Tensor, inputs: tuple) -> Any:
        return self.fun.prepare(fields, *inputs) if hasattr(self.fun, "prepare") else fields

    def _narrowed(self, solution: Solution, x: Tensor) -> Solution:
        """The value in the dtype of `x`, if that was narrow by itself and not by autocast."""
        if full_precision(x) is x or in_autocast(x):
            return solution
        return solution.with_value([part.to(x.dtype) for part in solution.value])

    def _solve(
        self,
        fields: Tensor,
        context: Any,
        state: State | None,
        settings: Settings,
        evidence: bool,
        rough: bool = False,
        traceable: bool = False,
    ) -> Solution:
        """The solution for the sources `fields`; `value` is the list of output elements.

        `rough` says that first steps may be rough ones: on an accelerator autocast is the leave.
        """
        fun, steps = self.fun, settings.steps
        if steps is not None:
            start, layout = self._start(fields, state, settings)
            check_reach(fun, self.output_elements, len(layout.shapes))
            traced = None if traceable else TracedMap(Update(fun), layout, (context,))

            def step(z: Tensor) -> Tensor:
                if traced is not None:
                    return traced(z, traced.tensors)
                return layout.pack(fun.update(layout.unpack(z), context))

            solution = relax(step, layout.pack(start), steps, settings.tol, evidence)
            value = layout.unpack(solution.value)
        elif of_its_update(fun, "solve") is not None:
            layout = None
            # Of the state that nothing starts from not even the layout is needed.
            given = settings.initial_state != "zeros" or state is not None
            if given or of_its_update(fun, "residual") is None:
                _, layout = self._start(fields, state, settings)
                check_reach(fun, self.output_elements, len(layout.shapes))
            return closed_form(fun, context, layout, self.output_elements, settings.tol)
        else:
            solution = self._equilibrium(fields, context, state, settings, rough)
            value = solution.value
        parts = (value,) if isinstance(value, Tensor) else value
        return solution.with_value([parts[i] for i in self.output_elements])

    def _equilibrium(
        self, fields: Tensor, context: Any, state: State | None, settings: Settings, rough: bool
    ) -> Solution:
        """The solution of an iteration to tolerance; `value` is the whole state."""
        refuse_transformations()
        fun, given, start, first = self.fun, settings.solver_options, None, None
        with torch.no_grad():
            preconditioner = solver_option(fun, "preconditioner", context, given)
            if settings.initial_state == "zeros" and state is None:
                start = start_near(fun, context, preconditioner)
            if rough and state is None:
                first = solver_option(fun, "rough", context, given)
        if start is None:
            start, _ = self._start(fields, state, settings)
        check_reach(fun, self.output_elements, count(start))
        return solve_and_attach(
            Update(fun),
            start,
            (context,),
            solver=self.solver,
            adjoint=settings.adjoint,
            on_failure=settings.on_failure,
            tol=settings.tol,
            max_iter=settings.max_iter,
            state_preconditioner=preconditioner,
            rough_args=None if first is None else (first,),
            **given,
        )

    def _start(self, x: Tensor, state: State | None, settings: Settings) -> tuple[State, Layout]:
        """The initial state: the module's, with what the caller gave put in its place."""
        own = widen(self.fun.initial_state(x))
        layout = Layout.of(own)
        initial = settings.initial_state
        if initial == "zeros" and state is None:
            return own, layout
        if callable(initial):
            own = widen(initial(x))
            layout.check_image(own)
        parts = [own] if isinstance(own, Tensor) else list(own)
        if initial == "input":
            parts[0] = x
        if state is not None:
            whole: Any = state.value if isinstance(state, Solution) else state
            if not isinstance(whole, Tensor | tuple | list):
                raise TypeError(
                    "state must be a tensor, a tuple of them or a Solution, got "
                    f"{type(whole).__name__}"
                )
            given = [whole] if isinstance(whole, Tensor) else list(whole)
            given = [part.value if isinstance(part, Solution) else part for part in given]
            places = range(len(parts)) if len(given) == len(parts) else self.output_elements
            if len(given) != len(places):
                raise ValueError(
                    f"state must have {len(parts)} elements, or the {len(places)} that this layer "
                    f"returns; got {len(given)}"
                )
            for place, part in zip(places, given, strict=True):
                if not isinstance(part, Tensor):
                    raise TypeError(
                        f"state element {place} must be a tensor, got {type(part).__name__}"
                    )
                if not part.is_floating_point() or part.shape != parts[place].shape:
                    raise ValueError(
                        f"state element {place} must be a real floating tensor of shape "
                        f"{tuple(parts[place].shape)}, got {part.dtype} {tuple(part.shape)}"
                    )
                part = part.detach().to(parts[place])
                parts[place] = torch.where(
                    per_sample(finite_samples(part), part), part, parts[place]
                )
        start = parts[0] if layout.bare else tuple(parts)
        return start, Layout.of(start)


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
