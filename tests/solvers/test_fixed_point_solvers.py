"""What `picard`, `anderson`, `broyden` and `newton_krylov` share: the answer and its evidence."""

import math

import pytest
import torch

from deep_implicit_attention.solvers import Status, anderson, broyden, newton_krylov, picard

ACCELERATED = [anderson, broyden, newton_krylov]
DAMPED = [(picard, {"damping": 0.5}), (anderson, {"damping": 0.5})]
EVERY = [(solver, {}) for solver in (picard, *ACCELERATED)] + DAMPED


def test_every_way_to_solve_is_tested(solver):
    assert solver in [entry[0] for entry in EVERY]


# --- the answer ---------------------------------------------------------------------------------


@pytest.mark.parametrize("nonlinear", [False, True], ids=["linear", "tanh"])
@pytest.mark.parametrize(("solver", "options"), EVERY)
def test_reaches_the_solution_of_a_contraction(solver, options, nonlinear, dtype, make_problem):
    tol = 1e-10 if dtype == torch.float64 else 1e-5
    problem = make_problem(norm=0.8, dtype=dtype, nonlinear=nonlinear)
    solution = solver(problem.f, problem.z0, tol=tol, max_iter=300, **options)
    for numbers in (solution.value, solution.residual, solution.residual_norm, solution.trace):
        assert numbers.dtype == dtype
    assert solution.converged.all()
    assert solution.status == (Status.CONVERGED,) * 4
    # ‖z − z*‖ ≤ ‖f(z) − z‖ / (1 − L), here in units of the solution's size.
    error = (solution.value - problem.solution).norm(dim=1) / problem.solution.norm(dim=1)
    assert (error <= 1.1 * tol / (1 - 0.8)).all()


@pytest.mark.parametrize("eigenvalues", [(-3.0, -1.5, 0.2, 0.9), (-2.0, 1.8, 3.0, 0.5)])
@pytest.mark.parametrize("solver", ACCELERATED)
def test_reaches_the_solution_of_a_linear_map_that_does_not_contract(solver, eigenvalues, dtype):
    generator = torch.Generator().manual_seed(1)
    skew = torch.eye(4, dtype=torch.float64) + 0.3 * torch.randn(
        4, 4, generator=generator, dtype=torch.float64
    )
    matrix = skew @ torch.diag(torch.tensor(eigenvalues, dtype=torch.float64)) @ skew.inverse()
    source = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    exact = torch.linalg.solve(torch.eye(4, dtype=torch.float64) - matrix, source.T).T
    matrix, source = matrix.to(dtype), source.to(dtype)

    tol, close = (1e-12, 1e-10) if dtype == torch.float64 else (1e-5, 1e-3)
    start = torch.zeros_like(source)
    solution = solver(lambda z: z @ matrix.T + source, start, tol=tol, max_iter=100)
    assert solution.converged.all()
    torch.testing.assert_close(solution.value.double(), exact, rtol=close, atol=close)
    # The case is not one that plain iteration solves.
    assert not picard(lambda z: z @ matrix.T + source, start, tol=tol).converged.any()


def test_damping_solves_what_plain_picard_does_not():
    """z ← −1.5 z + 5 runs away; with damping 0.6 the error shrinks by |1 − 0.4 · 2.5| = 0."""
    start = torch.full((2, 3), 7.0, dtype=torch.float64)
    assert picard(lambda z: -1.5 * z + 5, start).status == (Status.DIVERGED,) * 2
    solution = picard(lambda z: -1.5 * z + 5, start, tol=1e-12, damping=0.6)
    torch.testing.assert_close(solution.value, torch.full_like(start, 2.0))
    assert solution.steps.tolist() == [2, 2]


@pytest.mark.parametrize("damping", [0.0, 0.25, 0.75])
def test_picard_takes_the_damped_steps_of_its_definition(damping, make_problem, record):
    problem = make_problem()
    f = record(problem.f)
    picard(f, problem.z0, tol=0.0, max_iter=6, damping=damping)
    z = problem.z0
    for seen in f.seen:
        torch.testing.assert_close(seen, z, rtol=1e-13, atol=1e-13)
        z = damping * z + (1 - damping) * problem.f(z)


@pytest.mark.parametrize("scale", [2.0**-20, 2.0**20])
@pytest.mark.parametrize("nonlinear", [False, True], ids=["linear", "tanh"])
def test_change_of_units_changes_nothing(solver, scale, nonlinear, dtype, make_problem):
    """s f(z / s) has the iterates s z; powers of two make that exact in floating point."""
    tol = 1e-10 if dtype == torch.float64 else 1e-6
    plain = make_problem(dtype=dtype, nonlinear=nonlinear)
    expected = solver(plain.f, plain.z0, tol=tol, max_iter=100)
    found = solver(lambda z: scale * plain.f(z / scale), plain.z0, tol=tol, max_iter=100)
    assert found.steps.tolist() == expected.steps.tolist()
    assert torch.equal(found.value, scale * expected.value)
    assert torch.equal(found.residual, expected.residual)


