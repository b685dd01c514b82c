"""How many numbers a model really has."""

from __future__ import annotations

from torch import nn


def count_params(model: nn.Module) -> int:
    """Effective number of parameters: couplings count as their `count_params()` says.

    Symmetric, traceless couplings are stored in full but have fewer free entries; everything else
    counts once, shared or not.
    """
    total = sum(p.numel() for p in model.parameters())
    for module in model.modules():
        weight = getattr(module, "_weight", None)
        if isinstance(weight, nn.Parameter) and hasattr(module, "count_params"):
            total += module.count_params() - weight.numel()  # type: ignore[operator]
    return total
