"""`fixed_point`: exact gradients of every order, or a refusal; failures that are heard."""

from __future__ import annotations

import gc
import warnings
import weakref
from functools import partial

import pytest
import torch
from torch.autograd import grad, gradcheck, gradgradcheck

from deep_implicit_attention.deq import (
    ConvergenceError,
    ConvergenceWarning,
    Implicit,
    OneStep,
    Phantom,
    fixed_point,
)
from deep_implicit_attention.solvers import (
    Status,
    anderson,
    broyden,
    gmres,
    newton_krylov,
    picard,
)

SOLVERS = [picard, anderson, broyden, newton_krylov]
TIGHT = {"tol": 1e-13, "max_iter": 300}


def solve(problem, w, x, **options):
    return fixed_point(problem.map, torch.zeros_like(x), (w, x), **{**TIGHT, **options}).value


@pytest.mark.parametrize("solver", SOLVERS)
def test_value_and_gradients_are_those_of_a_long_unroll(problem, w, x, solver):
    value = solve(problem, w, x, solver=solver)
    reference = problem.unrolled(w, x)
    torch.testing.assert_close(value, reference, rtol=0, atol=1e-11)
    weights = torch.linspace(-1, 2, value.numel(), dtype=x.dtype).view_as(value)
    for mine, theirs in zip(
        grad((value * weights).sum(), (w, x)),
        grad((reference * weights).sum(), (w, x)),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.quick("anderson", "broyden")
@pytest.mark.parametrize("solver", SOLVERS)
def test_gradcheck_and_gradgradcheck(problem, w, x, solver):
    function = lambda w, x: solve(problem, w, x, solver=solver)  # noqa: E731
    assert gradcheck(function, (w, x), eps=1e-6, atol=1e-6)
    assert gradgradcheck(function, (w, x), eps=1e-6, atol=1e-6, fast_mode=True)


def test_third_derivatives_are_those_of_a_long_unroll(problem, w, x):
    def third(function):
        first = grad(function(w, x).pow(3).sum(), w, create_graph=True)[0]
        second = grad(first.pow(2).sum(), w, create_graph=True)[0]
        return grad(second.pow(2).sum(), (w, x))

    mine = third(lambda w, x: solve(problem, w, x))
    theirs = third(lambda w, x: problem.unrolled(w, x, 200))
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(
    "adjoint",
    [Implicit(), Implicit(restart=3), *(Implicit(solver) for solver in SOLVERS)],
    ids=lambda a: f"{a.solver.__name__}{a.options or ''}",
)
@pytest.mark.parametrize("options", [{}, {"solver": picard, "damping": 0.4}, {"m": 2}])
def test_gradient_does_not_depend_on_settings(problem, w, x, adjoint, options):
    expected = grad(problem.unrolled(w, x).square().sum(), w)[0]
    value = solve(problem, w, x, adjoint=adjoint, **options)
    torch.testing.assert_close(grad(value.square().sum(), w)[0], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("solver", [gmres, anderson])
def test_a_map_that_does_not_read_its_state(solver, x):
    z = fixed_point(lambda z, x: x.sin(), x, (x,), adjoint=Implicit(solver)).value
    (first,) = grad(z.sum(), x, create_graph=True)
    assert torch.equal(z, x.sin())
    torch.testing.assert_close(first, x.cos())
    torch.testing.assert_close(grad(first.sum(), x)[0], -x.sin())


def test_gradient_does_not_depend_on_the_start(problem, w, x):
    expected = grad(problem.unrolled(w, x).square().sum(), w)[0]
    start = problem.unrolled(w, x, 10)
    value = fixed_point(problem.map, start, (w, x), **TIGHT).value
    torch.testing.assert_close(grad(value.square().sum(), w)[0], expected, rtol=1e-9, atol=1e-9)


def test_parameters_of_a_module_are_differentiable_twice(problem, w, x):
    module = problem.module(w.detach())
    value = fixed_point(module, torch.zeros_like(x), (x,), **TIGHT).value
    first = grad(value.square().sum(), module.w, create_graph=True)[0]
    second = grad(first.square().sum(), (module.w, x))
    reference = grad(problem.unrolled(w, x).square().sum(), w, create_graph=True)[0]
    expected = grad(reference.square().sum(), (w, x))
    for mine, theirs in zip(second, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)


class TestClosures:
    """A tensor that f closes over gets first derivatives; second ones that involve it raise."""

    @pytest.fixture
    def value(self, problem, w, x):
        return fixed_point(
            lambda z, x: problem.map(z, w, x), torch.zeros_like(x), (x,), **TIGHT
        ).value

    def test_first_derivatives_are_exact(self, problem, value, w, x):
        expected = grad(problem.unrolled(w, x).square().sum(), (w, x))
        for mine, theirs in zip(grad(value.square().sum(), (w, x)), expected, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)

    @pytest.mark.parametrize(("first", "second"), [("w", "w"), ("w", "x"), ("x", "w")])
    @pytest.mark.parametrize("loss", [torch.sum, lambda z: z.square().sum()])
    def test_second_derivatives_raise(self, value, w, x, first, second, loss):
        tensors = {"w": w, "x": x}
        gradient = grad(loss(value), tensors[first], create_graph=True)[0]
        with pytest.raises(RuntimeError, match="second derivatives"):
            grad(gradient.sum(), tensors[second])

    def test_second_derivatives_of_arguments_are_exact(self, problem, value, w, x):
        first = grad(value.pow(3).sum(), x, create_graph=True)[0]
        reference = grad(problem.unrolled(w, x).pow(3).sum(), x, create_graph=True)[0]
        mine, theirs = (grad(g.square().sum(), x)[0] for g in (first, reference))
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)


class TestApproximateAdjoints:
    def test_one_step_is_the_derivative_of_one_step(self, problem, w, x):
        value = solve(problem, w, x, adjoint=OneStep())
        fixed = problem.unrolled(w, x).detach()
        expected = grad(problem.map(fixed, w, x).square().sum(), (w, x))
        for mine, theirs in zip(grad(value.square().sum(), (w, x)), expected, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)

    @pytest.mark.parametrize("damping", [0.0, 0.3])
    def test_phantom_tends_to_the_exact_gradient(self, problem, w, x, damping):
        exact = grad(problem.unrolled(w, x).square().sum(), w)[0]
        errors = []
        for steps in (2, 20, 200):
            value = solve(problem, w, x, adjoint=Phantom(steps, damping))
            errors.append((grad(value.square().sum(), w)[0] - exact).norm().item())
        assert errors[0] > 10 * errors[1]
        assert errors[2] < 1e-9

    @pytest.mark.parametrize("adjoint", [OneStep(), Phantom(3)])
    def test_second_derivatives_raise(self, problem, w, x, adjoint):
        for loss in (torch.sum, lambda z: z.square().sum()):
            value = solve(problem, w, x, adjoint=adjoint)
            gradient = grad(loss(value), w, create_graph=True)[0]
            with pytest.raises(RuntimeError, match="second derivatives"):
                grad(gradient.sum(), w)

    @pytest.mark.parametrize("adjoint", [Implicit(), OneStep(), Phantom(3, 0.2)])
    def test_the_value_is_the_iterate_bit_for_bit(self, problem, w, x, adjoint):
        options = {"tol": 1e-3, "adjoint": adjoint}
        with torch.no_grad():
            plain = solve(problem, w, x, **options)
        assert torch.equal(solve(problem, w, x, **options), plain)


class TestGraph:
    def test_two_forwards_before_one_backward(self, problem, w, x):
        first, second = solve(problem, w, x), solve(problem, w, 2 * x)
        together = grad(first.sum() + second.square().sum(), w)[0]
        alone = grad(solve(problem, w, x).sum(), w)[0]
        other = grad(solve(problem, w, 2 * x).square().sum(), w)[0]
        torch.testing.assert_close(together, alone + other)

    def test_backward_twice_with_retain_graph(self, problem, w, x):
        loss = solve(problem, w, x).square().sum()
        first = grad(loss, w, retain_graph=True)[0]
        assert torch.equal(grad(loss, w)[0], first)

    @pytest.mark.parametrize("reentrant", [True, False])
    def test_checkpointing(self, problem, w, x, reentrant):
        from torch.utils.checkpoint import checkpoint

        value = checkpoint(lambda w, x: solve(problem, w, x), w, x, use_reentrant=reentrant)
        value.square().sum().backward()
        expected = grad(solve(problem, w, x).square().sum(), w)[0]
        torch.testing.assert_close(w.grad, expected)

    def test_bytes_saved_do_not_depend_on_steps(self, problem, w, x):
        def saved(steps: int) -> int:
            total = 0

            def pack(t):
                nonlocal total
                total += t.numel() * t.element_size()
                return t

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
                solve(problem, w, x, solver=picard, tol=0.0, max_iter=steps, on_failure="ignore")
            return total

        assert 0 < saved(5) == saved(500)

    def test_weights_changed_before_backward_are_noticed(self, problem, x):
        module = problem.module(torch.eye(4, dtype=torch.float64) / 3)
        loss = fixed_point(module, torch.zeros_like(x), (x,), **TIGHT).value.sum()
        with torch.no_grad():
            module.w.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()

    def test_no_memory_is_held_after_backward(self, problem, w, x):
        def alive() -> int:
            return sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())

        solve(problem, w, x).sum().backward()
        gc.collect()
        before = alive()
        gc.disable()  # a cycle would need the collector
        try:
            for _ in range(5):
                solve(problem, w, x).sum().backward()
            leaked = alive() - before
        finally:
            gc.enable()
        assert leaked <= 0

    def test_weights_go_with_their_module(self, problem, w, x):
        module = problem.module(w.detach())
        weight = weakref.ref(module.w)
        gc.collect()
        gc.disable()
        try:
            fixed_point(module, torch.zeros_like(x), (x,), **TIGHT).value.sum().backward()
            del module
            assert weight() is None
        finally:
            gc.enable()


