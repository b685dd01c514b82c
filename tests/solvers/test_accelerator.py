"""How solves run on an accelerator, on the host: the same answers, and the host seldom asks."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from deep_implicit_attention.solvers import _iterate, _scale, anderson, broyden, gmres, picard

SOLVE = {"tol": 1e-10, "max_iter": 60}


class Questions(TorchDispatchMode):
    """Counts the operations whose answer a host would have to wait for, and looks at the norms."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.count = 0

        def look(*given):
            self.count += 1
            return _scale.seen(*given)

        monkeypatch.setattr(_iterate, "seen", look)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (
            torch.ops.aten._local_scalar_dense.default,
            torch.ops.aten.is_nonzero.default,
            torch.ops.aten.nonzero.default,
        )
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("solver", [picard, anderson, broyden])
@pytest.mark.parametrize("scale", [None, 1.0, -1.0])
def test_same_answers_and_evidence(solver, scale, make_problem, leave_the_host):
    problem = make_problem(norm=0.6)
    options = {} if scale is None else {"preconditioner": lambda r: scale * r}
    expected = solver(problem.f, problem.z0, **SOLVE, **options)
    leave_the_host()
    found = solver(problem.f, problem.z0, **SOLVE, **options)
    assert bool(found.converged.all())
    torch.testing.assert_close(found.value, expected.value, rtol=0, atol=1e-9)
    for name in ("codes", "converged"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    if solver is anderson:  # which hears of slow samples when the host looks
        assert (abs(found.steps - expected.steps) <= 3).all()
        return
    assert torch.equal(found.steps, expected.steps)
    torch.testing.assert_close(found.residual, expected.residual, rtol=1e-2, atol=1e-12)


@pytest.mark.parametrize("solver", [picard, anderson, broyden])
@pytest.mark.parametrize("preconditioner", [None, lambda r: 0.9 * r])
def test_the_host_asks_every_fourth_step_at_most(
    solver, preconditioner, make_problem, monkeypatch, leave_the_host
):
    leave_the_host()
    problem = make_problem(norm=0.6)
    with Questions(monkeypatch) as questions:
        solution = solver(problem.f, problem.z0, preconditioner=preconditioner, **SOLVE)
    assert solution.all_converged()
    assert questions.count <= int(solution.steps.max()) // 4 + 2
    assert int(solution.steps.max()) > 8


class Kernels(TorchDispatchMode):
    """Counts the operations that would start a kernel."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.count += isinstance(out, torch.Tensor) and not func.is_view
        return out


@pytest.mark.parametrize(
    ("solver", "left", "most"), [(picard, 0.9, 4), (anderson, 0.9, 56), (anderson, 0.25, 4)]
)
def test_what_a_step_starts_beside_the_map(solver, left, most, leave_the_host):
    """f(z) − z and two norms, what makes the next state of them, and a look now and then.

    Where every step leaves a quarter of the residual nobody is mixed.
    """
    leave_the_host()
    x, counts = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)).double(), []
    for steps in (12, 24):
        with Kernels() as kernels:
            solver(lambda z: left * z.flip(1) + x, x, tol=1e-30, max_iter=steps)
        counts.append(kernels.count - 3 * steps)
    assert 1 <= (counts[1] - counts[0]) / 12 <= most


def test_slow_samples_are_accelerated_soon(leave_the_host):
    """What is fast at first and then slow: as soon as the host looks."""
    g = torch.Generator().manual_seed(0)
    turned = torch.linalg.qr(torch.randn(30, 30, dtype=torch.float64, generator=g)).Q
    values = torch.linspace(-0.2, 0.2, 30, dtype=torch.float64)
    values[:3] = torch.tensor([0.9, -0.8, 0.7], dtype=torch.float64)
    matrix, x = turned * values @ turned.mT, torch.randn(8, 30, dtype=torch.float64, generator=g)
    x = x - 0.999 * x @ turned[:, :3] @ turned[:, :3].mT

    def f(z):
        return z @ matrix + x

    expected = anderson(f, torch.zeros_like(x), tol=1e-8, max_iter=40)
    leave_the_host()
    found = anderson(f, torch.zeros_like(x), tol=1e-8, max_iter=40)
    assert found.all_converged()
    assert int(found.steps.max()) <= int(expected.steps.max()) + 3


def test_what_a_mixture_leads_astray_is_forgotten_before_the_host_looks(leave_the_host):
    """Three spins at their critical point, where mixtures of early steps point far away."""
    g = torch.Generator().manual_seed(1)
    x = 0.1 * torch.rand(64, 1, generator=g).expand(64, 3)
    leave_the_host()
    found = anderson(
        lambda z: torch.tanh(z.mean(1, keepdim=True) + x), torch.tanh(x), tol=1e-4, max_iter=30
    )
    assert found.all_converged()


def test_who_took_a_plain_step_forgets_nothing_for_a_mate_that_was_mixed(leave_the_host):
    """Of two, one is mixed at once; the other's plain step makes its residual twenty times."""
    matrices = torch.tensor([[[0.0, -20], [0.5, 0]], [[-2, 0], [0, -2]]]).double()
    x = torch.tensor([[[1.0], [0]], [[1], [1]]]).double()
    leave_the_host()

    def steps(samples):
        M, b = matrices[:samples], x[:samples]
        return anderson(
            lambda z: (M @ z[:, :, None] + b)[:, :, 0], 0 * b[:, :, 0], tol=1e-8, period=2, ridge=0
        ).steps[0]

    assert steps(2) == steps(1)


@pytest.mark.parametrize("solver", [picard, anderson, broyden])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_who_is_done_stays_while_others_go_on(
    solver, dtype, make_problem, monkeypatch, leave_the_host
):
    """Bit for bit, whenever the host looks."""
    problem = make_problem(batch=6, norm=torch.linspace(0.1, 0.7, 6), dtype=dtype)
    leave_the_host()
    found = []
    for every in (1, 4):
        monkeypatch.setattr(_iterate, "BETWEEN_LOOKS", every)
        monkeypatch.setattr(_iterate, "_FIRST_LOOK", every)
        found.append(solver(problem.f, problem.z0, tol=1e-5, max_iter=60))
    once, seldom = found
    assert len(set(once.steps.tolist())) > 2
    for name in ("value", "residual", "steps", "codes", "trace", "residual_norm"):
        assert torch.equal(getattr(once, name), getattr(seldom, name)), name


@pytest.mark.parametrize("steps", [2, 3, 5, 6, 9])
def test_hardly_an_evaluation_is_wasted_where_residuals_fall_evenly(steps, record, leave_the_host):
    leave_the_host()
    f = record(lambda z: 0.1 * z + 1)
    start = torch.zeros(3, 2, dtype=torch.float64)
    solution = picard(f, start, tol=2 * 0.1 ** (steps - 1), max_iter=30)
    assert solution.steps.tolist() == 3 * [steps]
    assert len(f.seen) == steps


def test_far_away_states_do_not_count_and_go_back(leave_the_host):
    """`test_far_away` has more of them; without the way back 78 % are solved."""
    leave_the_host()
    x = 4 * torch.randn(300, 3, generator=torch.Generator().manual_seed(0))
    solution = anderson(
        lambda z: z + 0.5 * (x - z).clamp(-1, 1), torch.zeros_like(x), tol=1e-4, max_iter=100
    )
    error = (solution.value - x).norm(dim=1)
    assert (error[solution.converged] < 0.05).all()
    assert solution.converged.sum() > 0.83 * len(x)


@pytest.mark.parametrize("unit", [1e-25, 1e25])
def test_squares_that_are_lost_are_no_residual_of_zero(unit, leave_the_host):
    leave_the_host()
    x = unit * torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    for solver in (picard, anderson, broyden):
        solution = solver(lambda z: 0.7 * z.flip(1) + x, torch.zeros_like(x), tol=1e-5)
        assert solution.all_converged()
        expected = (x + 0.7 * x.flip(1)) / (1 - 0.49)
        torch.testing.assert_close(solution.value / unit, expected / unit, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("solver", [picard, anderson, broyden])
def test_an_empty_batch(solver, leave_the_host):
    leave_the_host()
    found = solver(lambda z: 0.5 * z, torch.zeros(0, 4), **SOLVE)
    assert found.value.shape == (0, 4)
    assert found.steps.shape == found.residual.shape == (0,)


def test_gmres_asks_every_fourth_vector_at_most(monkeypatch, leave_the_host):
    matrix = torch.eye(40, dtype=torch.float64) + 0.3 * torch.randn(40, 40, dtype=torch.float64)
    b = torch.randn(5, 40, dtype=torch.float64)
    expected = gmres(lambda v: v @ matrix.mT, b, **SOLVE)
    leave_the_host()
    with Questions(monkeypatch) as questions:
        found = gmres(lambda v: v @ matrix.mT, b, **SOLVE)
    torch.testing.assert_close(found.value, expected.value, rtol=0, atol=1e-9)
    for name in ("steps", "codes", "trace"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name))
    # One for each fourth vector, one for each of at most three cycles, one for the trace.
    assert questions.count <= int(found.steps.max()) // 4 + 4


def test_what_a_vector_of_gmres_starts(leave_the_host):
    """The product, its norm and two passes of Gram–Schmidt; rotations are the host's."""
    leave_the_host()
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(40, 40, dtype=torch.float64, generator=generator)
    b, counts = torch.randn(3, 40, dtype=torch.float64, generator=generator), []
    for vectors in (8, 24):
        with Kernels() as kernels:
            gmres(lambda v: v @ matrix.mT, b, tol=1e-12, max_iter=vectors)
        counts.append(kernels.count)
    assert (counts[1] - counts[0]) / 16 <= 36
