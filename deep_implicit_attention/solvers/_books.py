"""What the loop under the solvers knows of each sample: a few numbers, kept on the host."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ._scale import is_host, select
from ._solution import Solution, Status, numbers, sound, unread

# A sample whose residual norm ends this many times above where it started has diverged; below,
# it merely ran out of steps.
GROWTH = 10.0

# So many times as long a way as the largest residual may a sample have gone, and its residual have
# fallen by no more, to count as converged; beyond, the residual has to have fallen in proportion.
_FAR = 30.0
# A sample that is far away with more than this of the largest residual has gone astray.
_ASTRAY = 0.5

_CONVERGED = Status.CONVERGED.code

some = np.count_nonzero

# What there is one number of for every sample.
_NUMBERS = (
    "residual", "residual_norm", "first_norm", "last_norm", "broken", "converged", "active", "steps"
)  # fmt: skip


class Books:
    """Residuals, best iterates and status of every sample, brought up to date step by step.

    numpy handles a few numbers ten times faster than torch does, and on the host which case holds
    may be asked.
    """

    def __init__(self, z: Tensor, tol: float, stop_mode: str, together: bool) -> None:
        self.tol, self.relative = tol, stop_mode == "rel"
        kind = torch.finfo(z.dtype)
        self.tiny, self.huge, self.rounding = kind.tiny, kind.max**0.5, kind.eps
        self.best, self.device, self.on_host = z, z.device, is_host(z)
        self.broken = np.zeros(len(z), bool)
        self.converged, self.active = self.broken, ~self.broken
        self.steps = self.active * 0
        self.residual: Any = None  # that of `best`
        self.residual_norm = self.first_norm = self.last_norm = self.residual
        self.distance: Any = None
        self.trace: list[Any] = []
        # Whether all samples have gone on and improved at every step so far, so that of each no
        # more is to be kept than the last residual.
        self.together = together and len(z) > 0
        self.all_sound = False  # and now all have converged
        self.rows: Any = None  # which samples are left, where only they are in the books
        self.whole: dict[str, Any] = {}  # of all samples, as of when they were last in them

    @property
    def over(self) -> bool:
        """Whether no sample is left to go on."""
        return self.all_sound or not (self.together or some(self.active))

    def enter(self, z: Tensor, g_norm: Any, f_norm: Any, exact: Any = True) -> Any:
        """Take note of a step: ‖f(z) − z‖ and ‖f(z)‖ at z; returns the residuals.

        What is not `exact` counts neither as converged nor as the best.
        """
        k = len(self.trace)
        with np.errstate(all="ignore"):
            # A copy, so that residual and norm of a solution do not share memory.
            now = g_norm / (f_norm + self.tiny) if self.relative else g_norm.copy()
        if k and not self.together and some(self.first_norm == 0):
            # Who stood still until now, since its rough image was not finite, begins here.
            still = self.first_norm == 0
            self.first_norm = np.where(still, g_norm, self.first_norm)
            self.distance.begin(still, f_norm)
        if some(f_norm > self.huge):
            # Who comes here by growing runs away; who began here is large, and no more.
            away = (f_norm > self.huge) & (g_norm / GROWTH > self.first_norm) if k else self.broken
            f_norm = np.where(away, np.inf, f_norm)
        if k == 0:
            self.first_norm = self.last_norm = g_norm
            self.residual = self.residual_norm = np.full_like(g_norm, np.inf)
            self.distance = _Distance(g_norm, f_norm, self.rounding)
        within = now <= self.tol
        doubt = self.distance.doubt(within, g_norm, f_norm)
        if doubt is not None:
            within = within & ~doubt

        if self.together:
            # Comparisons are false of NaN; an infinite norm of f(z) makes `now` NaN or 0.
            improved = some(now < self.residual) == len(now)
            self.together = improved and doubt is None
            if self.together:
                self.best, self.residual = z, now
                self.residual_norm = self.last_norm = g_norm
                self.trace.append(now)
                return now
            self.steps = self.steps + k
            if improved and some(within) == len(now) == some(f_norm < np.inf):
                self.best, self.residual_norm, self.all_sound = z, g_norm, True
                self.trace.append(now)
                return now

        finite = np.isfinite(g_norm) & np.isfinite(f_norm)
        usable = self.active & finite
        better = usable & exact & ((now < self.residual) | np.isinf(self.residual))
        if doubt is not None:
            better = better & ~doubt
        # On the host a sample that is done stands in z as it does in `best`; elsewhere it went on.
        all_better = self.on_host and some(better) == some(self.active)
        self.best = z if all_better else select(better, z, self.best)
        self.residual = np.where(better, now, self.residual)
        self.residual_norm = np.where(better, g_norm, self.residual_norm)
        self.last_norm = np.where(usable, g_norm, self.last_norm)
        self.trace.append(self._of_all(np.where(usable, now, self.residual)))
        self.steps = self.steps + self.active
        self.broken = self.broken | (self.active & ~finite)
        self.converged = self.converged | (usable & exact & within)
        self.active = usable & ~self.converged
        return now

    def leave_out(self) -> Tensor | None:
        """Leave out who is done, if they are at least half: which of the samples so far stay."""
        if self.together or 2 * some(self.active) > len(self.active):
            return None
        self._enter_in_whole()
        stay = np.flatnonzero(self.active)
        for name in _NUMBERS:
            setattr(self, name, getattr(self, name)[stay])
        self.distance.keep(stay)
        index = torch.from_numpy(stay)
        self.best = self.best[index]
        self.rows = index if self.rows is None else self.rows[index]
        return index

    def _enter_in_whole(self) -> None:
        mine = {name: getattr(self, name) for name in _NUMBERS}
        if self.rows is None:
            self.whole = {name: array.copy() for name, array in mine.items()}
            self.whole["best"] = self.best.clone()
            return
        for name, array in mine.items():
            self.whole[name][self.rows.numpy()] = array
        self.whole["best"][self.rows] = self.best

    def _of_all(self, residuals: Any) -> Any:
        """The residuals of all samples: of those that were left out the last."""
        if self.rows is None:
            return residuals
        every = self.whole["residual"].copy()
        every[self.rows.numpy()] = residuals
        return every

    def goes_on_from(self, z: Tensor, image: Tensor, entered: bool) -> Tensor:
        """The next states, `z` as proposed: who is done stays, who went astray goes back.

        `image` is f at the last states, which may not have been `entered` yet.
        """
        if self.distance is not None:
            z = self.distance.back(z, image, self.best, self.active if entered else None)
        return z if self.together or not entered else select(self.active, z, self.best)

    def ahead(self, most: int, bound: float | None = None) -> int:
        """After how many further steps all samples should be done, by their last two residuals.

        With `bound`, after how many their residuals should be down to it.
        """
        bound = self.tol if bound is None else bound
        if len(self.trace) < 2:
            return most
        now, before = self.trace[-1][self.active], self.trace[-2][self.active]
        with np.errstate(all="ignore"):
            steps = np.log(bound / now) / np.log(now / before)
        # Of those whose residual grows there is nothing to say; comparisons are false of NaN.
        return int(np.ceil(np.where((steps > 0) & (steps < most), steps, most).max()))

    def solution(self) -> Solution:
        """The best iterate of every sample, with the evidence for it."""
        if self.rows is not None:
            self._enter_in_whole()
            vars(self).update(self.whole, rows=None)
        if self.all_sound:
            return sound(self.best, self.residual_norm, self.trace, self.device)
        steps = self.steps + len(self.trace) if self.together else self.steps
        # A map that was never finite has no best iterate; the start would look like an answer.
        best, lost = self.best, np.isinf(self.residual_norm)
        if some(lost):
            best = select(lost, torch.full_like(best, torch.nan), best)
        codes = steps * 0 + _CONVERGED
        if some(~self.converged):
            grown = self.last_norm / GROWTH > self.first_norm  # the product might overflow
            failed = np.where(grown, Status.DIVERGED.code, Status.MAX_ITER.code)
            failed = np.where(self.broken & ~grown, Status.NONFINITE.code, failed)
            codes = np.where(self.converged, codes, failed)
        rows = int(steps.max()) if len(steps) else 0
        evidence = {
            "residual": self.residual,
            "steps": steps,
            "converged": self.converged,
            "codes": codes,
            "trace": np.array(self.trace)[:rows],
            "residual_norm": self.residual_norm,
        }
        device = self.device  # and not all of this
        return unread(best, not some(~self.converged), lambda name: numbers(evidence[name], device))


class _Distance:
    """Who has a small residual relative to ‖f(z)‖ only because f(z) is long, and the way back."""

    def __init__(self, g_norm: np.ndarray, f_norm: np.ndarray, rounding: float) -> None:
        self.rounding = rounding
        self.largest, self.first = g_norm, f_norm
        self.astray: Any = None  # who is to go back
        self.plain: Any = None  # who has, and goes on by plain steps

    def doubt(self, within: np.ndarray, g_norm: np.ndarray, f_norm: np.ndarray) -> Any:
        """Who of those `within` the tolerance is too far away; None for nobody."""
        found = self.astray = None
        if some(within):
            # Of a long state no residual is known better than to rounding.
            left = np.maximum(g_norm, self.rounding * f_norm)
            with np.errstate(all="ignore"):
                way = (f_norm - self.first) / self.largest
                found = within & (left / self.largest * way > _FAR)
            self.astray = found & (left > _ASTRAY * self.largest)
        self.largest = np.maximum(g_norm, self.largest)
        return found

    def begin(self, there: np.ndarray, f_norm: np.ndarray) -> None:
        """The way of those `there` begins here."""
        self.first = np.where(there, f_norm, self.first)

    def keep(self, stay: np.ndarray) -> None:
        """Leave out all but some."""
        self.largest, self.first = self.largest[stay], self.first[stay]
        if self.astray is not None:
            self.astray = self.astray[stay]
        if self.plain is not None:
            self.plain = self.plain[stay]

    def back(self, z: Tensor, image: Tensor, best: Tensor, active: Any) -> Tensor:
        """The next states: `best` of who has just gone astray, f(z) of who has before, else `z`."""
        if self.plain is not None:
            z = select(self.plain, image, z)
        if self.astray is not None and active is not None:
            plain = np.zeros_like(active) if self.plain is None else self.plain
            anew = self.astray & active & ~plain
            if some(anew):
                z, self.plain = select(anew, best, z), plain | anew
        return z
