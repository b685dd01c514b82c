"""Numbers of order one: in float32 the squares of very small or large ones are lost."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from torch import Tensor

# For the numbers of an accelerator the host has to wait, so it looks only every so many steps.
BETWEEN_LOOKS = 4


def is_host(z: Tensor) -> bool:
    """Whether asking for a number of `z` does not stall a queue."""
    return z.is_cpu


def norms(*vectors: Tensor) -> list[Any]:
    """‖v‖ `(B,)` of each; on the host as numpy's arrays, and also where squares are too small or
    too large for their type.

    On an accelerator it would take a look, or twice the time, to find out: `seen` does, later.
    """
    found: list[Any] = [torch.linalg.vector_norm(v, dim=1) for v in vectors]
    if not is_host(vectors[0]):
        return found
    least = _least(vectors[0].dtype)
    for i, v in enumerate(vectors):
        found[i] = norm = found[i].numpy()
        lost = (norm < least) | (norm == np.inf)
        if np.count_nonzero(lost):
            found[i] = _anew(v, norm, lost)
    return found


def seen(vectors: list[Tensor], lengths: list[Tensor]) -> np.ndarray:
    """The norms `lengths` of `vectors` on an accelerator, `(vectors, B)` on the host.

    The host waits once, and again only where squares were too small or too large for their type.
    """
    found = torch.stack(lengths).cpu().numpy()
    lost = (found < _least(vectors[0].dtype)) | (found == np.inf)
    for i in np.flatnonzero(lost.any(axis=1)):
        found[i] = _anew(vectors[i], found[i], lost[i])
    return found


def norm_column(v: Tensor) -> Tensor:
    """`norms` of one, `(B, 1)`, as a tensor."""
    (norm,) = norms(v)
    return (torch.from_numpy(norm) if is_host(v) else norm)[:, None]


def relative(change: Tensor, image: Tensor, asked: bool) -> tuple[Tensor, Tensor]:
    """‖change‖ / ‖image‖ and ‖change‖ `(B,)`, as tensors.

    If numbers may be `asked` for, on the host, also where squares are too small or too large for
    their type.
    """
    norm = torch.linalg.vector_norm(change, dim=1)
    size = torch.linalg.vector_norm(image, dim=1)
    if asked:
        if not size.numel() or _moderate(size.detach()):
            return norm / size, norm
        unit = power_of_two(image.detach())
        norm = torch.linalg.vector_norm(change / unit, dim=1)
        size = torch.linalg.vector_norm(image / unit, dim=1)
        # Where the image is zero, all of the change counts.
        return norm / size.clamp_min(torch.finfo(size.dtype).tiny), norm * unit[:, 0]
    return norm / size.clamp_min(torch.finfo(size.dtype).tiny), norm


def _anew(v: Tensor, norm: np.ndarray, lost: np.ndarray) -> np.ndarray:
    """`norm` of `v` with that of the rows whose squares are `lost` made anew."""
    unit = power_of_two(v)
    scaled = torch.linalg.vector_norm(v / unit, dim=1) * unit[:, 0]
    return np.where(lost, scaled.cpu().numpy(), norm)


def _moderate(norms: Tensor) -> bool:
    """Whether all squares have all their digits; not if there is a NaN."""
    (shortest, longest), least = torch.aminmax(norms), _least(norms.dtype)
    return least < float(shortest) and float(longest) < 1 / least


@functools.cache
def _least(dtype: torch.dtype) -> float:
    """The least norm whose square has all its digits."""
    kind = torch.finfo(dtype)
    return (kind.tiny / kind.eps) ** 0.5


def power_of_two(b: Tensor) -> Tensor:
    """The power of two below the largest entry of each row, `(B, 1)`; ½ or 1 for rows of zeros."""
    if b.numel() == 0:
        return b.new_ones(b.shape[0], 1)
    largest = b.abs().amax(dim=1, keepdim=True)  # on the host four times faster than the norm
    if is_host(b):  # numpy is quicker with a few numbers
        few = largest.numpy()
        with np.errstate(all="ignore"):
            return torch.from_numpy(np.ldexp(few.dtype.type(0.5), np.frexp(few)[1]))
    sound = (largest > 0) & (largest < torch.inf)
    return torch.where(sound, largest, 1).log2().floor().exp2()


def select(mask: Any, a: Tensor, b: Tensor) -> Tensor:
    """The rows of `a` where `mask`, of `b` elsewhere.

    With a mask of numpy there is no copy where all rows are of one of them.
    """
    if isinstance(mask, np.ndarray):
        count = np.count_nonzero(mask)
        if count == len(mask) or not count:
            return a if count else b
        mask = torch.from_numpy(mask).to(a.device, non_blocking=True)
    return torch.where(mask[:, None], a, b)
