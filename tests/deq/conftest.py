"""A small nonlinear map whose fixed point and gradients other code can find, too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deep_implicit_attention.deq import DEQModule, fixed_point

TIGHT = {
    "solver_fwd_tol": 1e-13,
    "solver_fwd_max_iter": 300,
    "solver_bwd_tol": 1e-13,
    "solver_bwd_max_iter": 300,
}


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


class Rich(DEQModule):
    """Parameters of a submodule, a frozen one, a buffer, and a context made of one of them."""

    shift: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
        self.frozen = nn.Parameter(torch.full((4,), 0.7), requires_grad=False)
        self.register_buffer("shift", torch.tensor([0.1, -0.2, 0.3, 0.0]))

    def prepare(self, x):
        return {"field": x, "gain": self.inner[0].bias}

    def update(self, z, context):
        pulled = self.inner(z) * self.frozen + self.shift
        return 0.5 * pulled + context["field"] * (1 + context["gain"])


def reference(module: DEQModule, x: Tensor, steps: int = 300) -> Tensor:
    context = module.prepare(x)
    z = torch.zeros_like(x)
    for _ in range(steps):
        z = module.update(z, context)
    return z


def unroll(w: Tensor, x: Tensor, steps: int = 500) -> Tensor:
    z = torch.zeros_like(x)
    for _ in range(steps):
        z = tanh_map(z, w, x)
    return z


def solve(w: Tensor, x: Tensor, **options: Any) -> Tensor:
    """The fixed point, to the last digits unless `options` say otherwise."""
    tight = {"tol": 1e-13, "max_iter": 300, **options}
    return fixed_point(tanh_map, torch.zeros_like(x), (w, x), **tight).value


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
        solve = staticmethod(solve)

    return Problem


@pytest.fixture
def rich() -> Rich:
    torch.manual_seed(0)
    return Rich().double()
