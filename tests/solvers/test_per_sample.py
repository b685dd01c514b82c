"""What a sample gets does not depend on its batch mates, whatever becomes of them."""

import pytest
import torch

from deep_implicit_attention.solvers import Status, gmres, newton_krylov, picard

BATCH = 64
# (dtype, tol, agreement of values one by one and in the batch)
PRECISIONS = [
    pytest.param(torch.float64, 1e-4, 1e-10, id="float64-1e-4"),
    pytest.param(torch.float64, 1e-10, 1e-10, id="float64-1e-10"),
    pytest.param(torch.float32, 1e-4, 1e-5, id="float32-1e-4"),
    pytest.param(torch.float32, 1e-6, 1e-5, id="float32-1e-6"),
]


@pytest.fixture
def make_mixed(make_problem):
    """Samples from trivial to hard, of sizes 1e-6 to 1e6 in no order, n = 12."""

    def make(dtype, nonlinear=True):
        sizes = 10.0 ** torch.linspace(-6, 6, BATCH, dtype=torch.float64)
        sizes = sizes[torch.randperm(BATCH, generator=torch.Generator().manual_seed(0))]
        norms = torch.linspace(0.02, 0.95, BATCH)
        return make_problem(BATCH, 12, norms, dtype, nonlinear, scale=sizes)

    return make


def matvec_of(problem):
    """(1 − W) v"""
    return lambda v: v - (problem.matrices @ v.unsqueeze(2)).squeeze(2)


def assert_same_one_by_one(together, alone, close):
    """`alone` is a list of solutions of single samples."""
    assert together.converged.all()
    assert together.steps.max() > together.steps.min()  # difficulty does vary
    for i, one in enumerate(alone):
        assert one.converged.all()
        error = (one.value[0] - together.value[i]).norm() / one.value[0].norm()
        assert error <= close
        assert abs(int(one.steps) - int(together.steps[i])) <= 1  # a residual just at tol


@pytest.mark.quick("picard-*", "anderson-*", "broyden-*", "newton_krylov-float64-1e-4")
@pytest.mark.parametrize(("dtype", "tol", "close"), PRECISIONS)
def test_batch_gives_the_answers_of_one_by_one(solver, dtype, tol, close, make_mixed):
    mixed = make_mixed(dtype)
    together = solver(mixed.f, mixed.z0, tol=tol, max_iter=100)
    alone = []
    for i in range(BATCH):
        one = mixed[i : i + 1]
        alone.append(solver(one.f, one.z0, tol=tol, max_iter=100))
    assert_same_one_by_one(together, alone, close)
    error = (together.value - mixed.solution).norm(dim=1) / mixed.solution.norm(dim=1)
    assert (error <= 1.1 * tol / (1 - torch.linspace(0.02, 0.95, BATCH))).all()


@pytest.mark.quick("float64-1e-10-None", "float32-1e-4-4")
@pytest.mark.parametrize("restart", [None, 4])
@pytest.mark.parametrize(("dtype", "tol", "close"), PRECISIONS)
def test_gmres_batch_gives_the_answers_of_one_by_one(restart, dtype, tol, close, make_mixed):
    mixed = make_mixed(dtype)
    right = mixed.solution  # as good as any
    together = gmres(matvec_of(mixed), right, tol=tol, max_iter=100, restart=restart)
    alone = [
        gmres(matvec_of(mixed[i : i + 1]), right[i : i + 1], tol=tol, max_iter=100, restart=restart)
        for i in range(BATCH)
    ]
    assert_same_one_by_one(together, alone, close)
    identity = torch.eye(12, dtype=torch.float64)
    exact = torch.linalg.solve(identity - mixed.matrices.double(), right.double())
    error = (together.value - exact).norm(dim=1) / exact.norm(dim=1)
    assert (error <= 1.1 * tol / (1 - torch.linspace(0.02, 0.95, BATCH)) * 2).all()


