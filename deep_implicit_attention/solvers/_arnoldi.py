"""One step of the Arnoldi process for a batch of matrices, under `gmres` and spectral radii."""

from __future__ import annotations

import torch
from torch import Tensor


def extend(basis: Tensor, k: int, image: Tensor) -> tuple[Tensor, Tensor]:
    """Orthogonalise `image` (= A q_k) against basis[:, :k+1] and append it as basis[:, k+1].

    `basis` is `(B, K, n)` with orthonormal rows up to k. Classical Gram–Schmidt, twice, which
    is orthogonal to rounding and is two matrix products instead of k vector ones. Returns column
    k of the Hessenberg matrix, `(B, k + 2)`, and the norm of `image`, `(B, 1)`. Where the Krylov
    space is exhausted the last entry of the column is 0 and the appended row is zero.
    """
    previous = basis[:, : k + 1]
    size = torch.linalg.vector_norm(image, dim=1, keepdim=True)
    # Vectors as rows: as columns MKL takes ten times as long.
    first = image.unsqueeze(1) @ previous.mT
    image = image - (first @ previous).squeeze(1)
    second = image.unsqueeze(1) @ previous.mT
    image = image - (second @ previous).squeeze(1)
    norm = torch.linalg.vector_norm(image, dim=1, keepdim=True)
    # What is left after two passes is rounding noise if it is this small.
    norm = torch.where(norm > 10 * torch.finfo(image.dtype).eps * size, norm, 0)
    basis[:, k + 1] = torch.where(norm > 0, image / norm, 0)
    return torch.cat([(first + second).squeeze(1), norm], dim=1), size
