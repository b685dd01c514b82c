"""The plain training loop learns, the same way each time, and stays short."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch

from benchmarks.horizon import row
from deep_implicit_attention.models import DeepImplicitAttentionViT
from deep_implicit_attention.training import ImageData, Split

PATH = Path(__file__).parents[2] / "examples" / "mnist.py"


@pytest.fixture
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("mnist_example", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def data() -> ImageData:
    """Images of 8 × 8 pixels with a bright quarter, which is the label."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(400) % 4
    images = 0.5 * torch.randn(400, 1, 8, 8, generator=generator)
    for label in range(4):
        row, column = 4 * (label // 2), 4 * (label % 2)
        images[labels == label, :, row : row + 4, column : column + 4] += 2
    every = Split(images, labels)
    parts = [every[torch.arange(*ends)] for ends in ((0, 240), (240, 320), (320, 400))]
    return ImageData(*parts, background=0.0)


def trained(example: ModuleType, data: ImageData, out: Path) -> DeepImplicitAttentionViT:
    torch.manual_seed(0)
    model = DeepImplicitAttentionViT(
        image_size=8, patch_size=4, num_classes=4, dim=8, channels=1, stem="convolution"
    )
    example.train(model, data, 6, out)
    return DeepImplicitAttentionViT.from_pretrained(out)


def test_it_learns_and_keeps_the_best_weights(
    example: ModuleType,
    data: ImageData,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(example, "BATCH", 20)
    monkeypatch.setattr(example, "RATE", 2e-2)
    monkeypatch.setattr(example, "BLOCK_RATE", 5e-3)
    model = trained(example, data, tmp_path / "a")
    said = capsys.readouterr().out.splitlines()
    losses = [line.split()[3] for line in said]
    assert len(losses) == 6
    assert f"{example.report('kept', model, data.validation):.4f}" == min(losses, key=float)
    assert example.report("test", model, data.test) < 0.5
    assert "100.00%" in row(model, data.test, None)
    again = trained(example, data, tmp_path / "b")
    for one, other in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)


def test_it_is_short() -> None:
    lines = PATH.read_text().splitlines()
    assert len([line for line in lines if not line.startswith("# %%")]) < 60
