"""Newton–Krylov: Newton's own steps, the jvp that is given, and steps that overshoot."""

import math

import pytest
import torch

from deep_implicit_attention.solvers import Status, newton_krylov


def jvp_of(problem):
    """The exact derivative of s tanh(W z/s + c) along v."""

    def jvp(z, v):
        slope = 1 - (problem.f(z) / problem.scale) ** 2
        return slope * (problem.matrices @ v.unsqueeze(2)).squeeze(2)

    return jvp


def textbook_newton(problem, steps):
    """The iterates with dense Jacobians and `torch.linalg.solve`."""
    z, states = problem.z0, []
    identity = torch.eye(z.shape[1], dtype=z.dtype)
    for _ in range(steps):
        states.append(z)
        image = problem.f(z)
        jacobian = (1 - image**2)[:, :, None] * problem.matrices
        z = z + torch.linalg.solve(identity - jacobian, image - z)
    return states


def test_takes_newton_steps_and_converges_quadratically(make_problem, record):
    problem = make_problem(norm=0.9)
    f, jvp = record(problem.f), record(jvp_of(problem))
    solution = newton_krylov(f, problem.z0, tol=1e-13, jvp=jvp, inner_tol=1e-12)
    assert solution.converged.all()
    for seen, expected in zip(f.seen[:3], textbook_newton(problem, 3), strict=True):
        torch.testing.assert_close(seen, expected, rtol=1e-9, atol=1e-9)
    # The number of right digits doubles, until rounding.
    before, after = solution.trace[1:-1], solution.trace[2:]
    assert (after <= torch.maximum(2 * before**2, torch.tensor(1e-13))).all()
    assert solution.steps.max() <= 6


def test_given_jvp_replaces_every_difference_of_f(make_problem, record):
    problem = make_problem()
    f, jvp = record(problem.f), record(jvp_of(problem))
    solution = newton_krylov(f, problem.z0, tol=1e-10, jvp=jvp)
    assert solution.converged.all()
    assert len(f.seen) == int(solution.steps.max())
    # The points it differentiates at are the iterates, in order.
    assert len(jvp.seen) >= len(f.seen) - 1
    for z in jvp.seen:
        assert any(torch.equal(z, state) for state in f.seen)

    without, plain = newton_krylov(problem.f, problem.z0, tol=1e-10), record(problem.f)
    newton_krylov(plain, problem.z0, tol=1e-10)
    assert len(plain.seen) > int(without.steps.max())
    torch.testing.assert_close(solution.value, without.value, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("inner_max_iter", [1, 2, 4])
def test_inner_max_iter_bounds_the_products(inner_max_iter, make_problem, record):
    problem = make_problem(n=8, norm=0.9)
    jvp = record(jvp_of(problem))
    solution = newton_krylov(
        problem.f, problem.z0, tol=1e-9, jvp=jvp, inner_tol=0.0, inner_max_iter=inner_max_iter
    )
    newton_steps = int(solution.steps.max()) - 1
    assert len(jvp.seen) <= newton_steps * (inner_max_iter + 1)  # one to check the solve
    assert solution.converged.all()


def test_tighter_inner_tol_saves_newton_steps(make_problem):
    problem = make_problem(n=12, norm=0.95)
    loose, tight = (
        newton_krylov(problem.f, problem.z0, tol=1e-11, jvp=jvp_of(problem), inner_tol=inner)
        for inner in (0.5, 1e-8)
    )
    assert loose.converged.all()
    assert tight.converged.all()
    assert (tight.steps < loose.steps).all()


@pytest.mark.parametrize("exact", [False, True], ids=["difference", "jvp"])
@pytest.mark.parametrize("distance", [2.0, 10.0, -60.0])
def test_overshooting_start_is_brought_back(distance, exact):
    """z − arctan(z − 7): Newton from |z − 7| > 1.39 jumps ever farther over the root."""
    jump = distance
    for _ in range(3):
        jump -= (1 + jump**2) * math.atan(jump)
    assert abs(jump) > 10 * abs(distance)

    def jvp(z, v):
        return v - v / (1 + (z - 7) ** 2)

    solution = newton_krylov(
        lambda z: z - torch.atan(z - 7),
        torch.full((1, 1), 7 + distance, dtype=torch.float64),
        tol=1e-10,
        jvp=jvp if exact else None,
    )
    assert solution.converged.all()
    assert solution.value.item() == pytest.approx(7.0, abs=1e-8)


def test_residual_of_accepted_steps_falls():
    """Halved steps show in the trace as rises that are taken back at once."""
    solution = newton_krylov(
        lambda z: z - torch.atan(z - 7), torch.full((1, 1), 17.0, dtype=torch.float64), tol=1e-10
    )
    trace = solution.trace[:, 0]
    best = trace.cummin(dim=0).values
    assert (trace > best).any()  # it did overshoot
    assert trace[-1] == best[-1] == solution.residual.item()


@pytest.mark.parametrize("exact", [False, True], ids=["difference", "jvp"])
def test_singular_jacobian_is_survived(exact):
    """z² + z + 1 has no real fixed point, and 1 − f' = −2z vanishes on the way."""
    solution = newton_krylov(
        lambda z: z**2 + z + 1,
        torch.zeros(2, 3, dtype=torch.float64),
        jvp=(lambda z, v: (2 * z + 1) * v) if exact else None,
        max_iter=30,
    )
    assert not solution.converged.any()
    assert Status.NONFINITE not in solution.status
    assert solution.value.isfinite().all()
    assert (solution.residual <= 1).all()  # that of the start


def test_a_search_in_which_nothing_helps_goes_on_from_a_short_step():
    """The residual jumps up right beside the start, and falls to 0 from there on."""
    solution = newton_krylov(
        lambda z: torch.where(z > 0, 2.0, 1.0),
        torch.zeros(1, 1),
        jvp=lambda z, v: torch.zeros_like(v),
        max_iter=40,
    )
    assert solution.converged.all()
    assert solution.value.item() == 2
    assert int(solution.steps) > 10  # it did try shorter ones
