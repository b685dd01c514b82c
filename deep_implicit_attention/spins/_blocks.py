"""Matrices on all sites, their blocks on one, and their inverses."""

from __future__ import annotations

import torch
from torch import Tensor

from ..deq._watched import transformed


def block_diagonal(blocks: Tensor) -> Tensor:
    """`(..., N, d, d)` -> `(..., N·d, N·d)` with the blocks on the diagonal."""
    sites, dim = blocks.shape[-3:-1]
    spread = torch.diag_embed(blocks.movedim(-3, -1))  # (..., d, d, N, N)
    spread = spread.movedim((-2, -1), (-4, -2))  # (..., N, d, N, d)
    return spread.reshape(*blocks.shape[:-3], sites * dim, sites * dim)


def diagonal_blocks(matrix: Tensor, sites: int) -> Tensor:
    """The inverse of `block_diagonal`, ignoring what is off the diagonal."""
    dim = matrix.shape[-1] // sites
    split = matrix.reshape(*matrix.shape[:-2], sites, dim, sites, dim)
    return split.diagonal(dim1=-4, dim2=-2).movedim(-1, -3)


def cholesky_inverse(factor: Tensor) -> Tensor:
    """A⁻¹ `(..., n, n)` from the Cholesky factor of A.

    Forward-mode derivatives of torch's own are wrong (as of 2.13).
    """
    if not transformed(factor):
        return torch.cholesky_inverse(factor)
    identity = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
    return torch.cholesky_solve(identity.expand_as(factor), factor)
