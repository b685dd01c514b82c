"""GMRES against direct solutions, minimal residuals from least squares, and singular matrices."""

import pytest
import torch

from deep_implicit_attention.solvers import Status, gmres


def matvec_of(matrices):
    return lambda v: (matrices @ v.unsqueeze(2)).squeeze(2)


def relative_residual(matrices, x, b):
    return (b - matvec_of(matrices)(x)).norm(dim=1) / b.norm(dim=1)


@pytest.fixture
def make_system():
    """`make(batch, n, dtype)`: non-symmetric matrices of condition number below 10, and b."""

    def make(batch=5, n=10, dtype=torch.float64, seed=0):
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(batch, n, n, generator=generator, dtype=torch.float64)
        noise *= 0.8 / torch.linalg.matrix_norm(noise, 2)[:, None, None]
        matrices = torch.eye(n, dtype=torch.float64) + noise
        b = torch.randn(batch, n, generator=generator, dtype=torch.float64)
        return matrices.to(dtype), b.to(dtype)

    return make


@pytest.mark.parametrize("restart", [None, 1, 3, 10, 99])
def test_solves_what_a_direct_solver_solves(restart, dtype, make_system):
    matrices, b = make_system(dtype=dtype)
    tol = 1e-11 if dtype == torch.float64 else 1e-5
    solution = gmres(matvec_of(matrices), b, tol=tol, max_iter=400, restart=restart)
    assert solution.converged.all()
    assert solution.status == (Status.CONVERGED,) * 5
    exact = torch.linalg.solve(matrices.double(), b.double())
    # ‖x − x*‖ ≤ ‖A⁻¹‖ ‖b − A x‖ ≤ 5 tol ‖b‖
    error = (solution.value - exact).norm(dim=1)
    assert (error <= 5.5 * tol * b.norm(dim=1)).all()
    assert solution.value.dtype == dtype


def test_ends_within_n_vectors(make_system):
    matrices, b = make_system(n=7)
    solution = gmres(matvec_of(matrices), b, tol=1e-12, max_iter=1000)
    assert solution.converged.all()
    assert (solution.steps <= 7).all()


def test_ends_within_as_many_vectors_as_there_are_eigenvalues(make_system):
    _, b = make_system(n=9)
    matrices = torch.diag(torch.tensor([1.0, 2.0, -3.0] * 3, dtype=torch.float64)).expand(5, 9, 9)
    solution = gmres(matvec_of(matrices), b, tol=1e-12)
    assert solution.converged.all()
    assert solution.steps.tolist() == [3] * 5
    identity = gmres(lambda v: v.clone(), b, tol=1e-12)
    assert identity.steps.tolist() == [1] * 5
    torch.testing.assert_close(identity.value, b)


def test_residual_is_the_least_over_the_krylov_space(make_system):
    """At every vector; the least residual from a least-squares solver on b, Ab, A²b, …"""
    matrices, b = make_system(batch=3, n=6)
    traced = gmres(matvec_of(matrices), b, tol=0.0, max_iter=5).trace
    assert traced.shape == (5, 3)
    powers = [b]
    for k in range(5):
        powers.append(matvec_of(matrices)(powers[-1]))
        image = torch.stack(powers[1:], dim=2)
        weights = torch.linalg.lstsq(image, b.unsqueeze(2)).solution
        least = (b - (image @ weights).squeeze(2)).norm(dim=1) / b.norm(dim=1)
        torch.testing.assert_close(traced[k], least, rtol=1e-8, atol=1e-10)
        cut = gmres(matvec_of(matrices), b, tol=0.0, max_iter=k + 1)
        torch.testing.assert_close(cut.residual, least, rtol=1e-8, atol=1e-10)


