"""Spins on a sphere: how they respond to their fields."""

from __future__ import annotations

import copy

import pytest
import torch

from deep_implicit_attention.attention import DEQVectorSpinAttention
from deep_implicit_attention.deq import DEQFixedPoint, jacobian_norm


class TestVectorSpin:
    def test_contracts_and_is_bounded(self, x):
        torch.manual_seed(0)
        for beta in (0.5, 1.9):
            module = DEQVectorSpinAttention(6, 2, beta=beta).double()
            context = module.prepare(10 * x)
            f = lambda z: module.update(z, context)  # noqa: B023, E731
            torch.manual_seed(1)
            a, b = torch.randn(2, 200, 1, 4, 6, dtype=x.dtype).mul(3)
            for a_k, b_k in zip(a, b, strict=True):
                a_k, b_k = a_k.expand_as(x), b_k.expand_as(x)
                norm = lambda d: d.view(3, 4, 2, 3).norm(dim=-1).amax(dim=(1, 2))  # noqa: E731
                assert bool((norm(f(a_k) - f(b_k)) <= module.contraction * norm(a_k - b_k)).all())
            spins = f(100 * a[0].expand_as(x)).view(3, 4, 2, 3).norm(dim=-1)
            assert bool((spins < module.radius).all())

    def test_slope_at_zero_field_is_half_beta(self):
        module = DEQVectorSpinAttention(6, 2, beta=1.2).double()
        module.source.contract.weight.data.zero_()
        module.source.contract.bias.data.zero_()
        x = torch.zeros(1, 4, 6, dtype=torch.float64)
        context = module.prepare(x)
        norm = jacobian_norm(lambda z: module.update(z, context), x)
        # All logits are equal: J is the uniform average, whose norm is 1.
        torch.testing.assert_close(norm, torch.tensor([0.6], dtype=torch.float64))


@pytest.mark.parametrize("beta", [0.5, 1.9])
@pytest.mark.parametrize("size", [1e12, 1e18, 1e21, 1e33])
def test_fields_whose_squares_overflow_turn_spins_all_the_way(x, size, beta):
    """Those of float32 do from 1e19 on, those of float64 do not."""
    torch.manual_seed(0)
    module = DEQVectorSpinAttention(6, 2, beta=beta)
    module.to_q.weight.data.zero_()  # or the products of queries and keys would overflow
    found = []
    for dtype in (torch.float32, torch.float64):
        layer = DEQFixedPoint(copy.deepcopy(module).to(dtype))
        strong = (size * x.float()).to(dtype).requires_grad_()
        solution = layer(strong, return_solution=True)
        (slope,) = torch.autograd.grad(solution.value.sum(), strong)
        assert bool(solution.converged.all())
        found.append((solution.value.float(), (size * slope).float()))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)
    assert bool((found[0][0].unflatten(2, (2, 3)).norm(dim=-1) > 0.999 * module.radius).all())
