"""`DeepImplicitAttentionViT` kept, exported and misused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from deep_implicit_attention.models import DeepImplicitAttentionViT

from .conftest import default_type
from .vit import ATTENTION, build, images


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"attention": "mlp-mixer", "depth": 2, "weight_norm": True, "dropout": 0.2},
        {"attention": "vector-spin", "positions": "rotary", "heads": 1, "pooling": "mean"},
        {"attention": "mean-field", "stem": "convolution", "widths": [4, 6, 8]},
        {"attention": "adaptive-tap", "positions": "sinusoidal", "channels": 1},
        {"steps": 3, "solver": "picard"},
    ],
)
def test_round_trip(tmp_path: Path, changes: dict[str, Any]) -> None:
    model = build(**{"patch_size": 2, **changes})
    batch = images(channels=changes.get("channels", 2))
    model(batch)  # moves the statistics of batch normalisation
    model.eval().save_pretrained(tmp_path)
    again = DeepImplicitAttentionViT.from_pretrained(tmp_path)
    other = build(**{"patch_size": 2, **changes}, seed=5).eval()
    with torch.no_grad():
        logits = model(batch)
        assert torch.equal(again(batch), logits)
        assert not torch.allclose(other(batch), logits)
        other.load_state_dict(model.state_dict())
        assert torch.equal(other(batch), logits)
    config = json.loads((tmp_path / "config.json").read_text())
    for name, value in changes.items():
        assert config[name] == value


@pytest.mark.parametrize("pooling", ["token", "mean"])
def test_made_on_the_meta_device_and_filled_later(pooling: str) -> None:
    model = build(positions="sinusoidal", pooling=pooling).eval()
    with torch.device("meta"):
        empty = build(positions="sinusoidal", pooling=pooling).eval()
    empty.to_empty(device="cpu").load_state_dict(model.state_dict())
    assert torch.equal(empty.positions, model.positions)
    assert torch.equal(empty(images()), model(images()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_sinusoids_have_the_default_type(dtype: torch.dtype) -> None:
    options: dict[str, Any] = {"image_size": 6, "patch_size": 3, "num_classes": 2, "dim": 8}
    with default_type(dtype):
        model = DeepImplicitAttentionViT(**options, positions="sinusoidal")
    later = DeepImplicitAttentionViT(**options, positions="sinusoidal").to(dtype)
    assert torch.equal(model.positions, later.positions)
    assert model(torch.randn(2, 3, 6, 6, dtype=dtype)).dtype == model.positions.dtype == dtype


def test_loss() -> None:
    logits = torch.randn(3, 5, dtype=torch.float64)
    labels = torch.tensor([4, 0, 2])
    p = logits.softmax(dim=1).log()
    nats = -torch.stack([p[row, label] for row, label in enumerate(labels)]).mean()
    torch.testing.assert_close(build().loss(logits, labels), nats)
    smooth = 0.9 * nats - 0.1 * p.mean()
    torch.testing.assert_close(build().loss(logits, labels, 0.1), smooth)


@pytest.mark.parametrize(
    ("changes", "error", "named"),
    [
        ({"image_size": 7}, ValueError, "multiple of patch_size, got 7 and 3"),
        ({"dim": 9}, ValueError, "dim must be divisible by heads, got dim=9, heads=2"),
        ({"dim": 10, "heads": None}, ValueError, "by default, got dim=10: choose another dim"),
        ({"dim": 4, "attention": "vector-spin"}, ValueError, "at least 3 components a head"),
        ({"attention": "meanfield"}, ValueError, "attention must be one of mean-field, .*'meanf"),
        ({"stem": "conv"}, ValueError, "stem must be one of patch, convolution, got 'conv'"),
        ({"pooling": "max"}, ValueError, "pooling must be one of token, mean, got 'max'"),
        ({"positions": "absolute"}, ValueError, "positions must be one of learned, .*'absolute'"),
        ({"solver": "newton"}, ValueError, "solver must be one of anderson"),
        ({"attention": "mean-field", "positions": "rotary"}, ValueError, "mean-field takes learn"),
        ({"attention": "mlp-mixer", "heads": 2}, ValueError, "mlp-mixer has none"),
        ({"attention": "adaptive-tap", "weight_norm": True}, ValueError, "adaptive-tap has none"),
        ({"dim": 6, "positions": "rotary"}, ValueError, "rotary needs an even width"),
        ({"widths": (4,)}, ValueError, "stem 'patch' has none"),
        ({"stem": "convolution", "patch_size": 1, "widths": ()}, ValueError, "at least 1 entries"),
        ({"stem": "convolution", "widths": (4,)}, ValueError, "at least 2 entries"),
        ({"stem": "convolution", "widths": (4, 0)}, ValueError, "widths"),
        ({"stem": "convolution", "widths": 8}, TypeError, "widths must be a list or tuple"),
        ({"stem": "convolution", "image_size": 18}, ValueError, "image_size 18 .* to 5"),
        ({"heads": 0}, ValueError, "heads"),
        ({"depth": 0}, ValueError, "depth"),
        ({"channels": 0}, ValueError, "channels"),
        ({"num_classes": 1.5}, TypeError, "num_classes"),
        ({"dropout": 1.0}, ValueError, "dropout"),
        ({"steps": 0}, ValueError, "steps"),
        ({"solver_fwd_tolerance": 1.0}, TypeError, "solver_fwd_tolerance"),
        ({"adjoint": object()}, TypeError, "adjoint"),
    ],
)
def test_wrong_settings(changes: dict[str, Any], error: type[Exception], named: str) -> None:
    if changes.get("attention") == "meanfield":
        changes = {**changes, "heads": None}
    with pytest.raises(error, match=named):
        build(**changes)


@pytest.mark.parametrize(
    ("wrong", "error", "named"),
    [
        (torch.zeros(2, 2, 6, 5), ValueError, r"\(batch, 2, 6, 6\), got \(2, 2, 6, 5\)"),
        (torch.zeros(2, 3, 6, 6), ValueError, r"got \(2, 3, 6, 6\)"),
        (torch.zeros(2, 6, 6), ValueError, r"got \(2, 6, 6\)"),
        (torch.zeros(2, 2, 6, 6, dtype=torch.uint8), TypeError, "floating point.*uint8"),
        ([[0.0]], TypeError, "floating point.*list"),
        (torch.zeros(2, 2, 6, 6), TypeError, "dtype torch.float32, the model has torch.float64"),
        (torch.zeros(2, 2, 6, 6, device="meta").double(), ValueError, "on meta, the model is on"),
    ],
)
def test_wrong_images(wrong: Any, error: type[Exception], named: str) -> None:
    with pytest.raises(error, match=named):
        build()(wrong)


@pytest.mark.parametrize("attention", ATTENTION)
def test_narrow_and_empty_batches(attention: str) -> None:
    model = build(attention, stem="convolution", solver_fwd_tol=1e-4, solver_bwd_tol=1e-4)
    model = model.float().eval()
    batch = images().float()
    with torch.no_grad():
        exact = model(batch)
        assert model(batch[:0]).shape == (0, 5)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            torch.testing.assert_close(model(batch).float(), exact, rtol=0, atol=0.05)
        narrow = model.bfloat16()(batch.bfloat16())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            torch.testing.assert_close(model(batch).float(), exact, rtol=0, atol=0.05)
    assert narrow.dtype == torch.bfloat16
    torch.testing.assert_close(narrow.float(), exact, rtol=0, atol=0.05)


def test_exports_at_a_horizon() -> None:
    model = build(steps=3).eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (images(),), dynamic_shapes=({0: batch},)).module()
    other = images(seed=9)
    with torch.no_grad():
        for some in (other, other[:1]):
            torch.testing.assert_close(program(some), model(some))
