"""States whose residual is small beside them because they are far away, and no solutions."""

import pytest
import torch

from deep_implicit_attention.deq import DEQFixedPoint
from deep_implicit_attention.solvers import Status, anderson, broyden, gmres, newton_krylov, picard

SOLVERS = (picard, anderson, broyden, newton_krylov)


@pytest.mark.quick("*-rel-*", "*-abs-[!n]*")
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("stop_mode", ["rel", "abs"])
@pytest.mark.parametrize("bounded", [torch.tanh, lambda v: v.clamp(-1, 1)])
def test_no_state_far_away_counts_as_converged(solver, stop_mode, bounded):
    """z ← z + ½ h(x − z) with a bounded h has z = x alone; accelerated steps overshoot it by far.

    In float32 z + ½ h is z itself from 10⁷ on.
    """
    torch.manual_seed(0)
    x = 4 * torch.randn(300, 3)
    solution = solver(
        lambda z: z + 0.5 * bounded(x - z), torch.zeros_like(x),
        tol=1e-4, max_iter=100, stop_mode=stop_mode,
    )  # fmt: skip
    error = (solution.value - x).norm(dim=1)
    assert (error[solution.converged] < 0.05).all()
    assert solution.converged.sum() > 0.15 * len(x)  # plain steps solve them all
    # What is returned of the others is not called a solution by its residual either.
    measure = solution.residual if stop_mode == "rel" else solution.residual_norm
    assert (measure[~solution.converged] > 1e-4).all()


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_layer_finds_what_saturates(solver):
    class Relax(torch.nn.Module):
        def initial_state(self, x):
            return torch.zeros_like(x)

        def update(self, z, x):
            return z + 0.5 * torch.clamp(x - z, -1, 1)

    layer = DEQFixedPoint(
        Relax(), solver, on_failure="raise", solver_fwd_tol=1e-5, solver_fwd_max_iter=60
    )
    x = torch.full((2, 3), 2.0)
    torch.testing.assert_close(layer(x), x, rtol=0, atol=1e-3)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_solution_far_from_a_start_with_a_small_residual_is_one(solver):
    """m = tanh(2 m + h) from m = 0 in a field of 1e-6: the residual grows before it falls."""
    h = torch.tensor([[1e-6], [-1e-6]])
    solution = solver(lambda m: torch.tanh(2 * m + h), torch.zeros(2, 1), tol=1e-4, max_iter=100)
    assert solution.converged.all()
    if solver is picard:  # the others find the unstable one, next to the start
        expected = torch.tensor([[0.9575], [-0.9575]])
        torch.testing.assert_close(solution.value, expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("solver", [anderson, broyden, newton_krylov])
def test_slow_maps_may_go_a_long_way(solver):
    """z ← c z + x with c up to 0.995: the solution is 200 times as long as the first residual."""
    c = torch.tensor([[0.5, 0.9, 0.995]], dtype=torch.float64)
    solution = solver(lambda z: c * z + 1, torch.zeros(1, 3).double(), tol=1e-6, max_iter=100)
    assert solution.converged.all()
    torch.testing.assert_close(solution.value, 1 / (1 - c), rtol=1e-3, atol=0)


def test_newton_takes_plain_steps_where_its_equation_is_singular():
    """z + cos z has slope 1 at the start."""
    solution = newton_krylov(
        lambda z: z + torch.cos(z), torch.zeros(2, 1, dtype=torch.float64), tol=1e-8,
        jvp=lambda z, v: (1 - torch.sin(z)) * v,
    )  # fmt: skip
    assert solution.converged.all()
    torch.testing.assert_close(solution.value, torch.full((2, 1), torch.pi / 2).double())


def test_newton_says_that_a_map_is_not_finite_next_to_its_start():
    def f(z):
        return torch.where(z > 0, torch.nan, 0.5 * torch.cos(z) + 1)

    assert newton_krylov(f, torch.zeros(1, 2)).status == (Status.NONFINITE,)


def test_gmres_says_that_a_product_was_not_finite():
    """Not at the zero vector, by which alone its residual would be measured."""

    def matvec(v):
        return torch.where(v.abs().amax(dim=1, keepdim=True) > 0, torch.nan, 0.0) * v + v

    solution = gmres(lambda v: torch.cat([v[:1], matvec(v[1:])]), torch.ones(2, 2))
    assert solution.status == (Status.CONVERGED, Status.NONFINITE)
    assert solution.value[1].isnan().all()
