"""`fixed_point`: solve z = f(z, *args), with gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch.autograd import forward_ad

from ..solvers import Solution, anderson
from ..solvers._validate import check_options, takes
from ._adjoints import Adjoint, Forward, Implicit, is_gmres
from ._failure import OnFailure, check_on_failure, report
from ._linear_map import on_vectors
from ._map import TracedMap, outside_inference_mode, plain_arguments, without_autocast
from ._state import Layout, State, widen
from ._step import FORWARD_MODE, Step, dual


@outside_inference_mode
def fixed_point(
    f: Callable[..., State],
    z0: State,
    args: Sequence[Any] = (),
    *,
    solver: Callable[..., Solution] = anderson,
    adjoint: Adjoint = Implicit(),  # noqa: B008 (immutable)
    on_failure: OnFailure = "warn",
    tol: float = 1e-4,
    max_iter: int = 50,
    **solver_options: Any,
) -> Solution:
    """Solve z = f(z, *args) for every sample of a batch, differentiably.

    Args:
        f: the map, ``f(z, *args) -> z``: a function or an `nn.Module`. Each sample's image is a
            function of the same sample of z. A module may have
            ``select_samples(index, *args) -> args``, those of some samples, so that a solve can go
            on without the others once they are done.
        z0: where to start: a tensor `(B, ...)` or a tuple of them. It gets no gradient: a fixed
            point does not depend on where the solver came from.
        args: what f depends on; tensors may stand inside tuples, lists and dicts.
        solver: `picard`, `anderson`, `broyden`, `newton_krylov`, or a function with their
            signature.
        adjoint: how to differentiate: `Implicit()` (exact), `OneStep()`, `Phantom(steps)`.
        on_failure: ``"warn"``, ``"raise"`` or ``"ignore"``, forward and backward, where a sample
            does not reach the tolerance.
        tol: bound on each sample's residual ‖f(z) − z‖ / ‖f(z)‖ (or as `stop_mode` says).
        max_iter: the solver's step limit.
        **solver_options: further keywords of `solver`.

    Returns:
        `Solution`; `value` has the structure of `z0` and is the solver's iterate, bit for bit
        the same with and without gradients. Tensors in `args` and the parameters of an f that is
        a module are differentiable to any order; tensors that f merely closes over get first
        derivatives, and an attempt at second ones raises. Backward evaluates f again, so names that
        f closes over must still mean the same, which the variable of a loop does not; where z is no
        solution any more, it warns or raises as `on_failure` says. Floating types narrower than
        float32 are widened for the solve, and autocast is off inside it.

    Raises:
        TypeError, ValueError: for arguments of the wrong kind, shape or range, and unknown
            options.
        RuntimeError: for forward-mode derivatives, and an f that changes z in place.
        ConvergenceError: with ``on_failure="raise"``.
    """
    solution = solve_and_attach(
        f,
        z0,
        args,
        solver=solver,
        adjoint=adjoint,
        on_failure=on_failure,
        tol=tol,
        max_iter=max_iter,
        **solver_options,
    )
    report(solution, on_failure, "fixed_point", tol, stacklevel=4)
    return solution


def refuse_transformations() -> None:
    """Raise where `torch.func` hides the numbers that a solver looks at, or a trace keeps them."""
    if torch._C._get_tracing_state() is not None:
        raise RuntimeError(
            "torch.jit.trace would keep the steps that its example takes of a solve to tolerance, "
            "which is a loop on data: use a layer with a fixed number of steps, "
            "DEQFixedPoint(..., steps=K)"
        )
    if not torch._C._are_functorch_transforms_active():
        return
    if forward_ad._current_level >= 0:
        raise RuntimeError(FORWARD_MODE)
    raise RuntimeError(
        "torch.func cannot transform a solve to tolerance, which is a loop on data: use "
        "torch.autograd, or a layer with a fixed number of steps, DEQFixedPoint(..., steps=K)"
    )


def check_fixed_point_solver(solver: Callable) -> None:
    """Raise unless `solver` can be meant to solve z = f(z)."""
    if not callable(solver):
        raise TypeError(f"solver must be callable, got {type(solver).__name__}")
    if is_gmres(solver):
        raise TypeError("gmres solves linear systems; it can be the solver of Implicit only")


def solve_and_attach(
    f: Callable[..., State],
    z0: State,
    args: Sequence[Any],
    *,
    solver: Callable[..., Solution],
    adjoint: Adjoint,
    on_failure: str,
    tol: float,
    max_iter: int,
    state_preconditioner: Callable[[State], State] | None = None,
    rough_args: Sequence[Any] | None = None,
    **solver_options: Any,
) -> Solution:
    """`fixed_point` without its report on the forward solve.

    `state_preconditioner` is for solvers that take a preconditioner, forward and backward.
    f(z, *rough_args) is an approximation of f(z, *args) for the first steps of solvers that take a
    rough map; backward asks f for its own, `f.rough(*args)`.
    """
    if not callable(f):
        raise TypeError(f"f must be callable, got {type(f).__name__}")
    if not isinstance(args, tuple | list):
        raise TypeError(f"args must be a tuple, got {type(args).__name__}: write (a,) for one")
    if not isinstance(adjoint, Adjoint):
        raise TypeError(f"adjoint must be Implicit, OneStep or Phantom, got {adjoint!r}")
    check_fixed_point_solver(solver)
    check_on_failure(on_failure)
    check_options(solver, solver_options, owner="fixed_point")
    z0 = widen(z0)
    layout = Layout.of(z0)
    flat = layout.pack(z0).detach()
    flat_preconditioner = None
    if state_preconditioner is not None:
        flat_preconditioner = on_vectors(state_preconditioner, layout)
        if takes(solver, "preconditioner"):
            solver_options = {"preconditioner": flat_preconditioner, **solver_options}
    differentiable, plain = torch.is_grad_enabled(), None
    if rough_args is not None or not differentiable:
        plain = plain_arguments(f, args)
    if plain is None:
        rough_args = None  # narrow parameters are widened for f, but not for its approximation
    if rough_args is not None and takes(solver, "rough"):
        solver_options = {"rough": Step(f, layout, rough_args), **solver_options}
    solve = partial(solver, tol=tol, max_iter=max_iter, **solver_options)
    refuse_transformations()
    if not differentiable and plain is not None:
        with without_autocast(flat):
            solution = solve(Step(f, layout, plain), flat)
        value = solution.value.clone()  # a map may return what it was given
        return solution.with_value(layout.unpack(value))
    traced = TracedMap(f, layout, args)
    if dual(traced.tensors):
        raise RuntimeError(FORWARD_MODE)

    with torch.no_grad(), without_autocast(flat):
        constants = [t.detach() for t in traced.tensors]
        with traced.bound(constants) as step:
            solution = solve(step, flat)

    value = solution.value
    depends = traced.closes_over or any(t.requires_grad for t in traced.tensors)
    if differentiable and depends:
        with without_autocast(flat):
            rough, found = rough_args is not None, solution.with_value(None)
            forward = Forward(tol, max_iter, on_failure, flat_preconditioner, rough, found)
            value = adjoint.attach(traced, value, forward)
    else:
        value = value.clone()  # a map may return what it was given
    traced.tensors = []  # from here on what autograd saved is all that is held
    return solution.with_value(layout.unpack(value))
