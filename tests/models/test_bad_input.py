"""What a language model refuses at the door, by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from .conftest import build, tokens


@pytest.mark.parametrize(
    ("changes", "error", "named"),
    [
        ({"dim": 15}, ValueError, "dim must be divisible by heads, got dim=15, heads=2"),
        ({"dim": 15, "attention": "vector-spin"}, ValueError, "divisible by heads"),
        ({"attention": "softmaxx"}, ValueError, "attention must be one of softmax, .*'softmaxx'"),
        ({"positions": "absolute"}, ValueError, "positions must be one of learned, .*'absolute'"),
        ({"solver": "newton"}, ValueError, "solver must be one of anderson"),
        ({"attention": None}, ValueError, "attention"),
        ({"depth": 0}, ValueError, "depth"),
        ({"num_tokens": 0}, ValueError, "num_tokens"),
        ({"max_seq_len": 2.0}, TypeError, "max_seq_len"),
        ({"dropout": 1.0}, ValueError, "dropout"),
        ({"dim": 6, "positions": "rotary"}, ValueError, "rotary"),
        ({"rotary_base": 0.5}, ValueError, "rotary_base"),
        ({"rotary_base": 100.0}, ValueError, "rotary_base is of rotary positions .*, got 100.0"),
        ({"steps": 0}, ValueError, "steps"),
        ({"solver_fwd_tolerance": 1.0}, TypeError, "solver_fwd_tolerance"),
        ({"adjoint": object()}, TypeError, "adjoint"),
        ({"initial_state": "zeros"}, TypeError, "initial_state"),
        ({"solver_fwd_m": [1]}, TypeError, "solver_fwd_m"),
        ({"head": 2}, TypeError, "unknown option 'head'; beside the model's own arguments"),
    ],
)
def test_wrong_settings(changes: dict, error: type[Exception], named: str) -> None:
    with pytest.raises(error, match=named):
        build(**changes)


@pytest.mark.parametrize(
    ("ids", "error", "named"),
    [
        (torch.zeros(2, 11, dtype=torch.long), ValueError, "max_seq_len = 10 tokens, got 11"),
        (torch.tensor([[0, 11]]), ValueError, "from 0 to 10, got 11"),
        (torch.tensor([[0, -1]]), ValueError, "from 0 to 10, got -1"),
        (torch.zeros(2, 3), TypeError, "integers.*float32"),
        (torch.zeros(2, 3, dtype=torch.bool), TypeError, "integers.*bool"),
        ([[1, 2]], TypeError, "integers.*list"),
        (torch.zeros(3, dtype=torch.long), ValueError, r"\(batch, tokens\), got \(3,\)"),
    ],
)
def test_wrong_ids(ids: Any, error: type[Exception], named: str) -> None:
    with pytest.raises(error, match=named):
        build()(ids)


def test_targets_that_are_no_tokens() -> None:
    """Half a token would count as the one below it."""
    model = build(depth=1)
    logits = torch.randn(2, 3, 11).double()
    for wrong in (tokens(2, 3) + 0.5, tokens(2, 3).bool()):
        with pytest.raises(TypeError, match="targets must be a tensor of integers"):
            model.loss(logits, wrong)
    for wrong in (11, -1):
        with pytest.raises(ValueError, match=f"targets must be from 0 to 10, got {wrong}"):
            model.loss(logits, torch.tensor([[0, 1, wrong]] * 2))
    assert torch.equal(model.loss(logits, tokens(2, 3)), model.loss(logits, tokens(2, 3).int()))


def test_what_are_no_solutions() -> None:
    model, ids = build(), tokens(2, 3)
    logits, solutions = model(ids, return_solution=True)
    for wrong in ((logits, solutions), logits, solutions[:1]):
        for look in (model.maps, model.couplings, model.spectral_radius, model.jacobian_penalty):
            with pytest.raises(ValueError, match="solutions must be the 2 that the model returns"):
                look(ids, wrong)


@pytest.mark.parametrize("depth", [1, 2])
def test_a_state_that_is_not_one_for_each_block(depth: int) -> None:
    model, ids = build(depth=depth), tokens(2, 3)
    _, solutions = model(ids, return_solution=True)
    # A solution can be unpacked into two, and a tensor into its samples.
    for wrong in (solutions[0], solutions[0].value, 0):
        with pytest.raises(TypeError, match=f"state must be a tuple or list of {depth}, .* got"):
            model(ids, state=wrong)


@pytest.mark.parametrize("name", ["state", "return_solution"])
@pytest.mark.parametrize("cache", [True, False])
def test_what_one_solve_takes_and_generation_does_not(name: str, cache: bool) -> None:
    with pytest.raises(TypeError, match=f"generate solves many times and takes no '{name}'"):
        build().generate(tokens(2, 3), 2, cache=cache, **{name: True})
