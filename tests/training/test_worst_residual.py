"""A residual that is no number is the worst there is, wherever residuals are summed up."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deep_implicit_attention.solvers import picard
from deep_implicit_attention.training import Outcome, Run, measure

Build = Callable[..., Any]


@pytest.mark.parametrize("broken", [0, 3, 5])
@pytest.mark.parametrize("layer", [0, 1])
def test_no_residual_is_worse_than_one_that_is_no_number(
    broken: int, layer: int, small_model: Build, quadrants: Callable, monkeypatch: Any
) -> None:
    """Whichever image it is of, in whichever layer and batch, and whatever comes after it."""
    model, split = small_model(), quadrants(6, 3)
    split.images[broken, 0, 0, 0] = 77.0
    forward = model.forward

    def two_layers(images: Tensor, **options: Any) -> Any:
        scores, (solution,) = forward(images, **options)
        mark = torch.where(images[:, 0, 0, 0] == 77.0, torch.nan, 0.5)
        other = replace(solution, residual=torch.full_like(mark, 0.25))
        solutions = [other, other]
        solutions[layer] = replace(solution, residual=mark)
        return scores, tuple(solutions)

    monkeypatch.setattr(model, "forward", two_layers)
    for batch_size in (1, 2, 6):
        assert math.isnan(measure(model, split, batch_size).residual)
    split.images[broken, 0, 0, 0] = 0.0
    assert measure(model, split, 2).residual == 0.5


@pytest.mark.parametrize("layer", [0, 1])
def test_a_residual_that_is_no_number_is_the_worst_of_its_steps(
    layer: int, regression: Build, trainer: Build, tmp_path: Path
) -> None:
    """It is null in the metrics, and that of the next steps is a number again."""
    solved = picard(lambda z: z / 2, torch.ones(1, 1))

    class Unsolved(regression):  # type: ignore[valid-type, misc]
        count = 0

        def loss(self, model: nn.Module, batch: Any) -> Outcome:
            self.count += 1
            found = [0.25, 0.25]
            found[layer] = math.nan if self.count == 2 else self.count / 2
            solutions = tuple(replace(solved, residual=torch.tensor([r])) for r in found)
            return replace(super().loss(model, batch), solutions=solutions)

    trainer(Unsolved()).train()
    assert [r["residual"] for r in Run(tmp_path).metrics()] == [None, 3.0, 4.5, 6.0]
