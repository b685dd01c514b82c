"""One thread, global torch settings put back, and a small problem that can be learned."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deep_implicit_attention.models import SiteClassifier
from deep_implicit_attention.training import (
    ImageData,
    Outcome,
    Plan,
    Run,
    Schedule,
    Split,
    Task,
    Trainer,
)


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


class Regression(Task):
    """Noisy linear regression; 48 rows in batches of 8, every row shifted at random."""

    def __init__(self, noise: float = 0.1) -> None:
        generator = torch.Generator().manual_seed(7)
        self.x = torch.randn(48, 3, generator=generator, dtype=torch.float64)
        self.y = self.x @ torch.tensor([[1.0], [-2.0], [0.5]], dtype=torch.float64)
        self.batches, self.noise = 6, noise

    def batch(self, epoch: int, index: int, generator: torch.Generator) -> dict[str, Tensor]:
        if index == 0:
            self.order = torch.randperm(48, generator=generator)
        rows = self.order[8 * index : 8 * index + 8]
        shift = torch.randn(8, 3, generator=generator, dtype=torch.float64)
        return {"x": self.x[rows] + self.noise * shift, "y": self.y[rows]}

    def state(self) -> dict[str, Tensor]:
        return {"order": self.order}

    def load_state(self, state: dict[str, Tensor]) -> None:
        self.order = state["order"]

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Outcome:
        error = model(batch["x"]) - batch["y"]
        return Outcome(error.square().mean(), {"error": error.abs().mean()})

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        torch.rand(3)  # an evaluation may use random numbers
        with torch.no_grad():
            return {"validation_loss": (model(self.x) - self.y).square().mean().item()}


@pytest.fixture
def regression() -> type[Regression]:
    return Regression


@pytest.fixture
def network() -> Callable[..., nn.Module]:
    """Two layers with dropout between, float64."""

    def build(seed: int = 0, dropout: float = 0.1) -> nn.Module:
        torch.manual_seed(seed)
        layers = (nn.Linear(3, 5), nn.Dropout(dropout), nn.Tanh(), nn.Linear(5, 1))
        return nn.Sequential(*layers).double()

    return build


@pytest.fixture
def trainer(tmp_path: Path, network: Callable[..., nn.Module]) -> Callable[..., Trainer]:
    """A trainer of the network on a task, in `tmp_path`, with AdamW."""

    def build(
        task: Task,
        model: nn.Module | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        **settings: Any,
    ) -> Trainer:
        model = network() if model is None else model
        run = Run(tmp_path)
        if not run.is_started():
            run.start({})
        if optimizer is None:
            optimizer = torch.optim.AdamW(model.parameters(), lr=0.02, weight_decay=0.1)
        options = {"steps": 12, "evaluate_every": 3, "device": "cpu", **settings}
        return Trainer(model, optimizer, task, Plan(**options), run)

    return build
