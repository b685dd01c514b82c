"""What is measured of a language model, against all windows at once and block by block."""

from __future__ import annotations

import pytest
import torch

from deep_implicit_attention.models import DeepImplicitAttentionTransformer
from deep_implicit_attention.training import measure_language, windows


@pytest.fixture
def model() -> DeepImplicitAttentionTransformer:
    torch.manual_seed(0)
    return DeepImplicitAttentionTransformer(
        num_tokens=7, max_seq_len=6, dim=8, heads=2, depth=2
    ).double()


@pytest.fixture
def text() -> tuple[torch.Tensor, torch.Tensor]:
    """Five windows and what follows."""
    return windows(torch.randint(7, (31,), generator=torch.Generator().manual_seed(1)), 6)


@pytest.mark.parametrize("batch_size", [2, 3, 5])
def test_every_window_counts_as_much(
    batch_size: int, model: DeepImplicitAttentionTransformer, text: tuple
) -> None:
    inputs, targets = text
    with torch.no_grad():
        expected = model.loss(model(inputs), targets).item()
    found = measure_language(model, inputs, targets, batch_size)
    assert found["validation_windows"] == 5
    assert found["validation_loss"] == pytest.approx(expected, rel=1e-9)


def test_residuals_are_those_of_the_worse_block(
    model: DeepImplicitAttentionTransformer, text: tuple
) -> None:
    inputs, targets = text
    with torch.no_grad():
        _, solutions = model(inputs, return_solution=True)
    first, second = (solution.residual.tolist() for solution in solutions)
    worse = [max(pair) for pair in zip(first, second, strict=True)]
    found = measure_language(model, inputs, targets, 2)
    assert found["validation_worst_residual"] == pytest.approx(max(worse), rel=1e-6)
    assert found["validation_residual"] == pytest.approx(sum(worse) / 5, rel=1e-6)