def test_gmres_budget_of_a_sample_is_its_own():
    """Sample 0 needs a second Krylov space in float32; its mate uses up the 12 vectors in one."""
    matrices = torch.zeros(2, 12, 12)
    matrices[0] = torch.diag(torch.tensor([1.0, 30.0, 1e3, 1e4] * 3))
    matrices[1] = torch.eye(12).roll(1, dims=0)  # no progress before vector 12
    right = torch.randn(2, 12, generator=torch.Generator().manual_seed(0))
    right[1] = torch.eye(12)[0]

    def solve(rows, max_iter):
        return gmres(
            lambda v: (matrices[rows] @ v.unsqueeze(2)).squeeze(2),
            right[rows],
            tol=1e-6,
            max_iter=max_iter,
        )

    alone, together = solve(slice(0, 1), 12), solve(slice(0, 2), 12)
    assert int(together.steps[0]) == int(alone.steps)
    torch.testing.assert_close(together.residual[:1], alone.residual, rtol=0.05, atol=0)
    assert together.steps.tolist() == [12, 12]

    # With room for both spaces the trace tells of both.
    together = solve(slice(0, 2), 50)
    assert together.converged.all()
    assert (together.trace[-1] <= 1e-6).all()


@pytest.mark.parametrize("max_iter", [30, 31, 90])
def test_converged_sample_is_frozen_while_its_mates_go_on(solver, max_iter, make_problem):
    problem = make_problem(batch=2, norm=0.3)

    def with_hopeless_mate(z):  # whose map jumps over its fixed point
        jump = torch.where(z > 0, -1.0, 1.0).to(z.dtype)
        return torch.where(torch.tensor([[True], [False]]), problem.f(z), jump)

    together = solver(with_hopeless_mate, problem.z0, tol=1e-6, max_iter=max_iter)
    alone = solver(problem[:1].f, problem[:1].z0, tol=1e-6, max_iter=30)
    assert together.converged[0]
    assert int(alone.steps) == int(together.steps[0]) < int(together.steps[1])
    assert torch.equal(together.value[0], alone.value[0])
    assert torch.equal(together.residual[0], alone.residual[0])


# --- samples that fail ----------------------------------------------------------------------------

FAILURES = {
    "always NaN": lambda z: z * torch.nan,
    "always infinite": lambda z: z + torch.inf,
    "NaN later": lambda z: torch.where(z.abs() > 0.5, torch.nan, 2 * z + 0.1),
    "overflows": lambda z: 100 * (z + 1) ** 3,
    "grows": lambda z: 2 * z + 1,
    "never settles": lambda z: z + 1,
}


@pytest.mark.parametrize("failure", FAILURES)
def test_failing_sample_and_its_mates_do_not_touch_each_other(solver, failure, dtype, make_problem):
    problem = make_problem(batch=5, dtype=dtype)
    bad = torch.arange(5)[:, None] == 2
    tol = 1e-10 if dtype == torch.float64 else 1e-6

    def f(z):
        return torch.where(bad, FAILURES[failure](z), problem.f(z))

    healthy = solver(problem.f, problem.z0, tol=tol, max_iter=60)
    solution = solver(f, problem.z0, tol=tol, max_iter=60)
    good = [0, 1, 3, 4]
    assert healthy.converged.all()
    assert solution.converged[good].all()
    assert torch.equal(solution.value[good], healthy.value[good])
    assert torch.equal(solution.residual[good], healthy.residual[good])
    assert torch.equal(solution.steps[good], healthy.steps[good])
    alone = solver(FAILURES[failure], problem.z0[2:3], tol=tol, max_iter=60)
    assert solution.status[2] == alone.status[0]
    assert solution.steps[2] == alone.steps[0]
    assert torch.equal(solution.trace[: alone.steps[0], 2], alone.trace[:, 0])


@pytest.mark.parametrize("failure", FAILURES)
def test_failing_sample_is_honest(solver, failure, residual_of):
    """Either no number at all, or the best finite iterate with its own residual."""
    f = FAILURES[failure]
    start = torch.zeros(1, 3, dtype=torch.float64)
    solution = solver(f, start, tol=1e-10, max_iter=400)
    if failure.startswith("always"):
        assert solution.status == (Status.NONFINITE,)
        assert solution.value.isnan().all()
        assert solution.residual.tolist() == solution.residual_norm.tolist() == [torch.inf]
        assert solution.steps.tolist() == [1]
    else:
        assert solution.value.isfinite().all()
        torch.testing.assert_close(solution.residual, residual_of(f, solution.value))
        assert solution.residual[0] == solution.trace.min()
        assert bool(solution.converged) == (solution.residual.item() <= 1e-10)


