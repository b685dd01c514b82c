"""Positions that are added to embeddings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def sinusoids(sites: int, dim: int) -> Tensor:
    """`(sites, dim)`: sines, then cosines, of i · 10000^(−2a/dim) (Vaswani et al. 2017, §3.5)."""
    rates = 10_000.0 ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angles = torch.outer(torch.arange(sites, dtype=torch.float64), rates)
    return torch.cat([angles.sin(), angles.cos()], dim=1)[:, :dim].float()


class Positioned(nn.Module):
    """A model whose `positions`, where they are sinusoids, are a buffer that is not saved."""

    def _sinusoids(self) -> Tensor:
        """What that buffer holds."""
        raise NotImplementedError

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        before = self._buffers.get("positions")
        super()._apply(fn, recurse)
        after = self._buffers.get("positions")
        # A model that leaves the meta device has no numbers yet, and no state dict holds these.
        if before is not None and before.is_meta and after is not None and not after.is_meta:
            with after.device:
                after.copy_(self._sinusoids())
        return self
