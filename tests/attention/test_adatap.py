"""Adaptive TAP attention: the closed form against dense algebra and the iterated equations."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import grad

from deep_implicit_attention.attention import DEQAdaTAPMeanFieldAttention
from deep_implicit_attention.deq import DEQFixedPoint, fixed_point


class TestAdaTAP:
    @pytest.fixture
    def module(self):
        torch.manual_seed(0)
        module = DEQAdaTAPMeanFieldAttention(4, 3).double()
        blocks = torch.randn(4, 3, 3, dtype=torch.float64) / 4
        module.spin_prior_inv_var += blocks @ blocks.mT  # a prior that is not the identity
        return module

    @pytest.fixture
    def fields(self):
        torch.manual_seed(1)
        return torch.randn(3, 4, 3, dtype=torch.float64)

    def dense(self, module):
        """P − J from its entries."""
        operator = torch.zeros(12, 12, dtype=torch.float64)
        weight = module.weight().detach()
        for i in range(4):
            for j in range(4):
                block = module.spin_prior_inv_var[i] if i == j else -weight[i, j]
                operator[3 * i : 3 * i + 3, 3 * j : 3 * j + 3] = block
        return operator

    def test_closed_form_is_the_mean_of_the_gaussian(self, module, fields):
        z = DEQFixedPoint(module)(fields)
        expected = fields.flatten(1) @ torch.linalg.inv(self.dense(module)).T
        torch.testing.assert_close(z.flatten(1), expected)

    def test_closed_form_is_the_fixed_point_of_the_iterated_equations(self, module, fields):
        layer = DEQFixedPoint(module, output_elements=(0, 1))
        z, cavity = layer(fields)
        context = module.prepare(fields)
        start = module.initial_state(fields)
        solution = fixed_point(module.update, start, (context,), tol=1e-13, max_iter=300)
        torch.testing.assert_close(solution.value[0], z, rtol=0, atol=1e-10)
        torch.testing.assert_close(solution.value[1], cavity, rtol=0, atol=1e-10)
        weight = torch.linspace(-1, 1, z.numel(), dtype=z.dtype).view_as(z)
        losses = [(weight * a).sum() + b.square().sum() for a, b in ((z, cavity), solution.value)]
        mine, theirs = (grad(loss, module._weight)[0] for loss in losses)
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)

    def test_v_matches_the_response_on_the_diagonal(self, module, fields):
        _, cavity = DEQFixedPoint(module, output_elements=(0, 1))(fields)
        assert cavity.shape == (3, 4, 3, 3)
        response = torch.linalg.inv(self.dense(module))
        for i in range(4):
            block = response[3 * i : 3 * i + 3, 3 * i : 3 * i + 3]
            covariance = torch.linalg.inv(module.spin_prior_inv_var[i] - cavity[0, i])
            torch.testing.assert_close(covariance, block)

    def test_v_is_computed_only_if_wanted(self, module, fields, monkeypatch):
        monkeypatch.setattr("deep_implicit_attention.attention._adatap.inverse", None)
        DEQFixedPoint(module)(fields).sum().backward()
        with pytest.raises(TypeError, match="NoneType"):
            DEQFixedPoint(module, output_elements=(0, 1))(fields)

    def test_without_lin_response_v_is_zero_and_z_the_same(self, module, fields):
        z = DEQFixedPoint(module)(fields)
        module.lin_response = False
        naive, cavity = DEQFixedPoint(module, output_elements=(0, 1))(fields)
        assert torch.equal(naive, z)
        assert not bool(cavity.any())

    def test_residual_is_that_of_the_naive_update(self, module, fields):
        module.lin_response = False
        layer = DEQFixedPoint(module)
        z, solution = layer(fields, return_solution=True)
        cavity = torch.zeros(3, 4, 3, 3, dtype=z.dtype)
        image = module.update((1.5 * z, cavity), module.prepare(fields))[0]
        relative, absolute = module.residual(module.prepare(fields), (1.5 * z, None))
        gap = (image - 1.5 * z).flatten(1).norm(dim=1)
        torch.testing.assert_close(absolute, gap)
        torch.testing.assert_close(relative, gap / image.flatten(1).norm(dim=1))
        assert solution.residual.max() < 1e-12

    def test_no_distribution_is_said(self, fields):
        torch.manual_seed(0)
        module = DEQAdaTAPMeanFieldAttention(4, 3, weight_init_std=1.0).double()
        smallest = torch.linalg.eigvalsh(self.dense(module))[0].item()
        assert smallest < 0
        layer = DEQFixedPoint(module)
        with pytest.warns(UserWarning, match=f"smallest eigenvalue of P − J is {smallest:.4g}"):
            z, solution = layer(fields, return_solution=True)
        assert {str(status) for status in solution.status} == {"indefinite"}
        expected = fields.flatten(1) @ torch.linalg.inv(self.dense(module)).T
        torch.testing.assert_close(z.flatten(1), expected)

    def test_couplings_without_the_symmetry_are_no_complaint(self, fields):
        torch.manual_seed(0)
        module = DEQAdaTAPMeanFieldAttention(4, 3, 0.1, True, False, False).double()
        z, solution = DEQFixedPoint(module)(fields, return_solution=True)
        assert bool(solution.converged.all())
        expected = fields.flatten(1) @ torch.linalg.inv(self.dense(module)).T
        torch.testing.assert_close(z.flatten(1), expected)
