"""Mechanisms with a rough context of their own: used in first steps, forward and backward."""

import pytest
import torch
from torch import nn

from deep_implicit_attention.deq import DEQFixedPoint, DEQModule, Implicit
from deep_implicit_attention.solvers import anderson, newton_krylov


class Rounded(DEQModule):
    """z ← tanh(W z) + x, roughly with W rounded to two digits; `seen` lists what was asked for."""

    def __init__(self, from_own_weight=False):
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(0.9 * torch.linalg.qr(torch.randn(6, 6))[0])
        self.from_own_weight, self.there = from_own_weight, ["yes"]
        self.seen = []

    def prepare(self, x):
        return x, self.weight, "exact"

    def update(self, z, context):
        x, weight, kind = context
        self.seen.append(f"update, {kind}")
        return torch.tanh(z @ weight.mT.to(z)) + x

    def vjp(self, z, context):
        _, weight, kind = context
        slope = 1 - torch.tanh(z @ weight.mT).square()

        def product(v):
            self.seen.append(f"vjp, {kind}")
            return (v * slope) @ weight

        return product

    def rough(self, context):
        if not self.there:
            return None
        weight = self.weight if self.from_own_weight else context[1]
        return context[0], (weight * 100).round() / 100, "rough"


FORWARD = {"solver_fwd_tol": 1e-8, "solver_fwd_max_iter": 200, "on_failure": "raise"}
TIGHT = {**FORWARD, "solver_bwd_tol": 1e-8, "solver_bwd_max_iter": 200}


def results(module, **options):
    return results_of(DEQFixedPoint(module, **TIGHT), **options)


def results_of(layer, **options):
    weight = layer.fun.weight
    torch.manual_seed(1)
    x = torch.randn(3, 2, 6, dtype=weight.dtype).requires_grad_()
    z = layer(x, **options)
    return [z, *torch.autograd.grad(z.pow(3).sum(), [x, weight])]


@pytest.mark.parametrize("from_own_weight", [False, True])
def test_first_steps_are_rough_and_answers_exact(from_own_weight):
    module = Rounded(from_own_weight).double()
    expected = results(module, solver_fwd_rough=None, solver_bwd_rough=None)
    assert not any(what.endswith("rough") for what in module.seen)
    exact = len(module.seen)
    module.seen.clear()
    for ours, theirs in zip(results(module), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    assert module.seen.count("update, rough") >= 2
    assert module.seen.count("vjp, rough") >= 2
    assert len([what for what in module.seen if what.endswith("exact")]) < exact


@pytest.mark.parametrize("options", [{"rough": None}, {"solver": newton_krylov}])
def test_backward_does_without_where_it_is_told_to_or_its_solver_takes_none(options):
    module = Rounded().double()
    expected = results(module)
    module.seen.clear()
    adjoint = Implicit(**{"solver": anderson, "tol": 1e-8, "max_iter": 200} | options)
    layer = DEQFixedPoint(module, adjoint=adjoint, **FORWARD)
    for ours, theirs in zip(results_of(layer), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    assert "update, rough" in module.seen
    assert "vjp, rough" not in module.seen


def test_it_may_be_gone_when_the_gradient_comes():
    module = Rounded().double()
    expected = results(module)[2]
    layer = DEQFixedPoint(module, **TIGHT)
    torch.manual_seed(1)
    z = layer(torch.randn(3, 2, 6, dtype=torch.float64))
    module.there.clear()
    module.seen.clear()
    (found,) = torch.autograd.grad(z.pow(3).sum(), module.weight)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert "vjp, rough" not in module.seen


def test_narrow_modules_do_without():
    module = Rounded().bfloat16()
    layer = DEQFixedPoint(module)
    with torch.no_grad():
        layer(torch.randn(3, 2, 6).bfloat16())
    assert set(module.seen) == {"update, exact"}
