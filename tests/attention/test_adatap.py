"""Adaptive TAP attention: the closed form against dense algebra and the iterated equations."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch.autograd import grad

from deep_implicit_attention.attention import (
    DEQAdaTAPMeanFieldAttention,
    DEQMeanFieldAttention,
    _adatap,
    _linear,
)
from deep_implicit_attention.deq import DEQFixedPoint, fixed_point
from deep_implicit_attention.spins import GaussianPrior


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

    def test_elements_beyond_the_state_are_refused(self, module, fields):
        message = "output_elements must be below 2.*DEQAdaTAPMeanFieldAttention"
        for layer in (
            DEQFixedPoint(module, output_elements=(0, 2)),
            DEQFixedPoint(module, output_elements=(2,), initial_state="input"),
        ):
            with pytest.raises(ValueError, match=message):
                layer(fields)

    def test_what_stands_in_the_raw_couplings_of_a_site_with_itself_is_nothing(
        self, module, fields
    ):
        expected = DEQFixedPoint(module)(fields)
        with torch.no_grad():
            module._weight.diagonal(dim1=0, dim2=1).fill_(torch.nan)
        z = DEQFixedPoint(module, on_failure="raise")(fields)
        torch.testing.assert_close(z, expected, rtol=0, atol=0)
        (found,) = grad(z.square().sum(), module._weight)
        assert not found.diagonal(dim1=0, dim2=1).any()

    def test_v_matches_the_response_on_the_diagonal(self, module, fields):
        _, cavity = DEQFixedPoint(module, output_elements=(0, 1))(fields)
        assert cavity.shape == (3, 4, 3, 3)
        response = torch.linalg.inv(self.dense(module))
        for i in range(4):
            block = response[3 * i : 3 * i + 3, 3 * i : 3 * i + 3]
            covariance = torch.linalg.inv(module.spin_prior_inv_var[i] - cavity[0, i])
            torch.testing.assert_close(covariance, block)

    def test_every_sample_has_a_v_of_its_own(self, module, fields):
        _, cavity = DEQFixedPoint(module, output_elements=(0, 1))(fields)
        kept = cavity[1].clone()
        with torch.no_grad():
            cavity[0] = 0.0
        torch.testing.assert_close(cavity[1], kept)

    @pytest.mark.parametrize("size", [1e-30, 1e-22, 1.0, 1e22, 1e30])
    def test_the_residual_is_right_whatever_the_size(self, module, fields, size):
        module, x = module.float(), fields.float()
        context = module.prepare(size * x)
        for wrong in (0.0, 0.25):
            z = (1 + wrong) * module.solve(context, (0,))[0].detach()
            relative, absolute = module.residual(context, (z, None))
            expected = module.residual(module.prepare(x), (z / size, None))
            torch.testing.assert_close(relative, expected[0], rtol=1e-3, atol=1e-6)
            torch.testing.assert_close(absolute / size, expected[1], rtol=1e-3, atol=1e-5)

    def test_all_of_it_works_under_transformations(self, module, fields):
        layer = DEQFixedPoint(module)
        z = layer(fields)
        weight = torch.linspace(-1, 1, z.numel(), dtype=z.dtype).view_as(z)
        loss = lambda x: (weight * layer(x)).sum()  # noqa: E731
        x = fields.clone().requires_grad_()
        expected = grad(loss(x), x)[0]
        torch.testing.assert_close(torch.func.grad(loss)(fields), expected)
        jacobian = torch.func.jacrev(layer)(fields)
        torch.testing.assert_close(torch.tensordot(weight, jacobian, 3), expected)
        tangent = torch.func.jvp(layer, (fields,), (weight,))[1]
        torch.testing.assert_close(torch.tensordot(jacobian, weight, 3), tangent)
        energy = torch.func.grad(lambda x: module.free_energy(x).sum())(fields)
        torch.testing.assert_close(energy, -z)
        with pytest.raises(RuntimeError, match=r"vmap cannot map a solve.*steps=K"):
            torch.func.vmap(layer)(fields[:, None])

    def test_hessians_of_whole_batches(self, module, fields):
        def loss(weight):
            layer, options = DEQFixedPoint(module), {"fun._weight": weight}
            return torch.func.functional_call(layer, options, (fields,)).tanh().sum()

        hessian = torch.autograd.functional.hessian
        weight = module._weight.detach()
        torch.testing.assert_close(hessian(loss, weight, vectorize=True), hessian(loss, weight))

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


class TestClosedFormAsUsersMeetIt:
    @pytest.mark.parametrize("kind", ["own", "other couplings", "other operator", "indefinite"])
    def test_a_size_that_is_a_power_of_two(self, kind, monkeypatch):
        """There the factorised matrix stands in the corner of a larger one."""
        made = []

        def empty(*shape, like):
            made.append(shape)
            return like.new_full(shape, torch.nan)

        monkeypatch.setattr(_linear, "empty", empty)

        class Weaker(DEQAdaTAPMeanFieldAttention):
            def coupling_matrix(self):
                return 0.5 * super().coupling_matrix()

        class Doubled(DEQAdaTAPMeanFieldAttention):
            def coupling_operator(self, precision):
                return 2 * super().coupling_operator(precision)

        torch.manual_seed(0)
        kinds = {"other couplings": Weaker, "other operator": Doubled}
        module = kinds.get(kind, DEQAdaTAPMeanFieldAttention)(16, 8).double()
        if kind == "indefinite":
            module._weight.data *= 9
        x = torch.randn(3, 16, 8, dtype=torch.float64, requires_grad=True)
        solution = DEQFixedPoint(module, on_failure="ignore")(x, return_solution=True)
        assert made == [(136, 136)]
        assert {str(status) for status in solution.status} == {
            "indefinite" if kind == "indefinite" else "converged"
        }
        operator = torch.eye(128, dtype=torch.float64) - module.coupling_matrix()
        operator = 2 * operator if kind == "other operator" else operator
        expected = torch.linalg.solve(operator, x.flatten(1).mT).mT.view_as(x)
        torch.testing.assert_close(solution.value, expected)
        g, at = torch.randn_like(x), (x, module._weight)
        torch.testing.assert_close(grad(solution.value, at, g), grad(expected, at, g))

    @pytest.mark.parametrize("name", ["coupling_matrix", "coupling_blocks", "weight"])
    @pytest.mark.parametrize("kind", [DEQAdaTAPMeanFieldAttention, DEQMeanFieldAttention])
    def test_other_couplings_are_those_of_the_system(self, kind, name):
        def weaker(self):
            return 0.5 * getattr(kind, name)(self)

        torch.manual_seed(0)
        module = type("Weaker", (kind,), {name: weaker})(4, 3).double()
        x = torch.randn(2, 4, 3, dtype=torch.float64)
        plain = kind(4, 3).double()
        plain.load_state_dict(module.state_dict())
        plain._weight.data /= 2
        found, expected = DEQFixedPoint(module)(x), DEQFixedPoint(plain)(x)
        torch.testing.assert_close(found, expected)
        (by_weight,) = torch.autograd.grad(found.square().sum(), module._weight)
        (other,) = torch.autograd.grad(expected.square().sum(), plain._weight)
        torch.testing.assert_close(by_weight, other / 2)

    def test_gradients_of_a_whole_batch_at_once(self):
        torch.manual_seed(0)
        module = DEQAdaTAPMeanFieldAttention(4, 3).double()
        x = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
        z, v = DEQFixedPoint(module)(x), torch.randn(5, 2, 4, 3, dtype=torch.float64)
        at = x, module._weight
        found = torch.autograd.grad(z, at, v, is_grads_batched=True, retain_graph=True)
        for i, one in enumerate(v):
            expected = torch.autograd.grad(z, at, one, retain_graph=True)
            torch.testing.assert_close(tuple(part[i] for part in found), expected)

    @pytest.mark.parametrize("frozen", [False, True])
    def test_a_step_of_the_weights_before_backward_changes_nothing(self, frozen):
        torch.manual_seed(0)
        module = DEQAdaTAPMeanFieldAttention(4, 3)
        layer, x = DEQFixedPoint(module), torch.randn(2, 4, 3, requires_grad=True)
        (expected,) = torch.autograd.grad(layer(x).square().sum(), x)
        with module.frozen() if frozen else contextlib.nullcontext():
            z = layer(x)
        with torch.no_grad():
            module._weight.mul_(0.9)
        torch.testing.assert_close(torch.autograd.grad(z.square().sum(), x)[0], expected)

    def test_the_output_may_be_changed_in_place(self):
        layer, x = DEQFixedPoint(DEQAdaTAPMeanFieldAttention(4, 3)), torch.randn(2, 4, 3)
        torch.testing.assert_close(layer(x).add_(1), layer(x) + 1)

    def test_another_default_device_leaves_no_trace(self):
        layer, x = DEQFixedPoint(DEQAdaTAPMeanFieldAttention(5, 3)), torch.randn(2, 5, 3)
        with torch.device("meta"):
            found = layer(x)
        torch.testing.assert_close(found, layer(x))

    def test_made_on_the_meta_device_and_filled_later(self):
        def make():
            prior = GaussianPrior(torch.zeros(3), torch.eye(3) / 2)
            return DEQAdaTAPMeanFieldAttention(4, 3, prior=prior)

        filled, x = make(), torch.randn(2, 4, 3)
        with torch.device("meta"):
            empty = make()
        empty.to_empty(device="cpu").load_state_dict(filled.state_dict())
        torch.testing.assert_close(DEQFixedPoint(empty)(x), DEQFixedPoint(filled)(x))

    def test_the_residual_is_that_of_an_update(self):
        """With an accelerator's way to it as well, where P stays out of the product."""
        torch.manual_seed(0)
        prior = GaussianPrior(torch.randn(3), torch.eye(3) + 0.2)
        module = DEQAdaTAPMeanFieldAttention(5, 3, prior=prior).double()
        x = torch.randn(2, 5, 3, dtype=torch.float64)
        context, z = module.prepare(x), torch.randn_like(x)
        image, _ = module.update((z, torch.zeros(2, 5, 3, 3).double()), context)
        norm = (image - z).flatten(1).norm(dim=1)
        expected = norm / image.flatten(1).norm(dim=1), norm
        torch.testing.assert_close(module.residual(context, (z, None)), expected)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(_adatap, "is_host", lambda t: False)
            torch.testing.assert_close(module.residual(context, (z, None)), expected)


