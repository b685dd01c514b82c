"""What modules say of their update: derivatives, closed forms, first steps; whose update it is."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import grad

from deep_implicit_attention.attention import (
    DEQAdaTAPMeanFieldAttention,
    DEQMeanFieldAttention,
    DEQVanillaSoftmaxAttention,
)
from deep_implicit_attention.deq import (
    ConvergenceWarning,
    DEQFixedPoint,
    DEQModule,
    StateCache,
    fixed_point,
)
from deep_implicit_attention.deq._linear_map import Pullback
from deep_implicit_attention.deq._module import of_its_update
from deep_implicit_attention.solvers import Status

from .conftest import TIGHT, reference


class ByHand(DEQModule):
    """z = tanh(gain · z) / 2 + x, with derivatives of its own and a context of tensors and more."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor([0.5, -0.7, 0.9, 0.3]))
        self.updates = []  # with gradients; a list, to be that of copies, too

    def prepare(self, x):
        return {"field": x, "rest": ("half", 0.5, self.gain)}

    def update(self, z, context):
        if torch.is_grad_enabled() and context["field"].requires_grad:
            self.updates.append(z)
        return torch.tanh(context["rest"][2] * z) * context["rest"][1] + context["field"]

    def vjp(self, z, context):
        gain = context["rest"][2]
        slope = 0.5 * (1 - torch.tanh(gain * z) ** 2)

        def by_context(v, needed):
            assert needed["field"] is True
            by_gain = (v * slope * z).sum(0) if needed["rest"][2] else None
            return self.derivatives(v, by_gain)

        return Pullback(lambda v: v * slope * gain, by_context)

    def derivatives(self, by_field, by_gain):
        return {"field": by_field, "rest": ("half", 0.5, by_gain)}


def test_derivatives_by_the_context_spare_an_evaluation(x):
    module = ByHand().double()
    layer = DEQFixedPoint(module, **TIGHT)
    z = layer(x)
    first = grad(z.pow(3).sum(), (x, module.gain))
    assert not module.updates
    kind = type("ByState", (ByHand,), {"vjp": lambda self, *at: ByHand.vjp(self, *at).by_state})
    other = kind().double()
    grad(DEQFixedPoint(other, **TIGHT)(x).sum(), x)
    assert len(other.updates) == 1
    expected = grad(reference(module, x).pow(3).sum(), (x, module.gain))
    torch.testing.assert_close(first, expected, rtol=1e-9, atol=1e-9)
    module.gain.requires_grad_(False)
    torch.testing.assert_close(grad(layer(x).pow(3).sum(), x), expected[:1], rtol=1e-9, atol=1e-9)


def test_derivatives_by_several_arguments(x):
    class Scaled(nn.Module):
        def forward(self, z, field, gain):
            return 0.5 * torch.tanh(gain * z) + field

        def vjp(self, z, field, gain):
            slope = 0.5 * (1 - torch.tanh(gain * z) ** 2)

            def by_arguments(v, for_field, for_gain):
                assert for_field is True
                assert for_gain is True
                return v, (v * slope * z).sum(0)

            return Pullback(lambda v: v * slope * gain, by_arguments)

    gain = torch.tensor([0.5, -0.7, 0.9, 0.3], dtype=torch.float64, requires_grad=True)
    exact = {"tol": 1e-13, "max_iter": 300}
    plain = fixed_point(lambda z, a, b: Scaled()(z, a, b), torch.zeros_like(x), (x, gain), **exact)
    found = fixed_point(Scaled(), torch.zeros_like(x), (x, gain), **exact)
    torch.testing.assert_close(
        *(grad(solution.value.pow(3).sum(), (x, gain)) for solution in (found, plain))
    )


def test_derivatives_by_the_context_have_its_structure(x):
    class Wrong(ByHand):
        def derivatives(self, by_field, by_gain):
            return {"field": by_field}

    layer = DEQFixedPoint(Wrong().double())
    with pytest.raises(TypeError, match="derivatives in place of its tensors"):
        layer(x).sum().backward()


