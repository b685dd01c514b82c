"""A small nonlinear map whose fixed point and gradients other code can find, too."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn


def tanh_map(z: Tensor, w: Tensor, x: Tensor) -> Tensor:
    return torch.tanh(z @ w.T + x)


class TanhModule(nn.Module):
    """The same map with its weight as a parameter; also the smallest user-written DEQ module."""

    def __init__(self, w: Tensor) -> None:
        super().__init__()
        self.w = nn.Parameter(w.clone())

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return tanh_map(z, self.w, x)

    def initial_state(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)

    def update(self, z: Tensor, context: Tensor) -> Tensor:
        return self(z, context)


def unroll(w: Tensor, x: Tensor, steps: int = 500) -> Tensor:
    z = torch.zeros_like(x)
    for _ in range(steps):
        z = tanh_map(z, w, x)
    return z


@pytest.fixture
def w() -> Tensor:
    torch.manual_seed(0)
    return (0.25 * torch.randn(4, 4, dtype=torch.float64)).requires_grad_()


@pytest.fixture
def x() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(3, 4, dtype=torch.float64, requires_grad=True)


@pytest.fixture
def problem():
    """The pieces above, for tests (conftest cannot be imported in importlib mode)."""

    class Problem:
        map = staticmethod(tanh_map)
        module = TanhModule
        unrolled = staticmethod(unroll)

    return Problem
