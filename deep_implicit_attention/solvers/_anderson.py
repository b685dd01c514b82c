"""Anderson acceleration, with a history for each sample."""

from __future__ import annotations

import torch
from torch import Tensor

from ._iterate import Map, iterate
from ._solution import Solution
from ._validate import check_count, check_number


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
) -> Solution:
    """Solve z = f(z) by Anderson acceleration (type II) with window `m`, each sample by itself.

    With g = f(z) − z and the last m differences Δg_j, Δf_j between successive iterates,

        γ = argmin ‖g − Σ_j γ_j Δg_j‖² + ridge Σ_j γ_j² ‖Δg_j‖²,   z ← f(z) − Σ_j γ_j Δf_j

    (Walker, Ni 2011, SIAM J. Numer. Anal. 49, 1715). The ridge is relative to the residual
    differences themselves, so it does not stall the iteration as they shrink, and it keeps the
    problem solvable where they are dependent (m > n, equal iterates); a sample whose problem
    still cannot be solved takes a Picard step.

    Args:
        f, z0, tol, max_iter, stop_mode: as for `picard`.
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

    def propose(k: int, z: Tensor, fz: Tensor, g: Tensor) -> Tensor:
        nonlocal history
        if history is None:
            # No more columns than steps or unknowns can fill.
            size = max(1, min(m, max_iter - 2, z.shape[1]))
            history = _History(fz, g, size, ridge)
            return fz - damping * g if damping else fz
        return history.accelerate(k, fz, g, damping)

    return iterate(f, z0, propose, tol=tol, max_iter=max_iter, stop_mode=stop_mode)


class _History:
    """The last differences of f and g, scaled to ‖Δg‖ = 1, and the Gram matrix of the Δg."""

    def __init__(self, fz: Tensor, g: Tensor, size: int, ridge: float) -> None:
        batch, n = fz.shape
        self.size = size
        self.f, self.g = fz, g
        self.delta_f = fz.new_zeros(batch, size, n)
        self.delta_g = fz.new_zeros(batch, size, n)
        self.gram = fz.new_zeros(batch, size, size)
        self.ridge = ridge * torch.eye(size, dtype=fz.dtype, device=fz.device)

    def accelerate(self, k: int, fz: Tensor, g: Tensor, damping: float) -> Tensor:
        slot = (k - 1) % self.size
        delta_g, delta_f = g - self.g, fz - self.f
        self.f, self.g = fz, g
        norm = torch.linalg.vector_norm(delta_g, dim=1, keepdim=True)
        scale = torch.where(norm > 0, 1 / norm, 0)
        self.delta_g[:, slot] = delta_g * scale
        self.delta_f[:, slot] = delta_f * scale

        # One pass over the history gives the new row of the Gram matrix and the right-hand side.
        used = min(k, self.size)
        columns_g, columns_f = self.delta_g[:, :used], self.delta_f[:, :used]
        right = torch.stack([self.delta_g[:, slot], g], dim=2)
        row, target = (columns_g @ right).unbind(dim=2)
        self.gram[:, slot, :used] = row
        self.gram[:, :used, slot] = row
        gram = self.gram[:, :used, :used] + self.ridge[:used, :used]
        factor, failed = torch.linalg.cholesky_ex(gram)
        gamma = torch.cholesky_solve(target.unsqueeze(2), factor).squeeze(2)
        solved = (failed == 0) & torch.isfinite(gamma).all(dim=1)
        gamma = torch.where(solved[:, None], gamma, 0).unsqueeze(1)

        z = fz - (gamma @ columns_f).squeeze(1)
        if damping:
            z = z - damping * (g - (gamma @ columns_g).squeeze(1))
        return z
