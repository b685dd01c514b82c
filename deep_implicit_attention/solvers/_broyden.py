"""Broyden's good method with limited memory, a secant history for each sample."""

from __future__ import annotations

import torch
from torch import Tensor

from ._iterate import Map, Norms, iterate
from ._scale import power_of_two
from ._solution import Solution
from ._validate import check_values


def broyden(
    f: Map,
    z0: Tensor,
    *,
    tol: float = 1e-4,
    max_iter: int = 50,
    stop_mode: str = "rel",
    memory: int = 20,
    preconditioner: Map | None = None,
    rough: Map | None = None,
) -> Solution:
    """Solve g(z) = f(z) − z = 0 by Broyden's good method, each sample by itself.

    z ← z − H g, where H starts as −1 (a Picard step) and is corrected after every step by the
    rank-one update that makes it map Δg to Δz (Sherman–Morrison form):

        H ← H + (Δz − H Δg)(Δzᵀ H) / (Δzᵀ H Δg)

    When `memory` corrections are stored the history starts anew. An update whose denominator
    vanishes is skipped. Converges superlinearly near a solution, also where f does not contract.

    Args:
        f, z0, tol, max_iter, stop_mode, preconditioner, rough: as for `picard`.
        memory: rank-one corrections kept.

    Returns:
        `Solution`. Cost: one evaluation and O(B memory n) a step; memory 2 B memory n.

    Raises:
        TypeError, ValueError: for arguments of the wrong kind, shape or range.
    """
    check_values(memory=memory)
    history: _Inverse | None = None

    def propose(k: int, z: Tensor, fz: Tensor, g: Tensor, norms: Norms) -> Tensor:
        nonlocal history
        if k == 0 or history is None:
            history = _Inverse(z, g, max(1, min(memory, max_iter - 2)))
        else:
            history.update(z, g)
        return z - history.apply(g)

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


class _Inverse:
    """H = −1 + Σ_k u_k v_kᵀ for every sample."""

    def __init__(self, z: Tensor, g: Tensor, size: int) -> None:
        batch, n = z.shape
        self.size, self.used = size, 0
        self.u, self.v = z.new_zeros(batch, size, n), z.new_zeros(batch, size, n)
        self.z, self.g = z, g

    def keep(self, stay: Tensor) -> None:
        """Leave out all samples but some."""
        self.u, self.v, self.z, self.g = (t[stay] for t in (self.u, self.v, self.z, self.g))

    def apply(self, g: Tensor) -> Tensor:
        """H g."""
        return self._product(g, self.v, self.u)

    def _product(self, x: Tensor, inner: Tensor, outer: Tensor) -> Tensor:
        if self.used == 0:
            return -x
        # Vectors as rows: as columns MKL takes ten times as long.
        weights = x.unsqueeze(1) @ inner[:, : self.used].mT
        return (weights @ outer[:, : self.used]).squeeze(1) - x

    def update(self, z: Tensor, g: Tensor) -> None:
        if self.used == self.size:
            self.used = 0
        delta_z, delta_g = z - self.z, g - self.g
        self.z, self.g = z, g
        # H is the same in any unit, and in this one squares are neither lost nor too large.
        unit = power_of_two(delta_z)
        delta_z, delta_g = delta_z / unit, delta_g / unit
        v = self._product(delta_z, self.u, self.v)
        denominator = (v * delta_g).sum(dim=1, keepdim=True)
        scale = torch.linalg.vector_norm(v, dim=1) * torch.linalg.vector_norm(delta_g, dim=1)
        safe = denominator.abs() > torch.finfo(z.dtype).eps * scale[:, None]
        u = (delta_z - self.apply(delta_g)) / torch.where(safe, denominator, 1)
        self.u[:, self.used] = torch.where(safe, u, 0)
        self.v[:, self.used] = v
        self.used += 1
