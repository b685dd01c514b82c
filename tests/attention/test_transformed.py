"""Mechanisms under `torch.func`, batched gradients and compilers: the same as by plain autograd."""

import pytest
import torch
from torch.func import functional_call, grad, jvp, vmap

from deep_implicit_attention.attention import (
    DEQAdaTAPMeanFieldAttention,
    DEQMeanFieldAttention,
    DEQVanillaSoftmaxAttention,
    DEQVectorSpinAttention,
    _memory,
    _pooling,
)
from deep_implicit_attention.deq import DEQFixedPoint
from deep_implicit_attention.spins import IsingPrior, PottsPrior, SphericalPrior


@pytest.fixture(autouse=True, params=["small", "large"])
def size(request, monkeypatch):
    """Also with the memory of large tensors. (`test_products` transforms those of oneDNN.)"""
    if request.param == "large":
        monkeypatch.setattr(_memory, "_LARGE", 0)


@pytest.fixture
def layer(case):
    return DEQFixedPoint(case.module, steps=3)


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_func_grad(case, layer, x):
    parameters = {name: p.detach() for name, p in layer.named_parameters()}

    def loss(parameters, x):
        return functional_call(layer, parameters, (x, *case.inputs)).pow(3).sum()

    found = grad(loss, argnums=(0, 1))(parameters, x)
    x = x.requires_grad_()
    expected = torch.autograd.grad(layer(x, *case.inputs).pow(3).sum(), [*layer.parameters(), x])
    for ours, theirs in zip([*found[0].values(), found[1]], expected, strict=True):
        close(ours, theirs)


