"""Options of the softmax couplings that language models need, and sites added one by one."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from deep_implicit_attention.attention import (
    DEQMeanFieldAttention,
    DEQVanillaSoftmaxAttention,
    DEQVectorSpinAttention,
)
from deep_implicit_attention.deq import DEQFixedPoint, StateCache

TIGHT = {"solver_fwd_tol": 1e-13, "solver_fwd_max_iter": 300}

CAUSAL = {
    "softmax": lambda: DEQVanillaSoftmaxAttention(5, 12, heads=3, causal=True),
    "normalized": lambda: DEQVanillaSoftmaxAttention(5, 12, heads=3, causal=True, normalize=True),
    "rotary": lambda: DEQVanillaSoftmaxAttention(
        5, 12, heads=2, causal=True, normalize=True, rotary=True, correction_width=7
    ),
    "vector-spin": lambda: DEQVectorSpinAttention(
        12, 2, causal=True, normalize=True, rotary=True
    ),
}  # fmt: skip


@pytest.fixture(params=list(CAUSAL))
def layer(request) -> DEQFixedPoint:
    torch.manual_seed(0)
    return DEQFixedPoint(CAUSAL[request.param]().double(), **TIGHT)


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(3, 5, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def standard(x):
    """Mean 0, variance 1 over the last axis, by the definition."""
    centred = x - x.mean(dim=-1, keepdim=True)
    return centred / (centred.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt()


def test_the_normalised_update(x):
    torch.manual_seed(0)
    module = DEQVanillaSoftmaxAttention(5, 12, heads=3, normalize=True, causal=True).double()
    z = torch.randn_like(x) * 3 + 1
    expected = torch.empty_like(x)
    for b in range(3):
        for i in range(5):
            heads = []
            for h in range(3):
                part = slice(4 * h, 4 * h + 4)
                q = module.to_q.weight[part] @ standard(x[b, i])
                keys = [module.to_k.weight[part] @ standard(x[b, j]) for j in range(i + 1)]
                couplings = torch.stack([q @ k / 2 for k in keys]).softmax(0)
                heads.append(couplings @ standard(z[b, : i + 1])[:, part])
            expand, contract = module.correction.expand, module.correction.contract
            correction = contract(F.gelu(expand(standard(z[b, i]))))
            expected[b, i] = module.to_out(torch.cat(heads)) - correction + x[b, i]
    torch.testing.assert_close(module.update(z, module.prepare(x)), expected)


def test_what_the_normalised_update_adds_does_not_depend_on_the_size_of_z(x):
    module = DEQVanillaSoftmaxAttention(5, 12, normalize=True).double()
    context = module.prepare(x)
    z = torch.randn_like(x)
    torch.testing.assert_close(
        module.update(1e3 * z, context), module.update(z, context), rtol=0, atol=1e-4
    )


@pytest.mark.parametrize("shift", [1, 3, 1000])
def test_rotary_couplings_depend_on_differences_of_sites(shift):
    torch.manual_seed(0)
    module = DEQVanillaSoftmaxAttention(5, 12, heads=2, rotary=True).double()
    x = torch.randn(1, 6, 12, dtype=torch.float64)
    q, k = module.queries_and_keys(x)
    far_q, far_k = module.queries_and_keys(x, first=shift)
    torch.testing.assert_close(far_q @ far_k.mT, q @ k.mT)
    assert (far_q - q).norm() > 0.1
    # Equal sources: without rotary all logits are equal, with it only those of one difference.
    logits = (lambda q, k: q @ k.mT)(*module.queries_and_keys(x[:, :1].expand(1, 6, 12)))[0, 0]
    for offset in range(-5, 6):
        diagonal = logits.diagonal(offset)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal))
    assert logits[0].std() > 1e-3


@pytest.mark.parametrize(("options", "root"), [({}, 100), ({"rotary_base": 49}, 7)])
def test_rotary_angles(options, root):
    module = DEQVanillaSoftmaxAttention(5, 4, rotary=True, **options).double()
    module.to_q.weight.data = torch.eye(4, dtype=torch.float64)
    one = torch.tensor([1.0, 0, 0, 0], dtype=torch.float64).expand(1, 3, 4)
    q, _ = module.queries_and_keys(one)
    sites = torch.arange(3.0, dtype=torch.float64)
    torch.testing.assert_close(q[0, 0, :, 0], sites.cos())
    torch.testing.assert_close(q[0, 0, :, 2], sites.sin())
    # The second pair turns by base^(−2/4) a site.
    q, _ = module.queries_and_keys(one.roll(1, dims=-1))
    torch.testing.assert_close(q[0, 0, :, 3], (sites / root).sin())


@pytest.mark.parametrize("padded", [False, True])
def test_sites_added_one_by_one_have_the_equilibrium_of_all_at_once(layer, x, padded):
    mask = torch.ones(3, 5, dtype=torch.bool)
    if padded:
        mask[0, 0] = mask[2, :2] = False
    together = layer(x, mask)
    cache = StateCache.start(layer, x[:, :2], mask[:, :2])
    torch.testing.assert_close(cache.solution.value, together[:, :2], rtol=0, atol=1e-10)
    for site in range(2, 5):
        before = cache
        cache = cache.append(x[:, site : site + 1])
        value = cache.solution.value
        torch.testing.assert_close(value, together[:, site : site + 1], rtol=0, atol=1e-10)
        # The old cache is as it was: a second continuation from it gives the same.
        again = before.append(x[:, site : site + 1]).solution.value
        assert torch.equal(again, value)


def test_an_update_of_an_added_site_works_on_that_site_only(layer, x):
    cache = StateCache.start(layer, x[:, :4])
    context = layer.fun.append(cache.context, cache.solution.value, x[:, 4:])
    assert layer.fun.update(x[:, 4:], context).shape == (3, 1, 12)
    assert context.couplings.matrix.shape[-2:] == (1, 1)


def test_caches_that_cannot_be(x):
    full = DEQFixedPoint(DEQVanillaSoftmaxAttention(5, 12).double())
    with pytest.raises(ValueError, match="must be causal"):
        StateCache.start(full, x[:, :4]).append(x[:, 4:])
    fixed = DEQFixedPoint(DEQVanillaSoftmaxAttention(5, 12, causal=True).double(), steps=3)
    with pytest.raises(ValueError, match="steps=3"):
        StateCache.start(fixed, x)
    with pytest.raises(TypeError, match="DEQMeanFieldAttention has no append"):
        StateCache.start(DEQFixedPoint(DEQMeanFieldAttention(5, 12).double()), x)
    causal = DEQFixedPoint(DEQVanillaSoftmaxAttention(5, 12, causal=True).double())
    with pytest.raises(ValueError, match=r"\(batch, 1, 12\), got \(3, 2, 12\)"):
        StateCache.start(causal, x).append(x[:, :2])
    with pytest.raises(ValueError, match=r"x_new must have the batch .* 3, got .*\(2, 1, 12\)"):
        StateCache.start(causal, x).append(x[:2, :1])
    with pytest.raises(TypeError, match="x_new must be a tensor"):
        StateCache.start(causal, x).append(x[:, :1].tolist())
    with pytest.raises(TypeError, match="x must be a tensor"):
        StateCache.start(causal, x.tolist())


@pytest.mark.parametrize("name", ["softmax", "normalized"])
def test_dropout_is_constant_during_a_solve(name, x):
    torch.manual_seed(0)
    module = CAUSAL[name]().double()
    module.dropout = 0.4
    context = module.prepare(x)
    z = torch.randn_like(x)
    assert torch.equal(module.update(z, context), module.update(z, context))
    assert not torch.equal(module.update(z, module.prepare(x)), module.update(z, context))
    # What is dropped: components of the pooled states and of f, not x; the mean is kept.
    kept = context.kept
    assert set(kept.unique().tolist()) == {0.0, 1 / 0.6}
    assert abs(kept.mean() - 1) < 0.2
    bare = module.update(z, context._replace(kept=torch.zeros_like(kept)))
    torch.testing.assert_close(bare, x)
    module.eval()
    assert module.prepare(x).kept is None
    # A solve with dropout reaches a fixed point, which a new mask each step would not have.
    module.train()
    solution = DEQFixedPoint(module, **TIGHT)(x, return_solution=True)
    assert bool(solution.converged.all())


def test_parametrised_weights_are_put_together_once_for_a_solve(x):
    torch.manual_seed(0)
    module = DEQVanillaSoftmaxAttention(5, 12, heads=3, normalize=True).double()
    counts = {}
    for name, part in list(module.named_modules()):
        if isinstance(part, torch.nn.Linear):
            plain = part.weight.detach().clone()
            parametrizations.weight_norm(part)
            torch.testing.assert_close(part.weight, plain)
            part.parametrizations.weight[0].register_forward_hook(
                lambda *_, name=name: counts.update({name: counts.get(name, 0) + 1})
            )
    solution = DEQFixedPoint(module)(x, return_solution=True)
    assert int(solution.steps.min()) > 3
    assert counts == dict.fromkeys(
        ["to_q", "to_k", "to_out", "correction.expand", "correction.contract"], 1
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DEQVanillaSoftmaxAttention(4, 6, heads=2, rotary=True), "rotary.*even.*3"),
        (lambda: DEQVectorSpinAttention(9, 3, rotary=True), "rotary.*even.*3"),
        (lambda: DEQVanillaSoftmaxAttention(4, 6, dropout=1.0), "dropout"),
        (lambda: DEQVectorSpinAttention(6, 1, dropout=-0.1), "dropout"),
        (lambda: DEQVanillaSoftmaxAttention(4, 6, correction_width=0), "correction_width"),
        (
            lambda: DEQVanillaSoftmaxAttention(4, 6, lin_response=False, correction_width=3),
            "lin_response",
        ),
    ],
)
def test_options_out_of_range(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("name", ["softmax", "normalized"])
def test_dropout_meets_what_earlier_sites_give_to_a_new_one(name, x):
    torch.manual_seed(0)
    module = CAUSAL[name]().double()
    module.dropout = 0.9
    new, state = x[:, 4:], torch.randn(3, 4, 12, dtype=torch.float64)
    whole = module.eval().append(module.prepare(x[:, :4]), state, new).x - new
    context = module.train().append(module.prepare(x[:, :4]), state, new)
    dropped = (context.x == new).double().mean()
    assert 0.75 < dropped < 1
    torch.testing.assert_close(context.x - new, context.kept[0] * whole)
