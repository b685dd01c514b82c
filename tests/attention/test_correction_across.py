"""The second product of the correction with its weights across, and its sum in one."""

import pytest
import torch

from deep_implicit_attention.attention import DEQVanillaSoftmaxAttention, _products
from deep_implicit_attention.deq import DEQFixedPoint


class TestCorrectionAcross:
    """The second product of the correction with its weights across, and its sum in one."""

    @pytest.fixture(params=[(False, False), (True, False), (True, True)])
    def module(self, request, monkeypatch):
        monkeypatch.setattr(_products, "_OWN", True)
        monkeypatch.setattr(_products, "_TURNED", 1 << 14)
        torch.manual_seed(0)
        normalize, causal = request.param
        return DEQVanillaSoftmaxAttention(16, 64, 4, normalize=normalize, causal=causal)

    @pytest.mark.parametrize("mask", [False, True])
    def test_update_and_derivative_are_those_of_the_plain_path(self, module, mask, monkeypatch):
        x, z, v = torch.randn(3, 3, 16, 64).unbind()
        inputs = (torch.arange(16).expand(3, 16) < torch.tensor([[16], [9], [4]]),) if mask else ()
        context = module.prepare(module.sources(x, *inputs), *inputs)
        assert context.correction.turned is not None
        plain = context._replace(correction=context.correction._replace(turned=None))
        calls, addmm = [], torch.Tensor.addmm_
        monkeypatch.setattr(
            torch.Tensor, "addmm_", lambda *a, **k: (calls.append(1), addmm(*a, **k))[1]
        )
        with torch.no_grad():
            kept = z.clone()
            for mine, other in (
                (module.update(z, context), module.update(z, plain)),
                (module.vjp(z, context)(v), module.vjp(z, plain)(v)),
            ):
                torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)
        assert len(calls) == 2
        assert torch.equal(z, kept)

    def test_bit_for_bit_with_gradients_which_are_right(self, module):
        x = torch.randn(3, 16, 64)
        # All products by themselves, so that only the weights across tell the two.
        layer = DEQFixedPoint(module, solver_fwd_tol=1e-5, solver_bwd_tol=1e-5)
        with torch.no_grad():
            expected = layer(x)
        x.requires_grad_()
        z = layer(x)
        assert torch.equal(z, expected)
        weights = [x, *module.parameters()]
        found = torch.autograd.grad(z.square().mean(), weights)
        module = module.double()
        exact = DEQFixedPoint(module, solver_fwd_tol=1e-10, solver_bwd_tol=1e-10)
        x = x.detach().double().requires_grad_()
        loss = exact(x).square().mean()
        for mine, other in zip(
            found, torch.autograd.grad(loss, [x, *module.parameters()]), strict=True
        ):
            error = (mine.double() - other).norm() / other.norm()
            assert error < 1e-3

    def test_second_derivatives_take_the_plain_path(self, module):
        x = torch.randn(2, 16, 64, requires_grad=True)
        z = DEQFixedPoint(module, solver_fwd_tol=1e-5, solver_bwd_tol=1e-5)(x)
        (g,) = torch.autograd.grad(z.square().mean(), x, create_graph=True)
        (second,) = torch.autograd.grad(g.square().sum(), module.correction.contract.weight)
        assert torch.isfinite(second).all()
        assert second.abs().max() > 0
