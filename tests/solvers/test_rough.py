"""Solvers that begin on an approximate map: the same solutions, the residual of the exact map."""

import pytest
import torch

from deep_implicit_attention.solvers import anderson, broyden, picard

SOLVERS = pytest.mark.parametrize("solver", [picard, anderson, broyden], ids=lambda s: s.__name__)
SOLVE = {"tol": 1e-6, "max_iter": 100}


@pytest.fixture(autouse=True, params=["host", "accelerator"])
def where(request, leave_the_host):
    """Both, with the host's tensors."""
    if request.param == "accelerator":
        leave_the_host()
    return request.param


def off(problem, by=1e-3):
    """The map of `problem`, wrong by `by` relative to what it returns, the same at every call."""
    generator = torch.Generator().manual_seed(1)
    error = torch.randn(problem.z0.shape, generator=generator, dtype=problem.z0.dtype)
    return lambda z: problem.f(z) * (1 + by * error)


@SOLVERS
def test_the_exact_map_decides_and_is_asked_less(solver, make_problem, record, residual_of):
    problem = make_problem(batch=8, norm=0.8)
    plain = solver(problem.f, problem.z0, **SOLVE)
    exact, rough = record(problem.f), record(off(problem))
    found = solver(exact, problem.z0, rough=rough, **SOLVE)
    assert bool(found.converged.all())
    torch.testing.assert_close(found.residual, residual_of(problem.f, found.value))
    torch.testing.assert_close(found.value, problem.solution, rtol=1e-4, atol=1e-4)
    assert len(rough.seen) >= 2
    assert len(exact.seen) < int(plain.steps.max())


@SOLVERS
def test_each_sample_decides_by_itself(solver, make_problem, where):
    """On an accelerator when the host looks, which mates bear on."""
    norms = torch.linspace(0.1, 0.9, 8)
    problem = make_problem(batch=8, norm=norms)
    together = solver(problem.f, problem.z0, rough=off(problem), **SOLVE)
    error = off(problem)
    for i in range(8):
        one = problem[i : i + 1]

        def rough(z, i=i):
            rows = torch.zeros_like(problem.z0)
            rows[i] = z[0]
            return error(rows)[i : i + 1]

        alone = solver(one.f, one.z0, rough=rough, **SOLVE)
        if where == "host":
            assert int(alone.steps) == int(together.steps[i])
            torch.testing.assert_close(alone.value[0], together.value[i], rtol=1e-10, atol=1e-12)
        else:
            assert abs(int(alone.steps) - int(together.steps[i])) <= 6
            torch.testing.assert_close(alone.value[0], together.value[i], rtol=1e-5, atol=1e-5)


@SOLVERS
@pytest.mark.parametrize("kind", ["another map", "constant", "growing", "not finite", "one is"])
def test_a_bad_approximation_costs_steps_and_not_the_solution(solver, make_problem, kind):
    problem, other = make_problem(norm=0.6), make_problem(norm=0.6, seed=3)
    rough = {
        "another map": other.f,
        "constant": lambda z: torch.full_like(z, 2.0),
        "growing": lambda z: 3 * z + 1,
        "not finite": lambda z: torch.full_like(z, torch.nan),
        "one is": lambda z: problem.f(z).where(torch.arange(len(z))[:, None] == 0, torch.inf),
    }[kind]
    plain = solver(problem.f, problem.z0, **SOLVE)
    found = solver(problem.f, problem.z0, rough=rough, **SOLVE)
    assert bool(found.converged.all())
    torch.testing.assert_close(found.value, problem.solution, rtol=1e-4, atol=1e-4)
    assert int(found.steps.max()) <= int(plain.steps.max()) + 25


@SOLVERS
def test_who_stands_still_is_judged_from_where_the_exact_map_begins(solver, make_problem):
    """An accelerator's states stay where they are until the host hears of an image that is NaN."""
    problem = make_problem(norm=0.6)

    def lost(z):
        return torch.full_like(z, torch.nan)

    found = solver(problem.f, problem.z0, rough=lost, preconditioner=lambda r: -r, **SOLVE)
    assert bool(found.converged.all())
    found = solver(problem.f, problem.z0, rough=lost, tol=1e-12, max_iter=4)
    assert set(found.status) == {"max_iter"}


@SOLVERS
def test_states_whose_squares_are_lost_begin_on_the_approximation(solver, make_problem, record):
    problem = make_problem(norm=0.6, scale=1e25, nonlinear=False, dtype=torch.float32)
    rough = record(off(problem))
    found = solver(problem.f, problem.z0, rough=rough, tol=1e-5, max_iter=100)
    assert bool(found.converged.all())
    torch.testing.assert_close(found.value / 1e25, problem.solution / 1e25, rtol=1e-3, atol=1e-3)
    assert len(rough.seen) >= 3


def test_a_first_step_that_gains_nothing_does_not_drop_the_approximation(record):
    """Relative residuals of z ← 1 − z/2 from 0 are 1, 1, 1/3, 1/5, … down to 1e-2 and beyond."""
    rough = record(lambda z: 1 - 0.5 * z)
    start = torch.zeros(1, 1, dtype=torch.float64)
    found = picard(lambda z: 1 - 0.5 * z, start, rough=rough, **SOLVE)
    assert found.converged.all()
    assert found.trace[1] == found.trace[0]
    assert len(rough.seen) == (found.trace > 1e-2).sum() + 1


@SOLVERS
def test_the_last_step_allowed_is_exact(solver, make_problem, residual_of):
    problem = make_problem(norm=0.95)
    found = solver(problem.f, problem.z0, rough=off(problem), tol=1e-12, max_iter=3)
    assert not bool(found.converged.any())
    torch.testing.assert_close(found.residual, residual_of(problem.f, found.value))


def test_few_steps_are_rough_after_the_residual_is_down(record, where):
    """An accelerator's host looks when it should be."""
    rough = record(lambda z: 0.5 * z + 1.001)
    start = torch.zeros(3, 2, dtype=torch.float64)
    found = picard(lambda z: 0.5 * z + 1, start, rough=rough, tol=1e-8, max_iter=60)
    assert found.all_converged()
    down = int((found.trace > 1e-2).all(dim=1).sum())
    assert down > 4
    assert 1 <= len(rough.seen) - down <= (1 if where == "host" else 3)


@SOLVERS
def test_absolute_residuals_are_of_the_exact_map_throughout(solver, make_problem, record):
    problem = make_problem()
    rough = record(off(problem))
    solver(problem.f, problem.z0, rough=rough, stop_mode="abs")
    assert not rough.seen


@SOLVERS
def test_bad_arguments(solver, make_problem):
    problem = make_problem()
    with pytest.raises(TypeError, match="rough must be callable or None, got int"):
        solver(problem.f, problem.z0, rough=3)
    with pytest.raises(ValueError, match="shape"):
        solver(problem.f, problem.z0, rough=lambda z: z[:, :2])


@SOLVERS
def test_the_exact_map_is_checked_when_its_turn_comes(solver):
    with pytest.raises(ValueError, match="the map must keep shape"):
        solver(lambda z: 0.5 * z[:, :2] + 1, torch.zeros(2, 4), rough=lambda z: 0.5 * z + 1)
