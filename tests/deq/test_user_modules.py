"""Maps as users write them: what a module owns, and what may not be done to it."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import grad
from torch.func import functional_call
from torch.nn.utils import parametrizations, parametrize, prune

from deep_implicit_attention.attention import (
    DEQAdaTAPMeanFieldAttention,
    DEQMeanFieldAttention,
    DEQVanillaSoftmaxAttention,
)
from deep_implicit_attention.deq import (
    ConvergenceError,
    ConvergenceWarning,
    DEQFixedPoint,
    DEQModule,
    Implicit,
    OneStep,
    StateCache,
    fixed_point,
    jacobian_norm,
    jacobian_penalty,
    spectral_radius,
)
from deep_implicit_attention.deq._linear_map import Pullback
from deep_implicit_attention.deq._module import of_its_update
from deep_implicit_attention.solvers import anderson, gmres

TIGHT = {
    "solver_fwd_tol": 1e-13,
    "solver_fwd_max_iter": 300,
    "solver_bwd_tol": 1e-13,
    "solver_bwd_max_iter": 300,
}


class Rich(DEQModule):
    """Parameters of a submodule, a frozen one, a buffer, and a context made of one of them."""

    shift: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
        self.frozen = nn.Parameter(torch.full((4,), 0.7), requires_grad=False)
        self.register_buffer("shift", torch.tensor([0.1, -0.2, 0.3, 0.0]))

    def prepare(self, x):
        return {"field": x, "gain": self.inner[0].bias}

    def update(self, z, context):
        pulled = self.inner(z) * self.frozen + self.shift
        return 0.5 * pulled + context["field"] * (1 + context["gain"])


@pytest.fixture
def rich() -> Rich:
    torch.manual_seed(0)
    return Rich().double()


def reference(module, x, steps=300):
    context = module.prepare(x)
    z = torch.zeros_like(x)
    for _ in range(steps):
        z = module.update(z, context)
    return z


def test_first_and_second_derivatives_of_all_it_owns(rich, x):
    tensors = [x, *(p for p in rich.parameters() if p.requires_grad)]
    layer = DEQFixedPoint(rich, **TIGHT)
    mine = grad(layer(x).pow(3).sum(), tensors, create_graph=True)
    theirs = grad(reference(rich, x).pow(3).sum(), tensors, create_graph=True)
    second, expected = (
        grad(sum(g.square().sum() for g in first), tensors) for first in (mine, theirs)
    )
    for a, b in zip((*mine, *second), (*theirs, *expected), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


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


def test_the_live_module_is_not_touched_even_by_threads(rich, x):
    layer = DEQFixedPoint(rich)
    before = copy.deepcopy(rich.state_dict())
    failures = []

    def work():
        try:
            for _ in range(20):
                layer(x.detach()).square().sum().backward()
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert all(isinstance(p, nn.Parameter) for p in rich.parameters())
    for name, value in rich.state_dict().items():
        assert torch.equal(value, before[name])


def test_a_change_between_forward_and_backward_is_noticed(rich, x):
    loss = DEQFixedPoint(rich)(x).sum()
    with torch.no_grad():
        rich.frozen.mul_(0.3)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_backward_takes_buffers_as_forward_found_them(rich, x):
    layer = DEQFixedPoint(rich, **TIGHT)
    expected = grad(layer(x).square().sum(), x)[0]
    loss = layer(x).square().sum()
    with torch.no_grad():
        rich.shift.mul_(0.3)
    torch.testing.assert_close(grad(loss, x)[0], expected, rtol=0, atol=0)


def test_functional_call_with_constants_differentiates_at_them(rich, x):
    layer = DEQFixedPoint(rich, **TIGHT)
    other = {f"fun.{n}": 0.5 * t.detach() for n, t in rich.state_dict(keep_vars=True).items()}
    mine = grad(functional_call(layer, other, (x,)).square().sum(), x)[0]
    changed = copy.deepcopy(rich)
    changed.load_state_dict({n.removeprefix("fun."): t for n, t in other.items()})
    expected = grad(reference(changed, x).square().sum(), x)[0]
    torch.testing.assert_close(mine, expected, rtol=1e-9, atol=1e-9)


def test_a_branch_that_the_start_does_not_take_is_differentiated(x):
    class Branching(DEQModule):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.full((4,), 0.4, dtype=torch.float64))

        def update(self, z, context):
            return context + z * self.w if z.abs().max() > 0 else context

    module = Branching()
    mine = grad(DEQFixedPoint(module, **TIGHT)(x).square().sum(), module.w)[0]
    expected = grad((x.detach() / (1 - module.w)).square().sum(), module.w)[0]
    torch.testing.assert_close(mine, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("steps", [None, 3])
def test_a_narrow_module_of_a_user_is_widened(rich, x, steps):
    narrow = copy.deepcopy(rich).bfloat16()
    source = x.detach().bfloat16()
    z = DEQFixedPoint(narrow, steps=steps)(source)
    z.sum().backward()
    assert z.dtype == torch.bfloat16
    wide = DEQFixedPoint(copy.deepcopy(narrow).float(), steps=steps)(source.float())
    torch.testing.assert_close(z.float(), wide, rtol=0.01, atol=0.01)
    assert {p.grad.dtype for p in narrow.parameters() if p.requires_grad} == {torch.bfloat16}


@pytest.mark.parametrize("grad", [True, False])
def test_what_is_returned_may_be_written_to(grad):
    class Constant(DEQModule):
        def __init__(self):
            super().__init__()
            self.answer = nn.Parameter(torch.ones(2, 3), requires_grad=False)

        def update(self, z, context):
            return self.answer if context.mean() > 1 else context

    layer = DEQFixedPoint(Constant())
    with torch.set_grad_enabled(grad):
        for x in (torch.full((2, 3), 0.5), torch.full((2, 3), 2.0)):
            before = x.clone()
            layer(x).zero_()
            assert torch.equal(x, before)
    assert torch.equal(layer.fun.answer, torch.ones(2, 3))


@pytest.mark.parametrize("steps", [None, 3])
def test_a_state_changed_in_place_is_refused(x, steps):
    class InPlace(DEQModule):
        def update(self, z, context):
            return z.mul_(0.5).add_(context)

    with pytest.raises(RuntimeError, match="in place"):
        DEQFixedPoint(InPlace(), steps=steps)(x.detach())


class TestParametrised:
    @pytest.mark.parametrize(
        "parametrise", [parametrizations.weight_norm, parametrizations.orthogonal]
    )
    @pytest.mark.parametrize("backward_inside", [True, False])
    def test_cached_or_not_the_gradients_are_right(self, problem, x, parametrise, backward_inside):
        module = problem.module(torch.eye(4, dtype=torch.float64) / 3)
        parametrise(module, "w")
        layer = DEQFixedPoint(module, **TIGHT)
        parameters = list(module.parameters())
        scale = 0.3 if parametrise is parametrizations.orthogonal else 1.0
        loss = lambda z: z.square().sum()  # noqa: E731
        expected = grad(loss(problem.unrolled(module.w, scale * x)), parameters)
        with parametrize.cached():
            z = layer(scale * x)
            if backward_inside:
                mine = grad(loss(z), parameters)
        if not backward_inside:
            mine = grad(loss(z), parameters)
        for a, b in zip(mine, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-8)

    def test_hooks_inside_a_solve_are_refused_not_ignored(self, x):
        module = DEQMeanFieldAttention(5, 4)
        prune.l1_unstructured(module.correction.expand, "weight", amount=0.5)
        with pytest.raises(RuntimeError, match="hooks are not called"):
            DEQFixedPoint(module)(torch.zeros(2, 5, 4))
        module = DEQVanillaSoftmaxAttention(5, 4)
        module.to_out.register_full_backward_hook(lambda *_: None)
        with pytest.raises(RuntimeError, match="hooks are not called"):
            DEQFixedPoint(module)(torch.zeros(2, 5, 4))

    def test_layers_that_act_on_the_sources_may_be_wrapped(self):
        torch.manual_seed(0)
        module = DEQVanillaSoftmaxAttention(5, 4)
        prune.l1_unstructured(module.to_q, "weight", amount=0.5)
        layer = DEQFixedPoint(module)
        layer(torch.randn(2, 5, 4)).square().sum().backward()
        assert module.to_q.weight_orig.grad.norm() > 0


class TestRefusals:
    def test_forward_mode(self, problem, w, x):
        def run(x):
            return fixed_point(problem.map, torch.zeros_like(x), (w.detach(), x)).value

        with pytest.raises(RuntimeError, match="forward-mode"):
            torch.func.jvp(run, (x.detach(),), (torch.ones_like(x),))

    def test_gmres_as_a_fixed_point_solver(self, rich, x):
        with pytest.raises(TypeError, match="linear systems"):
            DEQFixedPoint(rich, gmres)
        with pytest.raises(TypeError, match="linear systems"):
            fixed_point(lambda z: z, x, solver=gmres)

    @pytest.mark.parametrize("diagnose", [spectral_radius, jacobian_norm, jacobian_penalty])
    def test_diagnostics_in_inference_mode(self, diagnose):
        with torch.inference_mode(), pytest.raises(RuntimeError, match="inference_mode"):
            diagnose(lambda z: z / 2, torch.ones(2, 3))

    @pytest.mark.parametrize("elements", [(), 0, (1, 0), (0, 0), (-1,), "0"])
    def test_output_elements(self, elements):
        with pytest.raises((TypeError, ValueError), match="output_elements"):
            DEQFixedPoint(DEQAdaTAPMeanFieldAttention(5, 3), anderson, elements)

    def test_arguments_that_are_no_tuple(self, x):
        with pytest.raises(TypeError, match=r"args must be a tuple.*\(a,\)"):
            fixed_point(lambda z, a: a, x.detach(), x)

    def test_a_map_that_turns_complex(self, x):
        with pytest.raises(TypeError, match="real"):
            fixed_point(lambda z: z * 1j, x.detach())

    def test_inputs_by_name(self, x):
        layer = DEQFixedPoint(DEQVanillaSoftmaxAttention(5, 4))
        with pytest.raises(TypeError, match=r"mask.*positional"):
            layer(torch.zeros(2, 5, 4), mask=torch.ones(2, 5, dtype=torch.bool))

    @pytest.mark.parametrize("initial", [lambda x: x[:, :2], lambda x: (x, x)])
    def test_initial_states_of_another_layout(self, rich, x, initial):
        with pytest.raises((TypeError, ValueError), match="map must"):
            DEQFixedPoint(rich, initial_state=initial)(x)


class TestWarmStart:
    @pytest.fixture
    def layer(self):
        torch.manual_seed(0)
        return DEQFixedPoint(DEQMeanFieldAttention(5, 4)).double()

    def test_gets_no_gradient(self, layer):
        x = torch.randn(2, 5, 4, dtype=torch.float64)
        z = layer(x)
        z.sum().backward()
        for steps in (None, 2):
            layer(x, state=z, steps=steps).sum().backward()

    def test_samples_that_are_not_finite_start_afresh(self, layer):
        x = torch.randn(3, 5, 4, dtype=torch.float64)
        bad = x.clone()
        bad[1] = torch.nan
        with pytest.warns(ConvergenceWarning):
            previous = layer(bad)
        solution = layer(x, state=previous, return_solution=True)
        assert bool(solution.converged.all())
        torch.testing.assert_close(solution.value, layer(x), rtol=1e-3, atol=1e-3)


class TestScales:
    @pytest.mark.parametrize("scale", [1e-25, 1e-21, 1.0, 1e20])
    @pytest.mark.parametrize("adjoint", [None, Implicit(gmres)])
    def test_loss_scaling_does_not_change_the_gradient(self, scale, adjoint):
        torch.manual_seed(0)
        layer = DEQFixedPoint(DEQMeanFieldAttention(5, 4))
        x = torch.randn(2, 5, 4)
        gradients = [
            grad((layer(x, adjoint=adjoint) * factor).sum(), layer.fun._weight)[0] / factor
            for factor in (scale, 1.0)
        ]
        torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)

    def test_solver_options_may_be_positional_or_numpy(self, rich, x):
        import numpy as np

        def mine(f, z0, tol=1e-3, max_iter=10, m=3):
            return anderson(f, z0, tol=tol, max_iter=max_iter, m=m)

        layer = DEQFixedPoint(rich, mine, solver_fwd_m=2, solver_fwd_max_iter=np.int64(60))
        assert bool(layer(x, return_solution=True).converged.all())


class TestNonfinite:
    def test_a_batch_of_nothing_else_leaves_finite_gradients_if_left_out(self):
        torch.manual_seed(0)
        layer = DEQFixedPoint(DEQMeanFieldAttention(5, 4))
        x = torch.full((1, 5, 4), torch.nan)
        with pytest.warns(ConvergenceWarning):
            z = layer(x)
        (z[:0].sum() + layer(torch.randn(1, 5, 4)).sum()).backward()
        assert all(bool(p.grad.isfinite().all()) for p in layer.parameters())

    def test_a_fixed_horizon_reports_them_too(self):
        layer = DEQFixedPoint(DEQMeanFieldAttention(5, 4), steps=3)
        x = torch.randn(2, 5, 4)
        x[0] = torch.inf
        with pytest.warns(ConvergenceWarning, match="1 of 2 samples.*nonfinite"):
            layer(x)
        with pytest.raises(ConvergenceError):
            layer(x, on_failure="raise")


def test_an_adjoint_for_one_call_replaces_the_backward_options():
    layer = DEQFixedPoint(DEQMeanFieldAttention(5, 4), solver_bwd_tol=1e-6)
    layer(torch.randn(2, 5, 4), adjoint=OneStep()).sum().backward()


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


def test_a_solution_is_a_warm_start(x):
    layer = DEQFixedPoint(Affine(), solver_fwd_tol=1e-8)
    solution = layer(x, return_solution=True)
    for start in (solution, (solution,), solution.value):
        assert torch.equal(layer(x, state=start), solution.value)
    with pytest.raises(TypeError, match="state element 0 must be a tensor, got list"):
        layer(x, state=[[1.0, 2.0]])


def test_a_solve_cannot_be_exported():
    layer = DEQFixedPoint(DEQMeanFieldAttention(5, 4))
    with pytest.raises(RuntimeError, match="steps=K"):
        torch.export.export(layer, (torch.randn(2, 5, 4),))


def test_a_parametrisation_is_evaluated_once_a_call():
    calls = []

    class Counting(nn.Module):
        def forward(self, weight):
            calls.append(1)
            return weight

    for module in (DEQMeanFieldAttention(5, 4), DEQAdaTAPMeanFieldAttention(5, 4)):
        nn.utils.parametrize.register_parametrization(module, "_weight", Counting())
        calls.clear()
        DEQFixedPoint(module)(torch.randn(2, 5, 4)).sum().backward()
        assert len(calls) == 1


def test_warnings_point_at_the_caller():
    layer = DEQFixedPoint(DEQMeanFieldAttention(5, 4), solver_fwd_max_iter=1)
    with pytest.warns(ConvergenceWarning) as caught:
        layer(torch.randn(2, 5, 4))
    assert caught[0].filename == __file__
