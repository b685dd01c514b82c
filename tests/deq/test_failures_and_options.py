"""Where a solve fails, a sample is not finite, or options are wrong."""

from __future__ import annotations

import math
import warnings
from functools import partial, wraps

import pytest
import torch
from torch import nn
from torch.autograd import grad
from torch.func import functional_call

from deep_implicit_attention.deq import (
    ConvergenceError,
    ConvergenceWarning,
    DEQFixedPoint,
    DEQModule,
    Implicit,
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
        value = problem.solve(w, x, adjoint=adjoint)
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
        value = problem.solve(w, x, adjoint=Implicit(solver), on_failure="raise")
        weight = torch.ones_like(value)
        (expected,) = grad(value, x, weight, retain_graph=True)
        weight[1, 0] = torch.nan
        (found,) = grad(value, x, weight)
        assert torch.equal(found[[0, 2]], expected[[0, 2]])
        assert bool(found[1].isnan().any())

    def test_a_failed_backward_solve_raises_if_told_so(self, problem, w, x):
        adjoint = Implicit(max_iter=1, tol=1e-10)
        value = problem.solve(w, x, adjoint=adjoint, on_failure="raise")
        with pytest.raises(ConvergenceError, match="backward solve"):
            value.sum().backward()

    def test_one_bad_sample_leaves_the_gradients_of_the_others(self, problem, w, x):
        bad = x.detach().clone()
        bad[1, 0] = torch.nan
        bad.requires_grad_()
        with pytest.warns(ConvergenceWarning, match="nonfinite: 1"):
            value = problem.solve(w, bad)
        assert bool(value[1].isnan().all())
        mine = grad(value[[0, 2]].square().sum(), bad)[0]
        theirs = grad(problem.solve(w, x)[[0, 2]].square().sum(), x)[0]
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
            (lambda: Implicit(restart=0), ValueError, "restart must be at least 1, got 0"),
            (lambda: Implicit(anderson, m=0), ValueError, "m must be at least 1"),
            (lambda: Phantom(0), ValueError, "steps"),
            (lambda: Phantom(3, 1.0), ValueError, "damping"),
        ],
    )
    def test_bad_adjoints(self, make, error, message):
        with pytest.raises(error, match=message):
            make()

    @pytest.mark.parametrize(
        ("solver", "options", "error"),
        [
            (anderson, {"m": 0}, ValueError),
            (anderson, {"period": 1.5}, TypeError),
            (anderson, {"ridge": -1.0}, ValueError),
            (partial(anderson, m=2), {"damping": 1.0}, ValueError),
            (picard, {"stop_mode": "relative"}, ValueError),
            (broyden, {"memory": 0}, ValueError),
            (newton_krylov, {"inner_tol": "small"}, TypeError),
            (newton_krylov, {"preconditioner": 1}, TypeError),
        ],
    )
    @pytest.mark.parametrize("prefix", ["solver_fwd_", "solver_bwd_"])
    def test_layers_know_the_values_of_solver_options(self, solver, options, error, prefix):
        """When they are made, not only when they are called; of other solvers they know none."""
        given = {prefix + name: value for name, value in options.items()}
        with pytest.raises(error, match=f"{next(iter(given))} must be"):
            DEQFixedPoint(_Linear(), solver, **given)
        DEQFixedPoint(_Linear(), lambda f, z0, **options: picard(f, z0), **given)
        disguised = wraps(solver)(lambda f, z0, **options: picard(f, z0))
        DEQFixedPoint(_Linear(), disguised, **given)

    def test_gmres_may_be_bound_to_its_options(self, problem, w, x):
        bound = Implicit(partial(gmres, restart=2), tol=1e-12, max_iter=200)
        mine = grad(problem.solve(w, x, adjoint=bound).square().sum(), [w, x])
        theirs = grad(problem.solve(w, x).square().sum(), [w, x])
        torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-9)

    def test_every_backward_option_arrives(self, problem, w, x):
        seen = {}

        def spy(f, z0, *, tol, max_iter, m, ridge):
            seen.update(tol=tol, max_iter=max_iter, m=m, ridge=ridge)
            return anderson(f, z0, tol=tol, max_iter=max_iter, m=m, ridge=ridge)

        adjoint = Implicit(spy, tol=1e-7, max_iter=77, m=3, ridge=1e-5)
        problem.solve(w, x, adjoint=adjoint).sum().backward()
        assert seen == {"tol": 1e-7, "max_iter": 77, "m": 3, "ridge": 1e-5}

    @pytest.mark.parametrize(
        ("solver", "given", "periods"),
        [
            (anderson, {}, (3, 3)),
            (anderson, {"solver_fwd_period": 1}, (1, 3)),
            (anderson, {"solver_bwd_period": 2}, (3, 2)),
            (partial(anderson, period=2), {}, (2, 2)),
        ],
    )
    def test_a_layer_mixes_every_third_step(self, solver, given, periods, x):
        """By the steps that a solve takes, forward and backward."""
        torch.manual_seed(0)
        module = _Linear()
        layer = DEQFixedPoint(
            module, solver, solver_fwd_tol=1e-9, solver_fwd_max_iter=99, solver_bwd_tol=1e-9,
            solver_bwd_max_iter=99, **given,
        )  # fmt: skip
        x = torch.randn(5, 40, dtype=torch.float64, requires_grad=True)
        solution = layer(x, return_solution=True)
        backward = partial(layer._settings.adjoint.solver, **layer._settings.adjoint.options)
        forward, g = partial(anderson, period=periods[0]), torch.ones_like(x)
        expected = forward(lambda z: z @ module.w.mT + x, 0 * x, tol=1e-9, max_iter=99)
        assert torch.equal(solution.steps, expected.steps)
        assert torch.equal(solution.trace, expected.trace)
        found = backward(lambda u: u @ module.w + g, g, tol=1e-9, max_iter=99)
        expected = anderson(lambda u: u @ module.w + g, g, tol=1e-9, max_iter=99, period=periods[1])
        assert torch.equal(found.trace, expected.trace)
        other = anderson(lambda u: u @ module.w + g, g, tol=1e-9, max_iter=99, period=5)
        assert not torch.equal(found.trace, other.trace)