@pytest.mark.parametrize(
    ("failure", "status", "steps"),
    [
        ("NaN later", Status.NONFINITE, 4),  # 0, 0.1, 0.3, 0.7
        ("overflows", Status.DIVERGED, 5),  # 0, 1e2, 1e8, 1e26, 1e80; 1e242 has no square
        ("grows", Status.DIVERGED, 300),
        ("never settles", Status.MAX_ITER, 300),
    ],
)
def test_each_failure_has_its_status(failure, status, steps):
    start = torch.zeros(1, 1, dtype=torch.float64)
    solution = picard(FAILURES[failure], start, max_iter=300, stop_mode="abs")
    assert solution.status == (status,)
    # The residuals of these maps grow (or stay): the start is the best iterate.
    assert solution.value.item() == 0.0
    assert solution.residual.item() == FAILURES[failure](start).item()
    assert int(solution.steps) == steps


def test_a_sample_that_grew_before_it_was_lost_has_diverged():
    def f(z):
        lost = torch.where(z.abs() > 1e3, torch.nan, 4 * z + 1)
        return torch.where(torch.arange(len(z))[:, None] == 0, lost, 0.8 * z + 1)

    start = torch.zeros(2, 1, dtype=torch.float64)
    assert picard(f, start[:1]).status == (Status.DIVERGED,)
    together = picard(f, start)
    assert together.status == (Status.DIVERGED, Status.CONVERGED)
    assert bool(together.trace.isfinite().all())


@pytest.mark.parametrize("bad_value", [torch.nan, torch.inf])
def test_gmres_flags_a_sample_with_a_non_finite_right_hand_side(bad_value, dtype, make_problem):
    problem = make_problem(batch=4, n=6, dtype=dtype)
    right = problem.solution.clone()
    healthy = gmres(matvec_of(problem), right, tol=1e-5)
    right[1, 3] = bad_value
    solution = gmres(matvec_of(problem), right, tol=1e-5)
    assert solution.status[1] is Status.NONFINITE
    assert solution.value[1].isnan().all()
    assert solution.residual[1] == torch.inf
    assert solution.steps[1] == 0
    assert healthy.converged.all()
    good = [0, 2, 3]
    assert solution.converged[good].all()
    torch.testing.assert_close(solution.value[good], healthy.value[good], rtol=1e-12, atol=1e-12)


def test_gmres_flags_a_sample_with_a_non_finite_matrix(make_problem):
    problem = make_problem(batch=3, n=6)
    healthy = gmres(matvec_of(problem), problem.solution, tol=1e-8)
    right = problem.solution
    problem.matrices[2, 0, 0] = torch.nan
    solution = gmres(matvec_of(problem), right, tol=1e-8)
    assert solution.status == (Status.CONVERGED, Status.CONVERGED, Status.NONFINITE)
    assert solution.value[2].isnan().all()
    torch.testing.assert_close(solution.value[:2], healthy.value[:2], rtol=1e-12, atol=1e-12)


def test_newton_flags_a_sample_whose_jvp_is_not_finite(make_problem):
    """The map is fine, its derivative is not: a Picard step replaces the Newton step."""
    problem = make_problem(batch=2, norm=0.5, nonlinear=False)

    def jvp(z, v):
        product = (problem.matrices @ v.unsqueeze(2)).squeeze(2)
        return torch.where(torch.tensor([[False], [True]]), torch.nan, product)

    solution = newton_krylov(problem.f, problem.z0, jvp=jvp, tol=1e-8)
    assert solution.converged.all()
    assert solution.steps[1] > solution.steps[0]
    reference = picard(problem[1:].f, problem[1:].z0, tol=1e-8)
    torch.testing.assert_close(solution.value[1:], reference.value, rtol=1e-12, atol=0)
