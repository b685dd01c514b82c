"""Anderson acceleration: its definition, and histories that carry no information."""

import itertools

import pytest
import torch

from deep_implicit_attention.solvers import Status, anderson, picard


def textbook_anderson(f, z, steps, m, ridge, damping, period):
    """The iterates, one sample, γ from a least-squares solver on ΔG stacked over the ridge.

    γ = argmin ‖g − ΔG γ‖² + ridge Σ γ_j² ‖ΔG_j‖²
    z ← (1 − damping) (f − ΔF γ) + damping (z − ΔZ γ)

    with the differences since the first step at which ‖g‖ fell to no less than 0.3 of what it was,
    and since a step with γ that left 3 times as much and more than z. γ = 0 but in every
    `period`-th step, after a plain step that left no less, and after one with γ that left less than
    half of what the last plain one left.
    """
    states, images = [z], [f(z)]
    first, forgotten, plain, by_plain = None, 0, True, None
    at_start = (images[0] - z).norm()
    while len(states) < steps:
        k = len(states) - 1
        mixes = False
        if k:
            now, before = ((images[i] - states[i]).norm() for i in (k, k - 1))
            left = now / before
            if first is None and left > 0.3:
                first = k - 1
            if plain:
                by_plain, pays = left, left >= 1
            else:
                pays = left < by_plain / 2
                forgotten = k if left >= 3 and now > at_start else forgotten
            mixes = first is not None and bool(pays or k % period == 0)
        plain = not mixes
        start = max(first, forgotten, k - m) if mixes else k
        s, h = torch.stack(states[start:]), torch.stack(images[start:])
        residuals = h - s
        delta_z, delta_f, delta_g = s.diff(dim=0).T, h.diff(dim=0).T, residuals.diff(dim=0).T
        gamma = z.new_zeros(delta_g.shape[1])
        if len(gamma):
            system = torch.cat([delta_g, torch.diag(ridge**0.5 * delta_g.norm(dim=0))])
            target = torch.cat([residuals[-1], torch.zeros_like(gamma)])
            gamma = torch.linalg.lstsq(system, target).solution
        picard_step, averaged = h[-1] - delta_f @ gamma, s[-1] - delta_z @ gamma
        states.append((1 - damping) * picard_step + damping * averaged)
        images.append(f(states[-1]))
    return torch.stack(states)