def test_start_at_the_solution_takes_one_step_and_is_returned_bit_for_bit(solver, dtype):
    start = torch.tensor([[0.3, -0.7, 1e-3], [2.0, 0.1, -5.0]], dtype=dtype)
    solution = solver(lambda z: start.clone(), start)
    assert solution.steps.tolist() == [1, 1]
    assert solution.converged.all()
    assert torch.equal(solution.value, start)
    assert solution.value.data_ptr() != start.data_ptr()


def test_zero_map_is_solved_by_zero(solver):
    """All-zero sources: the relative residual of the solution is 0/0 and counts as 0."""
    at_zero = solver(lambda z: 0 * z, torch.zeros(2, 3))
    assert at_zero.converged.all()
    assert at_zero.residual.tolist() == [0.0, 0.0]
    from_elsewhere = solver(lambda z: 0 * z, torch.tensor([[3.0, -1.0]]))
    assert from_elsewhere.converged.all()
    assert from_elsewhere.value.tolist() == [[0.0, 0.0]]


def test_value_of_a_finite_map_is_finite(solver):
    """The relative residual at z ≠ 0 of the zero map is infinite, the iterate is not."""
    start = torch.full((1, 3), 10.0)
    solution = solver(lambda z: 0 * z, start, max_iter=1)
    assert not solution.converged.any()
    assert torch.equal(solution.value, start)


def test_map_without_solution_ends_at_the_step_limit(solver):
    """z + 1 moves by 1 wherever it is: nothing to divide by, nothing to converge to."""
    solution = solver(lambda z: z + 1, torch.zeros(1, 4), tol=0.5, max_iter=12, stop_mode="abs")
    assert solution.status == (Status.MAX_ITER,)
    assert solution.residual.tolist() == [2.0]
    assert solution.steps.tolist() == [12]


# --- the evidence -------------------------------------------------------------------------------


@pytest.mark.parametrize("max_iter", [1, 2, 7, 100])
@pytest.mark.parametrize("stop_mode", ["rel", "abs"])
@pytest.mark.parametrize(("solver", "options"), EVERY)
def test_residual_is_that_of_the_value(
    solver, options, stop_mode, max_iter, dtype, make_problem, residual_of
):
    """On the undamped map, whether the sample has converged or not."""
    norms = torch.linspace(0.1, 2.5, 8)  # the last ones do not contract
    problem = make_problem(batch=8, dtype=dtype, norm=norms)
    solution = solver(
        problem.f, problem.z0, tol=1e-5, max_iter=max_iter, stop_mode=stop_mode, **options
    )
    expected = residual_of(problem.f, solution.value, stop_mode)
    torch.testing.assert_close(solution.residual, expected, rtol=1e-6, atol=0)
    norm = residual_of(problem.f, solution.value, "abs")
    torch.testing.assert_close(solution.residual_norm, norm, rtol=1e-6, atol=0)
    assert torch.equal(solution.converged, expected <= 1e-5)


@pytest.mark.parametrize(("solver", "options"), EVERY)
def test_stop_mode_decides_which_residual_the_tolerance_bounds(solver, options, make_problem):
    """Solutions of size 1e-6 satisfy an absolute tolerance at once, a relative one not."""
    problem = make_problem(scale=1e-6)
    absolute = solver(problem.f, problem.z0, tol=1e-4, stop_mode="abs", **options)
    assert absolute.steps.tolist() == [1] * 4
    relative = solver(problem.f, problem.z0, tol=1e-4, max_iter=200, **options)
    assert (relative.steps > 1).all()
    assert relative.converged.all()


@pytest.mark.parametrize(("solver", "options"), EVERY)
def test_value_is_the_best_iterate(solver, options, make_problem, record, residual_of):
    problem = make_problem(batch=6, norm=torch.linspace(0.5, 4.0, 6))
    f = record(problem.f)
    solution = solver(f, problem.z0, tol=1e-12, max_iter=15, **options)
    tried = torch.stack([residual_of(problem.f, z) for z in f.seen])
    if solver is newton_krylov:  # which also evaluates f off its iterates
        tried = solution.trace
    torch.testing.assert_close(solution.residual, tried.amin(dim=0), rtol=1e-9, atol=0)


