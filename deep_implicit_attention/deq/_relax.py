"""The ways to a solution that are not an iteration to tolerance: K steps, and a closed form."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..solvers import Solution, Status
from ._state import Layout


def relax(
    step: Callable[[Tensor], Tensor], z: Tensor, steps: int, tol: float, evidence: bool
) -> Solution:
    """`steps` plain steps from `z` `(B, n)`, differentiated through.

    The residual of the result costs one more evaluation, spent only if `evidence` is wanted.
    """
    for _ in range(steps):
        z = step(z)
    with torch.no_grad():
        finite = torch.isfinite(z).all(dim=1)
        count = torch.full_like(finite, steps, dtype=torch.long)
        if evidence:
            image = step(z)
            residual, norm = _residual(z, image)
        else:
            residual = norm = z.new_full(finite.shape, torch.nan)
    return _solution(z, finite, residual, norm, count, tol, Status.FIXED_STEPS)


def closed_form(
    fun: Any, context: Any, layout: Layout, wanted: Sequence[int], tol: float
) -> Solution:
    """`fun.solve`, with the residual of what it returned and the verdict of `fun` on the system.

    A module with a `residual` is asked for it and computes only what is wanted; of others every
    element is computed, and the residual is that of an update.
    """
    measured = hasattr(fun, "residual")
    state = fun.solve(context, tuple(wanted) if measured else tuple(range(len(layout.shapes))))
    parts = [state] if isinstance(state, Tensor) else state
    chosen = [parts[i] for i in wanted]
    with torch.no_grad():
        if measured:
            residual, norm = fun.residual(context, state)
        else:
            residual, norm = _residual(layout.pack(state), layout.pack(fun.update(state, context)))
        largest = norm
        for part in chosen:
            size = torch.linalg.vector_norm(part.flatten(1), ord=torch.inf, dim=1)
            largest = torch.maximum(largest, size)
        finite = largest < torch.inf  # which NaN is not
    objection = fun.judge(context) if hasattr(fun, "judge") else ""
    count = torch.ones_like(finite, dtype=torch.long)
    solution = _solution(chosen, finite, residual, norm, count, tol, Status.MAX_ITER)
    if objection:
        solution = replace(solution.with_status(finite, Status.INDEFINITE), note=objection)
    return solution


def _residual(z: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
    """‖f(z) − z‖, relative to ‖f(z)‖ and absolute."""
    norm = torch.linalg.vector_norm(image - z, dim=1)
    size = torch.linalg.vector_norm(image, dim=1)
    return norm / size.clamp_min(torch.finfo(z.dtype).tiny), norm


def _solution(
    value: Any,
    finite: Tensor,
    residual: Tensor,
    norm: Tensor,
    steps: Tensor,
    tol: float,
    otherwise: Status,
) -> Solution:
    converged = finite & (residual <= tol)
    codes = torch.full_like(steps, otherwise.code)
    codes = codes.masked_fill(converged, Status.CONVERGED.code)
    codes = codes.masked_fill(~finite, Status.NONFINITE.code)
    residual = torch.where(finite, residual, torch.inf)
    return Solution(value, residual, steps, converged, codes, residual[None], norm)