@pytest.mark.parametrize("watch", ["hook", "retained", "neither"])
def test_who_looks_at_the_operator_sees_its_gradient(watch):
    torch.manual_seed(0)
    seen = []

    class Watched(DEQAdaTAPMeanFieldAttention):
        def coupling_operator(self, precision):
            operator = super().coupling_operator(precision)
            if watch == "hook":
                operator.register_hook(seen.append)
            elif watch == "retained":
                operator.retain_grad()
                seen.append(operator)
            return operator

    module, x = Watched(4, 3).double(), torch.randn(2, 4, 3, dtype=torch.float64)
    DEQFixedPoint(module)(x).square().sum().backward()
    plain = DEQAdaTAPMeanFieldAttention(4, 3).double()
    plain.load_state_dict(module.state_dict())
    DEQFixedPoint(plain)(x).square().sum().backward()
    torch.testing.assert_close(module._weight.grad, plain._weight.grad)
    if watch != "neither":
        found = seen[0] if watch == "hook" else seen[0].grad
        z = plain.solve(plain.prepare(x), (0,))[0].detach().flatten(1)
        operator = plain.coupling_operator(plain.spin_prior_inv_var).detach()
        u = 2 * torch.linalg.solve(operator, z.mT)
        torch.testing.assert_close(found, -u @ z)


def test_forward_derivatives_of_the_free_energy():
    torch.manual_seed(0)
    module = DEQAdaTAPMeanFieldAttention(2, 2, 0.2).double()
    x = torch.randn(2, 2, 2, dtype=torch.float64)

    class Energy(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.module = module

        def forward(self, x):
            return self.module.free_energy(x).sum()

    def energy(weight):
        return torch.func.functional_call(Energy(), {"module._weight": weight}, (x,))

    at = module._weight.detach()
    first = torch.func.jacrev(energy)
    torch.testing.assert_close(torch.func.jacfwd(energy)(at), first(at))
    # Not forward over forward: torch's own of slogdet and of linear systems are wrong there.
    second = torch.func.jacfwd(first)(at)
    torch.testing.assert_close(second, torch.func.jacrev(first)(at))
