"""Second and third derivatives of whole models against differences of the order below."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deep_implicit_attention.attention._normalize import LayerNorm
from deep_implicit_attention.models import (
    DeepImplicitAttentionTransformer,
    DeepImplicitAttentionViT,
    SiteClassifier,
)

EXACT = {
    "solver_fwd_tol": 1e-13,
    "solver_fwd_max_iter": 300,
    "solver_bwd_tol": 1e-13,
    "solver_bwd_max_iter": 300,
}


def directional(loss: Callable[[], Tensor], model: nn.Module, order: int, step: float) -> Tensor:
    """The derivative of that order along one direction, and the difference quotient for it."""
    weights = [p for p in model.parameters() if p.requires_grad]
    random = torch.Generator().manual_seed(0)
    along = [torch.randn(p.shape, dtype=p.dtype, generator=random) for p in weights]

    def derivative(order: int) -> Tensor:
        value = loss()
        for k in range(order):
            more = k + 1 < order
            grads = torch.autograd.grad(value, weights, create_graph=more, allow_unused=True)
            parts = [(g * v).sum() for g, v in zip(grads, along, strict=True) if g is not None]
            value = torch.stack(parts).sum()
        return value.detach()

    def moved(by: float) -> Tensor:
        with torch.no_grad():
            for p, v in zip(weights, along, strict=True):
                p.add_(by * v)
        value = derivative(order - 1)
        with torch.no_grad():
            for p, v in zip(weights, along, strict=True):
                p.sub_(by * v)
        return value

    return torch.stack([derivative(order), (moved(step) - moved(-step)) / (2 * step)])


def language(**options) -> tuple[nn.Module, Callable[[], Tensor]]:
    model = DeepImplicitAttentionTransformer(
        num_tokens=5, max_seq_len=4, dim=8, depth=1, heads=2, **options, **EXACT
    ).double()
    ids = torch.tensor([[1, 2, 3, 4]])
    return model, lambda: model.loss(model(ids), ids)


def vision() -> tuple[nn.Module, Callable[[], Tensor]]:
    model = DeepImplicitAttentionViT(
        image_size=4, patch_size=2, num_classes=3, channels=1, dim=4, depth=1,
        attention="mean-field", **EXACT,
    ).double()  # fmt: skip
    images = torch.randn(2, 1, 4, 4, dtype=torch.float64)
    return model, lambda: model(images).square().sum()


def sites() -> tuple[nn.Module, Callable[[], Tensor]]:
    model = SiteClassifier(
        image_size=4, num_classes=3, widths=(4,), strides=(2,), dim=3, **EXACT
    ).double()
    images = torch.randn(2, 1, 4, 4, dtype=torch.float64)
    model.eval()  # batch normalisation of torch has no right third derivative while training
    return model, lambda: model(images).square().sum()


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: language(weight_norm=True), id="weight_norm"),
        pytest.param(language, id="language"),
        pytest.param(vision, id="vision"),
        pytest.param(sites, id="sites"),
    ],
)
@pytest.mark.parametrize("order", [2, 3])
def test_derivatives_are_those_of_the_loss(order, make):
    torch.manual_seed(0)
    model, loss = make()
    mine, theirs = directional(loss, model, order, 3e-5)
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_a_layer_norm_that_is_used_twice_has_the_derivatives_of_torch():
    torch.manual_seed(0)
    norm = LayerNorm(5).double()
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2)
        norm.bias.uniform_(-1, 1)
    inputs = torch.randn(3, 5, dtype=torch.float64, requires_grad=True), norm.weight, norm.bias

    def derivatives(of: Callable[[Tensor], Tensor]) -> list[Tensor]:
        value = of(1.3 * of(inputs[0]) + inputs[0])
        first = torch.autograd.grad(value.pow(3).sum(), inputs, create_graph=True)
        penalty = torch.stack([g.square().sum() for g in first]).sum()
        return [*first, *torch.autograd.grad(penalty, inputs)]

    found = derivatives(norm)
    expected = derivatives(lambda t: F.layer_norm(t, (5,), norm.weight, norm.bias, norm.eps))
    torch.testing.assert_close(found, expected)


def test_the_layer_norm_is_that_of_torch():
    torch.manual_seed(0)
    mine, theirs = LayerNorm(5), nn.LayerNorm(5)
    with torch.no_grad():
        mine.weight.uniform_(0.5, 2)
        mine.bias.uniform_(-1, 1)
    theirs.load_state_dict(mine.state_dict())
    x = torch.randn(3, 4, 5)
    losses = []
    for norm in (mine, theirs):
        at = x.clone().requires_grad_()
        value = norm(at)
        grads = torch.autograd.grad(value.square().sum(), (at, norm.weight, norm.bias))
        losses.append((value.detach(), *grads))
    for a, b in zip(*losses, strict=True):
        assert torch.equal(a, b)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert mine(x.bfloat16()).dtype == theirs(x.bfloat16()).dtype
    torch.testing.assert_close(torch.compile(mine, backend="eager")(x), theirs(x))
    at = x.clone().requires_grad_()
    by_x = torch.autograd.grad(mine(at).square().sum(), at)[0]
    torch.testing.assert_close(torch.func.grad(lambda x: mine(x).square().sum())(x), by_x)
    exact = mine.double()

    def slope(x: Tensor) -> Tensor:
        at = x if x.requires_grad else x.clone().requires_grad_()
        return torch.autograd.grad(exact(at).tanh().sum(), at, create_graph=True)[0].square().sum()

    at = torch.randn(2, 5, dtype=torch.float64)
    vjp = torch.autograd.functional.vjp
    steps = 1e-5 * torch.eye(10, dtype=torch.float64).view(10, 2, 5)
    rows = [(vjp(slope, at + d)[1] - vjp(slope, at - d)[1]) / 2e-5 for d in steps]
    found = torch.autograd.functional.hessian(slope, at)
    torch.testing.assert_close(found, torch.stack(rows).view(2, 5, 2, 5), rtol=1e-5, atol=1e-6)