class _Linear(DEQModule):
    """z ↦ W z + x with a spectral radius of about 0.9."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(0.9 * torch.randn(40, 40, dtype=torch.float64) / 40**0.5)

    def update(self, z, x):
        return z @ self.w.mT + x


@pytest.mark.parametrize("steps", [None, 3])
@pytest.mark.parametrize("bad", [torch.nan, -1.0])
def test_a_nonfinite_sample_where_zero_is_none_either(steps, bad):
    class Divides(DEQModule):
        """Its couplings divide by a norm, and -1 is no square."""

        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(0.7, dtype=torch.float64))

        def prepare(self, x):
            return (self.scale * x).sqrt() / x.norm(dim=1, keepdim=True)

        def update(self, z, context):
            return torch.tanh(self.scale * z.roll(1, dims=1) + context)

    def loss(scale, x):
        value = functional_call(layer, {"fun.scale": scale}, (x,))
        return value[torch.tensor([0, 2])].square().sum()

    layer = DEQFixedPoint(Divides(), steps=steps, on_failure="ignore")
    x = torch.rand(3, 4, dtype=torch.float64) + 0.1
    scale = layer.fun.scale
    expected = grad(loss(scale, x), scale)[0]
    x[1, 2] = bad
    torch.testing.assert_close(grad(loss(scale, x), scale)[0], expected)
    if steps is not None and math.isnan(bad):  # of its map nobody asks in a transformation
        torch.testing.assert_close(torch.func.grad(loss)(scale, x), expected)
