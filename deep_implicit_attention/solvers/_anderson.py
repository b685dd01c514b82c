"""Anderson acceleration, with a history for each sample."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ._iterate import Map, Norms, iterate
from ._scale import is_host, power_of_two
from ._solution import Solution
from ._validate import check_values

# A sample whose residual falls at least by this factor at every step gains nothing from a history.
_FAST = 0.3
# One that was mixed is mixed again if of its residual less than this part was left of what the last
# plain step left.
_PAYS = 0.5
# A mixture that leaves so many times the residual, and more than there was at the start, has led
# astray: what it was made of does not hold there.
_ASTRAY = 3.0
# Differences are stored as they are where residuals begin between 2 to minus and plus this.
_MODERATE = 20


def anderson(
    f: Map,
    z0: Tensor,
    *,
    tol: float = 1e-4,
    max_iter: int = 50,
    stop_mode: str = "rel",
    m: int = 6,
    period: int = 1,
    ridge: float = 1e-3,
    damping: float = 0.0,
    preconditioner: Map | None = None,
    rough: Map | None = None,
) -> Solution:
    """Solve z = f(z) by Anderson acceleration (type II) with window `m`, each sample by itself.

    With g = f(z) − z and the last m differences Δg_j, Δf_j between successive iterates,

        γ = argmin ‖g − Σ_j γ_j Δg_j‖² + ridge Σ_j γ_j² ‖Δg_j‖²,   z ← f(z) − Σ_j γ_j Δf_j

    (Walker, Ni 2011, SIAM J. Numer. Anal. 49, 1715). A sample forgets its history when a step
    leaves three times the residual, and more than there was at the start. The ridge is relative to
    the residual differences themselves, so it does not stall the iteration as they shrink, and it
    keeps the problem solvable where they are dependent (m > n, equal iterates); a sample whose
    problem still cannot be solved takes a Picard step. So does one that acceleration would not
    help, whose residual has fallen more than threefold at every step so far.

    Args:
        f, z0, tol, max_iter, stop_mode, preconditioner, rough: as for `picard`.
        m: length of the history.
        period: one step in so many uses γ; those between are plain (Banerjee, Suryanarayana, Pask
            2016, Chem. Phys. Lett. 647, 31), enlarge the history as well and cost no products with
            it. A sample takes further steps with γ after a plain one that did not make its residual
            smaller, and as long as they leave less than half of what the last plain one left.
        ridge: regularisation relative to ‖Δg_j‖². The default costs no evaluations where the
            differences are independent and keeps noise out of γ where they are nearly dependent.
        damping: part of the old (averaged) state kept at each step, in [0, 1).

    Returns:
        `Solution`. Cost: one evaluation a step, with γ O(B m² n) and O(B m³) for the small systems,
        without O(B n); memory 2 B m n.

    Raises:
        TypeError, ValueError: for arguments of the wrong kind, shape or range.
    """
    check_values(m=m, period=period, damping=damping, ridge=ridge)
    history: _History | None = None

    def propose(k: int, z: Tensor, fz: Tensor, g: Tensor, norms: Norms) -> Tensor:
        nonlocal history
        if k == 0 or history is None:
            # No more columns than steps or unknowns can fill.
            size = max(1, min(m, max_iter - 2, z.shape[1]))
            history = _History(fz, g, norms, size, period, ridge)
            return fz - damping * g if damping else fz
        return history.accelerate(fz, g, norms, damping)

    def keep(stay: Tensor) -> None:
        if history is not None:
            history.keep(stay)

    return iterate(
        f,
        z0,
        propose,
        tol=tol,
        max_iter=max_iter,
        stop_mode=stop_mode,
        preconditioner=preconditioner,
        rough=rough,
        keep=keep,
    )


class _History:
    """The last differences of f and g, and γ of what they make of the next state.

    A sample's history begins when its residual first falls too slowly. Who is mixed follows from
    the norms that the host has heard of; later ones only say who has been led astray.
    """

    def __init__(
        self, fz: Tensor, g: Tensor, norms: Norms, size: int, period: int, ridge: float
    ) -> None:
        self.size, self.ridge, self.steps = size, ridge, 0
        self.f, self.g, self.on_host = fz, g, is_host(g)
        self.norm: Any = None
        self.first: Any = None
        self.start = norms.here
        self.lengths = [norms.here]  # of the last step that was heard of, and those since
        self.slow = np.zeros(len(g), bool)
        self.turns = _Turns(len(g), period)
        self.unit: Tensor | None = None  # in which the differences are stored
        self.delta_f = self.delta_g = g[:0]
        self.known = np.zeros((len(g), size), bool)  # which differences are a sample's own
        self._hear(norms)

    def keep(self, stay: Tensor) -> None:
        """Leave out all samples but some."""
        rows = stay.numpy()
        self.f, self.g = self.f[stay], self.g[stay]
        self.norm, self.first, self.slow = self.norm[rows], self.first[rows], self.slow[rows]
        self.turns.keep(rows)
        self.known = self.known[rows]
        if self.unit is not None:
            self.unit = self.unit[stay]
        if self.steps:
            self.delta_f, self.delta_g = self.delta_f[stay], self.delta_g[stay]

    def _hear(self, norms: Norms) -> Any:
        """Take note of further norms: who was not led astray by the last step, if heard of."""
        near: Any = True
        for norm in norms.heard:
            if self.norm is None:
                self.norm = self.first = norm
                continue
            with np.errstate(all="ignore"):
                left = norm / self.norm
            self.norm = norm
            # What is not finite is not fast, nor what is lost.
            self.slow = self.slow | ~(left < _FAST)
            near = self.turns.hear(left) | (left < _ASTRAY) | (norm <= self.first)
            if self.steps:
                self.known &= near[:, None]
            del self.lengths[0]
        return near

    def _allocate(self) -> None:
        batch, n = self.g.shape
        with np.errstate(all="ignore"):
            moderate = (self.norm == 0) | (abs(np.log2(self.norm)) < _MODERATE)
        if np.count_nonzero(moderate) < batch:
            # So that squares do not vanish. A power of two changes no digit.
            self.unit = power_of_two(self.g)
        self.delta_f = self.g.new_empty(batch, self.size, n)
        self.delta_g = torch.empty_like(self.delta_f)

    def accelerate(self, fz: Tensor, g: Tensor, norms: Norms, damping: float) -> Tensor:
        """The next state, from f(z), f(z) − z and what is known of its norms."""
        plain = fz - damping * g if damping else fz
        f_before, g_before = self.f, self.g
        self.f, self.g = fz, g
        self.lengths.append(norms.here)
        near = self._hear(norms)
        mixed = self.turns.next(self.slow)
        if self.steps == 0:
            if not np.count_nonzero(self.slow):
                return plain
            self._allocate()
        slot = self.steps % self.size
        self.steps += 1
        torch.sub(g, g_before, out=self.delta_g[:, slot])
        torch.sub(fz, f_before, out=self.delta_f[:, slot])
        if self.unit is not None:
            self.delta_g[:, slot].div_(self.unit)
        self.known[:, slot] = self.slow & near
        if not np.count_nonzero(mixed):
            return plain

        used = min(self.steps, self.size)
        delta_g, delta_f = self.delta_g[:, :used], self.delta_f[:, :used]
        now = g if self.unit is None else g / self.unit
        # Vectors as rows: as columns MKL takes ten times as long.
        gram, target = delta_g @ delta_g.mT, (now[:, None] @ delta_g.mT).squeeze(1)
        gamma = _weights(gram, target, self._usable(mixed, used), self.ridge)[:, None]
        z = torch.baddbmm(fz.unsqueeze(1), gamma, delta_f, alpha=-1).squeeze(1)
        if damping:
            rest = torch.baddbmm(now.unsqueeze(1), gamma, delta_g, alpha=-1).squeeze(1)
            z = z - damping * (rest if self.unit is None else rest * self.unit)
        return z

    def _usable(self, mixed: Any, used: int) -> Any:
        """Which of the `used` differences are a sample's own, for those to be `mixed`."""
        usable = self.known[:, :used] & mixed[:, None]
        if self.on_host:
            return usable
        device = self.delta_g.device
        usable = torch.from_numpy(usable).to(device, non_blocking=True)
        # Mixtures that the host has not heard of may have led astray, too.
        steps = zip(self.turns.plain, self.lengths, self.lengths[1:], strict=False)
        for plain, before, after in steps:
            if np.count_nonzero(plain) < len(plain):
                near = (after < _ASTRAY * before) | (after <= self.start)
                if np.count_nonzero(plain):
                    near = near | torch.from_numpy(plain).to(device, non_blocking=True)
                usable = usable & near[:, None]
        return usable


