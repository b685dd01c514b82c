"""Answers do not depend on the unit: squares that are lost, or too large, are none of the map's."""

from __future__ import annotations

import pytest
import torch

from deep_implicit_attention.solvers import Status, picard


@pytest.mark.parametrize(
    ("power", "dtype"),
    [(-90, torch.float32), (70, torch.float32), (120, torch.float32), (-700, torch.float64),
     (1000, torch.float64)],
)  # fmt: skip
def test_another_unit_gives_the_same_steps(solver, power, dtype):
    unit = 2.0**power
    torch.manual_seed(0)
    matrix, b = 0.2 * torch.randn(6, 6, dtype=dtype), torch.randn(3, 6, dtype=dtype)
    start = torch.zeros_like(b)
    plain = solver(lambda z: z @ matrix + b, start, tol=1e-5, max_iter=200)
    scaled = solver(lambda z: z @ matrix + unit * b, start, tol=1e-5, max_iter=200)
    assert bool(scaled.converged.all())
    assert scaled.steps.tolist() == plain.steps.tolist()
    torch.testing.assert_close(scaled.value / unit, plain.value, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(scaled.residual_norm / unit, plain.residual_norm, rtol=0.1, atol=0)


@pytest.mark.parametrize("growth", [3.0, -3.0])
def test_what_runs_away_ends_where_squares_do(growth):
    """And not only with the last number there is; what comes before may still be of use."""
    start = torch.zeros(1, 4)
    solution = picard(lambda z: growth * z + 1, start, tol=1e-5, max_iter=100)
    assert solution.status == (Status.DIVERGED,)
    assert solution.value.norm() < 2e19
    assert int(solution.steps) < 50


def test_an_image_without_a_finite_norm_is_no_solution(solver):
    """Its relative residual would be 0 whatever the residual is."""
    huge = torch.full((2, 12), 3e38)  # √12 times that is too large
    huge[1] = 1.0
    solution = solver(lambda z: huge.clone(), huge / 2, tol=1e-3, max_iter=9)
    assert solution.converged.tolist() == [False, True]


def test_a_large_start_may_grow_a_little_before_it_settles():
    """The residual rises to eight times that of the start, where squares end, and then falls."""
    matrix = torch.tensor([[0.5, 8.0], [0.0, 0.5]])
    start = torch.tensor([[-32e18, -2e18]])
    solution = picard(lambda z: z @ matrix.T, start, tol=1e-3, max_iter=200, stop_mode="abs")
    assert solution.status == (Status.CONVERGED,)
    assert 5 < solution.trace.max() / solution.trace[0] < 10
