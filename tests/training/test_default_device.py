"""Data and draws are on the CPU, whatever the default device is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from deep_implicit_attention.models import DeepImplicitAttentionTransformer, SiteClassifier
from deep_implicit_attention.training import (
    ImageData,
    Language,
    Plan,
    Progress,
    Run,
    Schedule,
    Trainer,
    _classify,
    digits,
    text_data,
    train_classifier,
)

TEXT = 50 * "the quick brown fox. "


@pytest.mark.quick("images")
@pytest.mark.parametrize("kind", ["images", "text"])
def test_training_is_the_same(
    kind: str,
    small_model: Callable[..., SiteClassifier],
    problem: ImageData,
    plan: Callable[..., Schedule],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Not AdamW, whose counter torch 2.11 makes on the default device.
    monkeypatch.setattr(_classify, "_optimizer", lambda model, _: _optimizer(model))
    weights = []
    for device in ("cpu", "meta"):  # on which nothing has a value
        run = Run(tmp_path / device)
        run.start({})
        learn = _images if kind == "images" else _text
        weights.append(learn(device, run, small_model, problem, plan))
    for name, value in weights[0].items():
        assert torch.equal(value, weights[1][name]), name


def _optimizer(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)


def _images(
    device: str,
    run: Run,
    small_model: Callable[..., SiteClassifier],
    problem: ImageData,
    plan: Callable[..., Schedule],
) -> dict[str, Tensor]:
    model = small_model()
    moving = {"shift": 1.0, "rotation": 10.0, "zoom": 0.1}
    with torch.device(device), Progress(quiet=True) as progress:
        train_classifier(model, problem, plan(epochs=2, **moving), run, progress)
    return model.state_dict()


def _text(device: str, run: Run, *_: object) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = DeepImplicitAttentionTransformer(
        num_tokens=len(text_data(TEXT).vocabulary), max_seq_len=8, dim=8, heads=2
    )
    optimizer = _optimizer(model)
    with torch.device(device):
        task = Language(text_data(TEXT), 8, 4, relax=2, learn=2, evaluate_windows=4)
        settings = Plan(steps=6, evaluate_every=3, device="cpu")
        Trainer(model, optimizer, task, settings, run).train()
    return model.state_dict()


def test_digits_are_the_same() -> None:
    with torch.device("meta"):
        found = digits(0.1, 0)
    expected = digits(0.1, 0)
    for part in ("train", "validation", "test"):
        mine, theirs = getattr(found, part), getattr(expected, part)
        assert torch.equal(mine.images, theirs.images), part
        assert torch.equal(mine.labels, theirs.labels), part
