"""`DeepImplicitAttentionViT` against blocks written out, symmetries and long unrolls."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from deep_implicit_attention.models import DeepImplicitAttentionViT, SiteClassifier

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


@pytest.mark.parametrize("attention", SOFTMAX)
def test_couplings_are_those_that_the_blocks_use(attention: str) -> None:
    model = build(attention, depth=2)
    _, solutions = model(images(), return_solution=True)
    shown = model.couplings(images(), solutions)
    assert shown.shape == (2, 3, 2, 5, 5)
    for number, z in enumerate((model.sites(images()), solutions[0].value)):
        used = model.blocks[number].fun.prepare(model.fields(z, number)).couplings.matrix
        torch.testing.assert_close(shown[number], used.detach())


@pytest.mark.parametrize("attention", FREE)
def test_free_couplings_are_norms_of_the_jacobian(attention: str) -> None:
    model = build(attention, depth=2)
    image = images(1)
    _, solutions = model(image, return_solution=True)
    shown = model.couplings(image, solutions)
    assert shown.shape == (2, 1, 1, 5, 5)
    fun, x = model.blocks[1].fun, model.fields(solutions[0].value, 1).detach()
    context = fun.prepare(x)

    def update(z: Tensor) -> Tensor:
        """Without what acts on one site alone."""
        if attention == "adaptive-tap":  # its precisions are 1
            return fun.update((z, z.new_zeros(1, 5, 8, 8)), context)[0]
        return fun.update(z, context._replace(correction=None))

    jacobian = torch.autograd.functional.jacobian(update, x)[0, :, :, 0].permute(0, 2, 1, 3)
    torch.testing.assert_close(shown[1, 0, 0], torch.linalg.matrix_norm(jacobian))


@pytest.mark.parametrize("attention", ATTENTION)
def test_maps_are_the_steps_of_the_blocks(attention: str) -> None:
    model = build(attention, depth=2).eval()
    with torch.no_grad():
        _, solutions = model(images(), return_solution=True)
        pairs = model.maps(images(), solutions)
        entering = (model.sites(images()), solutions[0].value)
        for number, (f, state) in enumerate(pairs):
            assert torch.equal(mean(state), solutions[number].value)
            for image, part in zip(parts(f(state)), parts(state), strict=True):
                torch.testing.assert_close(image, part, rtol=0, atol=1e-8)
            far = mean(state) + 0.1 * torch.randn_like(mean(state))
            x = model.fields(entering[number], number)
            step = model.blocks[number](x, state=far, steps=1)
            whole = far if isinstance(state, Tensor) else (far, torch.zeros_like(state[1]))
            torch.testing.assert_close(mean(f(whole)), step)
    assert len(pairs) == 2


@pytest.mark.quick("mean-field")
@pytest.mark.parametrize("attention", ATTENTION)
def test_spectral_radius_and_penalty_against_the_jacobian(attention: str) -> None:
    model = build(attention, depth=2, dim=6).eval()
    batch = images(2)
    _, solutions = model(batch, return_solution=True)
    radii = model.spectral_radius(batch, solutions)
    assert radii.shape == (2, 2)
    squares = []
    for row in range(2):
        one = batch[row : row + 1]
        _, alone = model(one, return_solution=True)
        for number, (f, state) in enumerate(model.maps(one, alone)):
            sizes = [part.numel() for part in parts(state)]

            def flat(z: Tensor, f=f, state=state, sizes=sizes) -> Tensor:
                cut = zip(z.split(sizes), parts(state), strict=True)
                pieces = [piece.view_as(part) for piece, part in cut]
                image = f(pieces[0] if isinstance(state, Tensor) else tuple(pieces))
                return torch.cat([part.flatten() for part in parts(image)])

            at = torch.cat([part.detach().flatten() for part in parts(state)])
            jacobian = torch.autograd.functional.jacobian(flat, at)
            expected = torch.linalg.eigvals(jacobian).abs().max()  # type: ignore[arg-type]
            torch.testing.assert_close(radii[number, row], expected, rtol=1e-3, atol=0)
            squares.append(jacobian.square().mean() * len(at))  # type: ignore[operator]
    generator = torch.Generator().manual_seed(0)
    estimates = torch.stack(
        [model.jacobian_penalty(batch, solutions, generator=generator) for _ in range(200)]
    )
    error = estimates.mean() - torch.stack(squares).mean()
    assert abs(error) < 4 * estimates.std() / 200**0.5
    estimates[0].backward()
    assert all(parameter.grad is not None for parameter in model.blocks[0].parameters())


def parts(state: Any) -> tuple[Tensor, ...]:
    return (state,) if isinstance(state, Tensor) else state


def mean(state: Any) -> Tensor:
    return parts(state)[0]


def test_parameters_count_with_their_symmetries() -> None:
    model = build("mean-field", dim=10)
    stem = 10 * 2 * 9 + 10
    pairs = (5 * 4 // 2) * (10 * 11 // 2)
    correction = 2 * 4 * 100 + 50
    around = 10 + 5 * 10 + 20 + 20 + 5 * 10 + 5  # token, positions, norms, head
    assert model.count_params() == stem + pairs + correction + around


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


def test_what_are_no_solutions_and_no_labels() -> None:
    model = build(depth=2)
    scores, solutions = model(images(), return_solution=True)
    for wrong in ((scores, solutions, scores), scores, solutions[:1]):
        for look in (model.maps, model.couplings, model.spectral_radius, model.jacobian_penalty):
            with pytest.raises(ValueError, match="solutions must be the 2 that the model returns"):
                look(images(), wrong)
    labels = torch.zeros(len(scores), dtype=torch.long)
    labels[1] = 5
    with pytest.raises(ValueError, match="labels must be from 0 to 4, got 5"):
        model.loss(scores, labels)
    labels[1] = -100  # counts for nothing, as everywhere in torch
    expected = F.cross_entropy(scores, labels)
    torch.testing.assert_close(model.loss(scores, labels), expected)
    torch.testing.assert_close(
        model.loss(scores, scores.softmax(1)), F.cross_entropy(scores, scores.softmax(1))
    )
