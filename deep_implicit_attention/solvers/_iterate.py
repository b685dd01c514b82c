"""The loop under every fixed-point solver.

It owns what must be the same for all of them: the step limit, the per-sample residual and
freezing, the non-finite check, the status. A solver supplies only `propose`, the mathematics of
its next iterate.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ._books import Books
from ._scale import BETWEEN_LOOKS, is_host, norms, seen, select
from ._solution import Solution
from ._validate import check_arguments, check_same_shape, check_unchanged, version

Map = Callable[[Tensor], Tensor]


class Norms(NamedTuple):
    """‖f(z) − z‖ `(B,)` of this step, and of those that the host has heard of since the last.

    On the host that is this step, on an accelerator none or the last few.
    """

    here: Any
    heard: list[Any]


# What of k, z, f(z), f(z) − z and its norms makes the next z.
Propose = Callable[[int, Tensor, Tensor, Tensor, Norms], Tensor]

# A preconditioner that helps leaves less than this of the residual in its first step.
_HELPS = 0.8

# A rough map serves down to this residual, or as many times the tolerance, from where few steps
# end the solve; and as long as residuals fall.
_ROUGH = 1e-2
_NEAR = 5.0
_FALLS = 0.95

# Of a freed block of so many bytes or less glibc takes note, with room for what it adds to one.
_NOTED = (32 << 20) - (8 << 10)

# After so many steps is the first look at an accelerator's numbers, since many solves take two or
# three, and `_Guard` asks for them then; and so many guesses are made that a solve will be over
# before `BETWEEN_LOOKS` more.
_FIRST_LOOK, _GUESSES = 2, 2


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
    keep: Callable[[Tensor], None] | None = None,
) -> Solution:
    """Iterate `z ← propose(k, z, f(z), f(z) − z, norms)` to residuals within `tol`.

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
    and on by plain steps.

    On an accelerator the host waits for the numbers of several steps at once (`_Looks`), and
    `propose` hears of them then. Samples are judged as they are on the host; those that went astray
    meanwhile have taken other steps.

    `rough` takes the place of f while a sample is far from its solution (`_Rough`). No iterate is
    returned or counts as converged by what `rough` says of it.

    Where f has `of_samples`, index ↦ the map of these samples alone, and `keep` is given, on the
    host, samples that are done are left out once they are half of all, and then half of what is
    left, so that none costs more than twice the steps that it takes itself. `keep` is told which
    ones stay, before `propose` is given no more than these.
    """
    check_arguments(f, z0, "z0", tol, max_iter, stop_mode, preconditioner, rough)
    on_host = is_host(z0)
    if on_host:
        _keep_freed_memory()
    z = z0.detach().clone()
    first = None
    if rough is not None and stop_mode == "rel":
        first = _Rough(f, rough, len(z), tol)
    books = Books(z, tol, stop_mode, together=first is None)
    guard = None if preconditioner is None else _Guard(preconditioner)
    looks = None if on_host else _Looks()
    alone = getattr(f, "of_samples", None) if on_host and guard is None else None

    for k in range(max_iter):
        before = version(z)
        if first is not None and k + 1 < max_iter and np.count_nonzero(first.serves):
            fz, exact = first(z), ~first.serves
        else:
            fz, exact, first = f(z), True, None
            check_same_shape(fz, z, "the map")
        check_unchanged(z, before)
        g = fz - z
        g_norm, f_norm = norms(g, fz)
        last = k + 1 == max_iter
        heard = []
        if looks is None:
            heard = [g_norm]
            now = books.enter(z, g_norm, f_norm, exact)
            if first is not None:
                first.look(now)
        else:
            looks.keep(z, (g, fz), (g_norm, f_norm), exact)
        entered = looks is None or last or k + 1 == looks.next
        if looks is not None and entered:
            heard = looks.enter(books, first)
        if last or (entered and books.over):
            break
        if keep is not None and alone is not None and first is None:
            stay = books.leave_out()
            if stay is not None:
                f = alone(books.rows)
                z, fz, g, g_norm = z[stay], fz[stay], g[stay], g_norm[stay.numpy()]
                heard = [g_norm]
                keep(stay)
        image, lengths = fz, Norms(g_norm, heard)
        if guard is not None:
            z, g, lengths = guard(k, z, g, lengths, propose)
            fz = z + g
        z = propose(k, z, fz, g, lengths)
        z = books.goes_on_from(z, image, entered)

    return books.solution()


@functools.cache
def _keep_freed_memory() -> None:
    """Let what a step frees stay for the next one, where glibc has the memory.

    Blocks larger than any that it has seen freed, and more free memory than twice as much, go back
    to the system, which clears what it gives out; mallopt(3) has it under M_MMAP_THRESHOLD. So it
    is to see the largest that counts, which nobody touches.
    """
    np.empty(_NOTED, dtype=np.uint8)


class _Looks:
    """The steps on an accelerator whose numbers the host has not seen, and when it will.

    Until then all samples go on. Those that were done by then are in the books as they were.
    """

    def __init__(self) -> None:
        self.next, self.guesses = _FIRST_LOOK, _GUESSES
        self.states: list[tuple[Tensor, Any]] = []  # and for whom f was the exact one
        self.vectors: list[Tensor] = []  # f(z) − z and f(z) of each
        self.lengths: list[Tensor] = []  # of these

    def keep(
        self, z: Tensor, vectors: Iterable[Tensor], lengths: Iterable[Tensor], exact: Any
    ) -> None:
        """Keep a step."""
        self.states.append((z, exact))
        self.vectors += vectors
        self.lengths += lengths

    def enter(self, books: Books, first: _Rough | None) -> list[np.ndarray]:
        """Bring the books up to date, and decide when to look again; returns the residual norms."""
        found = seen(self.vectors, self.lengths)
        heard = list(found[::2])
        for (z, exact), g_norm, f_norm in zip(self.states, heard, found[1::2], strict=True):
            now = books.enter(z, g_norm, f_norm, exact)
            if first is not None:
                first.look(now)
            if books.over:
                return heard
        self.states, self.vectors, self.lengths = [], [], []
        ahead = books.ahead(BETWEEN_LOOKS) if self.guesses else BETWEEN_LOOKS
        self.guesses -= ahead < BETWEEN_LOOKS
        if first is not None and np.count_nonzero(first.serves):
            ahead = min(ahead, books.ahead(BETWEEN_LOOKS, first.bound))
        self.next += ahead
        return heard


class _Rough:
    """f, or `rough` for the samples that it still serves.

    They are far from their solutions: `rough` is near f as seen from there, and what it is wrong by
    the steps that follow take away. Each sample decides by itself, by its own residuals, on an
    accelerator when the host looks.
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
        if is_host(z):
            (norm,) = norms(image)
            self.serves = self.serves & np.isfinite(norm)
        else:  # where the host has not seen it yet, who does not move is not served any more
            size = torch.linalg.vector_norm(image, 1, dim=1, keepdim=True)  # without squares
            image = torch.where(torch.isfinite(size), image, z)
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


