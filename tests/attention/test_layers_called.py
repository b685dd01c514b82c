"""Layers of a mechanism that act on the sources are called; those inside a solve must be plain."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from deep_implicit_attention.attention import (
    DEQAdaTAPMeanFieldAttention,
    DEQMeanFieldAttention,
    DEQMLPMixerAttention,
    DEQVanillaSoftmaxAttention,
    DEQVectorSpinAttention,
)
from deep_implicit_attention.deq import DEQFixedPoint


class Adapted(nn.Linear):
    """A Linear with a low-rank addition, as adapters are written."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer.in_features, layer.out_features, layer.bias is not None)
        self.load_state_dict(layer.state_dict())
        self.down = nn.Parameter(torch.randn(1, layer.in_features))
        self.up = nn.Parameter(torch.randn(layer.out_features, 1))
        self.to(layer.weight.dtype)

    def forward(self, x):
        return super().forward(x) + (x @ self.down.mT) @ self.up.mT


@pytest.fixture
def layer():
    torch.manual_seed(0)
    return DEQFixedPoint(DEQVanillaSoftmaxAttention(5, 4, heads=2), solver_fwd_tol=1e-6)


@pytest.fixture
def x():
    torch.manual_seed(1)
    return torch.randn(2, 5, 4)


@pytest.mark.parametrize("name", ["to_q", "to_k"])
@pytest.mark.parametrize("own", ["class", "instance"])
def test_a_projection_with_a_forward_of_its_own_is_called(name, own, layer, x):
    plain = getattr(layer.fun, name)
    adapted = Adapted(plain)
    if own == "instance":
        plain.forward = adapted.forward
    else:
        setattr(layer.fun, name, adapted)
    z = layer(x)
    merged = plain.weight + adapted.up @ adapted.down
    setattr(layer.fun, name, nn.Linear(4, 4, bias=False))
    getattr(layer.fun, name).weight.data = merged.data
    torch.testing.assert_close(z, layer(x), rtol=1e-4, atol=1e-5)
    z.sum().backward()
    assert adapted.up.grad.norm() > 0


@pytest.mark.parametrize("name", ["to_q", "to_k"])
def test_a_projection_may_have_a_bias(name, layer, x):
    module = layer.fun
    setattr(module, name, nn.Linear(4, 4))
    q, k = (p(x).view(2, 5, 2, 2).transpose(1, 2) for p in (module.to_q, module.to_k))
    expected = (module.scale * q @ k.mT).softmax(dim=-1)
    torch.testing.assert_close(module.couplings(x), expected)
    layer(x).square().sum().backward()
    assert getattr(module, name).bias.grad.isfinite().all()


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("name", ["to_out", "correction.expand", "correction.contract"])
def test_a_layer_inside_a_solve_may_lack_a_bias(name, normalize, x):
    torch.manual_seed(0)
    module = DEQVanillaSoftmaxAttention(5, 4, heads=2, normalize=normalize)
    layer, plain = DEQFixedPoint(module), module.get_submodule(name)
    nn.init.zeros_(plain.bias)
    expected = layer(x)
    (by_weight,) = torch.autograd.grad(expected.sin().sum(), plain.weight)
    plain.bias = None
    z = layer(x)
    torch.testing.assert_close(z, expected)
    torch.testing.assert_close(torch.autograd.grad(z.sin().sum(), plain.weight)[0], by_weight)


def test_an_adapter_of_a_narrow_module_is_called_in_its_precision(layer, x):
    layer = layer.bfloat16()
    layer.fun.to_q = Adapted(layer.fun.to_q)
    assert layer(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["forward", "backward"])
def test_hooks_on_projections_are_called(kind, layer, x):
    seen = []
    if kind == "forward":
        layer.fun.to_q.register_forward_hook(lambda *_: seen.append(1))
    else:
        layer.fun.to_q.register_full_backward_hook(lambda *_: seen.append(1))
    layer(x.requires_grad_()).sum().backward()
    assert seen == [1]


@pytest.mark.parametrize("kind", ["forward", "adapted"])
def test_the_network_of_vector_spins_acts_on_sources_and_is_called(kind, x):
    torch.manual_seed(0)
    layer = DEQFixedPoint(DEQVectorSpinAttention(4, heads=1))
    before = layer(x)
    if kind == "adapted":
        layer.fun.source.expand = Adapted(layer.fun.source.expand)
    else:
        layer.fun.source.expand.register_forward_hook(lambda *given: 1.5 * given[-1])
    assert (layer(x) - before).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: DEQVanillaSoftmaxAttention(5, 4), "to_out"),
        (lambda: DEQVanillaSoftmaxAttention(5, 4), "correction.contract"),
        (lambda: DEQMLPMixerAttention(5, 4), "sum_over_couplings.expand"),
        (lambda: DEQMeanFieldAttention(5, 4), "correction.expand"),
    ],
)
@pytest.mark.parametrize("what", ["forward", "hook"])
def test_inside_a_solve_what_would_be_passed_over_is_refused(make, name, what, x):
    module = make()
    owner, last = module.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
    if what == "forward":
        setattr(owner, last, Adapted(getattr(owner, last)))
    else:
        getattr(owner, last).register_full_backward_hook(lambda *_: None)
    with pytest.raises(RuntimeError, match=r"acts inside a solve.*parametriz"):
        DEQFixedPoint(module)(x)


def test_a_hook_on_a_whole_network_inside_a_solve_is_refused(x):
    module = DEQVanillaSoftmaxAttention(5, 4)
    module.correction.register_forward_hook(lambda *_: None)
    with pytest.raises(RuntimeError, match=r"FeedForward.*acts inside a solve"):
        DEQFixedPoint(module)(x)


@pytest.mark.parametrize("kind", [DEQMeanFieldAttention, DEQAdaTAPMeanFieldAttention])
def test_couplings_that_a_hook_makes_are_refused(kind, x):
    """They stayed as they were when they were pruned, whatever was learned."""
    layer = DEQFixedPoint(kind(5, 4))
    prune.random_unstructured(layer.fun, "_weight", amount=0.5)
    with pytest.raises(RuntimeError, match=r"made by a hook.*prune\.remove"):
        layer(x)
    prune.remove(layer.fun, "_weight")
    layer(x).sum().backward()
    layer.fun.register_forward_pre_hook(lambda *_: None)  # it makes nothing
    layer(x)
