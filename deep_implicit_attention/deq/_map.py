"""The map z ↦ f(z, *args) as a function of explicit tensors.

Exact derivatives of every order need to know what f depends on. `TracedMap` lists the tensors in
`args` and, if f is a module that uses them, its parameters; it evaluates f with any substitutes
for them, and it notices when f reaches for a differentiable tensor that is on neither list.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrize
from torch.utils import _pytree as pytree  # the public module comes with torch 2.14

from ._state import Layout, full_precision


def without_autocast(like: Tensor) -> AbstractContextManager:
    """A solve keeps the precision of its state: autocast is off inside, forward and backward."""
    device = like.device.type
    if not torch.amp.is_autocast_available(device):
        return nullcontext()
    return torch.autocast(device, enabled=False)


def in_autocast(like: Tensor) -> bool:
    """Whether autocast is on for the device of `like`."""
    device = like.device.type
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


class TracedMap:
    """f(z, *args) on flat states `(B, n)`, for explicit `tensors`."""

    def __init__(self, f: Callable, layout: Layout, args: Sequence[Any]) -> None:
        self.f = f
        self.layout = layout
        leaves, self._tree = pytree.tree_flatten(tuple(args))
        self._leaves = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self._slots = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        self._names: list[str] = []
        self.tensors: list[Tensor] = [leaves[i] for i in self._slots]
        self.closes_over = False

    def __call__(self, z: Tensor, tensors: Sequence[Tensor]) -> Tensor:
        leaves = list(self._leaves)
        for slot, tensor in zip(self._slots, tensors, strict=False):
            leaves[slot] = full_precision(tensor)
        args = pytree.tree_unflatten(leaves, self._tree)
        state = self.layout.unpack(z)
        if self._names:
            weights = map(full_precision, tensors[len(self._slots) :])
            parameters = dict(zip(self._names, weights, strict=True))
            assert isinstance(self.f, nn.Module)
            image = functional_call(self.f, parameters, (state, *args))
        else:
            image = self.f(state, *args)
        self.layout.check_image(image)
        return self.layout.pack(image).to(z.dtype)

    def trace(self, z: Tensor) -> Tensor:
        """f at z, without a graph, finding out what f depends on beside its arguments.

        If the result needs gradients although z and `args` are detached, f uses something else:
        first its own parameters are put on the list; if that does not explain it, f closes over
        a tensor.
        """
        with torch.enable_grad():
            image = self(z.detach(), [t.detach() for t in self.tensors])
            if image.requires_grad and isinstance(self.f, nn.Module):
                _touch_cached(self.f)
                named = dict(self.f.named_parameters())
                self._names = list(named)
                self.tensors = [*self.tensors, *named.values()]
                image = self(z.detach(), [t.detach() for t in self.tensors])
            self.closes_over = image.requires_grad
        return image.detach()


def _touch_cached(module: nn.Module) -> None:
    """Compute parametrised weights with gradients before anything does so without them.

    Inside `parametrize.cached()` the first access is the one that is kept.
    """
    if not getattr(parametrize, "_cache_enabled", 0):
        return
    for part in module.modules():
        if parametrize.is_parametrized(part):
            for name in part.parametrizations:  # type: ignore[union-attr]
                getattr(part, name)
