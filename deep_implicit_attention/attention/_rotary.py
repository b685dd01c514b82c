"""Rotary positions: queries and keys turned by angles proportional to the site."""

from __future__ import annotations

import torch
from torch import Tensor

# The default of layers and models.
ROTARY_BASE = 10_000.0


def rotate(x: Tensor, base: float, first: int = 0) -> Tensor:
    """`x` `(..., N, k)`, component pairs (a, a + k/2) turned by i · base^(−2a/k) at site i.

    Sites count from `first`. The product of a query at i and a key at j then depends on i − j
    only (Su et al. 2021, arXiv:2104.09864).
    """
    sites, width = x.shape[-2:]
    # In float64: far sites turn by large angles.
    options = {"dtype": torch.float64, "device": x.device if x.device.type != "mps" else "cpu"}
    rates = base ** (-torch.arange(0, width, 2, **options) / width)
    angles = torch.outer(torch.arange(first, first + sites, **options), rates)
    cos, sin = angles.cos().to(x), angles.sin().to(x)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)
