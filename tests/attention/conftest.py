"""The five mechanisms, small, in float64, with what each is called with."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from deep_implicit_attention.attention import (
    DEQAdaTAPMeanFieldAttention,
    DEQMeanFieldAttention,
    DEQMLPMixerAttention,
    DEQVanillaSoftmaxAttention,
    DEQVectorSpinAttention,
)
from deep_implicit_attention.deq import DEQModule

SITES, DIM = 4, 6


@dataclass
class Case:
    """A mechanism and the inputs of its layer beside x."""

    module: DEQModule
    inputs: tuple[Tensor, ...] = field(default=())


def _mask(batch: int) -> Tensor:
    mask = torch.ones(batch, SITES, dtype=torch.bool)
    mask[0, 2:] = False  # right padding
    mask[-1, 0] = False  # left padding: with causal a query without keys
    return mask


_MAKE = {
    "mean-field": lambda: Case(DEQMeanFieldAttention(SITES, DIM)),
    "mean-field-symmetric": lambda: Case(
        DEQMeanFieldAttention(
            SITES, DIM, weight_sym_internal=True, weight_sym_sites=True, lin_response=False
        )
    ),
    "softmax": lambda: Case(DEQVanillaSoftmaxAttention(SITES, DIM, heads=2)),
    "softmax-masked": lambda: Case(
        DEQVanillaSoftmaxAttention(SITES, DIM, heads=2, dim_head=5), (_mask(3),)
    ),
    "softmax-causal": lambda: Case(
        DEQVanillaSoftmaxAttention(SITES, DIM, heads=3, causal=True), (_mask(3),)
    ),
    "mixer": lambda: Case(DEQMLPMixerAttention(SITES, DIM)),
    "adatap": lambda: Case(DEQAdaTAPMeanFieldAttention(SITES, DIM)),
    "adatap-free": lambda: Case(
        DEQAdaTAPMeanFieldAttention(
            SITES, DIM, weight_sym_internal=False, weight_sym_sites=False, lin_response=False
        )
    ),
    "vector-spin": lambda: Case(DEQVectorSpinAttention(DIM, 2, beta=1.5)),
    "vector-spin-causal": lambda: Case(
        DEQVectorSpinAttention(DIM, 1, causal=True), (_mask(3),)
    ),
}  # fmt: skip


@pytest.fixture(params=list(_MAKE))
def case(request) -> Case:
    torch.manual_seed(0)
    made = _MAKE[request.param]()
    made.module.double()
    return made


@pytest.fixture
def x() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(3, SITES, DIM, dtype=torch.float64) / DIM**0.5