class _Turns:
    """In which steps samples are mixed: every `period`-th of a solve, and as long as it pays."""

    def __init__(self, samples: int, period: int) -> None:
        self.period, self.steps = period, 0
        self.plain = [np.ones(samples, bool)]  # who took a plain step, of steps not heard of yet
        self.last: Any = None  # of the last that was: that, and what part of the residuals it left
        self.left: Any = None  # what part a sample's last plain step left

    def keep(self, rows: Any) -> None:
        """Leave out all samples but some."""
        self.plain = [plain[rows] for plain in self.plain]
        if self.last is not None:
            self.last = [numbers[rows] for numbers in self.last]
            self.left = self.left[rows]

    def hear(self, left: Any) -> Any:
        """Take note of what part of the residuals the next step `left`: for whom it was plain."""
        plain = self.plain.pop(0)
        self.left = left if self.left is None else np.where(plain, left, self.left)
        self.last = plain, left
        return plain

    def next(self, begun: Any) -> Any:
        """Who of those that have `begun` is mixed now."""
        self.steps += 1
        mixed = begun
        if self.steps % self.period and np.count_nonzero(begun):
            # After a plain step who does not get nearer, else for whom it paid.
            plain, left = self.last
            mixed = begun & (plain ^ (left < np.where(plain, 1.0, _PAYS * self.left)))
        self.plain.append(~mixed)
        return mixed


