"""The moving average of the weights against its closed form."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from deep_implicit_attention.training import MovingAverage


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.9])
def test_the_average_is_the_weighted_sum_of_the_history(decay: float) -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 2).double()
    average = MovingAverage(model, decay)
    history = [model.weight.detach().clone()]
    for step in range(1, 8):
        with torch.no_grad():
            model.weight.copy_(torch.randn(2, 3))
        history.append(model.weight.detach().clone())
        average.update(step)
    # e_n = Π_j d_j θ_0 + Σ_k (1 − d_k) Π_{j>k} d_j θ_k
    decays = [min(decay, n / (9 + n)) for n in range(8)]
    assert decay < 0.4 or decays[1] == 0.1  # the start is forgotten soon
    kept = [math.prod(decays[k + 1 :]) for k in range(8)]
    expected = kept[0] * history[0]
    for k in range(1, 8):
        expected = expected + (1 - decays[k]) * kept[k] * history[k]
    with average.in_model():
        torch.testing.assert_close(model.weight, expected, rtol=1e-14, atol=1e-14)
    assert torch.equal(model.weight, history[-1])


def test_running_statistics_are_averaged_as_the_weights_are() -> None:
    torch.manual_seed(0)
    model = nn.BatchNorm1d(3).double()
    average = MovingAverage(model, 0.6)
    expected = torch.zeros(3, dtype=torch.float64)
    for step in range(100, 105):
        model(torch.randn(8, 3, dtype=torch.float64) + step)
        average.update(step)
        assert model.running_mean is not None
        expected = 0.6 * expected + 0.4 * model.running_mean
    own = {name: value.clone() for name, value in model.state_dict().items()}
    with average.in_model():
        torch.testing.assert_close(model.running_mean, expected, rtol=1e-14, atol=1e-14)
        assert model.num_batches_tracked == 5  # a count has no average
    assert all(torch.equal(value, own[name]) for name, value in model.state_dict().items())


def test_the_weights_come_back_after_an_error() -> None:
    model = nn.Linear(2, 2)
    average = MovingAverage(model, 0.5)
    before = model.weight.detach().clone()
    with torch.no_grad():
        model.weight += 1
    inside = []

    def fail() -> None:
        with average.in_model():
            inside.append(model.weight.detach().clone())
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert torch.equal(inside[0], before)
    assert torch.equal(model.weight, before + 1)


def test_assign_starts_the_average_anew() -> None:
    model = nn.Linear(2, 2)
    average = MovingAverage(model, 0.5)
    with torch.no_grad():
        model.weight += 1
    average.assign()
    now = model.weight.detach().clone()
    with torch.no_grad():
        model.weight.zero_()
    with average.in_model():
        assert torch.equal(model.weight, now)


def test_complex_parameters_are_averaged_as_real_ones_are() -> None:
    model = nn.Module()
    model.weight = nn.Parameter(torch.tensor([1 + 2j]))
    average = MovingAverage(model, 0.5)
    nn.init.zeros_(model.weight)
    average.update(9)  # d = 9 / 18
    with average.in_model():
        assert model.weight.item() == 0.5 + 1j
    assert model.weight.item() == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_average_of_narrow_weights_moves(dtype: torch.dtype) -> None:
    """Each step by less than their resolution."""
    model = nn.Linear(1, 1, bias=False).to(dtype)
    nn.init.constant_(model.weight, 1.0)
    average = MovingAverage(model, 0.999)
    nn.init.constant_(model.weight, 1.5)
    for step in range(10_000, 18_000):
        average.update(step)
    assert average.wide()["weight"].item() == pytest.approx(1.5, abs=1e-3)
    with average.in_model():
        assert model.weight.dtype == dtype
        assert model.weight.item() == 1.5
    assert not MovingAverage(nn.Linear(1, 1), 0.9).wide()


@pytest.mark.parametrize("decay", [1.0, -0.1, math.nan])
def test_decays_that_are_none(decay: float) -> None:
    with pytest.raises(ValueError, match="decay"):
        MovingAverage(nn.Linear(2, 2), decay)
