"""The ways to a solution that are not an iteration to tolerance: K steps, and a closed form."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..solvers import Solution, Status
from ._state import Layout, State


def relax(
    update: Callable[[Any, Any], State],
    start: State,
    context: Any,
    steps: int,
    tol: float,
    want_evidence: bool,
) -> Solution:
    """`steps` plain steps from `start`, differentiated through.

    The residual of the result costs one more evaluation, spent only if `want_evidence`.
    """
    layout = Layout.of(start)
    state = start
    for _ in range(steps):
        state = update(state, context)
        layout.check_image(state)
    with torch.no_grad():
        flat = layout.pack(state)
        finite = torch.isfinite(flat).all(dim=1)
        count = torch.full_like(finite, steps, dtype=torch.long)
        if want_evidence:
            image = layout.pack(update(layout.unpack(flat), context))
            norm = torch.linalg.vector_norm(image - flat, dim=1)
            size = torch.linalg.vector_norm(image, dim=1)
            residual = norm / size.clamp_min(torch.finfo(flat.dtype).tiny)
        else:
            residual = norm = flat.new_full(finite.shape, torch.nan)
    return _solution(state, finite, residual, norm, count, tol, Status.FIXED_STEPS)


def closed_form(fun: nn.Module, context: Any, wanted: Sequence[int], tol: float) -> Solution:
    """`fun.solve`, with the residual that `fun` measures and its verdict on the system."""
    state: Any = fun.solve(context, tuple(wanted))  # type: ignore[operator]
    parts = [state] if isinstance(state, Tensor) else state
    chosen = [parts[i] for i in wanted]
    with torch.no_grad():
        residual, norm = fun.residual(context, state)  # type: ignore[operator]
        finite = torch.isfinite(norm)
        for part in chosen:
            finite = finite & torch.isfinite(part.flatten(1)).all(dim=1)
    objection = fun.judge(context) if hasattr(fun, "judge") else ""  # type: ignore[operator]
    solution = _solution(
        chosen, finite, residual, norm, torch.ones_like(finite, dtype=torch.long), tol,
        Status.MAX_ITER,
    )  # fmt: skip
    if objection:
        solution = replace(solution.with_status(finite, Status.INDEFINITE), note=objection)
    return solution


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
