"""`DEQFixedPoint`: one layer for every module, state and horizon."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn
from torch.autograd import grad

from deep_implicit_attention.attention import DEQMeanFieldAttention, DEQVanillaSoftmaxAttention
from deep_implicit_attention.deq import (
    ConvergenceError,
    ConvergenceWarning,
    DEQFixedPoint,
    DEQModule,
    Implicit,
    OneStep,
    Phantom,
)
from deep_implicit_attention.deq._state import finite_samples
from deep_implicit_attention.solvers import Solution, Status, anderson, newton_krylov, picard

TIGHT = {
    "solver_fwd_tol": 1e-12,
    "solver_fwd_max_iter": 200,
    "solver_bwd_tol": 1e-12,
    "solver_bwd_max_iter": 200,
}


@pytest.fixture
def layer():
    torch.manual_seed(0)
    return DEQFixedPoint(DEQMeanFieldAttention(5, 4), anderson, **TIGHT).double()


@pytest.fixture
def fields():
    torch.manual_seed(1)
    return torch.randn(3, 5, 4, dtype=torch.float64) / 2


def test_user_modules_with_two_methods_work_to_second_order(problem, w, x):
    module = problem.module(w.detach())
    layer = DEQFixedPoint(module, anderson, **TIGHT)
    first = grad(layer(x).square().sum(), module.w, create_graph=True)[0]
    reference = grad(problem.unrolled(w, x).square().sum(), w, create_graph=True)[0]
    torch.testing.assert_close(first, reference, rtol=1e-9, atol=1e-9)
    second, expected = grad(first.square().sum(), x)[0], grad(reference.square().sum(), x)[0]
    torch.testing.assert_close(second, expected, rtol=1e-9, atol=1e-9)


def test_a_module_that_forgets_update_says_so(x):
    with pytest.raises(NotImplementedError, match="must implement update"):
        DEQFixedPoint(DEQModule())(x)
    with pytest.raises(TypeError, match="initial_state"):
        DEQFixedPoint(nn.Linear(4, 4))


def test_parametrised_weights_of_a_user_module_keep_their_gradients(problem, x):
    module = problem.module(torch.eye(4, dtype=torch.float64) / 3)
    nn.utils.parametrizations.weight_norm(module, "w")
    layer = DEQFixedPoint(module, **TIGHT)
    expected = grad(problem.unrolled(module.w, x).square().sum(), list(module.parameters()))
    mine = grad(layer(x).square().sum(), list(module.parameters()))
    with nn.utils.parametrize.cached():
        cached = grad(layer(x).square().sum(), list(module.parameters()))
    for a, b, c in zip(mine, cached, expected, strict=True):
        assert a.norm() > 0
        torch.testing.assert_close(a, c, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(b, c, rtol=1e-9, atol=1e-9)


def test_training_and_evaluation_give_the_same_values_and_gradients(layer, fields):
    x = fields.requires_grad_()
    results = []
    for mode in (True, False):
        layer.train(mode)
        z = layer(x)
        results.append((z, *grad(z.square().sum(), [x, *layer.parameters()])))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_value_is_the_same_with_and_without_gradients(layer, fields):
    with torch.no_grad():
        plain = layer(fields)
    with torch.inference_mode():
        inference = layer(fields)
    assert torch.equal(layer(fields), plain)
    assert torch.equal(plain, inference)


def test_solution_is_what_the_call_returns(layer, fields):
    z = layer(fields)
    solution = layer(fields, return_solution=True)
    value, again = solution
    assert isinstance(solution, Solution)
    assert again is solution
    assert torch.equal(value, z)
    context = layer.fun.prepare(fields)
    image = layer.fun.update(z, context)
    gap = (image - z).flatten(1).norm(dim=1) / image.flatten(1).norm(dim=1)
    torch.testing.assert_close(solution.residual, gap, rtol=1e-3, atol=1e-16)
    assert bool((solution.residual <= 1e-12).all())
    assert solution.status == (Status.CONVERGED,) * 3


class TestHorizon:
    def test_k_steps_are_k_updates_differentiated_through(self, layer, fields):
        x = fields.requires_grad_()
        context = layer.fun.prepare(x)
        z = torch.zeros_like(x)
        for _ in range(3):
            z = layer.fun.update(z, context)
        mine = layer(x, steps=3)
        torch.testing.assert_close(mine, z)
        for a, b in zip(
            grad(mine.square().sum(), [x, layer.fun._weight]),
            grad(z.square().sum(), [x, layer.fun._weight]),
            strict=True,
        ):
            torch.testing.assert_close(a, b)

    def test_many_steps_are_equilibrium(self, layer, fields):
        torch.testing.assert_close(layer(fields, steps=300), layer(fields), rtol=0, atol=1e-10)

    def test_evidence_of_a_fixed_horizon(self, layer, fields):
        solution = layer(fields, steps=2, return_solution=True)
        assert solution.status == (Status.FIXED_STEPS,) * 3
        context = layer.fun.prepare(fields)
        image = layer.fun.update(solution.value, context)
        gap = (image - solution.value).flatten(1).norm(dim=1) / image.flatten(1).norm(dim=1)
        torch.testing.assert_close(solution.residual, gap)

    def test_the_residual_may_be_left_out(self, layer, fields, monkeypatch):
        calls, update = [], layer.fun.update
        monkeypatch.setattr(layer.fun, "update", lambda *given: calls.append(1) or update(*given))
        found = {}
        for measure in (True, False):
            calls.clear()
            found[measure] = layer(fields, steps=4, return_solution=True, measure=measure)
            assert len(calls) == 4 + measure
        assert torch.equal(found[True].value, found[False].value)
        assert found[False].status == (Status.FIXED_STEPS,) * 3
        assert bool(found[False].residual.isnan().all())
        assert not bool(found[False].converged.any())

    def test_a_solve_to_tolerance_has_its_residual_anyway(self, layer, fields):
        solution = layer(fields, return_solution=True, measure=False)
        assert bool((solution.residual <= 1e-12).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_finite_samples(dtype):
    largest = torch.finfo(dtype).max
    x = torch.full((5, 2, 3), largest, dtype=dtype)  # the sum of which is infinite
    assert finite_samples(x).tolist() == [True] * 5
    for place, value in enumerate((torch.nan, torch.inf, -torch.inf)):
        x[place, 1, 2] = value
    assert finite_samples(x).tolist() == [False] * 3 + [True] * 2
    assert finite_samples(torch.ones(2, 3, dtype=dtype)).tolist() == [True] * 2
    assert finite_samples(x[:0]).tolist() == []
    assert finite_samples(x[:, 1, 2]).tolist() == [False] * 3 + [True] * 2
    mapped = torch.func.vmap(lambda t: finite_samples(t))(x[:, None])
    assert mapped.flatten().tolist() == [False] * 3 + [True] * 2


class TestInitialState:
    def test_input_starts_at_x(self, layer, fields):
        first = layer(fields, steps=1, initial_state="input")
        expected = layer.fun.update(fields, layer.fun.prepare(fields))
        assert torch.equal(first, expected)

    def test_callable(self, layer, fields):
        first = layer(fields, steps=1, initial_state=lambda x: 2 * x)
        assert torch.equal(first, layer.fun.update(2 * fields, layer.fun.prepare(fields)))

    def test_equilibrium_does_not_depend_on_it(self, layer, fields):
        a, b = layer(fields), layer(fields, initial_state="input")
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)

    def test_warm_start_saves_steps(self, layer, fields):
        cold = layer(fields, return_solution=True)
        warm = layer(1.001 * fields, state=cold.value, return_solution=True)
        again = layer(1.001 * fields, return_solution=True)
        assert warm.steps.max() < again.steps.max()
        torch.testing.assert_close(warm.value, again.value, rtol=0, atol=1e-10)
        assert layer(fields, state=cold.value, return_solution=True).steps.tolist() == [1, 1, 1]

    def test_wrong_states_are_refused(self, layer, fields):
        with pytest.raises(ValueError, match="state element 0"):
            layer(fields, state=fields[:2])
        with pytest.raises(ValueError, match="state must have"):
            layer(fields, state=(fields, fields))
        for wrong, kind in ((fields.detach().numpy(), "ndarray"), (0.0, "float")):
            with pytest.raises(TypeError, match=f"state must be a tensor.*got {kind}"):
                layer(fields, state=wrong)


class TestOptions:
    def test_belong_to_the_instance(self, fields):
        torch.manual_seed(0)
        module = DEQMeanFieldAttention(5, 4).double()
        DEQFixedPoint(module, anderson, solver_fwd_tol=0.5, solver_fwd_m=2)
        other = DEQFixedPoint(module, anderson)
        assert other(fields, return_solution=True).residual.max() <= 1e-4

    def test_overrides_last_for_one_call(self, layer, fields):
        loose = layer(fields, return_solution=True, solver_fwd_tol=1e-2)
        assert loose.residual.max() > 1e-6
        assert layer(fields, return_solution=True).residual.max() <= 1e-12

    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            ({"solver_fwd_window": 3}, TypeError, r"solver_fwd_window.*solver_fwd_m\b"),
            ({"solver_bwd_window": 3}, TypeError, "solver_bwd_window"),
            ({"tolerance": 1e-3}, TypeError, "unknown option 'tolerance'"),
            ({"adjoint": OneStep(), "solver_bwd_tol": 1e-3}, TypeError, "solver_bwd_tol"),
            ({"adjoint": "implicit"}, TypeError, "adjoint"),
            ({"steps": 0}, ValueError, "steps"),
            ({"steps": 1.5}, TypeError, "steps"),
            ({"initial_state": "ones"}, ValueError, "initial_state"),
            ({"on_failure": "shout"}, ValueError, "on_failure"),
            ({"solver_fwd_tol": -1e-4}, ValueError, "solver_fwd_tol"),
            ({"solver_bwd_tol": -1e-4}, ValueError, "solver_bwd_tol"),
            ({"solver_fwd_max_iter": 0}, ValueError, "solver_fwd_max_iter"),
            ({"solver": "anderson"}, TypeError, "solver"),
            ({"output_elements": (1,)}, ValueError, "output_elements"),
        ],
    )
    def test_bad_ones_are_refused(self, options, error, message, fields):
        with pytest.raises(error, match=message):
            DEQFixedPoint(DEQMeanFieldAttention(5, 4), **options)(fields.float())

    def test_bad_overrides_are_refused(self, layer, fields):
        with pytest.raises(TypeError, match="solver_fwd_window"):
            layer(fields, solver_fwd_window=3)

    @pytest.mark.parametrize("adjoint", [Implicit(tol=1e-12, max_iter=99), Phantom(200)])
    def test_adjoints_agree(self, layer, fields, adjoint):
        other = DEQFixedPoint(layer.fun, newton_krylov, adjoint=adjoint, **{
            name: value for name, value in TIGHT.items() if "fwd" in name
        })  # fmt: skip
        mine, theirs = (
            grad(some(fields).square().sum(), layer.fun._weight)[0] for some in (layer, other)
        )
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)

    def test_debug_prints_first_and_last_residual(self, layer, fields, capsys):
        layer(fields, debug=True)
        printed = capsys.readouterr().out
        first, last = (
            float(word) for word in printed.split() if ("e" in word and "+" in word) or "e-" in word
        )
        assert first > 1e-3 > 1e-12 >= last


class TestFailure:
    @pytest.fixture
    def diverging(self):
        torch.manual_seed(0)
        return DEQMeanFieldAttention(5, 4, weight_init_std=3.0).double()

    def test_couplings_that_diverge(self, diverging, fields):
        layer = DEQFixedPoint(diverging, picard, solver_fwd_preconditioner=None)
        with pytest.warns(ConvergenceWarning, match="couplings weaker"):
            solution = layer(fields, return_solution=True)
        assert set(solution.status) == {Status.DIVERGED}
        assert bool(torch.isfinite(solution.value).all())
        with pytest.raises(ConvergenceError):
            layer(fields, on_failure="raise")

    def test_a_backward_solve_cut_at_one_step_warns(self, layer, fields):
        x = fields.requires_grad_()
        z = layer(x, solver_bwd_max_iter=1)
        with pytest.warns(ConvergenceWarning, match=r"backward solve.*worst residual \d"):
            z.sum().backward()

    @pytest.mark.parametrize("bad", [torch.nan, torch.inf])
    @pytest.mark.parametrize("steps", [None, 3])
    def test_a_nonfinite_sample_touches_no_other(self, layer, fields, bad, steps, recwarn):
        x = fields.clone()
        x[1, 2, 0] = bad
        x.requires_grad_()
        solution = layer(x, return_solution=True, steps=steps)
        assert solution.status[1] is Status.NONFINITE
        assert bool(solution.value[1].isnan().all())
        for evidence in (solution.residual, solution.residual_norm, solution.trace[-1]):
            assert evidence.isinf().tolist() == [False, True, False]
        assert bool(solution.trace[:, 1].isinf().all())
        if steps is None:
            (warning,) = recwarn.list
            assert "nonfinite: 1" in str(warning.message)
            assert "left out of the loss" in str(warning.message)
        keep = [0, 2]
        clean = fields.clone().requires_grad_()
        reference = layer(clean, steps=steps)
        assert torch.equal(solution.value[keep], reference[keep])
        tensors = list(layer.parameters())
        mine = grad(solution.value[keep].square().sum(), [x, *tensors])
        theirs = grad(reference[keep].square().sum(), [clean, *tensors])
        assert torch.equal(mine[0][keep], theirs[0][keep])
        for a, b in zip(mine[1:], theirs[1:], strict=True):
            torch.testing.assert_close(a, b)

    def test_a_nonfinite_sample_in_the_loss_is_not_hidden(self, layer, fields):
        x = fields.clone()
        x[1] = torch.nan
        with pytest.warns(ConvergenceWarning) as caught:
            layer(x).sum().backward()
        assert len(caught) == 1
        assert all(not bool(p.grad.isfinite().all()) for p in layer.parameters())

    def test_a_finite_input_whose_couplings_overflow(self, fields):
        torch.manual_seed(0)
        layer = DEQFixedPoint(DEQVanillaSoftmaxAttention(5, 4, heads=2))
        x = fields.float().clone()
        x[0] = 1e30
        with pytest.warns(ConvergenceWarning, match="nonfinite: 1"):
            z = layer(x)
        z[1:].square().sum().backward()
        assert all(bool(p.grad.isfinite().all()) for p in layer.parameters())
        torch.testing.assert_close(z[1:], layer(x[1:]))

    @pytest.mark.parametrize(
        ("x", "error", "message"),
        [
            ([[1.0]], TypeError, "tensor"),
            (torch.zeros(3, 5, 4, dtype=torch.long), TypeError, "floating"),
            (torch.zeros(3, 5, 4, dtype=torch.complex128), TypeError, "floating"),
        ],
    )
    def test_inputs_that_are_no_sources(self, layer, x, error, message):
        with pytest.raises(error, match=message):
            layer(x)


class TestPlaysWithTorch:
    def test_copies_and_files(self, layer, fields):
        z = layer(fields)
        buffer = io.BytesIO()
        torch.save(layer, buffer)
        buffer.seek(0)
        loaded = torch.load(buffer, weights_only=False)
        other = DEQFixedPoint(DEQMeanFieldAttention(5, 4), anderson, **TIGHT).double()
        other.load_state_dict(layer.state_dict())
        for same in (loaded, copy.deepcopy(layer), other):
            assert torch.equal(same(fields), z)

    def test_autocast_leaves_the_solve_in_full_precision(self, fields):
        torch.manual_seed(0)
        layer = DEQFixedPoint(DEQMeanFieldAttention(5, 4))
        embed = nn.Linear(4, 4)
        x = fields.float()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(layer(x), layer(x))
            inside = layer(x)
            out = layer(embed(x), return_solution=True)
            loss = out.value.square().mean()
        loss.backward()
        assert torch.equal(inside, layer(x))
        assert out.value.dtype == torch.float32
        assert bool(out.converged.all())
        exact = layer(x @ embed.weight.T + embed.bias).square().mean()
        expected = grad(exact, embed.weight)[0]
        torch.testing.assert_close(embed.weight.grad, expected, rtol=0.05, atol=1e-3)

    def test_a_bfloat16_module_returns_bfloat16_and_solves_in_float32(self, fields):
        torch.manual_seed(0)
        layer = DEQFixedPoint(DEQMeanFieldAttention(5, 4)).bfloat16()
        x = fields.bfloat16().requires_grad_()
        solution = layer(x, return_solution=True)
        assert solution.value.dtype == torch.bfloat16
        assert solution.residual.max() <= 1e-4
        solution.value.sum().backward()
        assert {p.grad.dtype for p in layer.parameters()} == {torch.bfloat16}
        wide = copy.deepcopy(layer).float()(x.detach().float())
        torch.testing.assert_close(solution.value.float(), wide, rtol=0.02, atol=0.01)

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    def test_cuda_agrees_with_cpu(self, layer, fields):
        expected = grad(layer(fields).square().sum(), layer.fun._weight)[0]
        there = copy.deepcopy(layer).cuda()
        z = there(fields.cuda())
        torch.testing.assert_close(z.cpu(), layer(fields), rtol=0, atol=1e-10)
        mine = grad(z.square().sum(), there.fun._weight)[0]
        torch.testing.assert_close(mine.cpu(), expected, rtol=1e-9, atol=1e-9)