def _halved(kind):
    """A subclass of a mechanism with an update of its own."""

    class Halved(kind):
        def update(self, z, context):
            image = super().update(z, context)
            if isinstance(image, tuple):
                return 0.5 * image[0], image[1]
            return 0.5 * torch.tanh(image)

    return Halved


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (DEQMeanFieldAttention, {}),
        (DEQVanillaSoftmaxAttention, {}),
        (DEQVanillaSoftmaxAttention, {"normalize": True}),
        (DEQAdaTAPMeanFieldAttention, {}),
    ],
)
def test_an_update_that_is_overridden_is_the_one_that_counts(kind, options):
    """What the mechanism knows of its own update (closed form, derivatives) is not for another."""
    torch.manual_seed(0)
    module = _halved(kind)(4, 8, **options).double()
    x = torch.randn(2, 4, 8, dtype=torch.float64, requires_grad=True)
    z = DEQFixedPoint(module, **TIGHT)(x)
    context, state = module.prepare(x), module.initial_state(x)
    for _ in range(200):
        state = module.update(state, context)
    unrolled = state if isinstance(state, Tensor) else state[0]
    torch.testing.assert_close(z, unrolled, rtol=1e-9, atol=1e-9)
    tensors = [x, *module.parameters()]
    found, expected = (grad(value.pow(3).sum(), tensors) for value in (z, unrolled))
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)


def test_a_mechanism_need_not_be_a_module():
    """It has no parameters, then; what it closes over has first derivatives."""

    class Plain:
        weight = torch.randn(4, 4, dtype=torch.float64, requires_grad=True)

        def initial_state(self, x):
            return torch.zeros_like(x)

        def update(self, z, context):
            return torch.tanh(context + 0.2 * z @ self.weight)

    plain, x = Plain(), torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    layer = DEQFixedPoint(plain, **TIGHT)
    z = x
    for _ in range(100):
        z = plain.update(z, x)
    inputs = x, plain.weight
    for mine, theirs in zip(grad(layer(x).sum(), inputs), grad(z.sum(), inputs), strict=True):
        torch.testing.assert_close(mine, theirs)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), z.detach())


def test_a_class_is_no_mechanism():
    with pytest.raises(TypeError, match="got the class DEQMeanFieldAttention"):
        DEQFixedPoint(DEQMeanFieldAttention)


def test_an_update_set_on_the_instance_counts_as_well(monkeypatch):
    torch.manual_seed(0)
    module = DEQMeanFieldAttention(4, 3).double()
    x = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    inherited = module.update
    monkeypatch.setattr(
        module, "update", lambda z, context: 0.5 * torch.tanh(inherited(z, context))
    )
    expected = _halved(DEQMeanFieldAttention)(4, 3).double()
    expected.load_state_dict(module.state_dict())
    found, others = (
        grad(DEQFixedPoint(fun, **TIGHT)(x).pow(3).sum(), x) for fun in (module, expected)
    )
    torch.testing.assert_close(found, others, rtol=1e-9, atol=1e-9)


def test_a_subclass_may_say_anew_what_it_knows():
    class Doubled(DEQMeanFieldAttention):
        def update(self, z, context):
            return super().update(z, context) / 2

        def vjp(self, z, context):
            product = super().vjp(z, context)
            return lambda v: product(v / 2)

    module = Doubled(4, 3)
    assert of_its_update(module, "vjp") is not None
    assert of_its_update(module, "preconditioner") is None
    assert of_its_update(_halved(Doubled)(4, 3), "vjp") is None


class Exact(DEQModule):
    """A template: a closed form of affine updates, which subclasses write."""

    def solve(self, context, wanted):
        offset = self.update(torch.zeros_like(context), context)
        slope = self.update(torch.ones_like(context), context) - offset
        return offset / (1 - slope)


class Affine(Exact):
    def update(self, z, context):
        return context - 2 * z


class Mixed(Affine):
    def judge(self, context):
        return "nothing is right"

    solve = Exact.solve


def test_what_a_template_says_holds_for_the_update_written_for_it(x):
    for module in (Affine(), type("Both", (Exact, DEQModule), {"update": Affine.update})()):
        solution = DEQFixedPoint(module)(x, return_solution=True)
        torch.testing.assert_close(solution.value, x / 3)
        assert bool(solution.converged.all())


def test_a_verdict_on_another_system_is_not_used(x):
    class Other(Mixed):
        def update(self, z, context):
            return context - z

        solve = Exact.solve

    with pytest.warns(ConvergenceWarning, match="nothing is right"):
        DEQFixedPoint(Mixed())(x)
    torch.testing.assert_close(DEQFixedPoint(Other(), on_failure="raise")(x), x / 2)