def test_space_without_progress_is_gone_through():
    """The cyclic shift: no residual falls before vector n, which solves exactly."""
    n = 6
    shift = torch.eye(n, dtype=torch.float64).roll(1, dims=0)[None]
    b = torch.eye(n, dtype=torch.float64)[:1]
    cut = gmres(matvec_of(shift), b, tol=1e-10, max_iter=n - 1)
    assert cut.status == (Status.MAX_ITER,)
    assert cut.residual.tolist() == [1.0]
    solution = gmres(matvec_of(shift), b, tol=1e-10, max_iter=n)
    assert solution.converged.all()
    assert solution.trace[:, 0].tolist() == pytest.approx([1.0] * (n - 1) + [0.0])
    torch.testing.assert_close(solution.value, torch.eye(n, dtype=torch.float64)[n - 1 :])


@pytest.mark.parametrize("restart", [1, 2, 4])
def test_restarts_go_on_as_long_as_there_is_budget(restart):
    """Positive definite A, condition κ: each vector shrinks the residual by (κ − 1)/(κ + 1)."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(10, 10, generator=generator, dtype=torch.float64)).Q
    values = torch.linspace(1, 40, 10, dtype=torch.float64)
    matrix = (basis * values @ basis.T)[None]
    b = torch.randn(1, 10, generator=generator, dtype=torch.float64)
    solution = gmres(matvec_of(matrix), b, tol=1e-6, max_iter=277, restart=restart)
    assert (39 / 41) ** 277 <= 1e-6
    assert solution.converged.all()
    assert relative_residual(matrix, solution.value, b).item() <= 1e-6


@pytest.mark.parametrize("restart", [1, 3])
def test_restart_begins_anew_with_what_is_left(restart, make_system):
    matrices, b = make_system()
    solution = gmres(matvec_of(matrices), b, tol=0.0, max_iter=2 * restart, restart=restart)
    first = gmres(matvec_of(matrices), b, tol=0.0, max_iter=restart).value
    left = b - matvec_of(matrices)(first)
    second = gmres(matvec_of(matrices), left, tol=0.0, max_iter=restart).value
    torch.testing.assert_close(solution.value, first + second, rtol=1e-12, atol=1e-14)


def test_the_trace_goes_on_over_restarts(make_system):
    """With restart 1 each vector is the best multiple of the residual, by itself."""
    matrices, b = make_system()
    solution = gmres(matvec_of(matrices), b, tol=0.0, max_iter=7, restart=1)
    assert solution.trace.shape[0] == 7
    left = b
    for row in solution.trace:
        image = matvec_of(matrices)(left)
        left = left - (image * left).sum(1, True) / image.square().sum(1, True) * image
        torch.testing.assert_close(row, left.norm(dim=1) / b.norm(dim=1))


def test_a_limit_that_is_never_met_costs_nothing(make_system):
    matrices, b = make_system()
    few = gmres(matvec_of(matrices), b, tol=1e-8, max_iter=100)
    many = gmres(matvec_of(matrices), b, tol=1e-8, max_iter=10**15)
    assert torch.equal(many.value, few.value)
    assert torch.equal(many.trace, few.trace)


def test_further_vectors_never_make_it_worse(make_system):
    """At the limit of float32, where another Krylov space may well come out a bit worse."""
    matrices, b = make_system(batch=64, n=8, dtype=torch.float32)
    first, more = (gmres(matvec_of(matrices), b, tol=0.0, max_iter=k) for k in (8, 100))
    assert (more.residual <= first.residual).all()
    assert (more.steps > first.steps).any()


@pytest.mark.parametrize("restart", [None, 2])
@pytest.mark.parametrize("max_iter", [1, 2, 5, 50])
@pytest.mark.parametrize("tol", [1e-2, 1e-9])
def test_residual_is_that_of_the_value(tol, max_iter, restart, make_system):
    matrices, b = make_system()
    b = b * 10.0 ** torch.arange(-4, 6, 2)[:, None]
    solution = gmres(matvec_of(matrices), b, tol=tol, max_iter=max_iter, restart=restart)
    expected = relative_residual(matrices, solution.value, b)
    torch.testing.assert_close(solution.residual, expected, rtol=1e-6, atol=1e-15)
    norms = solution.residual * b.norm(dim=1)
    torch.testing.assert_close(solution.residual_norm, norms, rtol=1e-12, atol=0)
    assert torch.equal(solution.converged, expected <= tol)
    assert (solution.steps <= max_iter).all()
    assert solution.trace.shape == (int(solution.steps.max()), 5)
    assert (solution.trace[-1, ~solution.converged] > tol).all()


def test_steps_count_krylov_vectors(make_system, record):
    """One product a vector, and one at the end for the true residual."""
    matrices, b = make_system()
    matvec = record(matvec_of(matrices))
    solution = gmres(matvec, b, tol=1e-6)
    assert solution.converged.all()
    assert len(matvec.seen) == int(solution.steps.max()) + 1


def test_zero_right_hand_side_has_the_zero_solution(make_system):
    matrices, b = make_system()
    b[2] = 0
    solution = gmres(matvec_of(matrices), b, tol=1e-10)
    assert solution.converged.all()
    assert solution.value[2].tolist() == [0.0] * 10
    assert solution.steps[2] == 0
    assert solution.residual[2] == 0
    torch.testing.assert_close(solution.value, torch.linalg.solve(matrices, b))


def test_nothing_but_zeros_needs_no_product(record):
    matvec = record(lambda v: 2 * v)
    solution = gmres(matvec, torch.zeros(3, 4))
    assert solution.converged.all()
    assert solution.value.tolist() == torch.zeros(3, 4).tolist()
    assert matvec.seen == []


# --- singular matrices --------------------------------------------------------------------------


@pytest.fixture
def singular():
    """Three matrices of rank n − 1, or n − 2, without structure, and a right-hand side each."""
    generator = torch.Generator().manual_seed(3)
    matrices = torch.randn(3, 8, 8, generator=generator, dtype=torch.float64)
    left, values, right = torch.linalg.svd(matrices)
    values = values.clamp_min(0.5)
    values[:, -1] = 0
    values[2, -2] = 0
    b = torch.randn(3, 8, generator=generator, dtype=torch.float64)
    return left @ torch.diag_embed(values) @ right, b


@pytest.mark.parametrize("max_iter", [8, 50])
def test_singular_consistent_system_is_solved(singular, max_iter):
    matrices, x = singular
    b = matvec_of(matrices)(x)
    solution = gmres(matvec_of(matrices), b, tol=1e-9, max_iter=max_iter)
    assert solution.value.isfinite().all()
    assert solution.converged.all()
    assert (relative_residual(matrices, solution.value, b) <= 1e-9).all()


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("max_iter", [1, 7, 8, 9, 50])
def test_singular_inconsistent_system_keeps_its_best_residual(singular, max_iter, symmetric):
    """More vectors never make it worse, the last of which meets a pivot of rounding noise."""
    matrices, b = singular
    if symmetric:
        matrices = matrices @ matrices.mT
    solution = gmres(matvec_of(matrices), b, tol=1e-9, max_iter=max_iter)
    assert not solution.converged.any()
    expected = relative_residual(matrices, solution.value, b)
    torch.testing.assert_close(solution.residual, expected)
    earlier = gmres(matvec_of(matrices), b, tol=1e-9, max_iter=min(max_iter, 6))
    assert (solution.residual <= 1.001 * earlier.residual).all()
    assert (solution.value.norm(dim=1) <= 1e3 * b.norm(dim=1)).all()
    # What no x can do better than, by least squares.
    best = torch.linalg.lstsq(matrices, b.unsqueeze(2), driver="gelsd").solution.squeeze(2)
    assert (solution.residual >= 0.999 * relative_residual(matrices, best, b)).all()
    assert (solution.trace >= 0.999 * relative_residual(matrices, best, b)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [5, 20, 60])
@pytest.mark.parametrize("symmetric", [False, True])
def test_rounding_does_not_drown_what_a_singular_system_allows(dtype, n, symmetric):
    """In floating point the matrix is as good as singular, and x long: without a look at the true
    residual it is all rounding, in single precision up to b itself."""
    generator = torch.Generator().manual_seed(n)
    matrices = torch.randn(40, n, n, generator=generator, dtype=torch.float64)
    left, values, right = torch.linalg.svd(matrices / n**0.5)
    values = values.clamp_min(0.3)
    values[:, -1] = 0
    values[::2, -2] = 0
    matrices = left @ torch.diag_embed(values) @ right
    if symmetric:
        matrices = matrices @ matrices.mT
    b = torch.randn(40, n, generator=generator, dtype=torch.float64)
    kernel = left[:, :, -1:], left[:, :, -2:-1] * (values[:, -2] == 0)[:, None, None]
    best = torch.stack([(k.mT @ b.unsqueeze(2)).flatten() for k in kernel]).norm(dim=0)
    matrices, b = matrices.to(dtype), b.to(dtype)
    solution = gmres(matvec_of(matrices), b, tol=1e-9, max_iter=2 * n)
    assert (solution.residual <= 1.1 * best / b.norm(dim=1) + 1e-6).all()
    assert not solution.converged.any()


def test_what_is_as_good_as_singular_is_solved_where_further_cycles_can():
    """Jordan blocks in single precision: condition 1e8, but x no longer than b. The first x is
    long, and wrong by rounding that some of the next cycles take away, beginning where it is."""
    generator = torch.Generator().manual_seed(0)
    converged = 0
    for n, value in ((8, 0.1), (12, 0.2), (16, 0.3)):
        matrix = value * torch.eye(n) + torch.diag(torch.ones(n - 1), 1)
        b = torch.randn(300, n, generator=generator) @ matrix.mT
        solution = gmres(lambda v, matrix=matrix: v @ matrix.mT, b, tol=1e-5, max_iter=200)
        converged += int(solution.converged.sum())
        residual = (b - solution.value @ matrix.mT).norm(dim=1) / b.norm(dim=1)
        torch.testing.assert_close(solution.residual, residual, rtol=1e-3, atol=1e-6)
    assert converged >= 350


def test_zero_matrix_is_flagged():
    solution = gmres(lambda v: 0 * v, torch.ones(2, 3))
    assert solution.status == (Status.SINGULAR,) * 2
    assert solution.steps.tolist() == [1, 1]
    assert solution.residual.tolist() == [1.0, 1.0]
    assert solution.value.isfinite().all()


def test_nilpotent_matrix_is_flagged():
    """b is in the image, but the Krylov space b, 0 does not hold a solution."""
    matrix = torch.tensor([[[0.0, 1.0], [0.0, 0.0]]])
    solution = gmres(matvec_of(matrix), torch.tensor([[1.0, 0.0]]))
    assert solution.status == (Status.SINGULAR,)
    assert solution.residual.tolist() == [1.0]
    assert solution.value.isfinite().all()


# --- edges --------------------------------------------------------------------------------------


@pytest.mark.parametrize("exponent", [-100, -40, 0, 40, 100])
def test_size_of_the_right_hand_side_is_no_reason_for_a_wrong_answer(exponent, make_system):
    """float32 squares of 2^±100 are 0 and infinity: solved or flagged, never silently wrong."""
    matrices, b = make_system(batch=1, n=4, dtype=torch.float32)
    exact = torch.linalg.solve(matrices.double(), b.double())
    solution = gmres(matvec_of(matrices), b * 2.0**exponent, tol=1e-5)
    if abs(exponent) <= 40:
        assert solution.converged.all()
    if solution.converged.all():
        torch.testing.assert_close(
            solution.value.double() / 2.0**exponent, exact, rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("shape", [(0, 3), (0, 0)])
def test_empty_batch_gives_an_empty_solution(shape):
    solution = gmres(lambda v: v, torch.zeros(shape))
    assert solution.value.shape == shape
    assert solution.trace.shape == (0, 0)
    assert solution.status == ()


def test_vectors_without_components_are_solved():
    assert gmres(lambda v: v, torch.zeros(2, 0)).converged.all()


def test_no_graph_is_built_and_b_is_left_alone(make_system):
    matrices, b = make_system()
    original = b.clone()
    weight = torch.ones((), dtype=torch.float64, requires_grad=True)
    solution = gmres(lambda v: weight * matvec_of(matrices)(v), b.requires_grad_(), tol=1e-9)
    assert not solution.value.requires_grad
    assert not solution.residual.requires_grad
    assert torch.equal(b, original)
