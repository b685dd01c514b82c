"""The plain training loop learns, the same way each time, and stays short."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from types import ModuleType

import pytest
import torch

from deep_implicit_attention.models import DeepImplicitAttentionTransformer
from deep_implicit_attention.training import windows

PATH = Path(__file__).parents[2] / "examples" / "shakespeare.py"


@pytest.fixture
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("shakespeare_example", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def trained(
    example: ModuleType, ids: torch.Tensor, **steps: int
) -> DeepImplicitAttentionTransformer:
    torch.manual_seed(0)
    model = DeepImplicitAttentionTransformer(
        num_tokens=5, max_seq_len=example.LENGTH, dim=16, heads=2, on_failure="ignore"
    )
    example.train(model, ids, 80, seed=0, rate=1e-2)
    return model.eval()


def test_it_learns_a_text_that_can_be_learned(
    example: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(example, "WARMUP", 5)
    monkeypatch.setattr(example, "LENGTH", 16)
    ids = torch.tensor([0, 1, 2, 3, 4]).repeat(40)  # each id follows from the one before it
    model = trained(example, ids)
    inputs, targets = windows(ids, 16)
    with torch.no_grad():
        loss = model.loss(model(inputs), targets)
        far = model.loss(model(inputs, steps=100), targets)
    assert loss < 0.1 * math.log(5)
    torch.testing.assert_close(far, loss, rtol=0, atol=1e-3)  # at equilibrium, not after 18 steps
    again = trained(example, ids)
    for one, other in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)


def test_it_is_short() -> None:
    lines = PATH.read_text().splitlines()
    assert len([line for line in lines if not line.startswith("# %%")]) < 60
