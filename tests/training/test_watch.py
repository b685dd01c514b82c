"""The signs of divergence: seen in curves that diverge, not in curves that learn."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from deep_implicit_attention.training import Watch


def signs(losses: list[float], failed: list[float] | None = None) -> list[tuple[int, str]]:
    watch = Watch()
    shares = failed or [0.0] * len(losses)
    told = [watch.step(loss, share) for loss, share in zip(losses, shares, strict=True)]
    return [(step, sign) for step, sign in enumerate(told) if sign]


@pytest.mark.parametrize("level", [2.3, -40.0])
@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_a_loss_that_falls_is_no_sign(level: float, noise: float) -> None:
    rng = np.random.default_rng(0)
    curve = level - abs(level) * 0.9 * (1 - np.exp(-np.arange(500) / 80))
    assert signs(list(curve + noise * rng.normal(size=500))) == []


def test_a_loss_that_stays_is_no_sign() -> None:
    rng = np.random.default_rng(0)
    assert signs(list(2.3 + 0.1 * rng.normal(size=500))) == []


def test_one_bad_batch_is_no_sign() -> None:
    losses = [math.exp(-k / 50) for k in range(300)]
    losses[200] = 5.0
    assert signs(losses) == []


def test_a_loss_that_rises_above_its_beginning() -> None:
    ((step, sign),) = signs([1 + 0.01 * k for k in range(60)])
    # The running mean lags by at most 19 steps behind 1 + 0.01 k, and must pass 1.1 · 1.095.
    assert 21 <= step <= 40
    assert "rises" in sign


def test_a_loss_that_loses_what_it_had_gained() -> None:
    fall = [2.0 - 0.01 * k for k in range(150)]
    rise = [0.5 + 0.02 * k for k in range(60)]
    ((step, _),) = signs(fall + rise)
    assert 150 < step < 210
    assert (fall + rise)[step] < 2.0  # before it is back where it began


@pytest.mark.parametrize("level", [2.3, -40.0])
def test_a_loss_that_blows_up_in_the_first_steps(level: float) -> None:
    rise = [level + abs(level) * factor for factor in (0.0, 1.0, 8.9, 9.1, 500.0)]
    ((step, sign),) = signs(rise)
    assert step == 3
    assert "jumps" in sign


def test_more_than_half_of_the_solves_fail() -> None:
    shares = [0.0] * 100 + [0.9] * 100
    ((step, sign),) = signs([1.0] * 200, shares)
    # 0.9 (1 − 0.95^n) > 1/2 for n ≥ 16
    assert step == 115
    assert "51%" in sign or "50%" in sign
    assert signs([1.0] * 200, [0.45] * 200) == []
    ((step, sign),) = signs([1.0] * 10, [0.0, *[1.0] * 9])
    assert step == 2  # two thirds after three steps
    assert "67% of the equilibria of the last 3 steps" in sign


def test_failed_solves_are_told_with_their_residual() -> None:
    watch = Watch()
    told = [watch.step(2.0, 1.0, residual) for residual in (3e-7, 4e-7, 5e-7)]
    assert told[:2] == [None, None]
    assert str(told[2]).endswith(
        "not found to the tolerance (the last with residuals up to 5.0e-07)"
    )


@pytest.mark.parametrize(
    ("radius", "told"), [(0.7, False), (0.97, False), (0.99, True), (3.0, True), (math.nan, True)]
)
def test_the_spectral_radius(radius: float, told: bool) -> None:
    watch = Watch()
    assert bool(watch.evaluation(radius)) == told
    assert watch.evaluation(radius) is None  # once


def test_it_goes_on_from_its_state() -> None:
    losses = [2.0 - 0.01 * k for k in range(150)] + [0.5 + 0.02 * k for k in range(60)]
    whole, first = Watch(), Watch()
    expected = [whole.step(loss, 0.0) for loss in losses]
    found = [first.step(loss, 0.0) for loss in losses[:160]]
    second = Watch(**json.loads(json.dumps(first.state())))
    found += [second.step(loss, 0.0) for loss in losses[160:]]
    assert found == expected
    assert second == whole
