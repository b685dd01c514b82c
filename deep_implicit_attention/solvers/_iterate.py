"""The loop under every fixed-point solver.

It owns what must be the same for all of them: the step limit, the per-sample residual and
freezing, the non-finite check, the status. A solver supplies only `propose`, the mathematics of
its next iterate.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ._scale import is_host, norms
from ._solution import Solution, Status, sound
from ._validate import check_arguments, check_same_shape, check_unchanged, version

Map = Callable[[Tensor], Tensor]
# What of k, z, f(z), f(z) − z and its norms makes the next z.
Propose = Callable[[int, Tensor, Tensor, Tensor, Any], Tensor]

# A sample whose residual norm ends this many times above where it started has diverged; below,
# it merely ran out of steps.
_GROWTH = 10.0

# A preconditioner that helps leaves less than this of the residual in its first step.
_HELPS = 0.8

# So many times as long a way as the largest residual may a sample have gone, and its residual have
# fallen by no more, to count as converged; beyond, the residual has to have fallen in proportion.
_FAR = 30.0
# A sample that is far away with more than this of the largest residual has gone astray.
_ASTRAY = 0.5

# A rough map serves down to this residual, or as many times the tolerance, from where few steps
# end the solve; and as long as residuals fall.
_ROUGH = 1e-2
_NEAR = 5.0
_FALLS = 0.95

# On an accelerator asking "is everybody done?" stalls the queue, so ask only now and then.
_STEPS_BETWEEN_SYNCS = 4

_CONVERGED = Status.CONVERGED.code


@torch.no_grad()
def iterate(
    f: Map,
    z0: Tensor,
    propose: Propose,
    *,
    tol: float,
    max_iter: int,
    stop_mode: str,
    preconditioner: Map | None = None,
    rough: Map | None = None,
) -> Solution:
    """Iterate `z ← propose(k, z, f(z), f(z) − z, ‖f(z) − z‖)` to residuals within `tol`.

    The value returned is, per sample, the iterate with the smallest residual seen. A sample that
    is done (converged or no longer finite) is frozen: its value does not change any more, however
    long its batch mates take.

    With a `preconditioner` P, `propose` is given z + P (f(z) − z) in the place of f(z), a map with
    the same fixed points; residuals and norms are those of f. A sample of whose residual the
    first step leaves more than 0.8 goes back to where it was and goes on without P, so that an
    approximation which is bad there costs one evaluation and not the solution. `propose` is told
    of a new beginning by k = 0.

    A small residual relative to ‖f(z)‖ may come from a small ‖f(z) − z‖ or from a long f(z). Where
    f(z) − z is bounded, as with clamps and other saturations, any state far enough away has one.
    So an iterate counts as converged only if

        ‖f(z) − z‖ (‖f(z)‖ − ‖f(z_0)‖) ≤ 30 G²

    where G is the largest ‖f(z) − z‖ so far: f(z) may have become longer by 30 G, and by more if
    ‖f(z) − z‖ has fallen as much. A sample that only became longer goes back to its best iterate
    and on by plain steps (on the host).

    `rough` takes the place of f while a sample is far from its solution (`_Rough`), on the host. No
    iterate is returned or counts as converged by what `rough` says of it.
    """
    check_arguments(f, z0, "z0", tol, max_iter, stop_mode, preconditioner, rough)
    on_host = is_host(z0)
    # What is kept of each sample is a few numbers. On the host numpy handles them ten times faster
    # than torch, and which case holds may be asked; elsewhere they stay on the device.
    xp: Any = np if on_host else torch
    some: Any = np.count_nonzero if on_host else torch.any
    sync_every = 1 if on_host else _STEPS_BETWEEN_SYNCS
    tiny = torch.finfo(z0.dtype).tiny
    huge = torch.finfo(z0.dtype).max ** 0.5

    z = z0.detach().clone()
    best = z
    broken: Any = np.zeros(len(z), bool) if on_host else z.new_zeros(len(z), dtype=torch.bool)
    converged = broken
    active = ~broken
    steps = active * 0
    residual: Any = None  # that of `best`
    residual_norm = first_norm = last_norm = residual
    distance: Any = None
    trace: list[Any] = []
    guard = None if preconditioner is None else _Guard(preconditioner, xp)
    first = None
    if rough is not None and on_host and stop_mode == "rel":
        first = _Rough(f, rough, len(z), tol)
    # Whether all samples have gone on and improved at every step so far, so that of each no more is
    # to be kept than the last residual.
    together = on_host and len(z) > 0

    for k in range(max_iter):
        before = version(z)
        if first is not None and k + 1 < max_iter and some(first.serves):
            fz, exact = first(z), ~first.serves
            together = False
        else:
            fz, exact, first = f(z), True, None
            check_same_shape(fz, z, "the map")
        check_unchanged(z, before)
        g = fz - z
        g_norm, f_norm = norms(g, fz)
        with np.errstate(all="ignore"):  # a copy of g_norm: they are returned apart
            now = g_norm / (f_norm + tiny) if stop_mode == "rel" else 1.0 * g_norm
        if on_host and some(f_norm > huge):
            # Who comes here by growing runs away; who began here is large, and no more.
            away = (f_norm > huge) & (g_norm / _GROWTH > first_norm) if k else broken
            f_norm = xp.where(away, np.inf, f_norm)
        if k == 0:
            first_norm = last_norm = g_norm
            residual = residual_norm = xp.full_like(g_norm, torch.inf)
            distance = _Distance(g_norm, f_norm, z.dtype, xp)
        within = now <= tol
        doubt = distance.doubt(within, g_norm, f_norm)
        if doubt is not None:  # on the host it is None where nobody is within
            within = within & ~doubt

        if together:
            # Comparisons are false of NaN; an infinite norm of f(z) makes `now` NaN or 0.
            improved = some(now < residual) == len(z)
            together = improved and doubt is None
            if not together:
                steps = steps + k
                if improved and some(within) == len(z) == some(f_norm < np.inf):
                    trace.append(now)
                    return sound(z, torch.from_numpy(g_norm), trace)
        if together:
            best, residual, residual_norm, last_norm = z, now, g_norm, g_norm
            trace.append(now)
        else:
            finite = xp.isfinite(g_norm) & xp.isfinite(f_norm)
            usable = active & finite
            better = usable & exact & ((now < residual) | xp.isinf(residual))
            if doubt is not None:
                better = better & ~doubt
            # A sample that is done stands in z as it does in `best`.
            all_better = on_host and some(better) == some(active)
            best = z if all_better else select(better, z, best)
            residual = xp.where(better, now, residual)
            residual_norm = xp.where(better, g_norm, residual_norm)
            last_norm = xp.where(usable, g_norm, last_norm)
            trace.append(xp.where(usable, now, residual))
            if first is not None:
                first.look(now)
            steps = steps + active
            broken = broken | (active & ~finite)
            converged = converged | (usable & exact & within)
            active = usable & ~converged

        last = k + 1 == max_iter
        if last or not (together or (k + 1) % sync_every or some(active)):
            break
        image = fz
        if guard is not None:
            z, g, g_norm = guard(k, z, g, g_norm, propose)
            fz = z + g
        z = propose(k, z, fz, g, g_norm)
        if on_host:  # an accelerator would have to be asked
            z = distance.back(z, image, best, active)
        if not together:
            z = select(active, z, best)

    if together:
        steps = steps + len(trace)
    # A map that was never finite has no best iterate; the start would look like an answer.
    lost = xp.isinf(residual_norm)
    if not on_host or some(lost):
        best = select(lost, torch.full_like(best, torch.nan), best)
    codes = steps * 0 + _CONVERGED
    if not on_host or some(~converged):
        grown = last_norm / _GROWTH > first_norm  # the product might overflow
        failed = xp.where(grown, Status.DIVERGED.code, Status.MAX_ITER.code)
        failed = xp.where(broken & ~grown, Status.NONFINITE.code, failed)
        codes = xp.where(converged, codes, failed)
    # On an accelerator some steps more than were needed may have been taken before it was asked.
    rows = int(steps.max()) if len(steps) else 0
    tensor: Any = torch.from_numpy if on_host else _itself
    rows_of_all = np.array(trace) if on_host else torch.stack(trace)
    return Solution(
        value=best,
        residual=tensor(residual),
        steps=tensor(steps),
        converged=tensor(converged),
        codes=tensor(codes),
        trace=tensor(rows_of_all[:rows]),
        residual_norm=tensor(residual_norm),
    )


def _itself(x: Tensor) -> Tensor:
    return x


class _Rough:
    """f, or `rough` for the samples that it still serves.

    They are far from their solutions: `rough` is near f as seen from there, and what it is wrong by
    the steps that follow take away. Each sample decides by itself, by its own residuals.
    """

    def __init__(self, f: Map, rough: Map, samples: int, tol: float):
        self.f, self.rough = f, rough
        self.bound = max(_ROUGH, _NEAR * tol)
        self.serves = np.ones(samples, dtype=bool)
        self.before = self.earlier = np.full(samples, np.inf)

    def __call__(self, z: Tensor) -> Tensor:
        image = self.rough(z)
        check_same_shape(image, z, "the rough map")
        # Narrow numbers may not reach as far as those of f.
        self.serves = self.serves & np.isfinite(norms(image)[0])
        if np.count_nonzero(self.serves) == len(z):
            return image
        exact = self.f(z)
        check_same_shape(exact, z, "the map")
        return select(self.serves, image, exact)

    def look(self, now: Any) -> None:
        """Take note of the residuals after a step."""
        # Over two steps: many a solve makes nothing of its first.
        self.serves = self.serves & (now > self.bound) & (now < _FALLS * self.earlier)
        self.earlier, self.before = self.before, now


class _Distance:
    """Who has a small residual relative to ‖f(z)‖ only because f(z) is long, and the way back."""

    def __init__(self, g_norm: Any, f_norm: Any, dtype: torch.dtype, xp: Any):
        self.xp, self.rounding = xp, torch.finfo(dtype).eps
        self.largest, self.first = g_norm, f_norm
        self.astray: Any = None  # who is to go back
        self.plain: Any = None  # who has, and goes on by plain steps

    def doubt(self, within: Any, g_norm: Any, f_norm: Any) -> Any:
        """Who of those `within` the tolerance is too far away; None for nobody."""
        found = self.astray = None
        on_host = self.xp is np
        if not on_host or np.count_nonzero(within):
            # Of a long state no residual is known better than to rounding.
            left = self.xp.maximum(g_norm, self.rounding * f_norm)
            with np.errstate(all="ignore"):
                way = (f_norm - self.first) / self.largest
                found = within & (left / self.largest * way > _FAR)
            if on_host:
                self.astray = found & (left > _ASTRAY * self.largest)
        self.largest = self.xp.maximum(g_norm, self.largest)
        return found

    def back(self, z: Tensor, image: Tensor, best: Tensor, active: np.ndarray) -> Tensor:
        """The next states: `best` of who has just gone astray, f(z) of who has before, else `z`."""
        if self.plain is not None:
            z = select(self.plain, image, z)
        if self.astray is not None:
            plain = np.zeros_like(active) if self.plain is None else self.plain
            anew = self.astray & active & ~plain
            if np.count_nonzero(anew):
                z, self.plain = select(anew, best, z), plain | anew
        return z


class _Guard:
    """P (f(z) − z) where P helps, f(z) − z elsewhere, and where to go on from."""

    def __init__(self, preconditioner: Map, xp: Any):
        self.preconditioner, self.xp = preconditioner, xp
        self.start: tuple[Tensor, Tensor, Tensor] | None = None
        self.first_norm: Any = None
        self.helps: Any = None
        self.everywhere = self.nowhere = False

    def __call__(
        self, k: int, z: Tensor, g: Tensor, g_norm: Any, propose: Propose
    ) -> tuple[Tensor, Tensor, Any]:
        if k == 0:
            changed = self.preconditioner(g)
            check_same_shape(changed, z, "the preconditioner")
            self.start, self.first_norm = (z, g, changed), g_norm
            return z, changed, g_norm
        if self.start is not None:
            before, plain, changed = self.start
            self.start = None
            self.helps = g_norm <= _HELPS * self.first_norm
            if isinstance(self.helps, np.ndarray):
                # Asked of numpy only: on an accelerator the answer would stall the queue.
                count = np.count_nonzero(self.helps)
                self.everywhere, self.nowhere = count == len(self.helps), count == 0
            if not self.everywhere:
                z, g = select(self.helps, z, before), select(self.helps, g, plain)
                g_norm = self.xp.where(self.helps, g_norm, self.first_norm)
                first = select(self.helps, changed, plain)
                propose(0, before, before + first, first, self.first_norm)
        if self.nowhere:
            return z, g, g_norm
        changed = self.preconditioner(g)
        return z, changed if self.everywhere else select(self.helps, changed, g), g_norm


def select(mask: Any, a: Tensor, b: Tensor) -> Tensor:
    """The rows of `a` where `mask`, of `b` elsewhere.

    With a mask of numpy, on the host, there is no copy where all rows are of one of them.
    """
    if isinstance(mask, np.ndarray):
        count = np.count_nonzero(mask)
        if count == len(mask) or not count:
            return a if count else b
        mask = torch.from_numpy(mask)
    return torch.where(mask[:, None], a, b)
