"""Anderson acceleration, with a history for each sample."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ._iterate import Map, iterate
from ._scale import is_host, power_of_two
from ._solution import Solution
from ._validate import check_count, check_number

# A sample whose residual falls at least by this factor at every step gains nothing from a history.
_FAST = 0.3
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
    ridge: float = 1e-3,
    damping: float = 0.0,
    preconditioner: Map | None = None,
    rough: Map | None = None,
) -> Solution:
    """Solve z = f(z) by Anderson acceleration (type II) with window `m`, each sample by itself.

    With g = f(z) − z and the last m differences Δg_j, Δf_j between successive iterates,

        γ = argmin ‖g − Σ_j γ_j Δg_j‖² + ridge Σ_j γ_j² ‖Δg_j‖²,   z ← f(z) − Σ_j γ_j Δf_j

    (Walker, Ni 2011, SIAM J. Numer. Anal. 49, 1715). The ridge is relative to the residual
    differences themselves, so it does not stall the iteration as they shrink, and it keeps the
    problem solvable where they are dependent (m > n, equal iterates); a sample whose problem
    still cannot be solved takes a Picard step. So does one whose residual has fallen more than
    threefold at every step so far, which acceleration would not help.

    Args:
        f, z0, tol, max_iter, stop_mode, preconditioner, rough: as for `picard`.
        m: length of the history.
        ridge: regularisation relative to ‖Δg_j‖². The default costs no evaluations where the
            differences are independent and keeps noise out of γ where they nearly are not.
        damping: part of the old (averaged) state kept at each step, in [0, 1).

    Returns:
        `Solution`. Cost: one evaluation and O(B m n) a step (one row of the Gram matrix is
        renewed), O(B m³) for the small systems; memory 2 B m n.

    Raises:
        TypeError, ValueError: for arguments of the wrong kind, shape or range.
    """
    check_count("m", m)
    check_number("damping", damping, minimum=0.0, below=1.0)
    check_number("ridge", ridge, minimum=0.0)
    history: _History | None = None

    def propose(k: int, z: Tensor, fz: Tensor, g: Tensor, norm: Any) -> Tensor:
        nonlocal history
        if k == 0 or history is None:
            # No more columns than steps or unknowns can fill.
            size = max(1, min(m, max_iter - 2, z.shape[1]))
            history = _History(fz, g, norm, size, ridge)
            return fz - damping * g if damping else fz
        return history.accelerate(fz, g, norm, damping)

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
    """The last differences of f and g, and the Gram matrix of the Δg scaled to ‖Δg‖ = 1.

    A sample's history begins when its residual first falls too slowly.
    """

    def __init__(self, fz: Tensor, g: Tensor, norm: Any, size: int, ridge: float) -> None:
        self.size, self.ridge, self.steps = size, ridge, 0
        self.f, self.g, self.norm = fz, g, norm
        self.on_host = is_host(g)
        self.unit: Tensor | None = None  # in which the differences are stored
        self.slow = norm < 0
        self.delta_f = self.delta_g = g[:0]
        self.weights: _Weights

    def _allocate(self) -> None:
        batch, n = self.g.shape
        # So that squares do not vanish. A power of two changes no digit.
        unit = power_of_two(self.g)
        if not self.on_host or np.any(abs(np.log2(unit.numpy())) > _MODERATE):
            self.unit = unit
        self.delta_f = self.g.new_empty(batch, self.size, n)
        self.delta_g = torch.empty_like(self.delta_f)
        self.weights = _Weights(self.g.new_zeros(batch, self.size, self.size), self.ridge)

    def keep(self, stay: Tensor) -> None:
        """Leave out all samples but some."""
        rows = stay.numpy()
        self.f, self.g, self.norm, self.slow = (
            self.f[stay], self.g[stay], self.norm[rows], self.slow[rows]
        )  # fmt: skip
        if self.unit is not None:
            self.unit = self.unit[stay]
        if self.steps:
            self.delta_f, self.delta_g = self.delta_f[stay], self.delta_g[stay]
            self.weights.keep(rows)

    def accelerate(self, fz: Tensor, g: Tensor, norm: Any, damping: float) -> Tensor:
        f_before, g_before = self.f, self.g
        fast = norm < _FAST * self.norm  # what is not finite is not fast, nor what is lost
        self.f, self.g, self.norm = fz, g, norm
        if self.steps == 0:
            if self.on_host and np.count_nonzero(fast) == len(fast):
                return fz - damping * g if damping else fz
            self._allocate()
        self.slow = self.slow | ~fast
        slot = self.steps % self.size
        self.steps += 1
        used = min(self.steps, self.size)
        delta_g, delta_f = self.delta_g[:, :used], self.delta_f[:, :used]
        torch.sub(g, g_before, out=delta_g[:, slot])
        torch.sub(fz, f_before, out=delta_f[:, slot])
        # Vectors as rows: as columns MKL takes ten times as long.
        now = g
        if self.unit is not None:
            delta_g[:, slot] /= self.unit
            now = g / self.unit
        row = (delta_g[:, slot, None] @ delta_g.mT).squeeze(1)
        target = (now[:, None] @ delta_g.mT).squeeze(1)
        gamma = self.weights.renew(slot, row, target, self.slow)[:, None]

        z = torch.baddbmm(fz.unsqueeze(1), gamma, delta_f, alpha=-1).squeeze(1)
        if damping:
            left = torch.baddbmm(now.unsqueeze(1), gamma, delta_g, alpha=-1).squeeze(1)
            z = z - damping * (left if self.unit is None else left * self.unit)
        return z


class _Weights:
    """γ of the least-squares problem, from the Gram matrix of the Δg scaled to ‖Δg‖ = 1.

    Of a sample these are a few numbers: on the host they are numpy's, as in `iterate`.
    """

    def __init__(self, gram: Tensor, ridge: float) -> None:
        self.on_host, self.ridge = is_host(gram), ridge
        self.xp: Any = np if self.on_host else torch
        self.gram: Any = gram.numpy() if self.on_host else gram
        self.scale = self.xp.zeros_like(self.gram[:, 0])  # 1 / ‖Δg‖, 0 for what is left out

    def keep(self, rows: Any) -> None:
        """Leave out all samples but some."""
        self.gram, self.scale = self.gram[rows], self.scale[rows]

    def renew(self, slot: int, row: Tensor, target: Tensor, begun: Any) -> Tensor:
        """γ `(B, used)` once Δg number `slot` is new: `row` its products with all, `target` g's.

        Of samples that have not `begun` it is left out.
        """
        xp, used = self.xp, row.shape[1]
        rows, targets = (t.numpy() if self.on_host else t for t in (row, target))
        scale, gram = self.scale[:, :used], self.gram[:, :used, :used]
        square = rows[:, slot]
        begun = begun & (square > 0)
        with np.errstate(all="ignore"):
            scale[:, slot] = xp.where(begun, xp.sqrt(1 / square), xp.zeros_like(square))
            gram[:, slot] = gram[:, :, slot] = rows * scale * scale[:, slot, None]
            # A column that is left out decouples, with γ = 0.
            gram[:, slot, slot] += xp.where(scale[:, slot] > 0, self.ridge, 1.0)
            gamma = self._solved(gram, targets * scale)
            sound = (abs(gamma) < xp.inf).all(-1)
            found = xp.where(sound[:, None], gamma * scale, xp.zeros_like(gamma))
            return torch.from_numpy(found) if self.on_host else found

    def _solved(self, gram: Any, target: Any) -> Any:
        """NaN for a sample whose matrix is singular."""
        if self.on_host:
            try:
                return np.linalg.solve(gram, target[..., None])[..., 0]
            except np.linalg.LinAlgError:
                gram, target = torch.from_numpy(gram), torch.from_numpy(target)
        gamma, failed = torch.linalg.solve_ex(gram, target[..., None])
        gamma = torch.where(failed[:, None] == 0, gamma.squeeze(2), torch.nan)
        return gamma.numpy() if self.on_host else gamma
