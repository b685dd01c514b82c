"""Memory for matrices between all sites, which can be most of what a solve touches."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

# numpy asks the system for huge pages from this size on.
_LARGE = 4 << 20
_NUMPY = {torch.float32: np.float32, torch.float64: np.float64}


def empty(*shape: int, like: Tensor) -> Tensor:
    """An uninitialised tensor with the dtype and device of `like`.

    On the host large ones come from numpy, which, unlike torch, asks for huge pages: the first
    touch of fresh memory otherwise takes longer than the arithmetic that fills it (measured:
    copying 64 MB 40 ms, with huge pages 20).
    """
    size = torch.Size(shape).numel() * like.element_size()
    if like.device.type != "cpu" or size < _LARGE or like.dtype not in _NUMPY:
        return like.new_empty(shape)
    return torch.from_numpy(np.empty(shape, dtype=_NUMPY[like.dtype]))
