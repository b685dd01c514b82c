"""States (a tensor or a tuple of tensors, batch first) as one batch of vectors, and back."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..solvers._scale import is_host
from ._watched import watched

State = Tensor | tuple[Tensor, ...]

_FULL = (torch.float32, torch.float64)


def full_precision(x: Any) -> Any:
    """`x` in float32 if it is a tensor of a narrower floating type; a solve needs the digits."""
    if not isinstance(x, Tensor) or x.dtype in _FULL:
        return x
    return x.float() if x.is_floating_point() and x.element_size() < 4 else x


def widen(state: Any) -> Any:
    """`full_precision` of every part of a state."""
    if isinstance(state, tuple | list):
        return tuple(map(full_precision, state))
    return full_precision(state)


def finite_samples(x: Tensor) -> Tensor:
    """Which samples of `x` `(B, ...)` are finite, `(B,)`; on the host a sum tells most often."""
    x = x.detach()
    if is_host(x) and not watched(x) and math.isfinite(float(x.sum())):
        return torch.ones(len(x), dtype=torch.bool, device=x.device)
    finite = torch.isfinite(x)
    return finite.flatten(1).all(dim=1) if x.dim() > 1 else finite


def per_sample(rows: Tensor, x: Tensor) -> Tensor:
    """`rows` `(B,)` shaped to broadcast over `x` `(B, ...)`."""
    return rows.reshape(-1, *[1] * (x.dim() - 1))


def replaced(rows: Tensor, x: Tensor) -> Tensor:
    """`x` with the sources of another sample in `rows`, zeros if there is none.

    A map need not be differentiable at zero: it may divide by a norm.
    """
    choices = torch.cat([x.detach(), x.new_zeros(1, *x.shape[1:])])
    rank = torch.cat([2 - 2 * rows.int(), rows.new_ones(1, dtype=torch.int)])
    sound = choices.index_select(0, rank.argmax(dim=0, keepdim=True))
    return torch.where(per_sample(rows, x), sound, x)


def _vectors(part: Tensor) -> Tensor:
    """`part` `(B, ...)` as `(B, n)`."""
    # `flatten` is the quicker, but a number a sample has nothing to flatten.
    return part.flatten(1) if part.dim() > 1 else part[:, None]


@dataclass(frozen=True)
class Layout:
    """Shapes of the parts of a state, and whether it is a bare tensor."""

    shapes: tuple[torch.Size, ...]
    bare: bool

    @staticmethod
    def of(state: Any) -> Layout:
        """The layout of a state; raises for anything that is none."""
        parts = (state,) if isinstance(state, Tensor) else state
        if not isinstance(parts, tuple | list) or not parts:
            raise TypeError(
                f"a state is a tensor or a tuple of tensors, got {type(state).__name__}"
            )
        for part in parts:
            if not isinstance(part, Tensor) or not part.is_floating_point():
                kind = part.dtype if isinstance(part, Tensor) else type(part).__name__
                raise TypeError(f"every part of a state is a real floating tensor, got {kind}")
            if part.dim() < 1 or part.shape[0] != parts[0].shape[0]:
                raise ValueError(
                    "the parts of a state share their first dimension, the batch; got shapes "
                    f"{[tuple(p.shape) for p in parts]}"
                )
            if part.dtype != parts[0].dtype:
                raise TypeError(
                    f"the parts of a state share a dtype, got {[p.dtype for p in parts]}"
                )
        return Layout(tuple(part.shape for part in parts), isinstance(state, Tensor))

    def of_samples(self, count: int) -> Layout:
        """The layout of `count` samples of such a state."""
        return Layout(tuple(torch.Size((count, *shape[1:])) for shape in self.shapes), self.bare)

    def pack(self, state: Any) -> Tensor:
        """`(B, n)`; a view where the state is one tensor."""
        if len(self.shapes) == 1:
            return _vectors(state if self.bare else state[0])
        return torch.cat([_vectors(part) for part in state], dim=1)

    def unpack(self, flat: Tensor) -> State:
        """The inverse of `pack`."""
        if self.bare:
            return flat.reshape(*self.shapes[0])  # which torch reads faster than a `Size`
        parts = flat.split(self.sizes, dim=1)
        return tuple(part.reshape(shape) for part, shape in zip(parts, self.shapes, strict=True))

    @property
    def sizes(self) -> list[int]:
        """Numbers per sample in each part."""
        return [shape[1:].numel() for shape in self.shapes]

    def check_image(self, state: Any) -> None:
        """Raise unless a map returned a state of this layout."""
        simple = self.bare and isinstance(state, Tensor)
        if simple and state.shape == self.shapes[0] and state.dtype in _FULL:
            return
        parts = (state,) if isinstance(state, Tensor) else state
        if isinstance(state, Tensor) != self.bare or not isinstance(parts, tuple | list):
            raise TypeError(
                f"the map must return what it is given, a {'tensor' if self.bare else 'tuple'}, "
                f"got {type(state).__name__}"
            )
        shapes = tuple(getattr(part, "shape", None) for part in parts)
        if shapes != self.shapes:
            raise ValueError(
                f"the map must keep shapes {[tuple(s) for s in self.shapes]}, returned "
                f"{[None if s is None else tuple(s) for s in shapes]}"
            )
        if not all(part.is_floating_point() for part in parts):
            raise TypeError(f"the map must return real tensors, got {[p.dtype for p in parts]}")
