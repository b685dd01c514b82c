"""The ways to a solution that are not an iteration to tolerance: K steps, and a closed form."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..solvers import Solution, Status
from ..solvers._scale import is_host, relative
from ..solvers._solution import sound
from ._module import of_its_update
from ._settings import check_reach
from ._state import Layout, finite_samples
from ._watched import mapped, transformed, watched


def relax(
    step: Callable[[Tensor], Tensor], z: Tensor, steps: int, tol: float, evidence: bool
) -> Solution:
    """`steps` plain steps from `z` `(B, n)`, differentiated through.

    If `evidence` is wanted the residual after every step is measured, the last one by an evaluation
    more.
    """
    trace = []
    for k in range(steps):
        image = step(z)
        if evidence and k:
            with torch.no_grad():
                trace.append(_residual(z, image)[0])
        z = image
    with torch.no_grad():
        finite = finite_samples(z)
        if evidence:
            residual, norm = _residual(z, step(z))
        else:
            residual = norm = z.new_full(finite.shape, torch.nan)
            trace = [residual] * (steps - 1)
    return _solution(z, finite, (*trace, residual), norm, steps, tol, Status.FIXED_STEPS)


def closed_form(
    fun: Any, context: Any, layout: Layout | None, wanted: Sequence[int], tol: float
) -> Solution:
    """`fun.solve`, with the residual of what it returned and the verdict of `fun` on the system.

    A module with a `residual` is asked for it and computes only what is wanted; of others, of which
    `layout` has to be known, every element is computed, and the residual is that of an update.
    """
    residual_of = of_its_update(fun, "residual")
    if residual_of is None:
        assert layout is not None
        state = fun.solve(context, tuple(range(len(layout.shapes))))
        layout.check_image(state)
    else:
        state = fun.solve(context, tuple(wanted))
    parts = [state] if isinstance(state, Tensor) else state
    check_reach(fun, wanted, len(parts))
    chosen = [parts[i] for i in wanted]
    for i, part in zip(wanted, chosen, strict=True):
        if not isinstance(part, Tensor):
            raise TypeError(
                f"solve must return element {i}, which is wanted, got {type(part).__name__}"
            )
    with torch.no_grad():
        if residual_of is not None:
            residual, norm = residual_of(context, state)
        else:
            assert layout is not None
            residual, norm = _residual(layout.pack(state), layout.pack(fun.update(state, context)))
        fine = _fine(residual, tol, chosen)
    if torch._C._are_functorch_transforms_active() and any(map(mapped, (residual, *chosen))):
        raise RuntimeError(
            "torch.func.vmap cannot map a solve, whose residual is looked at: give what it maps "
            "over as the batch, or a fixed number of steps, DEQFixedPoint(..., steps=K)"
        )
    judge = of_its_update(fun, "judge")
    objection = "" if judge is None else judge(context)
    if fine and not objection:
        return sound(chosen, norm, [residual], residual.device)
    finite = norm < torch.inf
    for part in chosen:
        finite = finite & finite_samples(part)
    solution = _solution(chosen, finite, (residual,), norm, 1, tol, Status.MAX_ITER)
    if objection:
        solution = replace(solution.with_status(finite, Status.INDEFINITE), note=objection)
    return solution


def _fine(residual: Tensor, tol: float, parts: Sequence[Tensor]) -> bool:
    """Whether it is known that every sample converged to what is finite.

    It is asked with few operations, of tensors on the host; sums may be infinite of finite numbers.
    """
    if not is_host(residual) or transformed(residual, *parts):
        return False
    if residual.numel() and not float(residual.max()) <= tol:  # as NaN is not
        return False
    for part in parts:  # noqa: SIM110
        if not math.isfinite(float(part.sum())):
            return False
    return True


def _residual(z: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
    """‖f(z) − z‖, relative to ‖f(z)‖ and absolute."""
    return relative(image - z, image, is_host(z) and not watched(z, image))


def _solution(
    value: Any,
    finite: Tensor,
    trace: Sequence[Tensor],
    norm: Tensor,
    steps: int,
    tol: float,
    otherwise: Status,
) -> Solution:
    """Of what is known of each sample `(B,)`, its residuals in the order of the steps."""
    residual = trace[-1]
    converged = finite & (residual <= tol)
    codes = torch.where(converged, Status.CONVERGED.code, otherwise.code)
    codes = torch.where(finite, codes, Status.NONFINITE.code)
    residual = torch.where(finite, residual, torch.inf)
    rows = torch.stack((*trace[:-1], residual))
    return Solution(
        value=value,
        residual=residual,
        steps=torch.full_like(codes, steps),
        converged=converged,
        codes=codes,
        trace=torch.where(finite | rows.isfinite(), rows, torch.inf),
        residual_norm=torch.where(finite, norm, torch.inf),
    )
