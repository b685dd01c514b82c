"""Couplings and fields as one symmetric matrix: a field is the coupling to a spin always up."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ._moments import Moments


@dataclass(frozen=True)
class Learned:
    """What a method finds.

    Attributes:
        theta: the parameters, `(N+1, N+1)`, see `pack`.
        steps: iterations, 1 for a formula.
        shrinkage: of the covariance.
        residual: largest difference that is left between the two sides of the method's equation,
            0 for a formula.
        converged: whether an iteration found what it looked for.
    """

    theta: Tensor
    steps: int = 1
    shrinkage: float = 0.0
    residual: float = 0.0
    converged: bool = True


def pack(couplings: Tensor, fields: Tensor) -> Tensor:
    """Θ `(N+1, N+1)`, site 0 the spin always up: ½ sᵀΘs = ½ Σ_ij J_ij S_i S_j + Σ_i h_i S_i."""
    n = len(fields)
    theta = couplings.new_zeros(n + 1, n + 1)
    theta[1:, 1:] = couplings
    theta[0, 1:] = theta[1:, 0] = fields
    return theta


def unpack(theta: Tensor) -> tuple[Tensor, Tensor]:
    """Couplings `(N, N)` and fields `(N,)`."""
    return theta[1:, 1:], theta[0, 1:]


def target(moments: Moments) -> Tensor:
    """Second moments ⟨s sᵀ⟩ `(N+1, N+1)`, of the spin always up too, diagonal 1."""
    second = pack(moments.second, moments.mean)
    second[0, 0] = 1.0
    return second


def rows_with_one(spins: Tensor) -> Tensor:
    """Spins `(M, N)` with the one that is always up in front, `(M, N+1)`."""
    return torch.cat([torch.ones_like(spins[:, :1]), spins], dim=1)


def is_coupling(size: int, like: Tensor) -> Tensor:
    """1 where Θ holds a coupling, 0 for fields and the diagonal, `(size, size)`."""
    mask = 1 - torch.eye(size, dtype=like.dtype, device=like.device)
    mask[0] = mask[:, 0] = 0
    return mask
