"""Backward solves with settings of a user's own: an absolute tolerance, a preconditioner."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import grad

from deep_implicit_attention.attention import DEQMeanFieldAttention
from deep_implicit_attention.deq import (
    ConvergenceError,
    ConvergenceWarning,
    DEQFixedPoint,
    DEQModule,
    Implicit,
    LinearMap,
    fixed_point,
)
from deep_implicit_attention.solvers import gmres, picard

from .conftest import TIGHT


@pytest.mark.parametrize("weight", [2.0**-10, 2.0**10])
def test_an_absolute_tolerance_is_that_of_gradients_of_order_one(weight):
    """A small loss would else be solved for in fewer steps, and a large one in more."""
    slopes = torch.tensor([0.9, 0.5], dtype=torch.float64)
    adjoint = Implicit(picard, tol=1e-3, max_iter=500, stop_mode="abs")

    def gradient(weight):
        x = torch.ones(1, 2, dtype=torch.float64, requires_grad=True)
        z = fixed_point(
            lambda z, x: slopes * z + x, torch.zeros_like(x), (x,),
            tol=1e-10, max_iter=500, adjoint=adjoint,
        ).value  # fmt: skip
        return grad(weight * z.sum(), x)[0] / weight

    torch.testing.assert_close(gradient(1.0), 1 / (1 - slopes)[None], rtol=0, atol=0.02)
    assert torch.equal(gradient(weight), gradient(1.0))


@pytest.mark.parametrize(("size", "unit"), [(3.0, 1.0), (3.0 * 2.0**-40, 2.0**-39)])
def test_what_is_observed_is_scaled_only_where_gradients_are_far_from_order_one(size, unit):
    slopes, seen = torch.tensor([0.9, 0.5], dtype=torch.float64), []
    x = torch.ones(1, 2, dtype=torch.float64, requires_grad=True)
    adjoint = Implicit(tol=1e-12, observe=seen.append)
    z = fixed_point(lambda z, x: slopes * z + x, x.detach(), (x,), adjoint=adjoint).value
    found = grad(size * z.sum(), x)[0]
    torch.testing.assert_close(found, size / (1 - slopes)[None], rtol=1e-10, atol=0)
    assert torch.equal(seen[0].value, found / unit)


def test_a_preconditioner_of_ones_own_serves_in_the_place_of_the_modules():
    torch.manual_seed(0)
    module = DEQMeanFieldAttention(4, 3).double()
    layer = DEQFixedPoint(module, **TIGHT)
    x = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    shapes = set()

    def own(r):
        shapes.add(r.shape)
        return 0.9 * r

    z = layer(x, adjoint=Implicit(picard, preconditioner=own))
    assert not shapes
    found = grad(z.pow(3).sum(), x)
    assert shapes == {(2, 12)}
    torch.testing.assert_close(found, grad(layer(x).pow(3).sum(), x), rtol=1e-9, atol=1e-9)


class Affine(DEQModule):
    """z = A z + x with an A far from symmetric, and (1 − A)⁻¹ but for a little."""

    def __init__(self, knows_its_transpose):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        a = 0.2 * torch.randn(4, 4, generator=generator, dtype=torch.float64).triu()
        self.register_buffer("a", a)
        self.knows_its_transpose = knows_its_transpose

    def update(self, z, context):
        return z @ self.a.mT + context

    def preconditioner(self, context):
        inverse = torch.linalg.inv(torch.eye(4).to(self.a) - 0.99 * self.a)
        if self.knows_its_transpose:
            return LinearMap(lambda r: r @ inverse.mT, lambda r: r @ inverse)
        return lambda r: r @ inverse.mT


@pytest.mark.parametrize("solver", [picard, gmres])
@pytest.mark.parametrize("knows_its_transpose", [True, False])
def test_a_plain_callable_is_transposed_for_backward(solver, knows_its_transpose):
    module, seen = Affine(knows_its_transpose), []
    adjoint = Implicit(solver, tol=1e-12, observe=seen.append)
    layer = DEQFixedPoint(module, adjoint=adjoint, solver_fwd_tol=1e-12)
    x = torch.arange(8.0, dtype=torch.float64).view(2, 4).requires_grad_()
    solution = layer(x, return_solution=True)
    found = grad(solution.value.square().sum(), x)[0]
    expected = torch.linalg.inv(torch.eye(4).to(module.a) - module.a)
    torch.testing.assert_close(solution.value, x @ expected.mT)
    torch.testing.assert_close(found, 2 * solution.value @ expected)
    # Backward needs as few steps as forward; with P in the place of its transpose many more.
    assert int(seen[0].steps.max()) <= int(solution.steps.max()) + 1 <= 9


def test_backward_alone_may_do_without_the_preconditioner():
    x = torch.arange(8.0, dtype=torch.float64).view(2, 4).requires_grad_()
    layer = DEQFixedPoint(Affine(False), picard, solver_bwd_max_iter=100)
    asked = []
    module = layer.fun
    preconditioner = module.preconditioner

    def counted(context):
        inner = preconditioner(context)

        def apply(r):
            asked.append("forward")
            return inner(r)

        return LinearMap(apply, lambda r: asked.append("backward") or inner(r))

    module.preconditioner = counted
    layer(x, solver_bwd_preconditioner=None).sum().backward()
    assert set(asked) == {"forward"}
    layer(x).sum().backward()
    assert set(asked) == {"forward", "backward"}


@pytest.mark.parametrize("solver", [picard, gmres])
def test_a_preconditioner_without_a_graph_is_refused_not_zero(solver):
    class Detached(Affine):
        def preconditioner(self, context):
            return torch.no_grad()(super().preconditioner(context))

    x = torch.ones(1, 4, dtype=torch.float64, requires_grad=True)
    z = DEQFixedPoint(Detached(False), adjoint=Implicit(solver))(x)
    with pytest.raises(RuntimeError, match="preconditioner computes without gradients"):
        z.sum().backward()


def test_solvers_that_take_no_preconditioner_solve_without_it():
    def own(f, z0, *, tol, max_iter):
        return picard(f, z0, tol=tol, max_iter=max_iter)

    module = Affine(True)
    limits = {"solver_fwd_max_iter": 100, "solver_bwd_max_iter": 100}
    layer = DEQFixedPoint(module, own, solver_fwd_tol=1e-12, solver_bwd_tol=1e-12, **limits)
    x = torch.arange(8.0, dtype=torch.float64).view(2, 4).requires_grad_()
    z = layer(x)
    expected = torch.linalg.inv(torch.eye(4).to(module.a) - module.a)
    torch.testing.assert_close(z, x @ expected.mT)
    torch.testing.assert_close(grad(z.square().sum(), x)[0], 2 * z @ expected)


class TestAnotherMap:
    """Backward evaluates f again, which may have become another map meanwhile."""

    @staticmethod
    def solved(f, on_failure="warn", **options):
        J = 0.3 * torch.eye(3, dtype=torch.float64)
        J.requires_grad_()
        z0 = torch.zeros(2, 3, dtype=torch.float64)
        return fixed_point(f, z0, (J,), on_failure=on_failure, **options).value, J

    def test_a_name_that_has_got_another_value_is_noticed(self):
        beta = 0.5
        z, J = self.solved(lambda z, J: torch.tanh(beta * z @ J + 1))
        grad(z.sum(), J, retain_graph=True)
        beta = 1.0
        with pytest.warns(ConvergenceWarning, match=r"2 of 2 .* Pass it in args"):
            grad(z.sum(), J)

    @pytest.mark.parametrize("adjoint", [Implicit(), Implicit(picard)])
    def test_only_samples_whose_map_has_changed_are_counted(self, adjoint):
        slopes = torch.tensor([[1.0], [1.0]], dtype=torch.float64)
        z, J = self.solved(lambda z, J: torch.tanh(slopes * z @ J + 1), "raise", adjoint=adjoint)
        slopes[1] = 1.5
        with pytest.raises(ConvergenceError, match="1 of 2 samples"):
            grad(z.sum(), J)

    def test_it_is_not_looked_for_where_failures_are_ignored(self):
        beta = 0.5
        z, J = self.solved(lambda z, J: torch.tanh(beta * z @ J + 1), "ignore")
        beta = 1.0
        assert bool(grad(z.sum(), J)[0].isfinite().all())

    @pytest.mark.parametrize("power", [-60, 0, 60])
    @pytest.mark.parametrize(
        ("dtype", "tol"), [(torch.float32, 1e-2), (torch.float32, 2e-6), (torch.float64, 1e-14)]
    )
    def test_a_map_that_stays_is_not_suspected(self, dtype, tol, power):
        torch.manual_seed(0)
        J = (0.1 * torch.randn(40, 40, dtype=dtype)).requires_grad_()
        x, scale = torch.randn(5, 40, dtype=dtype), 2.0**power
        z = fixed_point(
            lambda z, J: scale * torch.tanh(z / scale @ J + x), torch.zeros_like(x), (J,),
            tol=tol, on_failure="raise", adjoint=Implicit(tol=1e-3),
        ).value  # fmt: skip
        grad((z / scale).square().sum(), J)

    def test_random_numbers_in_a_map_are_no_news(self):
        """Such a solve fails, and says so; its residual is as large in backward."""
        generator = torch.Generator().manual_seed(0)

        def f(z, J):
            noise = torch.rand(z.shape, generator=generator, dtype=z.dtype)
            return torch.tanh(z @ J + noise)

        with pytest.warns(ConvergenceWarning, match="did not converge"):
            z, J = self.solved(f)
        grad(z.sum(), J)

    def test_a_tensor_behind_a_branch_that_is_not_taken_at_first(self):
        def solved(outside, on_failure="warn"):
            def f(z, J):
                return torch.tanh(outside * z @ J + 1) if z.norm() > 0.1 else torch.tanh(z @ J + 1)

            return self.solved(f, on_failure)

        leaf = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
        z, J = solved(torch.tensor(0.5, dtype=torch.float64))
        (without,) = grad(z.sum(), J)
        for outside in (leaf, 1 * leaf):
            z, J = solved(outside)
            with pytest.warns(ConvergenceWarning, match="the gradient by that tensor is missing"):
                assert torch.equal(grad(z.sum(), J)[0], without)
            z, J = solved(outside, "raise")
            with pytest.raises(ConvergenceError, match="Pass it in args"):
                grad(z.sum(), J)
