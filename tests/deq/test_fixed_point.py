"""`fixed_point`: exact gradients of every order, or a refusal."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn
from torch.autograd import grad, gradcheck, gradgradcheck

from deep_implicit_attention.deq import (
    Implicit,
    OneStep,
    Phantom,
    fixed_point,
)
from deep_implicit_attention.solvers import (
    anderson,
    broyden,
    gmres,
    newton_krylov,
    picard,
)

SOLVERS = [picard, anderson, broyden, newton_krylov]
TIGHT = {"tol": 1e-13, "max_iter": 300}


@pytest.mark.parametrize("solver", SOLVERS)
def test_value_and_gradients_are_those_of_a_long_unroll(problem, w, x, solver):
    value = problem.solve(w, x, solver=solver)
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
    function = lambda w, x: problem.solve(w, x, solver=solver)  # noqa: E731
    assert gradcheck(function, (w, x), eps=1e-6, atol=1e-6)
    assert gradgradcheck(function, (w, x), eps=1e-6, atol=1e-6, fast_mode=True)


def test_third_derivatives_are_those_of_a_long_unroll(problem, w, x):
    def third(function):
        first = grad(function(w, x).pow(3).sum(), w, create_graph=True)[0]
        second = grad(first.pow(2).sum(), w, create_graph=True)[0]
        return grad(second.pow(2).sum(), (w, x))

    mine = third(lambda w, x: problem.solve(w, x))
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
    value = problem.solve(w, x, adjoint=adjoint, **options)
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

    @pytest.mark.parametrize("create_graph", [False, True])
    def test_a_change_before_backward_is_noticed(self, problem, x, create_graph):
        # Of a bias a tape saves nothing, but backward would be that of another f.
        bias, before = x.detach().requires_grad_(), x.detach().exp().requires_grad_()
        scaled = before * 0.5
        value = fixed_point(lambda z: (z * 0.3 + scaled + bias).tanh(), torch.zeros_like(x)).value
        with torch.no_grad():
            before += 1.0  # which f does not use itself
        grad(value.sum(), bias, create_graph=create_graph, retain_graph=True)
        with torch.no_grad():
            bias *= 3.0
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            grad(value.sum(), bias, create_graph=create_graph)

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
        value = problem.solve(w, x, adjoint=OneStep())
        fixed = problem.unrolled(w, x).detach()
        expected = grad(problem.map(fixed, w, x).square().sum(), (w, x))
        for mine, theirs in zip(grad(value.square().sum(), (w, x)), expected, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)

    @pytest.mark.parametrize("damping", [0.0, 0.3])
    def test_phantom_tends_to_the_exact_gradient(self, problem, w, x, damping):
        exact = grad(problem.unrolled(w, x).square().sum(), w)[0]
        errors = []
        for steps in (2, 20, 200):
            value = problem.solve(w, x, adjoint=Phantom(steps, damping))
            errors.append((grad(value.square().sum(), w)[0] - exact).norm().item())
        assert errors[0] > 10 * errors[1]
        assert errors[2] < 1e-9

    @pytest.mark.parametrize("adjoint", [OneStep(), Phantom(3)])
    def test_second_derivatives_raise(self, problem, w, x, adjoint):
        for loss in (torch.sum, lambda z: z.square().sum()):
            value = problem.solve(w, x, adjoint=adjoint)
            gradient = grad(loss(value), w, create_graph=True)[0]
            with pytest.raises(RuntimeError, match="second derivatives"):
                grad(gradient.sum(), w)

    @pytest.mark.parametrize("adjoint", [Implicit(), OneStep(), Phantom(3, 0.2)])
    def test_the_value_is_the_iterate_bit_for_bit(self, problem, w, x, adjoint):
        options = {"tol": 1e-3, "adjoint": adjoint}
        with torch.no_grad():
            plain = problem.solve(w, x, **options)
        assert torch.equal(problem.solve(w, x, **options), plain)

    @pytest.mark.parametrize("without", [torch.no_grad, torch.inference_mode])
    def test_so_it_is_where_torch_has_another_kernel_without_gradients(self, without):
        torch.manual_seed(0)
        block = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True).eval()
        x = torch.randn(4, 7, 16)

        def solve():
            return fixed_point(lambda z: 0.2 * block(z + x), torch.zeros_like(x)).value

        with without():
            plain = solve()
        assert torch.equal(solve(), plain)


class TestGraph:
    def test_two_forwards_before_one_backward(self, problem, w, x):
        first, second = problem.solve(w, x), problem.solve(w, 2 * x)
        together = grad(first.sum() + second.square().sum(), w)[0]
        alone = grad(problem.solve(w, x).sum(), w)[0]
        other = grad(problem.solve(w, 2 * x).square().sum(), w)[0]
        torch.testing.assert_close(together, alone + other)

    def test_backward_twice_with_retain_graph(self, problem, w, x):
        loss = problem.solve(w, x).square().sum()
        first = grad(loss, w, retain_graph=True)[0]
        assert torch.equal(grad(loss, w)[0], first)

    @pytest.mark.parametrize("reentrant", [True, False])
    def test_checkpointing(self, problem, w, x, reentrant):
        from torch.utils.checkpoint import checkpoint

        value = checkpoint(lambda w, x: problem.solve(w, x), w, x, use_reentrant=reentrant)
        value.square().sum().backward()
        expected = grad(problem.solve(w, x).square().sum(), w)[0]
        torch.testing.assert_close(w.grad, expected)

    def test_bytes_saved_do_not_depend_on_steps(self, problem, w, x):
        def saved(steps: int) -> int:
            total = 0

            def pack(t):
                nonlocal total
                total += t.numel() * t.element_size()
                return t

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
                problem.solve(w, x, solver=picard, tol=0.0, max_iter=steps, on_failure="ignore")
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

        problem.solve(w, x).sum().backward()
        gc.collect()
        before = alive()
        gc.disable()  # a cycle would need the collector
        try:
            for _ in range(5):
                problem.solve(w, x).sum().backward()
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
        known = problem.unrolled(w, x)
        torch.testing.assert_close(rest, known, rtol=0, atol=1e-11)
        expected = torch.zeros_like(level)
        for _ in range(100):
            expected = 0.5 * torch.cos(expected) + 0.1 * known.sum(1)
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
        value = problem.solve(w, x)
        value.sum().backward()
        assert value.shape == (0, 4)
        assert w.grad is not None
        assert not w.grad.any()