@pytest.mark.parametrize("stop_mode", ["rel", "abs"])
@pytest.mark.parametrize(("solver", "options"), EVERY)
def test_trace_tells_the_residual_of_every_step(
    solver, options, stop_mode, make_problem, residual_of
):
    problem = make_problem(batch=5, norm=torch.tensor([0.0, 0.05, 0.3, 0.9, 3.0]))
    start = problem.z0 + 1
    solution = solver(problem.f, start, tol=1e-6, max_iter=40, stop_mode=stop_mode, **options)
    assert solution.trace.shape == (int(solution.steps.max()), 5)
    first = residual_of(problem.f, start, stop_mode)
    torch.testing.assert_close(solution.trace[0], first, rtol=1e-12, atol=0)
    assert len(set(solution.steps.tolist())) >= 3  # or the next lines would say little
    for i, steps in enumerate(solution.steps.tolist()):
        assert (solution.trace[steps - 1 :, i] == solution.trace[steps - 1, i]).all()
        assert (solution.trace[: steps - 1, i] > 1e-6).all()
        if solution.converged[i]:
            assert solution.trace[-1, i] == solution.residual[i]


@pytest.mark.parametrize(
    ("solver", "options"), [entry for entry in EVERY if entry[0] is not newton_krylov]
)
def test_steps_count_evaluations(solver, options, make_problem, record, residual_of):
    problem = make_problem(batch=5, norm=torch.linspace(0.05, 0.9, 5))
    f = record(problem.f)
    solution = solver(f, problem.z0, tol=1e-8, max_iter=200, **options)
    assert solution.converged.all()
    assert len(f.seen) == int(solution.steps.max())
    for i, steps in enumerate(solution.steps.tolist()):
        residuals = torch.stack([residual_of(problem.f, z)[i] for z in f.seen])
        torch.testing.assert_close(solution.trace[:steps, i], residuals[:steps])
        assert residuals[steps - 1] <= 1e-8 < residuals[: steps - 1].min()


@pytest.mark.parametrize("max_iter", [1, 2, 3, 17])
def test_max_iter_is_kept(solver, max_iter, make_problem):
    problem = make_problem(norm=0.99)
    solution = solver(problem.f, problem.z0, tol=0.0, max_iter=max_iter)
    assert solution.steps.max() <= max_iter
    assert solution.trace.shape[0] == solution.steps.max()
    assert (solution.steps[~solution.converged] == max_iter).all()


@pytest.mark.parametrize(("solver", "options"), DAMPED)
def test_damping_cannot_fake_convergence(solver, options):
    """Steps of a tenth of the residual |f(z) − z| = 0.1 |z − 10|: all of it must be small."""
    start = torch.zeros(1, 1, dtype=torch.float64)
    options = options | {"damping": 0.9}
    solution = solver(
        lambda z: 0.9 * z + 1, start, tol=1e-3, stop_mode="abs", max_iter=1000, **options
    )
    assert solution.converged.all()
    assert 0.1 * abs(solution.value.item() - 10) <= 1e-3


def test_no_graph_is_built_and_the_start_is_left_alone(solver):
    weight = torch.tensor(0.5, requires_grad=True)
    start = torch.zeros(2, 3, requires_grad=True)
    solution = solver(lambda z: weight * z + 1, start, tol=1e-6)
    for tensor in (solution.value, solution.residual, solution.trace):
        assert not tensor.requires_grad
    assert torch.equal(start, torch.zeros(2, 3))
    torch.testing.assert_close(solution.value, torch.full((2, 3), 2.0))


@pytest.mark.parametrize("shape", [(0, 3), (0, 0)])
def test_empty_batch_gives_an_empty_solution(solver, shape):
    solution = solver(lambda z: 0.5 * z, torch.zeros(shape))
    assert solution.value.shape == shape
    assert solution.residual.shape == solution.steps.shape == solution.converged.shape == (0,)
    assert solution.trace.shape == (0, 0)
    assert solution.status == ()


def test_vectors_without_components_are_solved(solver):
    solution = solver(lambda z: 0.5 * z, torch.zeros(2, 0))
    assert solution.value.shape == (2, 0)
    assert solution.converged.all()


@pytest.mark.parametrize("factor", [2.0, 50.0])
def test_runaway_is_called_divergence_and_the_best_iterate_returned(factor):
    """z ← factor z + 1 from 0: the first iterate has the smallest residual, 1."""
    solution = picard(lambda z: factor * z + 1, torch.zeros(1, 1), max_iter=300, stop_mode="abs")
    assert solution.status == (Status.DIVERGED,)
    assert solution.value.item() == 0.0
    assert solution.residual.item() == 1.0
    assert math.isfinite(solution.trace.max().item())
