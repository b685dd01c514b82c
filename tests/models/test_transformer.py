"""`DeepImplicitAttentionTransformer` against blocks written out and against long unrolls."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deep_implicit_attention.models import DeepImplicitAttentionTransformer, left_pad

from .conftest import build, default_type, tokens

ATTENTION = ("softmax", "softmax-plain", "vector-spin")
POSITIONS = ("learned", "sinusoidal", "rotary")


def test_one_step_is_a_transformer_block() -> None:
    model = build(depth=1, steps=1)
    model.norm.weight.data.normal_()
    ids = tokens()
    with torch.no_grad():
        x = 10 * (model.tokens.weight[ids] + model.positions[:7])
        fun = model.blocks[0].fun
        normal = F.layer_norm(x, (16,))
        q, k, v = (
            t.view(3, 7, 2, 8).transpose(1, 2)
            for t in (normal @ fun.to_q.weight.T, normal @ fun.to_k.weight.T, normal)
        )
        pooled = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        attended = fun.to_out(pooled.transpose(1, 2).reshape(3, 7, 16))
        z = x + attended - fun.correction.contract(F.gelu(fun.correction.expand(normal)))
        expected = (
            F.layer_norm(z, (16,), model.norm.weight, model.norm.bias) @ model.tokens.weight.T
        )
        torch.testing.assert_close(model(ids), expected)


@pytest.mark.parametrize("attention", ATTENTION)
def test_equilibrium_is_the_limit_of_the_explicit_networks(attention: str) -> None:
    model = build(attention=attention, depth=2).eval()
    ids = tokens()
    with torch.no_grad():
        equilibrium = model(ids)
        gaps = [(model(ids, steps=k) - equilibrium).norm().item() for k in (1, 2, 4, 400)]
    assert gaps[0] > gaps[1] > gaps[2] > gaps[3]
    assert gaps[3] < 1e-6 * gaps[0]


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("positions", POSITIONS)
def test_no_token_moves_logits_before_it(attention: str, positions: str) -> None:
    model = build(attention=attention, positions=positions).eval()
    ids = tokens()
    changed = ids.clone()
    changed[:, 4:] = (changed[:, 4:] + 3) % 11
    with torch.no_grad():
        logits, moved = model(ids), model(changed)
        shorter = model(ids[:, :4])
    torch.testing.assert_close(moved[:, :4], logits[:, :4], rtol=0, atol=1e-10)
    torch.testing.assert_close(shorter, logits[:, :4], rtol=0, atol=1e-10)
    assert (moved - logits)[:, 4:].abs().amax(dim=2).min() > 1e-4


@pytest.mark.parametrize("positions", POSITIONS)
def test_the_order_of_tokens_matters(positions: str) -> None:
    model = build(positions=positions, depth=1).eval()
    ids = torch.tensor([[1, 2, 3, 4], [2, 1, 3, 4]])
    with torch.no_grad():
        last = model(ids)[:, -1]
    assert (last[0] - last[1]).abs().max() > 1e-5


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("positions", POSITIONS)
def test_padding_changes_nothing(attention: str, positions: str) -> None:
    model = build(attention=attention, positions=positions).eval()
    prompts = [[1, 2, 3], [4, 5, 6, 7, 8], [9]]
    ids, mask = left_pad(prompts, pad=10)
    with torch.no_grad():
        logits = model(ids, mask)
        right = model(ids.flip(1), mask.flip(1))
        for row, prompt in enumerate(prompts):
            alone = model(torch.tensor([prompt]))[0]
            torch.testing.assert_close(logits[row, -len(prompt) :], alone, rtol=0, atol=1e-8)
            alone = model(torch.tensor([prompt[::-1]]))[0]
            torch.testing.assert_close(right[row, : len(prompt)], alone, rtol=0, atol=1e-8)


@pytest.mark.parametrize("attention", ATTENTION)
def test_gradient_is_that_of_a_long_unroll(attention: str) -> None:
    model = build(attention=attention, dim=12, depth=2)
    ids, targets = tokens(2, 5), tokens(2, 5, seed=2)
    names = [name for name, _ in model.named_parameters()]
    parameters = list(model.parameters())
    exact = torch.autograd.grad(model.loss(model(ids), targets), parameters)
    unrolled = torch.autograd.grad(model.loss(model(ids, steps=150), targets), parameters)
    for name, one, other in zip(names, exact, unrolled, strict=True):
        assert (one - other).norm() <= 1e-6 * other.norm() + 1e-12, name
        assert one.abs().max() > 0, name


def test_gradcheck_of_the_loss() -> None:
    model = build(num_tokens=5, dim=8, depth=2, heads=2, weight_norm=True)
    ids, targets = tokens(2, 4) % 5, tokens(2, 4, seed=2) % 5
    own = dict(model.named_parameters())
    directions = {name: torch.randn_like(p) for name, p in own.items()}

    def loss(along: Tensor) -> Tensor:
        moved = {
            name: p.detach() + step * directions[name]
            for step, (name, p) in zip(along, own.items(), strict=True)
        }
        return model.loss(torch.func.functional_call(model, moved, (ids,)), targets)

    start = torch.zeros(len(own), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(loss, start, atol=1e-6)


def test_relaxing_first_and_learning_through_the_last_steps() -> None:
    model = build(depth=1)
    ids = tokens()
    with torch.no_grad():
        expected = model(ids, steps=9)
        _, states = model(ids, steps=6, return_solution=True)
    torch.testing.assert_close(model(ids, state=states, steps=3), expected)
    values = [part.value for part in states]
    torch.testing.assert_close(model(ids, state=values, steps=3), expected)
    _, unmeasured = model(ids, steps=6, return_solution=True, measure=False)
    torch.testing.assert_close(model(ids, state=unmeasured, steps=3), expected)
    with pytest.raises(ValueError, match="1 parts, got 2"):
        model(ids, state=[*states, *states])


def test_dropout_is_one_network_for_a_solve() -> None:
    model = build(dropout=0.3).train()
    ids = tokens()
    torch.manual_seed(5)
    logits, solutions = model(ids, return_solution=True)
    assert all(bool(solution.converged.all()) for solution in solutions)
    torch.manual_seed(5)
    torch.testing.assert_close(model(ids, steps=400), logits, rtol=0, atol=1e-7)
    assert not torch.allclose(model(ids), logits)
    model.eval()
    torch.testing.assert_close(model(ids), model(ids))


def test_embedding_is_tied_and_parameters_count_once() -> None:
    model = build(num_tokens=65, max_seq_len=64, dim=256, depth=1, heads=4)
    couplings = 2 * 256 * 256
    out = 256 * 256 + 256
    correction = 2 * 4 * 256 * 256 + 5 * 256
    assert model.count_params() == (65 + 64) * 256 + couplings + out + correction + 2 * 256
    assert model.count_params() <= 800_000
    model = build()
    ids = tokens() % 10  # token 10 does not occur
    with torch.no_grad():
        before = model(ids)
        model.tokens.weight[10] += torch.randn(16, dtype=torch.float64)
        moved = model(ids) - before
    assert moved[..., :10].abs().max() == 0
    assert moved[..., 10].abs().min() > 0


@pytest.mark.quick("dtype0-*")
@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize(
    ("dim", "heads", "depth", "length"),
    [(4, 1, 2, 8), (8, 2, 3, 9), (32, 4, 2, 33), (64, 4, 1, 64)],
)
@pytest.mark.parametrize("weight_norm", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_converges_as_initialised(
    attention: str,
    positions: str,
    dim: int,
    heads: int,
    depth: int,
    length: int,
    weight_norm: bool,
    dtype: torch.dtype,
) -> None:
    torch.manual_seed(0)
    model = DeepImplicitAttentionTransformer(
        num_tokens=65, max_seq_len=length, dim=dim, heads=heads, depth=depth, attention=attention,
        positions=positions, weight_norm=weight_norm, on_failure="raise",
    ).to(dtype)  # fmt: skip
    ids = torch.randint(65, (4, length))
    with torch.no_grad():
        logits, solutions = model(ids, return_solution=True)
    assert all(bool(solution.converged.all()) for solution in solutions)
    # No more certain of anything than a fair guess.
    assert F.cross_entropy(logits.flatten(0, 1), torch.randint(65, (4 * length,))) < 5.0


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("positions", ["learned", "rotary"])
def test_plain_iteration_converges_as_initialised(attention: str, positions: str) -> None:
    torch.manual_seed(0)
    model = DeepImplicitAttentionTransformer(
        num_tokens=65, max_seq_len=33, dim=32, attention=attention, positions=positions, depth=2,
        solver="picard", solver_fwd_max_iter=60, on_failure="raise",
    )  # fmt: skip
    with torch.no_grad():
        model(torch.randint(65, (4, 33)))


@pytest.mark.quick("4-1-*", "8-2-*", "32-4-rotary")
@pytest.mark.parametrize("positions", ["learned", "rotary"])
@pytest.mark.parametrize(("dim", "heads"), [(4, 1), (8, 2), (16, 2), (32, 4)])
def test_narrow_models_converge_from_every_seed(positions: str, dim: int, heads: int) -> None:
    for seed in range(20):
        torch.manual_seed(seed)
        model = DeepImplicitAttentionTransformer(
            num_tokens=65, max_seq_len=16, dim=dim, heads=heads, positions=positions,
            on_failure="raise",
        )  # fmt: skip
        with torch.no_grad():
            model(torch.randint(65, (8, 16)))


def test_hidden_units_start_with_unit_deviation() -> None:
    torch.manual_seed(0)
    model = DeepImplicitAttentionTransformer(num_tokens=65, max_seq_len=64, dim=128)
    correction = model.blocks[0].fun.correction  # type: ignore[union-attr]
    acting = torch.nn.functional.layer_norm(torch.randn(4096, 128), (128,))
    assert correction.expand(acting).std().item() == pytest.approx(1.0, rel=0.02)


def test_diagnostics_against_the_jacobian() -> None:
    model = build(dim=8, depth=2)
    ids = tokens(2, 3)
    _, solutions = model(ids, return_solution=True)
    radii = model.spectral_radius(ids, solutions)
    assert radii.shape == (2, 2)
    sums = []
    for depth, (f, z) in enumerate(model.maps(ids, solutions)):
        torch.testing.assert_close(f(z), z, rtol=0, atol=1e-8)
        for row in range(2):
            one = lambda s, f=f, z=z, row=row: f(torch.cat([z[:row], s, z[row + 1 :]]))[row]  # noqa: E731
            jacobian = torch.autograd.functional.jacobian(one, z[row : row + 1].detach())
            matrix = jacobian.reshape(24, 24)
            torch.testing.assert_close(
                radii[depth, row], torch.linalg.eigvals(matrix).abs().max(), rtol=1e-4, atol=0
            )
            sums.append(matrix.square().sum() / 24)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        estimates = [
            model.jacobian_penalty(ids, solutions, generator=generator) for _ in range(400)
        ]
    estimate, exact = torch.stack(estimates), torch.stack(sums).mean()
    assert abs(estimate.mean() - exact) < 4 * estimate.std() / 400**0.5


def test_the_penalty_makes_the_map_contract_more() -> None:
    model = build(depth=1, dim=8)
    ids = tokens()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    radii = []
    for _ in range(8):
        _, solutions = model(ids, return_solution=True)
        radii.append(model.spectral_radius(ids, solutions).mean().item())
        penalty = model.jacobian_penalty(ids, solutions, generator=torch.Generator().manual_seed(0))
        optimizer.zero_grad()
        penalty.backward()
        optimizer.step()
    assert radii[-1] < 0.9 * radii[0]


def test_couplings_are_those_that_the_blocks_use() -> None:
    model = build().eval()
    ids, mask = left_pad([[1, 2, 3], [4, 5, 6, 7]])
    with torch.no_grad():
        _, solutions = model(ids, mask, return_solution=True)
        shown = model.couplings(ids, solutions, mask)
        assert shown.shape == (2, 2, 2, 4, 4)
        assert not bool(shown.triu(1).any())
        for depth, x in enumerate((model.fields(ids, mask), solutions[0].value)):
            fun = model.blocks[depth].fun
            used = fun.prepare(fun.sources(x, mask), mask).couplings
            torch.testing.assert_close(shown[depth], used.matrix)


@pytest.mark.parametrize("ignored", [0, 3])
def test_loss(ignored: int) -> None:
    logits = torch.randn(2, 4, 11, dtype=torch.float64)
    targets = tokens(2, 4)
    targets[0, :ignored] = -100
    nats = [
        -logits[b, t].softmax(0)[targets[b, t]].log()
        for b in range(2)
        for t in range(4)
        if targets[b, t] >= 0
    ]
    torch.testing.assert_close(build().loss(logits, targets), torch.stack(nats).mean())


def test_copies_and_state_dicts() -> None:
    model = build().eval()
    ids = tokens()
    other = build(seed=5).eval()
    with torch.no_grad():
        assert not torch.allclose(other(ids), model(ids))
        assert torch.equal(copy.deepcopy(model)(ids), model(ids))
        other.load_state_dict(model.state_dict())
        assert torch.equal(other(ids), model(ids))


def test_made_on_the_meta_device_and_filled_later() -> None:
    model, ids = build(positions="sinusoidal").eval(), tokens()
    with torch.device("meta"):
        empty = nn.ModuleList([build(positions="sinusoidal").eval()])
    empty.to_empty(device="cpu")[0].load_state_dict(model.state_dict())
    assert torch.equal(empty[0].positions, model.positions)
    assert torch.equal(empty[0](ids), model(ids))


@pytest.mark.parametrize("attention", ["softmax", "vector-spin"])
def test_on_the_meta_device_explicit_steps_have_shapes(attention: str) -> None:
    with torch.device("meta"):
        model = build(attention=attention, positions="sinusoidal")
        ids, mask = torch.zeros(2, 7, dtype=torch.long), torch.ones(2, 7, dtype=torch.bool)
    assert model(ids, steps=2).shape == model(ids, mask, steps=2).shape == (2, 7, 11)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_sinusoids_have_the_default_type(dtype: torch.dtype) -> None:
    options: dict[str, Any] = {"num_tokens": 11, "max_seq_len": 8, "dim": 8}
    with default_type(dtype):
        model = DeepImplicitAttentionTransformer(**options, positions="sinusoidal")
    later = DeepImplicitAttentionTransformer(**options, positions="sinusoidal").to(dtype)
    assert torch.equal(model.positions, later.positions)
    assert model(tokens()).dtype == model.positions.dtype == dtype


def test_int32_ids_and_empty_batches() -> None:
    model = build().eval()
    ids = tokens()
    assert torch.equal(model(ids.int()), model(ids))
    assert model(ids[:0]).shape == (0, 7, 11)


def test_exports_at_a_horizon() -> None:
    model = build(steps=3).eval()
    ids = tokens()
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (ids,), dynamic_shapes=({0: batch},)).module()
    with torch.no_grad():
        for other in (tokens(seed=9), tokens(batch=1, seed=9), tokens(batch=5, seed=9)):
            torch.testing.assert_close(program(other), model(other))


def test_padding_has_no_part_in_the_penalty() -> None:
    model = build(depth=1).eval()
    ids = tokens(2, 4)
    padded = torch.cat([torch.zeros(2, 5, dtype=torch.long), ids], dim=1)
    mask = torch.arange(9) >= torch.tensor([[5], [5]])

    def mean(*inputs: Any) -> float:
        solutions = model(*inputs, return_solution=True)[1]
        given = (inputs[0], solutions, *inputs[1:])
        generator = torch.Generator().manual_seed(0)
        draws = [model.jacobian_penalty(*given, generator=generator) for _ in range(60)]
        return torch.stack(draws).mean().item()

    assert mean(padded, mask) == pytest.approx(mean(ids), rel=0.15)