@pytest.mark.parametrize("damping", [0.0, 0.3])
@pytest.mark.parametrize("ridge", [0.0, 1e-3, 0.1])
@pytest.mark.parametrize("m", [1, 2, 5])
@pytest.mark.parametrize(("norm", "period"), [(0.9, 1), (0.9, 3), (3.0, 2), (3.0, 3)])
def test_takes_the_steps_of_its_definition(norm, m, ridge, damping, period, make_problem, record):
    problem = make_problem(batch=3, n=12, norm=norm)
    f = record(problem.f)
    options = {"m": m, "ridge": ridge, "damping": damping, "period": period}
    anderson(f, problem.z0, tol=0.0, max_iter=9, **options)
    found = torch.stack(f.seen, dim=1)
    for i in range(3):
        one = problem[i : i + 1]
        expected = textbook_anderson(lambda z, f=one.f: f(z[None])[0], one.z0[0], 9, **options)
        torch.testing.assert_close(found[i], expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("period", [1, 2, 3])
@pytest.mark.parametrize("slope", [1.02, 1.1])
def test_a_history_that_led_astray_is_forgotten(slope, period, record):
    """On a curve that bends extrapolation runs far off, where what it was made of holds no more."""
    x = torch.linspace(0.01, 0.05, 5, dtype=torch.float64)[:, None]

    def curve(z):
        return torch.tanh(slope * z.mean(dim=1, keepdim=True) + x).expand_as(z)

    f = record(curve)
    options = {"m": 3, "ridge": 0.1, "damping": 0.0, "period": period}
    solution = anderson(f, torch.zeros(5, 4, dtype=torch.float64), tol=0.0, max_iter=12, **options)
    found = torch.stack(f.seen, dim=1)
    residuals = [(curve(z) - z).norm(dim=1) for z in f.seen]
    assert max((b / a).max() for a, b in itertools.pairwise(residuals)) > 3
    for i in range(5):
        alone = textbook_anderson(
            lambda z, i=i: torch.tanh(slope * z.mean() + x[i]).expand_as(z),
            found[i, 0], 12, **options,
        )  # fmt: skip
        torch.testing.assert_close(found[i], alone, rtol=1e-6, atol=1e-8)
    assert not solution.converged.any()


@pytest.mark.parametrize("period", [1, 2, 3])
def test_near_a_critical_point_it_does_not_run_off_for_ever(period):
    """Sixty-four fields on a mean-field ferromagnet: with all of its history kept, some took
    hundreds of steps."""
    x = torch.rand(64, 1, generator=torch.Generator().manual_seed(5), dtype=torch.float64) / 10
    for slope in (1.0, 1.05):
        start = torch.tanh(x).expand(64, 20)
        solution = anderson(
            lambda z, slope=slope: torch.tanh(slope * z.mean(dim=1, keepdim=True) + x).expand_as(z),
            start,
            tol=1e-9,
            max_iter=250,
            period=period,
        )
        assert solution.all_converged()
        assert solution.steps.float().mean() < 45


def test_states_stay_on_their_device_whatever_the_default_is(make_problem):
    problem = make_problem(batch=3, n=12, norm=0.9)
    expected = anderson(problem.f, problem.z0, tol=1e-10)
    with torch.device("meta"):
        found = anderson(problem.f, problem.z0, tol=1e-10)
    assert expected.all_converged()
    assert torch.equal(found.value, expected.value)


@pytest.mark.parametrize("damping", [0.0, 0.05])
def test_a_sample_that_settles_fast_by_itself_takes_picard_steps(damping, make_problem, record):
    problem = make_problem(batch=3, n=12, norm=0.2)
    accelerated, plain = record(problem.f), record(problem.f)
    anderson(accelerated, problem.z0, tol=1e-12, max_iter=9, damping=damping)
    picard(plain, problem.z0, tol=1e-12, max_iter=9, damping=damping)
    rounding = 1e-15 if damping else 0.0
    torch.testing.assert_close(accelerated.seen, plain.seen, rtol=0, atol=rounding)


@pytest.mark.parametrize("m", [4, 10, 200])
def test_linear_map_in_n_dimensions_is_solved_in_n_plus_2_steps(m):
    """Without ridge it is GMRES (Walker, Ni 2011): n + 1 iterates, and one step to see it."""
    matrix = torch.tensor(
        [[-3.0, 1.0, 0.0, 0.2], [0.0, 2.0, 1.0, 0.0], [0.5, 0.0, -1.5, 1.0], [0.0, 0.3, 0.0, 0.4]],
        dtype=torch.float64,
    )
    source = torch.tensor([[1.0, -2.0, 0.5, 3.0]], dtype=torch.float64)
    solution = anderson(
        lambda z: z @ matrix.T + source, 0 * source, tol=1e-9, m=m, ridge=0.0, max_iter=10
    )
    assert int(solution.steps) <= 6
    exact = torch.linalg.solve(torch.eye(4, dtype=torch.float64) - matrix, source[0])
    torch.testing.assert_close(solution.value[0], exact, rtol=1e-7, atol=1e-7)


def test_needs_far_fewer_steps_than_picard(make_problem):
    problem = make_problem(n=3, norm=1.0, nonlinear=False)
    problem.matrices *= 0.98 / torch.linalg.eigvals(problem.matrices).abs().amax(1)[:, None, None]
    plain = picard(problem.f, problem.z0, tol=1e-8, max_iter=3000)
    fast = anderson(problem.f, problem.z0, tol=1e-8, max_iter=3000)
    assert plain.converged.all()
    assert fast.converged.all()
    assert (10 * fast.steps < plain.steps).all()


@pytest.mark.parametrize("m", [1, 6, 50])  # beyond max_iter, beyond n
@pytest.mark.parametrize("ridge", [0.0, 1e-3])
@pytest.mark.parametrize("damping", [0.0, 0.5])
@pytest.mark.parametrize(("batch", "n"), [(1, 1), (1, 8), (3, 1), (3, 8)])
def test_every_shape_of_history_reaches_the_solution(batch, n, damping, ridge, m, make_problem):
    problem = make_problem(batch=batch, n=n, norm=0.7)
    options = {"m": m, "ridge": ridge, "damping": damping}
    solution = anderson(problem.f, problem.z0, tol=1e-10, max_iter=48, **options)
    assert solution.converged.all()
    torch.testing.assert_close(solution.value, problem.solution, rtol=1e-8, atol=1e-8)


# Maps whose residual differences are all parallel, or vanish: a singular least-squares problem.
DEPENDENT = {
    "constant": (lambda z: torch.full_like(z, 0.25), 0.25),
    "identical components": (lambda z: 0.5 * torch.cos(z), 0.45018361129487355),
    "identical components, linear": (lambda z: -0.8 * z + 9, 5.0),
    "one component moves": (
        lambda z: torch.cat([0.5 * torch.cos(z[:, :1]), 0 * z[:, 1:] + 0.45018361129487355], dim=1),
        0.45018361129487355,
    ),
}


@pytest.mark.parametrize("map_name", DEPENDENT)
@pytest.mark.parametrize("ridge", [0.0, 1e-12, 1e-3])
@pytest.mark.parametrize("damping", [0.0, 0.5])
def test_dependent_history_is_survived(map_name, ridge, damping, dtype):
    f, answer = DEPENDENT[map_name]
    tol = 1e-10 if dtype == torch.float64 else 1e-6
    start = torch.zeros(2, 8, dtype=dtype)
    solution = anderson(f, start, tol=tol, ridge=ridge, damping=damping, max_iter=60)
    assert solution.converged.all()
    torch.testing.assert_close(solution.value, start + answer, rtol=20 * tol, atol=0)


@pytest.mark.parametrize("ridge", [0.0, 1e-3])
def test_equal_iterates_are_survived(ridge, record):
    """z + 1 moves on without its residual changing: ΔG = 0, and only a Picard step is left."""
    f = record(lambda z: z + 1)
    solution = anderson(f, torch.zeros(1, 3), ridge=ridge, max_iter=9, stop_mode="abs")
    assert solution.status == (Status.MAX_ITER,)
    assert [z[0, 0].item() for z in f.seen] == list(range(9))


def test_where_its_problem_cannot_be_solved_it_takes_picard_steps(record):
    """Residuals that halve: their differences are parallel to the last digit."""
    residuals = iter([8.0, 4.0, 2.0, 1.0, 0.5])
    f = record(lambda z: z + next(residuals))
    anderson(f, torch.zeros(1, 4), ridge=0.0, m=2, tol=0.0, max_iter=5)
    assert torch.equal(f.seen[3], f.seen[2] + 2.0)
    assert torch.equal(f.seen[4], f.seen[3] + 1.0)


def test_singular_sample_leaves_the_acceleration_of_the_others_alone(make_problem):
    problem = make_problem(batch=3)

    def with_constant_middle(z):
        return torch.where(torch.tensor([[False], [True], [False]]), z + 1, problem.f(z))

    alone = anderson(problem.f, problem.z0, ridge=0.0, tol=1e-10)
    together = anderson(with_constant_middle, problem.z0, ridge=0.0, tol=1e-10)
    assert together.steps[[0, 2]].tolist() == alone.steps[[0, 2]].tolist()
    assert torch.equal(together.value[[0, 2]], alone.value[[0, 2]])


@pytest.mark.parametrize("damping", [0.0, 0.3])
@pytest.mark.parametrize("size", [1e-30, 1e-20, 1e-17, 1e17])
def test_small_and_large_states_take_the_same_steps(size, damping):
    torch.manual_seed(0)
    matrix, c = 0.8 * torch.randn(4, 20, 20) / 20**0.5, torch.randn(4, 20)

    def steps(size):
        found = anderson(
            lambda z: (matrix @ z[:, :, None])[:, :, 0] + size * c,
            torch.zeros(4, 20), tol=1e-5, max_iter=60, damping=damping,
        )  # fmt: skip
        assert bool(found.converged.all())
        return found.steps

    assert (steps(size) - steps(1.0)).abs().max() <= 1