def test_forward_mode_of_explicit_steps(case, layer, x):
    tangent = torch.randn_like(x)
    _, found = jvp(lambda x: layer(x, *case.inputs), (x,), (tangent,))
    step = 1e-5
    with torch.no_grad():
        after, before = (layer(x + s * tangent, *case.inputs) for s in (step, -step))
    torch.testing.assert_close(found, (after - before) / (2 * step), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("prior", [IsingPrior(), PottsPrior(6), SphericalPrior(6, 1.5)])
def test_forward_mode_of_other_priors(x, prior):
    torch.manual_seed(0)
    module = DEQAdaTAPMeanFieldAttention(4, 6, 0.2, prior=prior).double()
    layer = DEQFixedPoint(module, steps=3, output_elements=(0, 1))
    tangent = torch.randn_like(x)
    _, found = jvp(layer, (x,), (tangent,))
    expected = torch.autograd.functional.jvp(layer, x, tangent)[1]
    for ours, theirs in zip(found, expected, strict=True):
        close(ours, theirs)


def test_a_context_made_outside(case, x):
    """∂F/∂z v, by what `prepare` returned before."""
    module = case.module
    if isinstance(module, DEQAdaTAPMeanFieldAttention):
        pytest.skip("its state is a pair")
    context = module.prepare(module.sources(x, *case.inputs), *case.inputs)
    z, v = 0.3 * torch.randn_like(x), torch.randn_like(x)
    _, found = jvp(lambda z: module.update(z, context), (z,), (v,))
    expected = torch.autograd.functional.jvp(lambda z: module.update(z, context), z, v)[1]
    close(found, expected)


def test_solves_are_refused_with_what_to_do(case, x):
    if hasattr(case.module, "solve"):
        pytest.skip("it has a closed form")
    layer = DEQFixedPoint(case.module)
    inputs = (x, *case.inputs)
    with pytest.raises(RuntimeError, match="a fixed number of steps"):
        grad(lambda x: layer(x, *case.inputs).sum())(x)
    with pytest.raises(RuntimeError, match="a fixed number of steps"):
        vmap(lambda *one: layer(*(t[None] for t in one))[0])(*inputs)
    with pytest.raises(RuntimeError, match="use reverse mode"):
        jvp(lambda x: layer(x, *case.inputs), (x,), (x,))


def test_vmap_over_samples(case, layer, x):
    inputs = (x, *case.inputs)
    with torch.no_grad():
        found = vmap(lambda *one: layer(*(t[None] for t in one))[0])(*inputs)
        close(found, layer(*inputs))


def test_gradients_of_a_whole_batch_at_once(case, layer, x):
    inputs = [x.requires_grad_(), *layer.parameters()]
    z = layer(x, *case.inputs)
    directions = torch.randn(3, *z.shape, dtype=z.dtype)
    together = torch.autograd.grad(z, inputs, directions, is_grads_batched=True, retain_graph=True)
    for i, direction in enumerate(directions):
        alone = torch.autograd.grad(z, inputs, direction, retain_graph=True)
        for ours, theirs in zip(together, alone, strict=True):
            close(ours[i], theirs)


MODULES = {
    "mean-field": lambda: DEQMeanFieldAttention(40, 16),  # couplings of 1.6 MB
    "symmetric": lambda: DEQMeanFieldAttention(
        40, 16, weight_sym_internal=True, weight_sym_sites=True
    ),
    "softmax": lambda: DEQVanillaSoftmaxAttention(120, 16, heads=2),
    "vector-spin": lambda: DEQVectorSpinAttention(16, 2),
}


@pytest.mark.quick("small-True-mean-field", "small-False-softmax")
@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("grad_enabled", [True, False])
def test_explicit_steps_compile_as_one_graph(name, grad_enabled):
    torch.manual_seed(0)
    torch._dynamo.reset()
    module = MODULES[name]()
    layer = DEQFixedPoint(module, steps=2)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = torch.randn(3, getattr(module, "num_spins", 120), 16) / 4

    def results(respond):
        with torch.set_grad_enabled(grad_enabled):
            z = respond(x)
            if not grad_enabled:
                return [z]
            return [z, *torch.autograd.grad(z.square().sum(), list(layer.parameters()))]

    for ours, theirs in zip(results(compiled), results(layer), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_fused_attention_is_left_to_autograd_where_transformed(monkeypatch):
    monkeypatch.setattr(_pooling, "_FUSED", 1)
    monkeypatch.setattr(_pooling, "_LONG", 1)
    torch.manual_seed(0)
    module = DEQVanillaSoftmaxAttention(6, 4, heads=2).double()
    layer = DEQFixedPoint(module, steps=2)
    x = torch.randn(2, 6, 4).double()
    found = grad(lambda x: layer(x).square().sum())(x)
    x.requires_grad_()
    (expected,) = torch.autograd.grad(layer(x).square().sum(), x)
    close(found, expected)


@pytest.mark.parametrize("sites", [4, 16])
def test_adaptive_tap_for_samples_one_by_one(sites):
    """Its couplings are factorised outside of `vmap`, also where N · d is a power of two."""
    torch.manual_seed(0)
    layer = DEQFixedPoint(DEQAdaTAPMeanFieldAttention(sites, 8), steps=2)
    x = torch.randn(3, sites, 8)
    with torch.no_grad():
        torch.testing.assert_close(vmap(lambda one: layer(one[None])[0])(x), layer(x))


@pytest.mark.parametrize("causal", [False, True])
def test_normalised_states(causal):
    torch.manual_seed(0)
    module = DEQVanillaSoftmaxAttention(5, 6, heads=2, normalize=True, causal=causal).double()
    layer = DEQFixedPoint(module, steps=3)
    x, tangent = torch.randn(2, 3, 5, 6, dtype=torch.float64)
    found = grad(lambda x: layer(x).pow(3).sum())(x)
    at = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(layer(at).pow(3).sum(), at)
    close(found, expected)
    _, along = jvp(lambda x: layer(x).pow(3).sum(), (x,), (tangent,))
    close(along, (expected * tangent).sum())
    with torch.no_grad():
        close(vmap(lambda one: layer(one[None])[0])(x), layer(x))