def _weights(gram: Tensor, target: Tensor, known: Any, ridge: float) -> Tensor:
    """γ `(B, m)` of the least-squares problems with these products of Δg with Δg, and with g.

    Differences that are not `known` are left out, with γ = 0. Of a sample these are a few numbers:
    on the host they are numpy's, as in `iterate`.
    """
    xp: Any = np if is_host(gram) else torch
    products, targets = (t.numpy() if xp is np else t for t in (gram, target))
    square = _diagonal(products)
    known = known & (square > 0)
    with np.errstate(all="ignore"):
        scale = xp.where(known, square**-0.5, 0.0)
        matrix = products * scale[:, :, None] * scale[:, None]  # of Δg / ‖Δg‖
        # What is left out decouples.
        own = _diagonal(matrix)
        own += xp.where(known, ridge, 1.0)
        gamma = _solved(matrix, targets * scale)
        sound = (abs(gamma) < xp.inf).all(-1)
        found = xp.where(sound[:, None], gamma * scale, 0.0)
    return torch.from_numpy(found) if xp is np else found


def _diagonal(matrices: Any) -> Any:
    """A view `(B, m)` of the diagonals of `(B, m, m)`, of numpy or torch."""
    batch, m = matrices.shape[:2]
    return matrices.reshape(batch, m * m)[:, :: m + 1]


def _solved(matrix: Any, target: Any) -> Any:
    """NaN for a sample whose matrix is singular."""
    on_host = isinstance(matrix, np.ndarray)
    if on_host:
        try:
            return np.linalg.solve(matrix, target[..., None])[..., 0]
        except np.linalg.LinAlgError:
            matrix, target = torch.from_numpy(matrix), torch.from_numpy(target)
    gamma, failed = torch.linalg.solve_ex(matrix, target[..., None])
    gamma = torch.where(failed[:, None] == 0, gamma.squeeze(2), torch.nan)
    return gamma.numpy() if on_host else gamma
