"""Small models of images, and what the tests of several files know of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from deep_implicit_attention.models import DeepImplicitAttentionViT

from .conftest import TIGHT

FREE = ("mean-field", "mlp-mixer", "adaptive-tap")
SOFTMAX = ("softmax", "vector-spin")
ATTENTION = (*FREE, *SOFTMAX)


def build(attention: str = "softmax", seed: int = 0, **changes: Any) -> DeepImplicitAttentionViT:
    """A model for images (2, 6, 6) of 2 × 2 patches of 3 × 3 pixels."""
    torch.manual_seed(seed)
    options = {"image_size": 6, "patch_size": 3, "num_classes": 5, "dim": 8, "channels": 2, **TIGHT}
    if attention in SOFTMAX:
        options["heads"] = 2
    model = DeepImplicitAttentionViT(**{**options, "attention": attention, **changes}).double()
    for name, p in model.named_parameters():  # gains and offsets that would not show at 1 and 0
        if "norm" in name or name.startswith("head.0"):
            p.data.add_(0.2 * torch.randn_like(p))
    if isinstance(model.positions, torch.nn.Parameter):
        model.positions.data.mul_(50)
    return model


def images(batch: int = 3, seed: int = 1, size: int = 6, channels: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, channels, size, size, dtype=torch.float64, generator=generator)


def patches(batch: Tensor, size: int) -> Tensor:
    """`(B, patches, C · size²)`, row by row, cut out one by one."""
    side = batch.shape[-1] // size
    cut = [
        batch[:, :, r * size : (r + 1) * size, c * size : (c + 1) * size].flatten(1)
        for r in range(side)
        for c in range(side)
    ]
    return torch.stack(cut, dim=1)


def parts(state: Any) -> tuple[Tensor, ...]:
    return (state,) if isinstance(state, Tensor) else state


def mean(state: Any) -> Tensor:
    return parts(state)[0]
