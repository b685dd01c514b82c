"""`DeepImplicitAttentionViT` against blocks written out, symmetries and long unrolls."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from deep_implicit_attention.models import DeepImplicitAttentionViT, SiteClassifier

from .conftest import TIGHT
from .vit import ATTENTION, SOFTMAX, build, images, patches


def field(model: DeepImplicitAttentionViT, sites: Tensor, scale: float) -> Tensor:
    norm = model.norms[0]
    centred = sites - sites.mean(dim=-1, keepdim=True)
    return scale * (
        centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight + norm.bias
    )


def read(model: DeepImplicitAttentionViT, z: Tensor) -> Tensor:
    norm, linear = model.head
    return F.layer_norm(z, (8,), norm.weight, norm.bias) @ linear.weight.T + linear.bias


def test_sites_are_a_token_and_linear_patches_with_positions() -> None:
    model = build()
    cut = patches(images(), 3)
    rows = cut @ model.stem.weight.flatten(1).T + model.stem.bias
    token = model.token[0, 0] + model.positions[0]
    sites = model.sites(images())
    assert sites.shape == (3, 5, 8)
    torch.testing.assert_close(sites[:, 0], token.expand(3, 8))
    torch.testing.assert_close(sites[:, 1:], rows + model.positions[1:])
    torch.testing.assert_close(F.unfold(images(), 3, stride=3).mT, cut)
    mean = build(pooling="mean", positions="none")
    assert mean.sites(images()).shape == (3, 4, 8)


def test_one_step_of_softmax_is_a_transformer_block() -> None:
    model = build(steps=1)
    with torch.no_grad():
        x = field(model, model.sites(images()), 1.0)
        fun = model.blocks[0].fun
        normal = F.layer_norm(x, (8,))
        q, k, v = (
            t.view(3, 5, 2, 4).transpose(1, 2)
            for t in (normal @ fun.to_q.weight.T, normal @ fun.to_k.weight.T, normal)
        )
        pooled = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(3, 5, 8)
        feed_forward = fun.correction.contract(F.gelu(fun.correction.expand(normal)))
        z = x + fun.to_out(pooled) - feed_forward
        torch.testing.assert_close(model(images()), read(model, z[:, 0]))


@pytest.mark.parametrize("pooling", ["token", "mean"])
def test_one_step_of_mean_field_is_a_sum_over_couplings(pooling: str) -> None:
    model = build("mean-field", steps=1, pooling=pooling)
    with torch.no_grad():
        x = field(model, model.sites(images()), 8**-0.5)
        fun = model.blocks[0].fun
        raw = fun._weight
        every = (raw, raw.mT, raw.transpose(0, 1), raw.transpose(0, 1).mT)
        z = x - fun.correction.contract(F.gelu(fun.correction.expand(x)))
        for i in range(x.shape[1]):
            for j in range(x.shape[1]):
                if i != j:
                    z[:, i] += x[:, j] @ (sum(w[i, j] for w in every) / 4).T
        pooled = z[:, 0] if pooling == "token" else z.sum(dim=1) / 4
        torch.testing.assert_close(model(images()), read(model, pooled))


def test_it_can_be_the_site_classifier() -> None:
    torch.manual_seed(0)
    options = {"num_classes": 10, "channels": 1, "widths": (4, 6, 8), "dim": 6, **TIGHT}
    small = SiteClassifier(image_size=12, strides=(1, 2, 2), **options).double()
    model = DeepImplicitAttentionViT(
        image_size=12, patch_size=4, stem="convolution", positions="none", **options
    ).double()
    assert model.count_params() == small.count_params()
    renamed = {
        name.replace("norm.", "norms.0.", name.startswith("norm.")).replace(
            "attention.", "blocks.0."
        ): value
        for name, value in small.state_dict().items()
    }
    model.load_state_dict(renamed)
    batch = images(4, size=12, channels=1)
    for mode in (True, False):
        small.train(mode)
        model.train(mode)
        torch.testing.assert_close(model(batch), small(batch), rtol=0, atol=1e-8)


def moved(batch: Tensor, order: list[int]) -> Tensor:
    """Images with their 2 × 2 patches of 3 × 3 pixels in another order."""
    cut = patches(batch, 3)[:, order].view(len(batch), 4, 2, 3, 3)
    rows = [torch.cat([cut[:, 2 * r], cut[:, 2 * r + 1]], dim=-1) for r in range(2)]
    return torch.cat(rows, dim=-2)


@pytest.mark.parametrize("attention", ATTENTION)
def test_patches_that_move_with_their_positions(attention: str) -> None:
    model = build(attention, pooling="mean", depth=2)
    order = [2, 0, 3, 1]
    with torch.no_grad():
        logits = model(images())
        assert (model(moved(images(), order)) - logits).abs().max() > 1e-4
        model.positions.copy_(model.positions[order].clone())
        change = (model(moved(images(), order)) - logits).abs().max()
    # Softmax couplings do not know the sites, free ones are of this pair or that.
    assert change < 1e-8 if attention in SOFTMAX else change > 1e-4


@pytest.mark.parametrize("attention", SOFTMAX)
@pytest.mark.parametrize("positions", ["rotary", "none"])
def test_rotary_positions_tell_patches_apart(attention: str, positions: str) -> None:
    model = build(attention, pooling="mean", positions=positions)
    assert model.positions is None
    with torch.no_grad():
        change = (model(moved(images(), [2, 0, 3, 1])) - model(images())).abs().max()
    assert change > 1e-6 if positions == "rotary" else change < 1e-9


def test_sinusoidal_positions_are_of_row_and_column() -> None:
    model = build(image_size=12, dim=10, positions="sinusoidal")
    assert "positions" not in model.state_dict()
    assert not bool(model.positions[0].any())
    rates = [10_000 ** (-2 * a / 5) for a in range(3)]
    for row in range(4):
        for column in range(4):
            # Five components each: sines of three rates, cosines of the two largest.
            waves = [
                wave(at * rate)
                for at in (row, column)
                for wave, some in ((math.sin, rates), (math.cos, rates[:2]))
                for rate in some
            ]
            found = model.positions[1 + 4 * row + column]
            torch.testing.assert_close(found, torch.tensor(waves).to(found))


@pytest.mark.parametrize("attention", ATTENTION)
def test_equilibrium_is_the_limit_of_the_explicit_networks(attention: str) -> None:
    model = build(attention, depth=2).eval()
    with torch.no_grad():
        logits, solutions = model(images(), return_solution=True)
        assert [bool(solution.converged.all()) for solution in solutions] == [True, True]
        gaps = [(model(images(), steps=k) - logits).norm().item() for k in (1, 4, 16, 300)]
        again, explicit = model(images(), steps=4, return_solution=True)
        torch.testing.assert_close(again, model(images(), steps=4))
    assert gaps[0] > gaps[1] > gaps[2]
    assert max(gaps[2] / 100, gaps[3]) < 1e-7 < gaps[0] / 100
    assert explicit[1].residual.min() > solutions[1].residual.max()


@pytest.mark.parametrize("solutions", [True, False])
def test_steps_are_measured_only_if_solutions_are_asked_for(solutions: bool, monkeypatch) -> None:
    model, calls = build().eval(), []
    fun: Any = model.blocks[0].fun
    update = type(fun).update

    def counted(*given: Any) -> Any:
        calls.append(given)
        return update(*given)

    monkeypatch.setattr(type(fun), "update", counted)
    with torch.no_grad():
        model(images(), steps=3, return_solution=solutions)
    assert len(calls) == 3 + solutions


@pytest.mark.parametrize("attention", ATTENTION)
def test_gradient_is_that_of_a_long_unroll(attention: str) -> None:
    model = build(attention, depth=2)
    labels = torch.tensor([0, 3, 1])
    names, parameters = zip(*model.named_parameters(), strict=True)
    exact = torch.autograd.grad(model.loss(model(images()), labels), parameters)
    far = torch.autograd.grad(model.loss(model(images(), steps=120), labels), parameters)
    for name, one, other in zip(names, exact, far, strict=True):
        assert (one - other).norm() <= 1e-6 * other.norm() + 1e-12, name
        assert one.abs().max() > 0, name


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("stem", ["patch", "convolution"])
def test_images_of_a_batch_do_not_touch(attention: str, stem: str) -> None:
    model = build(attention, stem=stem).eval()
    batch = images()
    with torch.no_grad():
        logits = model(batch)
        for row in range(3):
            alone = model(batch[row : row + 1])[0]
            torch.testing.assert_close(logits[row], alone, rtol=0, atol=1e-8)
        broken = batch.clone()
        broken[1, 0, 2, 2] = torch.inf
        others = model(broken, on_failure="ignore")
    torch.testing.assert_close(others[::2], logits[::2], rtol=0, atol=1e-8)
    assert bool(others[1].isnan().all())


@pytest.mark.quick("dtype0-*")
@pytest.mark.parametrize(
    ("attention", "weight_norm"),
    [(name, False) for name in ATTENTION]
    + [(name, True) for name in ATTENTION if name != "adaptive-tap"],
)
@pytest.mark.parametrize(
    ("image_size", "patch_size", "dim", "depth", "stem"),
    [
        (8, 4, 4, 2, "patch"),
        (8, 4, 16, 3, "patch"),
        (28, 7, 10, 1, "convolution"),
        (32, 4, 16, 2, "patch"),
        (16, 8, 64, 4, "convolution"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_converges_as_initialised(
    attention: str,
    image_size: int,
    patch_size: int,
    dim: int,
    depth: int,
    stem: str,
    weight_norm: bool,
    dtype: torch.dtype,
) -> None:
    torch.manual_seed(0)
    model = DeepImplicitAttentionViT(
        image_size=image_size, patch_size=patch_size, num_classes=10, dim=dim, depth=depth,
        attention=attention, heads=max(1, dim // 8) if attention in SOFTMAX else None, stem=stem,
        weight_norm=weight_norm, on_failure="raise",
    ).to(dtype)  # fmt: skip
    batch = torch.randn(4, 3, image_size, image_size, dtype=dtype)
    with torch.no_grad():
        logits, solutions = model(batch, return_solution=True)
    assert all(bool(solution.converged.all()) for solution in solutions)
    # No more certain of anything than a fair guess.
    assert model.loss(logits, torch.randint(10, (4,))) < 4.0


@pytest.mark.parametrize("attention", [name for name in ATTENTION if name != "adaptive-tap"])
def test_plain_iteration_converges_as_initialised(attention: str) -> None:
    """But for adaptive TAP, which is solved in closed form."""
    torch.manual_seed(0)
    model = DeepImplicitAttentionViT(
        image_size=28, patch_size=7, num_classes=10, dim=12, attention=attention, depth=2,
        solver="picard", solver_fwd_max_iter=60, on_failure="raise",
    )  # fmt: skip
    with torch.no_grad():
        model(torch.randn(4, 3, 28, 28))


@pytest.mark.parametrize(("image_size", "patch_size"), [(28, 7), (16, 4), (6, 6), (5, 1)])
def test_convolutions_reach_the_grid(image_size: int, patch_size: int) -> None:
    model = build(image_size=image_size, patch_size=patch_size, stem="convolution")
    grid = image_size // patch_size
    assert model.sites(images(2, size=image_size)).shape == (2, grid**2 + 1, 8)


def test_solutions_are_warm_starts() -> None:
    model, x = build("mean-field", depth=2).eval(), images()
    with torch.no_grad():
        scores, solutions = model(x, return_solution=True)
        again, warm = model(x, state=solutions, return_solution=True)
    torch.testing.assert_close(again, scores)
    assert all(bool((solution.steps == 1).all()) for solution in warm)
    with pytest.raises(ValueError, match="state must have 2 parts, got 1"):
        model(x, state=solutions[:1])


@pytest.mark.parametrize("attention", ATTENTION)
def test_dropout_is_one_network_for_a_solve(attention: str) -> None:
    model = build(attention, dropout=0.3).train()
    torch.manual_seed(5)
    logits, (solution,) = model(images(), return_solution=True)
    assert bool(solution.converged.all())
    torch.manual_seed(5)
    torch.testing.assert_close(model(images(), steps=300), logits, rtol=0, atol=1e-7)
    assert not torch.allclose(model(images()), logits)
    model.eval()
    assert torch.equal(model(images()), model(images()))


def test_weight_norm_keeps_the_function() -> None:
    plain, split = build("mlp-mixer"), build("mlp-mixer", weight_norm=True)
    assert split.count_params() == plain.count_params() + 20 + 5 + 32 + 8  # a magnitude per row
    torch.testing.assert_close(split(images()), plain(images()), rtol=0, atol=1e-7)
