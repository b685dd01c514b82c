"""One thread, global torch settings put back, and a small problem that can be learned."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from deep_implicit_attention.models import SiteClassifier
from deep_implicit_attention.training import ImageData, Schedule, Split


@pytest.fixture(autouse=True)
def settings_restored() -> Iterator[None]:
    threads = torch.get_num_threads()
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)


@pytest.fixture
def small_model() -> Callable[..., SiteClassifier]:
    """Five sites, four classes of 8×8 images."""

    def build(seed: int = 0, **changes: Any) -> SiteClassifier:
        torch.manual_seed(seed)
        options: dict[str, Any] = {
            "image_size": 8,
            "num_classes": 4,
            "widths": (8, 8),
            "strides": (2, 2),
            "dim": 8,
            "on_failure": "ignore",
        }
        return SiteClassifier(**{**options, **changes})

    return build


@pytest.fixture
def quadrants() -> Callable[..., Split]:
    """Noise with one bright quadrant; the label says which."""

    def make(count: int, seed: int) -> Split:
        generator = torch.Generator().manual_seed(seed)
        labels = torch.randint(4, (count,), generator=generator)
        images = 0.5 * torch.randn(count, 1, 8, 8, generator=generator)
        for image, label in zip(images, labels.tolist(), strict=True):
            row, column = divmod(label, 2)
            image[0, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] += 1
        return Split(images, labels)

    return make


@pytest.fixture
def problem(quadrants: Callable[..., Split]) -> ImageData:
    """The quadrants; training must not look at the test split, so it has none."""
    return ImageData(quadrants(96, 0), quadrants(40, 1), None, 0.0)  # type: ignore[arg-type]


@pytest.fixture
def plan() -> Callable[..., Schedule]:
    """A schedule without augmentation."""

    def make(**changes: Any) -> Schedule:
        options: dict[str, Any] = {
            "epochs": 2,
            "batch_size": 16,
            "learning_rate": 1e-2,
            "coupling_rate": 0.3,
            "weight_decay": 0.01,
            "smoothing": 0.0,
            "shift": 0.0,
            "rotation": 0.0,
            "zoom": 0.0,
            "warmup": 0.1,
        }
        return Schedule(**{**options, **changes})

    return make