class TestStates:
    def test_a_tuple_state_is_solved_like_its_parts(self, problem, w, x):
        def both(z, w, x):
            a, b = z
            return problem.map(a, w, x), problem.map(b, w.T, 2 * x).unsqueeze(-1).squeeze(-1)

        zeros = torch.zeros_like(x)
        value = fixed_point(both, (zeros, zeros), (w, x), **TIGHT).value
        assert isinstance(value, tuple)
        torch.testing.assert_close(value[0], problem.unrolled(w, x), rtol=0, atol=1e-11)
        torch.testing.assert_close(value[1], problem.unrolled(w.T, 2 * x), rtol=0, atol=1e-11)
        mine = grad(value[0].sum() + value[1].square().sum(), w)[0]
        theirs = grad(
            problem.unrolled(w, x).sum() + problem.unrolled(w.T, 2 * x).square().sum(), w
        )[0]
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)

    def test_a_part_may_be_one_number_a_sample(self, problem, w, x):
        def both(z, w, x):
            level, rest = z
            return 0.5 * torch.cos(level) + 0.1 * rest.sum(1), problem.map(rest, w, x)

        start = (torch.zeros_like(x[:, 0]), torch.zeros_like(x))
        level, rest = fixed_point(both, start, (w, x), **TIGHT).value
        torch.testing.assert_close(rest, problem.unrolled(w, x), rtol=0, atol=1e-11)
        expected = torch.zeros_like(level)
        for _ in range(100):
            expected = 0.5 * torch.cos(expected) + 0.1 * problem.unrolled(w, x).sum(1)
        torch.testing.assert_close(level, expected, rtol=0, atol=1e-11)
        torch.testing.assert_close(
            grad(level.sum(), w)[0], grad(expected.sum(), w)[0], rtol=1e-9, atol=1e-9
        )

    def test_arguments_may_be_nested(self, problem, w, x):
        def nested(z, bag):
            return problem.map(z, bag["w"], bag["rest"][0]) * bag["rest"][1]

        value = fixed_point(nested, torch.zeros_like(x), ({"w": w, "rest": (x, 1)},), **TIGHT).value
        expected = grad(problem.unrolled(w, x).square().sum(), w, create_graph=True)[0]
        mine = grad(value.square().sum(), w, create_graph=True)[0]
        torch.testing.assert_close(mine, expected, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(
            grad(mine.sum(), x)[0], grad(expected.sum(), x)[0], rtol=1e-9, atol=1e-9
        )

    def test_narrow_floats_are_widened(self, problem, w, x):
        narrow = x.detach().bfloat16()
        solution = fixed_point(
            problem.map, torch.zeros_like(narrow), (w.detach().bfloat16(), narrow)
        )
        assert solution.value.dtype == torch.float32
        assert bool(solution.converged.all())

    @pytest.mark.parametrize(
        ("start", "error", "message"),
        [
            (torch.zeros(3, 4, dtype=torch.long), TypeError, "floating"),
            (torch.zeros(3, 4, dtype=torch.complex64), TypeError, "floating"),
            ((torch.zeros(3, 4), torch.zeros(2, 4)), ValueError, "batch"),
            ((torch.zeros(3, 4), torch.zeros(3, 4, dtype=torch.double)), TypeError, "dtype"),
            ("zeros", TypeError, "state"),
            ((), TypeError, "state"),
        ],
    )
    def test_states_that_are_none(self, start, error, message):
        with pytest.raises(error, match=message):
            fixed_point(lambda z: z, start)

    def test_a_map_that_changes_the_shape(self):
        with pytest.raises(ValueError, match="keep shapes"):
            fixed_point(lambda z: z[:, :2], torch.zeros(3, 4))

    def test_empty_batch(self, problem, w):
        x = torch.zeros(0, 4, dtype=torch.float64, requires_grad=True)
        value = solve(problem, w, x)
        value.sum().backward()
        assert value.shape == (0, 4)
        assert w.grad is not None
        assert not w.grad.any()


class TestFailure:
    """Couplings that diverge: status, residual, and words that say what to try."""

    @staticmethod
    def expanding(z, x):
        return 3 * z + x

    def test_warns_with_evidence(self, x):
        with pytest.warns(ConvergenceWarning, match=r"3 of 3 samples.*diverged.*couplings weaker"):
            solution = fixed_point(self.expanding, torch.zeros_like(x), (x,), solver=picard)
        assert set(solution.status) == {Status.DIVERGED}
        assert bool(torch.isfinite(solution.value).all())

    def test_raises_or_keeps_quiet_if_told_so(self, x):
        start = torch.zeros_like(x)
        with pytest.raises(ConvergenceError, match="tolerance") as caught:
            fixed_point(self.expanding, start, (x,), solver=picard, on_failure="raise")
        assert caught.value.solution.residual.shape == (3,)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            fixed_point(self.expanding, start, (x,), solver=picard, on_failure="ignore")

    @pytest.mark.parametrize("solver", [gmres, anderson])
    def test_a_backward_solve_cut_short_warns_and_reports(self, problem, w, x, solver):
        seen = []
        adjoint = Implicit(solver, max_iter=1, tol=1e-10, observe=seen.append)
        value = solve(problem, w, x, adjoint=adjoint)
        with pytest.warns(ConvergenceWarning, match="backward solve: 3 of 3"):
            value.sum().backward()
        (solution,) = seen
        assert not bool(solution.converged.any())
        # The residual is the true one of u = (∂f/∂z)ᵀ u + g.
        z = problem.unrolled(w, x).detach().requires_grad_()
        image = problem.map(z, w, x)
        u = solution.value
        gap = grad(image, z, u)[0] + 1 - u
        norm = 2.0 if solver is gmres else (gap + u).norm(dim=1)
        torch.testing.assert_close(solution.residual, gap.norm(dim=1) / norm, rtol=1e-6, atol=0)

    @pytest.mark.parametrize("solver", [gmres, anderson])
    def test_a_gradient_with_a_number_that_is_none_is_not_the_solves_failure(
        self, problem, w, x, solver
    ):
        value = solve(problem, w, x, adjoint=Implicit(solver), on_failure="raise")
        weight = torch.ones_like(value)
        (expected,) = grad(value, x, weight, retain_graph=True)
        weight[1, 0] = torch.nan
        (found,) = grad(value, x, weight)
        assert torch.equal(found[[0, 2]], expected[[0, 2]])
        assert bool(found[1].isnan().any())

    def test_a_failed_backward_solve_raises_if_told_so(self, problem, w, x):
        adjoint = Implicit(max_iter=1, tol=1e-10)
        value = solve(problem, w, x, adjoint=adjoint, on_failure="raise")
        with pytest.raises(ConvergenceError, match="backward solve"):
            value.sum().backward()

    def test_one_bad_sample_leaves_the_gradients_of_the_others(self, problem, w, x):
        bad = x.detach().clone()
        bad[1, 0] = torch.nan
        bad.requires_grad_()
        with pytest.warns(ConvergenceWarning, match="nonfinite: 1"):
            value = solve(problem, w, bad)
        assert bool(value[1].isnan().all())
        mine = grad(value[[0, 2]].square().sum(), bad)[0]
        theirs = grad(solve(problem, w, x)[[0, 2]].square().sum(), x)[0]
        assert torch.equal(mine[[0, 2]], theirs[[0, 2]])


class TestOptions:
    def test_unknown_solver_options_are_refused_with_a_list(self, x):
        with pytest.raises(TypeError, match=r"unknown option 'window'.*\bm\b"):
            fixed_point(lambda z: z, torch.zeros_like(x), window=3)
        with pytest.raises(TypeError, match="unknown option 'm'"):
            Implicit(gmres, m=3)

    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            ({"tol": -1.0}, ValueError, "tol"),
            ({"max_iter": 0}, ValueError, "max_iter"),
            ({"on_failure": "shout"}, ValueError, "on_failure"),
            ({"adjoint": "implicit"}, TypeError, "adjoint"),
        ],
    )
    def test_bad_values(self, x, options, error, message):
        with pytest.raises(error, match=message):
            fixed_point(lambda z: 0 * z, torch.zeros_like(x), **options)

    @pytest.mark.parametrize(
        ("make", "error", "message"),
        [
            (lambda: Implicit(tol=-1.0), ValueError, "tol"),
            (lambda: Implicit(max_iter=0), ValueError, "max_iter"),
            (lambda: Implicit(observe=3), TypeError, "observe"),
            (lambda: Implicit(solver="gmres"), TypeError, "solver"),
            (lambda: Phantom(0), ValueError, "steps"),
            (lambda: Phantom(3, 1.0), ValueError, "damping"),
        ],
    )
    def test_bad_adjoints(self, make, error, message):
        with pytest.raises(error, match=message):
            make()

    def test_gmres_may_be_bound_to_its_options(self, problem, w, x):
        bound = Implicit(partial(gmres, restart=2), tol=1e-12, max_iter=200)
        options = {**TIGHT, "adjoint": bound}
        mine = grad(solve(problem, w, x, **options).square().sum(), [w, x])
        theirs = grad(solve(problem, w, x).square().sum(), [w, x])
        torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-9)

    def test_every_backward_option_arrives(self, problem, w, x):
        seen = {}

        def spy(f, z0, *, tol, max_iter, m, ridge):
            seen.update(tol=tol, max_iter=max_iter, m=m, ridge=ridge)
            return anderson(f, z0, tol=tol, max_iter=max_iter, m=m, ridge=ridge)

        adjoint = Implicit(spy, tol=1e-7, max_iter=77, m=3, ridge=1e-5)
        solve(problem, w, x, adjoint=adjoint).sum().backward()
        assert seen == {"tol": 1e-7, "max_iter": 77, "m": 3, "ridge": 1e-5}
