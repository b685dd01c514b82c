"""Settings out of range are refused, and the learning rate is the published one."""

from __future__ import annotations

import math
from typing import Any

import pytest

from deep_implicit_attention.training import Plan


def test_rates_rise_linearly_and_fall_like_a_cosine() -> None:
    plan = Plan(steps=110, evaluate_every=1, warmup=10 / 110)
    rates = [plan.rate(step) for step in range(110)]
    assert rates[0] == 0.01
    assert rates[1:11] == pytest.approx([k / 10 for k in range(1, 11)])
    for step in range(10, 110):
        angle = math.pi * (step - 10) / 100
        assert rates[step] == pytest.approx(math.cos(angle / 2) ** 2)  # (1 + cos a)/2


def test_without_warmup_the_first_rate_is_the_largest() -> None:
    plan = Plan(steps=4, evaluate_every=1, warmup=0.0)
    half = math.sqrt(0.5)
    expected = [1.0, (1 + half) / 2, 0.5, (1 - half) / 2]
    assert [plan.rate(k) for k in range(4)] == pytest.approx(expected)


def test_the_last_step_is_evaluated_and_every_evaluation_is_kept() -> None:
    plan = Plan(steps=10, evaluate_every=4, checkpoint_every=3)
    assert [k for k in range(1, 11) if plan.evaluation_due(k)] == [4, 8, 10]
    assert [k for k in range(1, 11) if plan.checkpoint_due(k)] == [3, 4, 6, 8, 9, 10]
    seldom = Plan(steps=10, evaluate_every=4)
    assert [k for k in range(1, 11) if seldom.checkpoint_due(k)] == [4, 8, 10]


@pytest.mark.parametrize(
    "change",
    [
        {"steps": 0},
        {"evaluate_every": 0},
        {"accumulate": 0},
        {"keep": 0},
        {"patience": 0},
        {"checkpoint_every": 0},
        {"seed": -1},
        {"warmup": 1.0},
        {"clip": 0.0},
        {"clip": math.nan},
        {"ema": 1.0},
        {"ema": -0.1},
        {"precision": "fp8"},
        {"device": "cuda:7"},
        {"on_divergence": "ignore"},
    ],
)
def test_settings_out_of_range(change: dict[str, Any]) -> None:
    (name,) = change
    with pytest.raises(ValueError, match=name):
        Plan(**{"steps": 1, "evaluate_every": 1, **change})
