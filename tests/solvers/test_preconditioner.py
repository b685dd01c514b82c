"""Preconditioned solvers: the same solutions, the residual of the plain map, fewer evaluations."""

import pytest
import torch

from deep_implicit_attention.solvers import gmres, newton_krylov

SOLVE = {"tol": 1e-11, "max_iter": 200}


def linear(problem):
    """The Jacobian's complement, 1 − W, and its inverse, of a linear problem."""
    identity = torch.eye(problem.z0.shape[1], dtype=problem.z0.dtype)
    operator = identity - problem.matrices
    return operator, torch.linalg.inv(operator)


def on(matrices):
    return lambda r: (matrices @ r.unsqueeze(2)).squeeze(2)


def test_the_inverse_solves_a_linear_map_in_one_step(solver, make_problem):
    problem = make_problem(norm=3.0, nonlinear=False)
    _, inverse = linear(problem)
    solution = solver(problem.f, problem.z0, preconditioner=on(inverse), **SOLVE)
    assert bool(solution.converged.all())
    assert int(solution.steps.max()) <= 3
    torch.testing.assert_close(solution.value, problem.solution, rtol=1e-8, atol=1e-8)


def test_an_approximation_gives_the_same_answer(solver, make_problem):
    problem = make_problem(norm=0.9)
    p = torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    p = torch.eye(6, dtype=torch.float64) + 0.05 * p
    solution = solver(problem.f, problem.z0, preconditioner=lambda r: r @ p, **SOLVE)
    assert bool(solution.converged.all())
    torch.testing.assert_close(solution.value, problem.solution, rtol=1e-8, atol=1e-8)


def test_the_residual_is_that_of_the_plain_map(solver, make_problem):
    problem = make_problem(norm=0.9)
    solution = solver(
        problem.f, problem.z0, preconditioner=lambda r: 0.01 * r, tol=1e-9, max_iter=5
    )
    image = problem.f(solution.value)
    residual = (image - solution.value).norm(dim=1) / image.norm(dim=1)
    torch.testing.assert_close(solution.residual, residual)
    if solver is not newton_krylov:  # there a scale of P changes nothing
        assert not bool(solution.converged.any())


def test_gmres_with_the_inverse_needs_one_vector(make_problem):
    problem = make_problem(norm=3.0, nonlinear=False)
    operator, inverse = linear(problem)
    b = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    solution = gmres(on(operator), b, preconditioner=on(inverse), tol=1e-10)
    assert int(solution.steps.max()) <= 2
    torch.testing.assert_close(on(operator)(solution.value), b, rtol=1e-8, atol=1e-8)


def test_bad_preconditioners(solver, make_problem):
    problem = make_problem()
    with pytest.raises(TypeError, match="preconditioner must be callable or None, got int"):
        solver(problem.f, problem.z0, preconditioner=3)
    with pytest.raises(ValueError, match="shape"):
        solver(problem.f, problem.z0, preconditioner=lambda r: r[:, :2])


@pytest.mark.parametrize("scale", [-1.0, 5.0])
def test_a_bad_preconditioner_is_dropped_where_it_does_not_help(solver, make_problem, scale):
    if solver is newton_krylov:
        pytest.skip("its linear solves take any regular P")
    problem = make_problem(norm=0.6)
    good = torch.arange(len(problem.z0)) % 2 == 0

    def mixed(r):
        return torch.where(good[:, None], r, scale * r)

    plain = solver(problem.f, problem.z0, **SOLVE)
    found = solver(problem.f, problem.z0, preconditioner=mixed, **SOLVE)
    assert bool(found.converged.all())
    torch.testing.assert_close(found.value, problem.solution, rtol=1e-8, atol=1e-8)
    # Where P is 1 nothing changes, whatever becomes of the others; there one evaluation is lost.
    assert torch.equal(found.value[good], plain.value[good])
    assert torch.equal(found.steps[~good], plain.steps[~good] + 1)
    torch.testing.assert_close(found.value[~good], plain.value[~good], rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [2.0**-30, 2.0**30])
def test_the_size_of_a_preconditioner_changes_no_newton_step(size, dtype, make_problem):
    problem = make_problem(batch=3, n=6, dtype=dtype)
    plain = newton_krylov(problem.f, problem.z0, tol=1e-5)
    scaled = newton_krylov(problem.f, problem.z0, tol=1e-5, preconditioner=lambda r: size * r)
    assert torch.equal(scaled.steps, plain.steps)
    torch.testing.assert_close(scaled.value, plain.value, rtol=1e-6, atol=0)
