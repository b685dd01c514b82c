"""`SiteClassifier` against its equations written out site by site."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from deep_implicit_attention.models import SiteClassifier
from deep_implicit_attention.solvers import anderson, picard

EXACT = {"solver_fwd_tol": 1e-11, "solver_fwd_max_iter": 200}


def build(seed: int = 0, **changes: Any) -> SiteClassifier:
    torch.manual_seed(seed)
    options = {"image_size": 8, "num_classes": 3, "widths": (4,), "strides": (2,), "dim": 3}
    return SiteClassifier(**{**options, **changes})


def images(batch: int, size: int = 8, channels: int = 1, seed: int = 1) -> Tensor:
    return torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(seed))


def couplings_by_hand(raw: Tensor, symmetric: bool) -> Tensor:
    """J_ij from the raw parameter, one pair of sites at a time."""
    sites = len(raw)
    out = torch.zeros_like(raw)
    for i in range(sites):
        for j in range(sites):
            if i != j:
                pair = (raw[i, j] + raw[j, i]) / 2 if symmetric else raw[i, j]
                out[i, j] = (pair + pair.T) / 2
    return out


def test_shapes_with_colour_odd_sizes_and_several_strides() -> None:
    model = build(image_size=7, channels=3, widths=(4, 5, 6), strides=(2, 1, 2), num_classes=5)
    x = images(2, 7, 3)
    assert model(x).shape == (2, 5)
    assert model.sources(x).shape == (2, 1 + 2 * 2, 3)  # 7 -> 4 -> 4 -> 2 on each side
    assert model.grid == 2
    assert model.couplings(x, model(x, return_solution=True)[1]).shape == (1, 2, 1, 5, 5)


@pytest.mark.parametrize(
    "shape", [(2, 1, 8, 7), (2, 1, 7, 8), (2, 3, 8, 8), (1, 8, 8), (2, 64), (2, 1, 16, 16)]
)
def test_wrong_image_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="images") as caught:
        build()(torch.zeros(shape))
    assert "(batch, 1, 8, 8)" in str(caught.value)
    assert str(shape) in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "error", "named"),
    [
        ({"widths": (4, 4)}, ValueError, r"got \(4, 4\) and \(.*\): give both"),
        ({"dropout": 1.0}, ValueError, "dropout"),
        ({"widths": (), "strides": ()}, ValueError, "widths"),
        ({"strides": (3,)}, ValueError, "strides"),
        ({"strides": (0,)}, ValueError, "strides"),
        ({"strides": (1.0,)}, TypeError, "strides must be an integer, got float"),
        ({"widths": 4}, TypeError, "widths must be a list or tuple of integers, got 4"),
        ({"dim": 0}, ValueError, "dim"),
        ({"num_classes": -1}, ValueError, "num_classes"),
        ({"image_size": 8.0}, TypeError, "image_size"),
        ({"solver_fwd_tolerance": 1.0}, TypeError, "solver_fwd_tolerance"),
    ],
)
def test_wrong_settings(changes: dict, error: type[Exception], named: str) -> None:
    with pytest.raises(error, match=named):
        build(**changes)


def test_the_solver_is_an_option() -> None:
    plain, other = build(), build(solver=picard)
    assert plain.attention.solver is anderson
    assert other.attention.solver is picard
    with torch.no_grad():
        torch.testing.assert_close(other.eval()(images(2)), plain.eval()(images(2)))


def test_fields_have_unit_norm_and_the_token_is_site_0() -> None:
    model = build(dim=6)
    x = model.sources(images(3))
    torch.testing.assert_close(x.norm(dim=2), torch.ones(3, 17), rtol=1e-3, atol=0)
    token = model.token.detach().flatten()
    expected = (token - token.mean()) / (token - token.mean()).norm()
    torch.testing.assert_close(x[:, 0], expected.expand(3, -1), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("row", "column"), [(0, 7), (7, 0), (5, 3)])
def test_a_pixel_reaches_the_sites_above_it(row: int, column: int) -> None:
    model = build().eval()
    x = images(1)
    touched = x.clone()
    touched[0, 0, row, column] += 1
    moved = (model.sources(x) - model.sources(touched)).abs().amax(dim=(0, 2)) > 0
    # A 3×3 kernel at stride 2 with padding 1 sees rows 2r−1 to 2r+1; sites lie row by row.
    near = {
        1 + 4 * r + c
        for r in range(4)
        for c in range(4)
        if abs(2 * r - row) <= 1 and abs(2 * c - column) <= 1
    }
    assert set(moved.nonzero().flatten().tolist()) == near


@pytest.mark.parametrize("symmetric", [True, False])
def test_scores_read_the_self_consistent_magnetization_of_site_0(symmetric: bool) -> None:
    model = build(dim=4, symmetric=symmetric, **EXACT).double().eval()
    x = images(3).double()
    with torch.no_grad():
        scores, (solution,) = model(x, return_solution=True)
        fields, z = model.sources(x), solution.value
        layer = model.attention.fun
        raw = layer._weight
        w1, b1 = layer.correction.expand.weight, layer.correction.expand.bias
        w2, b2 = layer.correction.contract.weight, layer.correction.contract.bias
        j = couplings_by_hand(raw, symmetric)
        for b in range(3):
            for i in range(17):
                inner = w1 @ z[b, i] + b1
                gelu = inner * (1 + torch.erf(inner / math.sqrt(2))) / 2
                right = fields[b, i] - (w2 @ gelu + b2)
                for k in range(17):
                    right = right + j[i, k] @ z[b, k]
                torch.testing.assert_close(z[b, i], right, rtol=0, atol=1e-8)
        norm, linear = model.head
        centred = z[:, 0] - z[:, 0].mean(dim=1, keepdim=True)
        unit = centred / (centred.square().mean(dim=1, keepdim=True) + norm.eps).sqrt()
        expected = (unit * norm.weight + norm.bias) @ linear.weight.T + linear.bias
    torch.testing.assert_close(scores, expected)


@pytest.mark.parametrize("symmetric", [True, False])
def test_couplings_are_frobenius_norms(symmetric: bool) -> None:
    model = build(symmetric=symmetric)
    j = couplings_by_hand(model.attention.fun._weight.detach(), symmetric)
    every = model.couplings(images(2), model(images(2), return_solution=True)[1])
    assert every.shape == (1, 2, 1, 17, 17)
    assert not every.requires_grad
    for shown in every.flatten(0, 2):
        torch.testing.assert_close(shown, j.square().sum(dim=(2, 3)).sqrt())
        assert torch.equal(shown, shown.T) == symmetric


def test_scores_do_not_depend_on_batch_mates() -> None:
    model = build(dim=4).eval()
    x = images(4)
    mates = torch.cat([x[:1], 30 * images(2, seed=5), torch.full((1, 1, 8, 8), torch.nan)])
    with torch.no_grad():
        alone = model(x[:1], on_failure="ignore")
        torch.testing.assert_close(model(x)[:1], alone, rtol=1e-5, atol=1e-6)
        crowd = model(mates, on_failure="ignore")
    torch.testing.assert_close(crowd[:1], alone, rtol=1e-5, atol=1e-6)
    assert crowd[3].isnan().all()


@pytest.mark.parametrize("symmetric", [True, False])
def test_every_parameter_has_a_finite_gradient(symmetric: bool) -> None:
    model = build(symmetric=symmetric, dropout=0.1, widths=(4, 5), strides=(1, 2))
    labels = torch.arange(9) % 3
    model.loss(model(images(9)), labels, 0.1).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


def test_gradient_equals_finite_differences() -> None:
    bwd = {"solver_bwd_tol": 1e-10, "solver_bwd_max_iter": 200}
    model = build(image_size=4, **EXACT, **bwd).double().eval()
    x, labels = images(3, 4).double(), torch.tensor([0, 2, 1])
    parameters = list(model.parameters())
    directions = [torch.randn_like(p) for p in parameters]
    gradients = torch.autograd.grad(model.loss(model(x), labels), parameters)
    slope = sum((g * v).sum() for g, v in zip(gradients, directions, strict=True))

    def loss_at(step: float) -> Tensor:
        with torch.no_grad():
            for p, v in zip(parameters, directions, strict=True):
                p += step * v
            loss = model.loss(model(x), labels)
            for p, v in zip(parameters, directions, strict=True):
                p -= step * v
        return loss

    step = 1e-5
    torch.testing.assert_close(
        slope, (loss_at(step) - loss_at(-step)) / (2 * step), rtol=1e-5, atol=1e-8
    )


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_loss_is_mean_cross_entropy_in_nats(smoothing: float, dtype: torch.dtype) -> None:
    scores = torch.tensor([[2.0, -1.0, 0.5], [0.0, 0.0, 0.0]])
    total = 0.0
    for row, label in zip(scores.tolist(), [1, 0], strict=True):
        norm = math.log(sum(math.exp(s) for s in row))
        target = [smoothing / 3 + (1 - smoothing) * (k == label) for k in range(3)]
        total += sum(p * (norm - s) for p, s in zip(target, row, strict=True))
    loss = build().loss(scores, torch.tensor([1, 0], dtype=dtype), smoothing)
    assert loss.item() == pytest.approx(total / 2, rel=1e-6)


@pytest.mark.parametrize(
    ("scores", "labels", "error", "named"),
    [
        (images(2), torch.tensor([1, 0]), ValueError, "scores must have shape.*as the model"),
        (torch.zeros(2, 3), [1, 0], TypeError, "labels must be a tensor, got list"),
        (torch.zeros(2, 3), torch.zeros(2), ValueError, r"labels must have shape \(2, 3\)"),
        (torch.zeros(2, 3), torch.tensor([[1, 0]]), ValueError, r"shape \(2,\) as the scores do"),
        (torch.zeros(2, 3), torch.tensor([1, 3]), ValueError, "labels must be from 0 to 2, got 3"),
    ],
)
def test_what_a_loss_is_not_of(
    scores: Tensor, labels: Any, error: type[Exception], named: str
) -> None:
    with pytest.raises(error, match=named):
        build().loss(scores, labels)


def test_dropout_acts_in_training_only() -> None:
    model = build(dropout=0.5, dim=8).eval()
    x = images(2)
    with torch.no_grad():
        assert torch.equal(model(x), model(x))
        model.dropout.train()
        assert not torch.equal(model(x), model(x))