def test_closed_forms_of_any_dtype_and_under_transformations(x):
    class Narrow(Affine):
        def solve(self, context, wanted):
            return (context / 3).bfloat16()

    found = DEQFixedPoint(Narrow(), on_failure="ignore", solver_fwd_tol=0.1)(x)
    torch.testing.assert_close(found.double(), x.detach() / 3, rtol=1e-2, atol=1e-2)
    layer = DEQFixedPoint(Affine())
    third = torch.full_like(x, 1 / 3)
    torch.testing.assert_close(torch.func.grad(lambda x: layer(x).sum())(x), third)
    torch.testing.assert_close(torch.func.jvp(layer, (x,), (torch.ones_like(x),))[1], third)


def test_sites_are_not_appended_to_another_update():
    module = _halved(DEQVanillaSoftmaxAttention)(4, 8, causal=True)
    with pytest.raises(TypeError, match="overrides append"):
        StateCache.start(DEQFixedPoint(module), torch.randn(1, 4, 8))


def test_a_closed_form_without_a_residual_is_measured_by_an_update(x):
    class Linear(DEQModule):
        def update(self, z, context):
            return z / 2 + context

        def solve(self, context, wanted):
            return 2 * context

    solution = DEQFixedPoint(Linear())(x.detach(), return_solution=True)
    assert torch.equal(solution.value, 2 * x.detach())
    assert solution.residual.tolist() == [0.0, 0.0, 0.0]


def test_a_closed_form_that_is_none_is_refused(x):
    class Wide(Affine):
        def solve(self, context, wanted):
            return torch.cat([context, context])

    class Nothing(Affine):
        def solve(self, context, wanted):
            return (None,)

        def residual(self, context, state):
            return context.new_zeros(len(context)), context.new_zeros(len(context))

    with pytest.raises(ValueError, match="must keep shapes"):
        DEQFixedPoint(Wide())(x)
    with pytest.raises(TypeError, match=r"solve must return element 0.*NoneType"):
        DEQFixedPoint(Nothing())(x)


@pytest.mark.parametrize("size", [1e-25, 1.0, 1e25])
def test_residuals_without_a_solver_are_right_whatever_the_size(size):
    class Half(DEQModule):
        def update(self, z, context):
            return context + 0.5 * z

    class Wrong(Half):
        def solve(self, context, wanted):
            return 3 * context

    x = torch.randn(2, 4, 2) * size
    for layer, residual in (
        (DEQFixedPoint(Half(), steps=1), 1 / 3),
        (DEQFixedPoint(Wrong(), on_failure="ignore"), 0.2),
    ):
        solution = layer(x, return_solution=True)
        torch.testing.assert_close(solution.residual, torch.full((2,), residual))
        assert not solution.converged.any()


@pytest.mark.parametrize("residual", [0.5, torch.inf, torch.nan])
def test_one_sample_with_a_residual_that_is_not_small_has_not_converged(residual):
    class Unknown(DEQModule):
        def update(self, z, context):
            return context

        def solve(self, context, wanted):
            return context

        def residual(self, context, state):
            found = torch.tensor([0.0, residual])
            return found, found

    x = torch.ones(2, 3)
    solution = DEQFixedPoint(Unknown(), on_failure="ignore")(x, return_solution=True)
    assert solution.converged.tolist() == [True, False]


def test_an_element_that_is_not_finite_is_no_convergence_whatever_the_residual():
    class Pair(DEQModule):
        def initial_state(self, x):
            return x, x

        def update(self, z, context):
            return context, context.sqrt()

        def solve(self, context, wanted):
            return self.update(None, context)

        def residual(self, context, state):
            return context.new_zeros(len(context)), context.new_zeros(len(context))

    x = torch.tensor([[4.0], [-1.0]])
    options = {"on_failure": "ignore", "output_elements": (0, 1)}
    solution = DEQFixedPoint(Pair(), **options)(x, return_solution=True)
    assert solution.status == (Status.CONVERGED, Status.NONFINITE)
    assert [part[0].item() for part in solution.value] == [4.0, 2.0]
    assert all(bool(part[1].isnan()) for part in solution.value)
    assert torch.equal(DEQFixedPoint(Pair(), on_failure="raise")(x), x)


def test_derivatives_are_not_those_of_a_map_that_is_overridden():
    class Half(nn.Module):
        def forward(self, z, x):
            return z / 2 + x

        def vjp(self, z, x):
            return lambda v: v / 2

    class Quarter(Half):
        def forward(self, z, x):
            return z / 4 + x

    x = torch.ones(1, 2, dtype=torch.float64, requires_grad=True)
    for f, slope in ((Half(), 2.0), (Quarter(), 4 / 3)):
        z = fixed_point(f, torch.zeros_like(x), (x,), tol=1e-12).value
        torch.testing.assert_close(grad(z.sum(), x)[0], torch.full_like(x, slope))
