"""Positions that are added to embeddings."""

from __future__ import annotations

import torch
from torch import Tensor


def sinusoids(sites: int, dim: int) -> Tensor:
    """`(sites, dim)`: sines, then cosines, of i · 10000^(−2a/dim) (Vaswani et al. 2017, §3.5)."""
    rates = 10_000.0 ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angles = torch.outer(torch.arange(sites, dtype=torch.float64), rates)
    return torch.cat([angles.sin(), angles.cos()], dim=1)[:, :dim].float()
