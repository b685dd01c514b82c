"""The map z ↦ f(z, *args) as a function of explicit tensors.

Exact derivatives of every order need to know what f depends on. `TracedMap` lists the tensors in
`args` and, if f is a module, its parameters and buffers; it evaluates f with any substitutes for
them, on a copy of the module that shares nothing mutable with it, and it notices when f reaches for
a differentiable tensor that is on neither list.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._autograd import _get_sequence_nr as node_number  # pyright: ignore
from torch.nn.utils import parametrize

from ..solvers._validate import version
from ._linear_map import Pullback, on_vectors
from ._module import of_its_update
from ._state import Layout, full_precision
from ._step import TracedStep, dual, flat_image, selected, selection
from ._tree import flatten, unflatten

# Where a tensor of a module stands: a table of parameters or buffers, and the name in it.
Place = tuple[dict[str, Any], str]

# Buffers of more numbers than these are couplings or masks, and constant.
_SMALL = 1 << 16


def without_autocast(like: Tensor) -> AbstractContextManager:
    """A solve keeps the precision of its state: autocast is off inside, forward and backward."""
    if not in_autocast(like):
        return nullcontext()
    return torch.autocast(like.device.type, enabled=False)


def in_autocast(like: Tensor) -> bool:
    """Whether autocast is on for the device of `like`."""
    device = like.device.type
    # The compiler of torch 2.11 breaks the graph at the first question; what it compiles for has
    # autocast.
    known = device == "cpu" or torch.compiler.is_compiling()
    known = known or torch.amp.is_autocast_available(device)
    return known and torch.is_autocast_enabled(device)


def outside_inference_mode(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` called under `no_grad` in the place of inference mode.

    Tensors of inference mode have no version, by which a map that changes its state in place is
    found out.
    """

    @functools.wraps(function)
    def call(*args: Any, **options: Any) -> Any:
        if not torch.is_inference_mode_enabled():
            return function(*args, **options)
        with torch.inference_mode(False), torch.no_grad():
            return function(*args, **options)

    return call


