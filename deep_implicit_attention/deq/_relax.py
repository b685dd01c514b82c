"""The ways to a solution that are not an iteration to tolerance: K steps, and a closed form."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..solvers import Solution, Status
from ..solvers._scale import is_host
from ._module import of_its_update
from ._state import Layout
from ._watched import transformed

_NUMPYS = (torch.float32, torch.float64)


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
        if evidence:
            image = step(z)
            residual, norm = _residual(z, image)
        else:
            residual = norm = z.new_full(finite.shape, torch.nan)
    return _solution(z, finite, residual, norm, steps, tol, Status.FIXED_STEPS)


def closed_form(
    fun: Any, context: Any, layout: Layout, wanted: Sequence[int], tol: float
) -> Solution:
    """`fun.solve`, with the residual of what it returned and the verdict of `fun` on the system.

    A module with a `residual` is asked for it and computes only what is wanted; of others every
    element is computed, and the residual is that of an update.
    """
    residual_of = of_its_update(fun, "residual")
    measured = residual_of is not None
    state = fun.solve(context, tuple(wanted) if measured else tuple(range(len(layout.shapes))))
    parts = [state] if isinstance(state, Tensor) else state
    chosen = [parts[i] for i in wanted]
    with torch.no_grad():
        if measured:
            residual, norm = residual_of(context, state)
        else:
            residual, norm = _residual(layout.pack(state), layout.pack(fun.update(state, context)))
        largest = norm
        for part in chosen:
            size = torch.linalg.vector_norm(part.flatten(1), ord=torch.inf, dim=1)
            largest = torch.maximum(largest, size)
        if norm.dtype in _NUMPYS and is_host(norm) and not transformed(norm, residual, largest):
            # It is quicker with a few numbers.
            residual, norm, largest = residual.numpy(), norm.numpy(), largest.numpy()
        finite = largest < torch.inf  # which NaN is not
    judge = of_its_update(fun, "judge")
    objection = "" if judge is None else judge(context)
    solution = _solution(chosen, finite, residual, norm, 1, tol, Status.MAX_ITER)
    if objection:
        solution = replace(solution.with_status(_tensor(finite), Status.INDEFINITE), note=objection)
    return solution


def _residual(z: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
    """‖f(z) − z‖, relative to ‖f(z)‖ and absolute."""
    norm = torch.linalg.vector_norm(image - z, dim=1)
    size = torch.linalg.vector_norm(image, dim=1)
    return norm / size.clamp_min(torch.finfo(z.dtype).tiny), norm


def _solution(
    value: Any,
    finite: Any,
    residual: Any,
    norm: Any,
    steps: int,
    tol: float,
    otherwise: Status,
) -> Solution:
    """Of what is known of each sample `(B,)`, as tensors or as numpy's arrays."""
    xp: Any = torch if isinstance(finite, Tensor) else np
    converged = finite & (residual <= tol)
    taken = xp.zeros_like(converged, dtype=xp.int64) + steps
    if xp is np and np.count_nonzero(converged) == len(converged):
        codes = taken * 0 + Status.CONVERGED.code
    else:
        codes = xp.where(converged, Status.CONVERGED.code, otherwise.code)
        codes = xp.where(finite, codes, Status.NONFINITE.code)
        residual = xp.where(finite, residual, xp.inf)
    residual = _tensor(residual)
    return Solution(
        value=value,
        residual=residual,
        steps=_tensor(taken),
        converged=_tensor(converged),
        codes=_tensor(codes),
        trace=residual[None],
        residual_norm=_tensor(norm),
    )


def _tensor(numbers: Any) -> Tensor:
    """Numbers of `_solution` as a tensor, whatever the default device."""
    return numbers if isinstance(numbers, Tensor) else torch.from_numpy(numbers)
