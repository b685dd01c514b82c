"""Contexts taken apart and put together: the same leaves as torch's pytree finds."""

from collections import OrderedDict
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

from deep_implicit_attention.deq._tree import flatten, unflatten


class Pair(NamedTuple):
    one: Any
    other: Any


class Opaque:
    """No container to anybody."""


t, p = torch.ones(2), nn.Parameter(torch.zeros(3))
CASES = [
    (t,),
    (t, None, 3, "name", True, 2.5),
    ({"b": t, "a": [p, (t, Pair(p, None))]}, Opaque()),
    (OrderedDict(x=t, y=(p, p)), torch.float32),
    ((), [], {}, Pair((), t)),
    (Pair(Pair(t, p), [Opaque(), {"k": Opaque()}]),),
]


@pytest.mark.parametrize("value", CASES, ids=range(len(CASES)))
def test_leaves_and_back(value):
    leaves, structure = flatten(value)
    expected = pytree.tree_leaves(value)
    assert len(leaves) == len(expected)
    assert all(mine is theirs for mine, theirs in zip(leaves, expected, strict=True))
    again, same = flatten(unflatten(leaves, structure))
    assert same == structure
    assert all(mine is theirs for mine, theirs in zip(again, leaves, strict=True))
    kinds = [type(part) for part in value]
    assert [type(part) for part in unflatten(leaves, structure)] == kinds
    replaced = unflatten(list(range(len(leaves))), structure)
    assert pytree.tree_leaves(replaced) == list(range(len(leaves)))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ((t,), [t]),
        ((t, t), ((t, t),)),
        (Pair(t, t), (t, t)),
        ({"a": t}, {"b": t}),
        (OrderedDict(a=t), {"a": t}),
        ((t, (t,)), ((t,), t)),
    ],
)
def test_other_structures_differ(one, other):
    assert flatten(one)[1] != flatten(other)[1]