class TracedMap:
    """f(z, *args) on flat states `(B, n)`, for explicit `tensors`."""

    def __init__(self, f: Callable, layout: Layout, args: Sequence[Any]) -> None:
        self.layout = layout
        leaves, self._tree = flatten(tuple(args))
        self._leaves = leaves
        self._slots = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        self._places: list[list[Place]] = []
        self.tensors: list[Tensor] = [leaves[i] for i in self._slots]
        for i in self._slots:
            leaves[i] = None
        if isinstance(f, nn.Module):
            f, owned = _replica(f)
            for tensor, places in owned:
                self.tensors.append(tensor)
                self._places.append(places)
        self.f = f
        self.closes_over = False

    def __call__(self, z: Tensor, tensors: Sequence[Tensor], rows: Tensor | None = None) -> Tensor:
        """f at `z`; with `rows`, that of these samples alone, `z` theirs."""
        with self._arguments(tensors) as args:
            f = self.f
            if isinstance(f, nn.Module) and torch.is_grad_enabled():
                # What a backward pass computes again (`torch.utils.checkpoint`) has to find its
                # tensors then, in a copy that lives as long as that graph.
                f = _copied(f, {}, {})
            layout, args = self._of_rows(rows, args)
            return flat_image(f, layout, z, args)

    @property
    def selects(self) -> bool:
        """Whether f can be asked of some samples alone."""
        return selection(self.f) is not None

    def _of_rows(self, rows: Tensor | None, args: Sequence[Any]) -> tuple[Layout, Sequence[Any]]:
        """The layout and the arguments of the samples `rows`."""
        if rows is None:
            return self.layout, args
        return self.layout.of_samples(len(rows)), selected(selection(self.f), rows, args)

    def kept(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """`tensors` as they are to be saved for backward, and in it for the next.

        Evaluations of f in training may update buffers (running statistics, the vectors of
        `spectral_norm`), so small ones are copied; torch's own do likewise.
        """
        given = len(self._slots)
        owned = (t.clone() if _is_small_buffer(t) else t for t in tensors[given:])
        return [*tensors[:given], *owned]

    def tape(self, z: Tensor) -> tuple[Tensor, list[Tensor]]:
        """f at `z`, with a graph of what it closes over alone, and the leaves among that."""
        begun = node_number()
        image = self(z, [t.detach() for t in self.tensors])
        return image, ends_since(image, begun)[0]

    @contextmanager
    def bound(self, constants: Sequence[Tensor]) -> Iterator[TracedStep]:
        """f as a function of z alone, with `constants` put in once for many evaluations.

        The first one finds out whether f closes over a differentiable tensor.
        """
        with self._arguments(constants) as args:
            yield TracedStep(self, args)

    @contextmanager
    def _arguments(self, tensors: Sequence[Tensor]) -> Iterator[Sequence[Any]]:
        """`args` made of `tensors`; inside, the parameters and buffers of f are theirs, too."""
        leaves = list(self._leaves)
        given = len(self._slots)
        wide = [full_precision(tensor) for tensor in tensors]
        for slot, tensor in zip(self._slots, wide[:given], strict=True):
            leaves[slot] = tensor
        self._fill(wide[given:])
        try:
            with _uncached():
                yield unflatten(leaves, self._tree)
        finally:
            # Held by nobody outside, so that what autograd saves is all that is kept.
            self._fill([None] * len(self._places))
            _take_over(tensors[given:], wide[given:])

    def vjp(
        self,
        z: Tensor,
        tensors: Sequence[Tensor],
        rough: bool = False,
        rows: Tensor | None = None,
    ) -> Callable[[Tensor], Tensor] | None:
        """v ↦ (∂f/∂z)ᵀ v at `z`, if f is a module that has one of its own, `f.vjp(z, *args)`.

        A `Pullback` if the module's is: `by_context` then takes v and a list of what is needed, and
        returns a list, as long as `tensors`. It has None for the module's own parameters, which a
        map with a `Pullback` does not read.

        With `rough`, an approximation of it: that of `f.rough(*args)`, if that has any. With
        `rows`, that of these samples alone, `z` theirs.
        """
        if not isinstance(self.f, nn.Module) or of_its_update(self.f, "vjp", "forward") is None:
            return None
        module: Any = self.f
        with self._arguments([tensor.detach() for tensor in tensors]) as args:
            args = module.rough(*args) if rough else args
            if args is None:
                return None
            layout, args = self._of_rows(rows, args)
            product = module.vjp(layout.unpack(z), *args)

        by_state = on_vectors(product, layout)
        if not isinstance(product, Pullback):
            return by_state
        by_context, remainder = product.by_context, product.remainder
        return Pullback(
            by_state,
            lambda v, needed: self._by_tensors(by_context, v, needed),
            None if remainder is None else on_vectors(remainder, layout),
        )

    def _by_tensors(
        self, by_context: Callable, v: Tensor, needed: Sequence[bool]
    ) -> list[Tensor | None]:
        """(∂f/∂θ)ᵀ v for the tensors that need it, by the module's own `by_context`."""
        leaves = list(self._leaves)
        given = len(self._slots)
        for slot, need in zip(self._slots, needed[:given], strict=True):
            leaves[slot] = need
        asked = unflatten(leaves, self._tree)
        found = by_context(self.layout.unpack(v), *asked)
        grads, tree = flatten((found,) if len(asked) == 1 else tuple(found))
        if tree != self._tree:
            raise TypeError(
                "by_context must return a context with derivatives in place of its tensors"
            )
        found = [grads[slot] for slot in self._slots]
        derivatives = [grad if isinstance(grad, Tensor) else None for grad in found]
        return derivatives + [None] * len(self._places)

    def _fill(self, tensors: Any) -> None:
        for places, tensor in zip(self._places, tensors, strict=True):
            for table, name in places:
                table[name] = tensor


def plain_arguments(f: Callable, args: Sequence[Any]) -> Sequence[Any] | None:
    """`args` detached, if f can be called with them as it is, or None.

    It can if it is a module, nothing needs widening or a derivative, and no parameter that it reads
    by itself requires a gradient: products with such a one may take another kernel, and the
    solution would not be that with gradients, bit for bit. (A module with a `vjp` reads none.)
    """
    if not isinstance(f, nn.Module):
        return None
    leaves, tree = flatten(tuple(args))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    if dual(tensors):
        return None
    owned = _owned(f, [])
    for tensor in (*tensors, *owned):
        if tensor is not full_precision(tensor):
            return None
    if of_its_update(f, "vjp", "forward") is None and any(t.requires_grad for t in owned):
        return None
    detached = [leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    return unflatten(detached, tree)


@torch.no_grad()
def _take_over(narrow: Sequence[Tensor], wide: Sequence[Tensor]) -> None:
    """What f has written to widened buffers (running statistics) is to stand in its own."""
    for tensor, copy in zip(narrow, wide, strict=True):
        if copy is not tensor and version(copy) and not tensor.requires_grad:
            tensor.copy_(copy)


def _is_small_buffer(tensor: Tensor) -> bool:
    own = not isinstance(tensor, nn.Parameter) and not tensor.requires_grad
    return own and tensor.numel() <= _SMALL


def _owned(module: nn.Module, found: list[Tensor]) -> list[Tensor]:
    """`found` with parameters and buffers, shared ones as often as they occur.

    `nn.Module` is slower to tell.
    """
    for table in (module._parameters, module._buffers):
        if table:
            found.extend(tensor for tensor in table.values() if tensor is not None)
    for child in module._modules.values():
        if child is not None:
            _owned(child, found)
    return found


def ends_since(image: Tensor, begun: int) -> tuple[list[Tensor], bool]:
    """The leaves of the graph of `image`, and whether it goes on behind nodes older than `begun`.

    `node_number` gives the number of the next node. What is behind older ones is left out.
    """
    leaves: list[Tensor] = []
    older = False
    known: set[Any] = set()
    ahead: list[Any] = [image.grad_fn]
    while ahead:
        node = ahead.pop()
        if node is None or node in known:
            continue
        known.add(node)
        if isinstance(node, torch._C._functions.AccumulateGrad):  # pyright: ignore
            leaves.append(node.variable)
        elif node._sequence_nr() >= begun:
            ahead.extend(following for following, _ in node.next_functions)
        else:
            older = True
    return leaves, older


@contextmanager
def _uncached() -> Iterator[None]:
    """Inside, parametrised weights are computed from the tensors that stand in the module.

    Within `parametrize.cached()` they would be those of an earlier access.
    """
    enabled = getattr(parametrize, "_cache_enabled", 0)
    if not enabled:
        yield
        return
    # By how much, not to what: another thread may enter or leave `cached()` meanwhile.
    parametrize._cache_enabled -= enabled
    try:
        yield
    finally:
        parametrize._cache_enabled += enabled
        if not parametrize._cache_enabled:
            parametrize._cache = {}


def _replica(module: nn.Module) -> tuple[nn.Module, list[tuple[Tensor, list[Place]]]]:
    """A copy of the tree of modules with tables of its own, and where each tensor stands in it."""
    owned: dict[int, tuple[Tensor, list[Place]]] = {}
    return _copied(module, {}, owned), list(owned.values())


def _copied(
    part: nn.Module,
    copies: dict[int, nn.Module],
    owned: dict[int, tuple[Tensor, list[Place]]],
) -> nn.Module:
    """`_replica` of a part, adding to what has been copied and to whose tensors stand where."""
    # Not a closure that calls itself: it would be a cycle, and keep the weights until a collection.
    if id(part) in copies:
        return copies[id(part)]
    if isinstance(part, torch.jit.ScriptModule):
        raise TypeError("f must not hold a scripted module, of which no copy can be made")
    new = copies[id(part)] = object.__new__(type(part))
    new.__dict__ = dict(part.__dict__)
    for kind in ("_parameters", "_buffers"):
        table = new.__dict__[kind] = dict(part.__dict__[kind])
        for name, tensor in table.items():
            if tensor is not None:
                owned.setdefault(id(tensor), (tensor, []))[1].append((table, name))
    new.__dict__["_modules"] = {
        name: None if child is None else _copied(child, copies, owned)
        for name, child in part._modules.items()
    }
    return new
