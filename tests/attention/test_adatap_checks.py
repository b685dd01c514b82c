"""Adaptive TAP attention: what free energy and `frozen` rest on, and what they refuse."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn
from torch.autograd import grad
from torch.nn.utils import parameters_to_vector, parametrizations, vector_to_parameters

from deep_implicit_attention.attention import DEQAdaTAPMeanFieldAttention
from deep_implicit_attention.deq import DEQFixedPoint
from deep_implicit_attention.solvers import picard
from deep_implicit_attention.spins import (
    AdaptiveTAP,
    GaussianPrior,
    IsingPrior,
    PottsPrior,
    SphericalPrior,
)

SITES, DIM = 4, 3

PRIORS = {
    "default": lambda: None,
    "gaussian": lambda: GaussianPrior(torch.full((DIM,), 0.3), torch.eye(DIM) / 2),
    "ising": IsingPrior,
    "potts": lambda: PottsPrior(DIM),
    "sphere": lambda: SphericalPrior(DIM, 1.2),
}
GAUSSIAN, ITERATED = list(PRIORS)[:2], list(PRIORS)[2:]


def make(name: str, std: float = 0.15, **options) -> DEQAdaTAPMeanFieldAttention:
    torch.manual_seed(0)
    prior = PRIORS[name]()
    return DEQAdaTAPMeanFieldAttention(SITES, DIM, std, prior=prior, **options).double()


@pytest.fixture
def fields():
    torch.manual_seed(1)
    return torch.randn(3, SITES, DIM, dtype=torch.float64)


class TestFreeEnergy:
    @pytest.mark.parametrize("name", PRIORS)
    def test_its_gradient_is_the_naive_mean_field_of_the_layer(self, name, fields):
        module = make(name, 0.3, lin_response=False)
        x = fields.requires_grad_()
        layer = DEQFixedPoint(module, picard, solver_fwd_tol=1e-12, solver_fwd_max_iter=200)
        by_field = grad(module.free_energy(x).sum(), x)[0]
        torch.testing.assert_close(by_field, -layer(x), rtol=0, atol=1e-5)
        if name in ITERATED:  # a test that adaptive TAP would fail
            other = grad(make(name, 0.3).free_energy(x).sum(), x)[0]
            assert (other - by_field).abs().max() > 1e-3

    @pytest.mark.parametrize("name", GAUSSIAN)
    def test_a_closed_form_takes_no_method(self, name, fields):
        with pytest.raises(ValueError, match="method must be None for a Gaussian prior"):
            make(name).free_energy(fields, AdaptiveTAP())

    @pytest.mark.parametrize("name", PRIORS)
    @pytest.mark.parametrize(
        ("method", "got"), [("tap", "got str"), (AdaptiveTAP, "got the class AdaptiveTAP")]
    )
    def test_other_methods_are_refused(self, name, method, got, fields):
        with pytest.raises(TypeError, match=f"method must be an inference method.*{got}"):
            make(name).free_energy(fields, method)

    @pytest.mark.parametrize("name", PRIORS)
    @pytest.mark.parametrize("value", [torch.nan, torch.inf])
    def test_every_sample_must_be_finite(self, name, value, fields):
        fields[1, 2, 0] = value
        with pytest.raises(ValueError, match="x must be finite, sample 1 is not"):
            make(name).free_energy(fields)

    @pytest.mark.parametrize("name", PRIORS)
    def test_autocast_has_no_effect(self, name, fields):
        module, x = make(name).float(), fields.float()
        expected = module.free_energy(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            torch.testing.assert_close(module.free_energy(x), expected, rtol=0, atol=0)
            with module.frozen():
                frozen = module.free_energy(x)
        torch.testing.assert_close(frozen, expected, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("name", PRIORS)
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_of_a_narrow_module_it_is_in_full_precision(self, name, dtype, fields):
        module, x = make(name).to(dtype), fields.to(dtype)
        found = module.free_energy(x)
        assert found.dtype == torch.float32
        with module.frozen():
            torch.testing.assert_close(module.free_energy(x), found, rtol=1e-4, atol=1e-5)
        widened = module.float().free_energy(x.float())
        torch.testing.assert_close(found, widened, rtol=1e-4, atol=1e-5)

    def test_what_is_not_finite_is_named(self, fields):
        module = make("default")
        module.spin_prior_inv_var[0, 0, 0] = torch.nan
        with pytest.raises(ValueError, match=r"positive definite\. P is not finite"):
            module.free_energy(fields)
        module = make("default")
        module._weight.data[0, 1, 0, 0] = torch.nan
        with pytest.raises(ValueError, match=r"positive definite\. The couplings are not finite"):
            module.free_energy(fields)


class TestFrozen:
    @pytest.mark.parametrize("name", PRIORS)
    def test_a_holder_without_gradients_leaves_them_to_others(self, name, fields):
        """Entered in inference mode first, as another thread may."""
        layer = DEQFixedPoint(make(name), solver_fwd_tol=1e-6)
        x = fields.requires_grad_()
        with layer.fun.frozen():
            expected = grad(layer(x).square().sum(), x)[0]
        outer = layer.fun.frozen()
        with torch.inference_mode():
            outer.__enter__()
            layer(fields.detach())
        with layer.fun.frozen():
            found = grad(layer(x).square().sum(), x)[0]
        outer.__exit__(None, None, None)
        torch.testing.assert_close(found, expected)

    @staticmethod
    def swap(module):
        flat = module._weight.data.view(-1)
        flat[[20, 31]] = flat[[31, 20]].clone()

    @staticmethod
    def flip_two_signs(module):
        array = module._weight.detach().numpy().reshape(-1)
        array[[20, 22]] *= -1

    @pytest.mark.parametrize("name", ["gaussian", "ising"])
    @pytest.mark.parametrize("change", [swap, flip_two_signs])
    def test_hidden_changes_are_noticed(self, name, change, fields):
        module = make(name)
        with module.frozen():
            change(module)
            with pytest.raises(RuntimeError, match=r"weights changed inside `frozen\(\)`"):
                module.prepare(fields)

    @pytest.mark.parametrize("part", ["spin_prior_inv_var", "_weight"])
    def test_changes_of_what_is_not_trained_are_noticed(self, part, fields):
        module = make("default", weight_training=False)
        layer = DEQFixedPoint(module)
        assert not list(module.parameters())
        with module.frozen():
            layer(fields)
            getattr(module, part).mul_(2)
            with pytest.raises(RuntimeError, match=r"weights changed inside `frozen\(\)`"):
                layer(fields)

    @pytest.mark.parametrize("size", [torch.float32, torch.float64])
    @pytest.mark.parametrize("entry", [0, -1])
    def test_one_bit_is_noticed(self, size, entry, fields):
        # Odd numbers of entries cannot be read in pairs.
        module = DEQAdaTAPMeanFieldAttention(3, 3).to(size)
        with module.frozen():
            flat = module._weight.data.view(-1)
            flat[entry] = torch.nextafter(flat[entry], flat[entry] + 1)
            with pytest.raises(RuntimeError, match="weights changed"):
                module.prepare(fields[:, :3].to(size))

    @pytest.mark.parametrize(
        "change",
        [
            lambda m: setattr(m, "prior", SphericalPrior(DIM, 1.2)),
            lambda m: setattr(m.prior, "radius", 3.0),
            lambda m: setattr(m, "lin_response", False),
            lambda m: setattr(m, "weight_sym_internal", False),
        ],
        ids=["prior", "radius", "lin_response", "symmetry"],
    )
    def test_other_settings_are_noticed(self, change, fields):
        module = make("sphere")
        with module.frozen():
            change(module)
            with pytest.raises(RuntimeError, match=r"prior or an option changed inside `frozen"):
                module.prepare(fields)
        module.prepare(fields)

    @pytest.mark.parametrize("shift", [0, 1])
    def test_weights_may_be_views_at_any_offset(self, shift, fields):
        module = make("gaussian").float()
        vector = parameters_to_vector(module.parameters()).detach()
        vector_to_parameters(torch.cat([vector[:shift], vector])[shift:], module.parameters())
        assert any(p.storage_offset() % 2 for p in module.parameters())
        layer, x = DEQFixedPoint(module), fields.float()
        expected = layer(x)
        with module.frozen():
            torch.testing.assert_close(layer(x), expected)
            vector_to_parameters(2 * vector, module.parameters())
            with pytest.raises(RuntimeError, match="weights changed"):
                layer(x)

    def test_copies_are_not_frozen(self, fields):
        module = make("gaussian")
        with module.frozen():
            file = io.BytesIO()
            torch.save(module, file)
            copies = [copy.deepcopy(module), torch.load(_rewound(file), weights_only=False)]
            assert module._frozen is not None
        for other in copies:
            assert other._frozen is None
            with torch.no_grad():
                other._weight.mul_(0.5)
            assert not torch.equal(other.free_energy(fields), module.free_energy(fields))

    def test_contexts_may_overlap(self, fields):
        module = make("gaussian")
        layer, one, other = DEQFixedPoint(module), module.frozen(), module.frozen()
        expected = layer(fields)
        one.__enter__()
        other.__enter__()
        one.__exit__(None, None, None)
        assert not layer(fields).requires_grad
        other.__exit__(None, None, None)
        torch.testing.assert_close(layer(fields), expected)
        layer(fields).sum().backward()
        assert module._weight.grad is not None

    def test_entering_again_after_a_change_is_refused(self, fields):
        module = make("gaussian")
        with module.frozen():
            with torch.no_grad():
                module._weight.mul_(0.5)
            with pytest.raises(RuntimeError, match="weights changed"), module.frozen():
                pass

    @pytest.mark.parametrize("name", ["default", "gaussian", "ising"])
    def test_fields_of_a_subclass_count_once(self, name, fields):
        class Biased(DEQAdaTAPMeanFieldAttention):
            def prepare(self, x):
                return super().prepare(x + 0.7)

        module = make(name)
        layer = DEQFixedPoint(module, solver_fwd_tol=1e-10, solver_fwd_max_iter=300)
        expected = layer(fields + 0.7)
        module.__class__ = Biased
        torch.testing.assert_close(layer(fields), expected)
        with module.frozen():
            torch.testing.assert_close(layer(fields), expected)

    @pytest.mark.parametrize("name", ["default", "gaussian", "ising"])
    def test_no_gradient_of_the_free_energy_reaches_weights(self, name, fields):
        module = make(name)
        expected = module.free_energy(fields)
        with module.frozen():
            assert not module.free_energy(fields).requires_grad
            x = fields.requires_grad_()
            free_energy = module.free_energy(x)
            torch.testing.assert_close(free_energy, expected)
            free_energy.sum().backward()
        assert x.grad is not None
        assert all(p.grad is None for p in module.parameters())

    def test_a_parametrisation_that_moves_while_training_is_no_change(self, fields):
        module = make("default")
        parametrizations.spectral_norm(module, "_weight")
        layer = DEQFixedPoint(module)
        with module.frozen():
            torch.testing.assert_close(layer(fields), layer(fields))

    def test_failing_to_enter_leaves_the_outer_context(self, fields):
        module = make("gaussian")
        with module.frozen():
            own, module._weight = module._weight, nn.Parameter(torch.zeros(1))
            with pytest.raises(Exception), module.frozen():  # noqa: B017, PT011
                pass
            module._weight = own
            assert module._frozen is not None
            module.prepare(fields)


def _rewound(file: io.BytesIO) -> io.BytesIO:
    file.seek(0)
    return file
