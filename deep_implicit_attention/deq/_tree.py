"""Tuples, lists and dicts of tensors as lists of leaves, and back.

`torch.utils._pytree` does the same for more kinds, in several calls of Python for every leaf, which
add up: contexts are taken apart and put together half a dozen times in a solve.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree  # the public module comes with torch 2.14

# What is certainly a leaf.
_LEAVES = (Tensor, nn.Parameter, type(None), bool, int, float, str)


def flatten(value: Any) -> tuple[list[Any], Any]:
    """The leaves of `value`, and what `unflatten` needs beside them; structures compare by `==`."""
    leaves: list[Any] = []
    return leaves, _taken_apart(value, leaves)


def unflatten(leaves: Sequence[Any], structure: Any) -> Any:
    """The inverse of `flatten`."""
    return _put_together(structure, iter(leaves))


def _taken_apart(value: Any, leaves: list[Any]) -> Any:
    """The structure of `value`, None for a leaf: its kind, its keys, and those of its parts."""
    kind, keys = type(value), None
    if kind is dict:
        keys, value = tuple(value), value.values()
    elif kind is not tuple and kind is not list and not hasattr(kind, "_fields"):
        return _other(value, leaves)
    parts = []
    for part in value:
        if type(part) in _LEAVES:
            leaves.append(part)
            parts.append(None)
        else:
            parts.append(_taken_apart(part, leaves))
    return kind, keys, parts


def _other(value: Any, leaves: list[Any]) -> Any:
    """The structure of what may be a leaf, or of a kind that torch knows."""
    found, structure = pytree.tree_flatten(value)
    leaves.extend(found)
    return None if structure.is_leaf() else (pytree, structure, len(found))


def _put_together(structure: Any, leaves: Iterator[Any]) -> Any:
    if structure is None:
        return next(leaves)
    kind, keys, parts = structure
    if kind is pytree:
        return pytree.tree_unflatten([next(leaves) for _ in range(parts)], keys)
    made = [next(leaves) if part is None else _put_together(part, leaves) for part in parts]
    if kind is dict:
        return dict(zip(keys, made, strict=True))
    if kind is list:
        return made
    return tuple(made) if kind is tuple else kind(*made)
