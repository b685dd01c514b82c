"""The loop under every fixed-point solver.

It owns what must be the same for all of them: the step limit, the per-sample residual and
freezing, the non-finite check, the status. A solver supplies only `propose`, the mathematics of
its next iterate.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ._solution import Solution, Status
from ._validate import check_arguments, check_same_shape

Map = Callable[[Tensor], Tensor]
Propose = Callable[[int, Tensor, Tensor, Tensor], Tensor]

# A sample whose residual norm ends this many times above where it started has diverged; below,
# it merely ran out of steps.
_GROWTH = 10.0

# On an accelerator asking "is everybody done?" stalls the queue, so ask only now and then.
_STEPS_BETWEEN_SYNCS = 4


@torch.no_grad()
def iterate(
    f: Map, z0: Tensor, propose: Propose, *, tol: float, max_iter: int, stop_mode: str
) -> Solution:
    """Iterate `z ← propose(k, z, f(z), f(z) − z)` until each sample's residual is within `tol`.

    The value returned is, per sample, the iterate with the smallest residual seen. A sample that
    is done (converged or no longer finite) is frozen: its value does not change any more, however
    long its batch mates take.
    """
    check_arguments(f, z0, "z0", tol, max_iter, stop_mode)
    batch = z0.shape[0]
    tiny = torch.finfo(z0.dtype).tiny
    sync_every = 1 if z0.device.type == "cpu" else _STEPS_BETWEEN_SYNCS

    z = z0.detach()
    best = z.clone()
    active = torch.ones(batch, dtype=torch.bool, device=z.device)
    converged = torch.zeros_like(active)
    broken = torch.zeros_like(active)
    steps = torch.zeros(batch, dtype=torch.long, device=z.device)
    residual = torch.full((batch,), torch.inf, dtype=z.dtype, device=z.device)
    residual_norm = residual.clone()
    first_norm = last_norm = residual
    trace: list[Tensor] = []

    for k in range(max_iter):
        fz = f(z)
        if k == 0:
            check_same_shape(fz, z, "the map")
        g = fz - z
        g_norm = torch.linalg.vector_norm(g, dim=1)
        f_norm = torch.linalg.vector_norm(fz, dim=1)
        now = g_norm / f_norm.clamp_min(tiny) if stop_mode == "rel" else g_norm
        finite = torch.isfinite(g_norm) & torch.isfinite(f_norm)
        if k == 0:
            first_norm = last_norm = g_norm

        usable = active & finite
        better = usable & (now < residual) if k else usable
        best = torch.where(better[:, None], z, best)
        residual = torch.where(better, now, residual)
        residual_norm = torch.where(better, g_norm, residual_norm)
        last_norm = torch.where(usable, g_norm, last_norm)
        trace.append(torch.where(usable, now, residual))
        steps += active
        broken |= active & ~finite
        converged |= usable & (now <= tol)
        active = usable & ~converged

        last = k + 1 == max_iter
        if last or ((k + 1) % sync_every == 0 and not active.any()):
            break
        z = torch.where(active[:, None], propose(k, z, fz, g), best)

    # A map that was never finite has no best iterate; the start would look like an answer.
    best = torch.where(torch.isinf(residual_norm)[:, None], torch.nan, best)
    grown = last_norm > _GROWTH * first_norm
    codes = torch.full_like(steps, Status.MAX_ITER.code)
    codes = codes.masked_fill(broken, Status.NONFINITE.code)
    codes = codes.masked_fill(grown, Status.DIVERGED.code)
    codes = codes.masked_fill(converged, Status.CONVERGED.code)
    rows = int(steps.max()) if batch else 0
    return Solution(
        best, residual, steps, converged, codes, torch.stack(trace)[:rows], residual_norm
    )
