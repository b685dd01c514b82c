"""Augmentation, measured: what map moved the pixels, and what came in from outside."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from deep_implicit_attention.training import Schedule, augment

SIZE = 16


def sampled_maps(schedule: Schedule, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The maps p ↦ A p + t from places in the new image to places in the old one, in pixels.

    Bilinear interpolation is exact on an image that holds its own coordinates, so the new image
    says where each pixel came from. Places count from the centre.
    """
    place = torch.arange(SIZE) - (SIZE - 1) / 2
    across = place.expand(SIZE, SIZE)
    sources = []
    for ramp in (across, across.T):
        torch.manual_seed(7)
        moved = augment(ramp.expand(count, 1, SIZE, SIZE), schedule, 0.0)
        sources.append(moved[:, 0, 6:10, 6:10].reshape(count, 16).double())
    inner = place[6:10].double()
    grid = torch.stack([inner.repeat(4), inner.repeat_interleave(4), torch.ones(16)], dim=1)
    a, t = [], []
    for x, y in zip(*sources, strict=True):
        target = torch.stack([x, y], dim=1)
        solution = torch.linalg.lstsq(grid, target).solution
        torch.testing.assert_close(grid @ solution, target, atol=1e-4, rtol=0)
        a.append(solution[:2].T.numpy())
        t.append(solution[2].numpy())
    return np.array(a), np.array(t)


@pytest.mark.parametrize(
    "changes",
    [
        {"shift": 2.5},
        {"rotation": 25.0},
        {"zoom": 0.15},
        {"shift": 1.0, "rotation": 12.0, "zoom": 0.1},
    ],
)
def test_random_similarities_within_their_bounds(
    changes: dict[str, float], plan: Callable[..., Schedule]
) -> None:
    a, t = sampled_maps(plan(**changes), 200)
    scale = np.sqrt(np.linalg.det(a))
    np.testing.assert_allclose(a @ a.mT, scale[:, None, None] ** 2 * np.eye(2), atol=1e-4)
    angle = np.degrees(np.arctan2(a[:, 1, 0], a[:, 0, 0]))
    limits = {name: changes.get(name, 0.0) for name in ("shift", "rotation", "zoom")}
    for drawn, limit in (
        (t[:, 0], limits["shift"] * (1 + limits["zoom"])),
        (t[:, 1], limits["shift"] * (1 + limits["zoom"])),
        (angle, limits["rotation"]),
        (scale - 1, limits["zoom"]),
    ):
        assert np.abs(drawn).max() <= limit * 1.001 + 1e-3
        if limit:
            assert drawn.max() > 0.85 * limit
            assert drawn.min() < -0.85 * limit
            assert abs(drawn.mean()) < 0.2 * limit
            assert drawn.std() == pytest.approx(limit / math.sqrt(3), rel=0.2)  # uniform
    if limits["shift"]:
        assert abs(np.corrcoef(t.T)[0, 1]) < 0.25  # the directions are drawn apart


@pytest.mark.parametrize("background", [0.0, -1.7])
@pytest.mark.parametrize("size", [6, 9])
@pytest.mark.parametrize("pixels", [1, 2])
@pytest.mark.parametrize("draw", [0.0, 1.0])
def test_whole_shifts_roll_the_image_and_fill_with_background(
    draw: float,
    pixels: int,
    size: int,
    background: float,
    plan: Callable[..., Schedule],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    images = torch.randn(3, 1, size, size, generator=torch.Generator().manual_seed(0))

    def extreme(*shape: Any, **_: Any) -> Tensor:
        return torch.full(shape, draw)

    monkeypatch.setattr(torch, "rand", extreme)
    moved = augment(images, plan(shift=float(pixels)), background)
    step = -pixels if draw else pixels  # the largest draw looks to the right and below
    expected = torch.roll(images, (step, step), (2, 3))
    gone = slice(step, None) if draw else slice(None, step)
    expected[..., gone, :] = background
    expected[..., gone] = background
    torch.testing.assert_close(moved, expected, atol=1e-5, rtol=0)


def test_a_right_angle_turns_the_image(
    plan: Callable[..., Schedule], monkeypatch: pytest.MonkeyPatch
) -> None:
    images = torch.randn(2, 1, 5, 5, generator=torch.Generator().manual_seed(0))
    turned = []
    for draw in (0.0, 1.0):
        with monkeypatch.context() as patch:
            patch.setattr(torch, "rand", lambda *shape, draw=draw, **_: torch.full(shape, draw))
            turned.append(augment(images, plan(rotation=90.0), 0.3))
    sides = [images.rot90(1, (2, 3)), images.rot90(-1, (2, 3))]
    if not torch.allclose(turned[0], sides[0], atol=1e-5):
        sides.reverse()
    for found, expected in zip(turned, sides, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_no_augmentation_is_the_identity(plan: Callable[..., Schedule]) -> None:
    images = torch.randn(4, 1, 7, 7)
    assert torch.equal(augment(images, plan(), -0.4), images)


def test_background_stays_background(plan: Callable[..., Schedule]) -> None:
    torch.manual_seed(0)
    images = torch.full((20, 1, 8, 8), -0.42)
    before = images.clone()
    moved = augment(images, plan(shift=3.0, rotation=40.0, zoom=0.4), -0.42)
    torch.testing.assert_close(moved, before)
    assert torch.equal(images, before)
    moved = augment(images, plan(shift=3.0), 5.0)  # another fill comes in at the edges
    assert moved[:, 0, 3:5, 3:5].max().item() == pytest.approx(-0.42, abs=1e-5)
    assert moved.max().item() > 4


def test_every_image_moves_on_its_own(plan: Callable[..., Schedule]) -> None:
    torch.manual_seed(0)
    image = torch.randn(1, 1, 8, 8)
    moved = augment(image.expand(10, 1, 8, 8), plan(shift=1.0), 0.0)
    distance = torch.cdist(moved.flatten(1), moved.flatten(1)) + torch.eye(10)
    assert distance.min() > 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("height", "width"), [(8, 20), (20, 12), (16, 16)])
def test_an_image_that_is_not_square_moves_as_within_a_square(
    height: int, width: int, dtype: torch.dtype, plan: Callable[..., Schedule]
) -> None:
    torch.manual_seed(3)
    images = torch.randn(6, 2, height, width, dtype=dtype)
    high, wide = (20 - height) // 2, (20 - width) // 2
    square = torch.nn.functional.pad(images, (wide, wide, high, high))
    schedule = plan(shift=3.0, rotation=40.0, zoom=0.2)
    moved, whole = (
        augment(some, schedule, 0.0, torch.Generator().manual_seed(5)) for some in (images, square)
    )
    assert moved.dtype == dtype
    inner = whole[..., high : high + height, wide : wide + width]
    torch.testing.assert_close(moved, inner, atol=1e-5, rtol=0)