class _Guard:
    """P (f(z) − z) where P helps, f(z) − z elsewhere, and where to go on from."""

    def __init__(self, preconditioner: Map):
        self.preconditioner = preconditioner
        self.start: tuple[Tensor, Tensor, Tensor, Norms] | None = None
        self.helps: Any = None
        self.everywhere = self.nowhere = False

    def __call__(
        self, k: int, z: Tensor, g: Tensor, norms: Norms, propose: Propose
    ) -> tuple[Tensor, Tensor, Norms]:
        if k == 0:
            changed = self.preconditioner(g)
            check_same_shape(changed, z, "the preconditioner")
            self.start = z, g, changed, norms
            return z, changed, norms
        if self.start is not None:
            before, plain, changed, first = self.start
            self.start = None
            first_norm, g_norm = first.heard + norms.heard
            # Of who stood still, since its rough image was not finite, nothing is known.
            self.helps = (g_norm > 0) & (g_norm <= _HELPS * first_norm)
            count = np.count_nonzero(self.helps)
            self.everywhere, self.nowhere = count == len(self.helps), count == 0
            if not self.everywhere:
                z, g = select(self.helps, z, before), select(self.helps, g, plain)
                there = select(self.helps, changed, plain)
                propose(0, before, before + there, there, Norms(first.here, [first_norm]))
                g_norm = np.where(self.helps, g_norm, first_norm)
                norms = Norms(norms.here, [g_norm])
        if self.nowhere:
            return z, g, norms
        changed = self.preconditioner(g)
        return z, changed if self.everywhere else select(self.helps, changed, g), norms
