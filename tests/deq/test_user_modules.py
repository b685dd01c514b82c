"""Maps as users write them: what a module owns, and what may not be done to it."""

from __future__ import annotations

import copy
import threading
from functools import partial

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad, grad
from torch.func import functional_call
from torch.nn.utils import parametrizations, parametrize, prune

from deep_implicit_attention.attention import (
    DEQAdaTAPMeanFieldAttention,
    DEQMeanFieldAttention,
    DEQVanillaSoftmaxAttention,
)
from deep_implicit_attention.deq import (
    DEQFixedPoint,
    DEQModule,
    fixed_point,
    jacobian_norm,
    jacobian_penalty,
    spectral_radius,
)
from deep_implicit_attention.solvers import anderson, broyden, gmres, newton_krylov, picard

from .conftest import TIGHT, reference


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


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
def test_couplings_may_be_sparse_to_second_order(layout, learned, x):
    dense = torch.eye(4, dtype=x.dtype).roll(1, 0) * torch.tensor([0.5, -0.3, 0.2, 0.4])
    w = dense.double().to_sparse(layout=layout).requires_grad_(learned)
    leaves = [x, w] if learned else [x]

    def step(z, w, x):
        return torch.tanh((w @ z.mT).mT + x)

    mine = fixed_point(step, torch.zeros_like(x), (w, x), tol=1e-13, max_iter=200).value
    theirs = x.detach()
    for _ in range(60):
        theirs = step(theirs, w, x)
    found, expected = [], []
    for z, derivatives in ((mine, found), (theirs, expected)):
        first = grad(z.pow(3).sum(), leaves, create_graph=True)
        second = grad(sum(g.to_dense().square().sum() for g in first), leaves)
        derivatives.extend(g.to_dense() for g in (*first, *second))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


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


def test_a_part_that_is_there_twice(x):
    """By two names, and with a weight that a third part has as well."""

    class Twice(DEQModule):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(4, 4)
            self.again, self.other = self.first, nn.Linear(4, 4)
            self.other.weight = self.first.weight
            nn.init.uniform_(self.first.weight, -0.1, 0.1)

        def update(self, z, context):
            return self.other(torch.tanh(self.again(self.first(z) + context)))

    torch.manual_seed(0)
    module = Twice().double()
    tensors = [x, *module.parameters()]
    assert len(tensors) == 4
    mine = grad(DEQFixedPoint(module, **TIGHT)(x).pow(3).sum(), tensors)
    theirs = grad(reference(module, x).pow(3).sum(), tensors)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


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


class Update(nn.Module):
    def __init__(self, call):
        super().__init__()
        self.call = call

    def forward(self, z):
        return self.call(z)


class TestRefusals:
    def test_forward_mode(self, problem, w, x):
        def run(x):
            return fixed_point(problem.map, torch.zeros_like(x), (w.detach(), x)).value

        with pytest.raises(RuntimeError, match="forward-mode"):
            torch.func.jvp(run, (x.detach(),), (torch.ones_like(x),))

    @pytest.mark.parametrize("solver", [picard, anderson, broyden, newton_krylov])
    @pytest.mark.parametrize("differentiable", [True, False])
    def test_forward_mode_by_what_a_map_closes_over(self, problem, w, x, solver, differentiable):
        # From the solution a solver takes no step, and its tangent would be zero.
        w, x = w.detach(), x.detach()
        start = fixed_point(problem.map, torch.zeros_like(x), (w, x), tol=1e-10).value
        with forward_ad.dual_level(), torch.set_grad_enabled(differentiable):
            dual = forward_ad.make_dual(x, torch.ones_like(x))
            with pytest.raises(RuntimeError, match="use reverse mode"):
                fixed_point(lambda z: problem.map(z, w, dual), start, solver=solver)
            module = Update(lambda z: problem.map(z, w, dual))
            with pytest.raises(RuntimeError, match="use reverse mode"):
                fixed_point(module, start, solver=solver)
            assert fixed_point(problem.map, start, (w, x), solver=solver).all_converged()

    def test_gmres_as_a_fixed_point_solver(self, rich, x):
        with pytest.raises(TypeError, match="linear systems"):
            DEQFixedPoint(rich, gmres)
        with pytest.raises(TypeError, match="linear systems"):
            fixed_point(lambda z: z, x, solver=gmres)
        with pytest.raises(TypeError, match="linear systems"):
            fixed_point(lambda z: z, x, solver=partial(gmres, restart=3))

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

    def test_a_mechanism_called_with_fields_alone(self, rich, x):
        with pytest.raises(TypeError, match=r"state and a context.*DEQFixedPoint\(Rich\(...\)\)"):
            rich(x)
        with pytest.raises(TypeError, match=r"DEQFixedPoint\(DEQVanillaSoftmaxAttention"):
            spectral_radius(DEQVanillaSoftmaxAttention(5, 4), torch.zeros(2, 5, 4))

    @pytest.mark.parametrize("initial", [lambda x: x[:, :2], lambda x: (x, x)])
    def test_initial_states_of_another_layout(self, rich, x, initial):
        with pytest.raises((TypeError, ValueError), match="map must"):
            DEQFixedPoint(rich, initial_state=initial)(x)
