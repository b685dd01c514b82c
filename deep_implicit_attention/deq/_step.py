"""A map as a solver takes it: a function of flat states, and the same of some samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from ..solvers._validate import check_unchanged, version
from ._module import of_its_update
from ._state import Layout

FORWARD_MODE = (
    "forward-mode derivatives (jvp, jacfwd) of a fixed point are not implemented: use reverse mode"
)


def dual(tensors: Sequence[Tensor]) -> bool:
    """Whether any of them has a tangent, for a forward-mode derivative."""
    # Outside of `dual_level` none has.
    if forward_ad._current_level < 0:
        return False
    return any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors)


class Step:
    """z ↦ f(z, *args) on flat states, in a solve.

    It has `of_samples`, index ↦ the same of these alone, or None where f cannot select them.
    """

    def __init__(self, f: Callable, layout: Layout, args: Sequence[Any]) -> None:
        self.f, self.layout, self.args = f, layout, args

    def __call__(self, z: Tensor) -> Tensor:
        return _image_in_solve(self.f, self.layout, z, self.args)

    @property
    def of_samples(self) -> Callable[[Tensor], Step] | None:
        """What makes the step of some samples."""
        select = selection(self.f)
        if select is None:
            return None

        def alone(rows: Tensor) -> Step:
            layout = self.layout.of_samples(len(rows))
            return Step(self.f, layout, selected(select, rows, self.args))

        return alone


class TracedStep(Step):
    """A step of whose first image a map with all that is listed detached learns if it `closes_over`
    a differentiable tensor: it does if that needs gradients.

    So it is in solves without gradients, too, where torch may have another kernel.
    """

    def __init__(self, traced: Any, args: Sequence[Any]) -> None:
        super().__init__(traced.f, traced.layout, args)
        self.learns: Any = traced

    def __call__(self, z: Tensor) -> Tensor:
        if self.learns is None:
            return super().__call__(z)
        traced, self.learns = self.learns, None
        with torch.enable_grad():
            image = super().__call__(z.detach())
            traced.closes_over = image.requires_grad
        return image.detach()


def selection(f: Callable) -> Any:
    """`f.select_samples`, by which a module takes of arguments what belongs to some samples."""
    return of_its_update(f, "select_samples", "forward") if isinstance(f, nn.Module) else None


def selected(select: Callable, rows: Tensor, args: Sequence[Any]) -> Sequence[Any]:
    """What of `args` belongs to the samples `rows`."""
    found = select(rows, *args)
    # Of one argument a tensor of one sample would be taken apart into it without its batch.
    if not isinstance(found, tuple | list):
        raise TypeError(
            "select_samples must return a tuple, the arguments of f beside z, got "
            f"{type(found).__name__}: write (a,) for one"
        )
    return found


def _image_in_solve(f: Callable, layout: Layout, z: Tensor, args: Sequence[Any]) -> Tensor:
    """`flat_image`, refused where f closes over a tensor with a tangent.

    A solver would carry it along, and end when the values have converged.
    """
    image = flat_image(f, layout, z, args)
    if dual((image,)):
        raise RuntimeError(FORWARD_MODE)
    return image


def flat_image(f: Callable, layout: Layout, z: Tensor, args: Sequence[Any]) -> Tensor:
    before = version(z)
    image = f(layout.unpack(z), *args)
    check_unchanged(z, before)
    layout.check_image(image)
    flat = layout.pack(image)
    return flat if flat.dtype == z.dtype else flat.to(z.dtype)
