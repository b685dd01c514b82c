"""Memory of matrices between all sites, which is most of a solve's: taken, used again, compared."""

from __future__ import annotations

import math
import threading
import weakref

import numpy as np
import torch
from torch import Tensor

from ..deq._watched import watched

# From this size on memory is worth keeping.
_LARGE = 1 << 20
# So much memory that is no longer used is kept for the next solve, at most.
_KEPT = 256 << 20

# By size; of one size and among sizes, what was given back last is last.
_kept: dict[int, list[np.ndarray]] = {}
_lock = threading.RLock()  # the garbage collector may give back while somebody takes


def empty(*shape: int, like: Tensor) -> Tensor:
    """An uninitialised tensor with the dtype and device of `like`.

    The system clears fresh memory as it is first touched, which takes longer than the arithmetic
    that fills it (measured: copying 64 MB 40 ms, into memory in use 7). So on the host large
    tensors come from numpy, which, unlike torch, asks for huge pages (20 ms), and their memory is
    used again by the next of the same size.
    """
    size = math.prod(shape) * like.element_size()
    if size < _LARGE or like.device.type != "cpu" or watched(like):
        return like.new_empty(shape)
    memory = _take(size)
    if memory is None:
        memory = np.empty(size, dtype=np.uint8)
    # torch holds the view as long as any tensor needs it.
    view = memory[:]
    weakref.finalize(view, _give, memory).atexit = False
    return torch.from_numpy(view).view(like.dtype).view(shape)


def release() -> None:
    """Give memory that is kept for the next solve back to the system."""
    with _lock:
        _kept.clear()


def _take(size: int) -> np.ndarray | None:
    with _lock:
        same = _kept.get(size)
        return same.pop() if same else None


def _give(memory: np.ndarray) -> None:
    if memory.size > _KEPT:
        return
    with _lock:
        same = _kept.pop(memory.size, [])
        same.append(memory)
        _kept[memory.size] = same
        while sum(size * len(kept) for size, kept in _kept.items()) > _KEPT:
            size, kept = next(iter(_kept.items()))
            if kept:
                kept.pop(0)
            if not kept:
                del _kept[size]


_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are the same bit for bit, so that NaN equals itself.

    As 64-bit integers where they can be read so, and on the host by numpy: for float32 either takes
    half the time.
    """
    if (a.shape, a.dtype, a.device) != (b.shape, b.dtype, b.device):
        return False
    a, b = a.reshape(-1), b.reshape(-1)
    size = a.element_size()
    if all((len(t) * size) % 8 == 0 and (t.storage_offset() * size) % 8 == 0 for t in (a, b)):
        size = 8
    a, b = a.view(_INTEGERS[size]), b.view(_INTEGERS[size])
    if a.is_cpu and not watched(a, b):
        return np.array_equal(a.numpy(), b.numpy())
    return torch.equal(a, b)
