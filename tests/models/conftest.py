"""Small language models, and one thread, since models here are too small for more."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from deep_implicit_attention.models import DeepImplicitAttentionTransformer


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@contextmanager
def default_type(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


TIGHT = {
    "solver_fwd_tol": 1e-11,
    "solver_fwd_max_iter": 300,
    "solver_bwd_tol": 1e-11,
    "solver_bwd_max_iter": 300,
    "on_failure": "raise",
}


def build(seed: int = 0, **changes: Any) -> DeepImplicitAttentionTransformer:
    torch.manual_seed(seed)
    options = {"num_tokens": 11, "max_seq_len": 10, "dim": 16, "depth": 2, "heads": 2, **TIGHT}
    return DeepImplicitAttentionTransformer(**{**options, **changes}).double()


def tokens(batch: int = 3, length: int = 7, seed: int = 1) -> Tensor:
    return torch.randint(11, (batch, length), generator=torch.Generator().manual_seed(seed))
