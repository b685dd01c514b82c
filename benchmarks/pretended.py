"""A device that is not there, to count what an accelerator would be given to do.

`register()` makes torch know a device named "pretended". The numbers of its tensors lie on the
host, but as on a GPU no operation may mix them with tensors of the host. `Counts` has what was
started meanwhile: kernels, and looks of the host at numbers, for which it would wait. How long
anything would take on a GPU it does not tell.

Python's backends are new in torch and private to it, and a process that has one keeps it: use a
process of its own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.backend_registration import (
    _setup_privateuseone_for_python_backend,  # pyright: ignore
)

from deep_implicit_attention.deq import _watched

NAME = "pretended"

_aten: Any = torch.ops.aten
# Operations that start nothing: memory is given out, numbers stay where they are.
_FREE = ("empty", "new_empty", "detach", "alias", "lift", "_unsafe_view", "_local_scalar_dense")
# Operations whose result has as many entries as the numbers say, so that the host waits for it.
_ASKING = ("_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "equal")
# Composite ones that would give a tensor its size after it was made, which wrappers cannot follow.
_WHOLE = (
    "eye", "eye.m", "arange", "arange.start", "arange.start_step", "randperm",
    "randperm.generator",
)  # fmt: skip


# Products of narrow numbers whose sums are in float32, which the host does not know.
_SUMS = (_aten.mm.dtype, _aten.bmm.dtype)


class Counts:
    """What has been started since it was made."""

    current: Counts | None = None

    def __init__(self) -> None:
        self.kernels = self.waits = 0
        self.narrow = 0  # products of narrow numbers with sums in float32
        Counts.current = self


class Pretended(Tensor):
    """A tensor of the device, with its numbers in `raw`."""

    raw: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, raw: Tensor) -> Pretended:
        made = Tensor._make_wrapper_subclass(  # pyright: ignore
            cls, raw.size(), strides=raw.stride(), storage_offset=raw.storage_offset(),
            dtype=raw.dtype, layout=raw.layout, device=torch.device(NAME, 0),
        )  # fmt: skip
        made.raw = raw
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})

    def new_tensor(self, data: Any, *, dtype: Any = None, **options: Any) -> Tensor:
        return torch.tensor(data, dtype=dtype or self.dtype).to(NAME)

    def tolist(self) -> Any:
        return self.cpu().tolist()


@functools.cache
def _starts(func: Any) -> bool:
    """Whether an operation starts a kernel: those that return views do not."""
    name = func.name().partition("::")[2].partition(".")[0]
    returns = func._schema.returns
    view = returns and returns[0].alias_info is not None and not returns[0].alias_info.is_write
    return not (view or name in _FREE)


def _is_pretended(device: Any) -> bool:
    return device is not None and torch.device(device).type == NAME


def _run(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """The operation on the host, as if it were not."""
    name = func.name().partition("::")[2].partition(".")[0]
    leaves = list(_tensors((*args, *kwargs.values())))
    wrapped = {id(leaf.raw): leaf for leaf in leaves if isinstance(leaf, Pretended)}
    host = [leaf for leaf in leaves if not isinstance(leaf, Pretended)]
    asked = name in _ASKING
    here = bool(wrapped)
    if kwargs.get("device") is not None:
        here = _is_pretended(kwargs["device"])
        asked |= bool(wrapped) and not here
        kwargs = {**kwargs, "device": torch.device("cpu")}
    if name in ("copy_", "_copy_from"):
        asked |= bool(wrapped) and not isinstance(args[0], Pretended)
    elif name in ("index", "index_put_", "_index_put_impl_"):
        indices = [index for index in args[1] if index is not None]
        asked |= any(index.dtype == torch.bool for index in indices)
        host = [leaf for leaf in host if not any(leaf is index for index in indices)]
    if wrapped and name not in ("copy_", "_copy_from", "_to_copy"):
        # A number of the host may take part in anything.
        for mixed in (leaf for leaf in host if leaf.dim()):
            raise RuntimeError(f"{func.name()}: {tuple(mixed.shape)} is on the host")
    if Counts.current is not None and (here or wrapped):
        Counts.current.kernels += _starts(func)
        Counts.current.waits += asked
        Counts.current.narrow += func in _SUMS

    def bare(leaf: Tensor) -> Tensor:
        return leaf.raw if isinstance(leaf, Pretended) else leaf

    def dressed(leaf: Tensor) -> Tensor:
        if isinstance(leaf, Pretended) or not here:
            return leaf
        return wrapped[id(leaf)] if id(leaf) in wrapped else Pretended(leaf)

    options = {key: _with_tensors(bare, value) for key, value in kwargs.items()}
    given = _with_tensors(bare, args)
    if func in _SUMS:
        found = torch.matmul(*(factor.to(given[2]) for factor in given[:2]))
    else:
        found = func(*given, **options)
    for leaf in wrapped.values():
        assert leaf.size() == leaf.raw.size(), f"{func.name()} has changed a size in place"
    return _with_tensors(dressed, found)


def _tensors(values: Any) -> Iterator[Tensor]:
    """Those among what an operation is given, in lists as well."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _with_tensors(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    """`value` with its tensors changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, list | tuple):
        return type(value)([_with_tensors(change, part) for part in value])
    return value


_libraries: list[Any] = []  # which are in force as long as somebody holds them


def register() -> None:
    """Make the device known, and its tensors ordinary ones to the library."""
    if _libraries:
        return
    _setup_privateuseone_for_python_backend(NAME)
    every, own = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    every.fallback(lambda op, *args, **kwargs: _run(op, args, kwargs), "PrivateUse1")
    for name in _WHOLE:
        base, _, overload = name.partition(".")
        op = getattr(getattr(_aten, base), overload or "default")
        own.impl(name, functools.partial(_direct, op), "PrivateUse1")
    _libraries.extend((every, own))
    _watched._ORDINARY = (*_watched._ORDINARY, Pretended)
    plain = torch.tensor

    def tensor(data: Any, *, device: Any = None, **options: Any) -> Tensor:
        """torch's own knows devices of its own only."""
        if _is_pretended(device):
            return plain(data, **options).to(NAME)
        return plain(data, device=device, **options)

    torch.tensor = tensor


def _direct(op: Any, *args: Any, **kwargs: Any) -> Any:
    return _run(op, args, kwargs)
