"""Broyden's method: its definition, its memory, its speed."""

import pytest
import torch

from deep_implicit_attention.solvers import Status, broyden, picard


def textbook_broyden(f, z, steps, memory):
    """The iterates, one sample, with the inverse Jacobian of g = f − 1 as a dense matrix."""
    identity = torch.eye(len(z), dtype=z.dtype)
    inverse, stored = -identity, 0
    g, states = f(z) - z, [z]
    while len(states) < steps:
        new = states[-1] - inverse @ g
        new_g = f(new) - new
        if stored == memory:
            inverse, stored = -identity, 0
        delta_z, delta_g = new - states[-1], new_g - g
        gain = delta_z @ inverse
        inverse = inverse + torch.outer(delta_z - inverse @ delta_g, gain) / (gain @ delta_g)
        stored += 1
        states.append(new)
        g = new_g
    return torch.stack(states)


@pytest.mark.parametrize("memory", [1, 3, 20])
def test_takes_the_steps_of_its_definition(memory, make_problem, record):
    problem = make_problem(batch=3, n=12, norm=1.2)
    f = record(problem.f)
    broyden(f, problem.z0, tol=0.0, max_iter=10, memory=memory)
    found = torch.stack(f.seen, dim=1)
    for i in range(3):
        one = problem[i : i + 1]
        expected = textbook_broyden(lambda z, f=one.f: f(z[None])[0], one.z0[0], 10, memory)
        torch.testing.assert_close(found[i], expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("memory", [1, 2, 5, 1000])
def test_restarts_still_reach_the_solution(memory, make_problem):
    problem = make_problem(n=8, norm=0.8)
    solution = broyden(problem.f, problem.z0, tol=1e-10, max_iter=200, memory=memory)
    assert solution.converged.all()
    assert (solution.steps > memory).all() or memory == 1000  # it did restart
    torch.testing.assert_close(solution.value, problem.solution, rtol=1e-8, atol=1e-8)


def test_one_dimension_is_the_secant_method(record):
    """z = cos z, from 0: the iterates of the secant method on cos z − z, after a Picard step."""
    f = record(torch.cos)
    solution = broyden(f, torch.zeros(1, 1, dtype=torch.float64), tol=1e-14)
    a, b = 0.0, 1.0
    for seen in f.seen[2:6]:
        a_g, b_g = (torch.tensor(x, dtype=torch.float64).cos().item() - x for x in (a, b))
        a, b = b, b - b_g * (b - a) / (b_g - a_g)
        assert seen.item() == pytest.approx(b, abs=1e-12)
    assert solution.value.item() == pytest.approx(0.7390851332151607, abs=1e-14)
    assert int(solution.steps) <= 8


def test_linear_map_in_n_dimensions_is_solved_in_2n_steps(make_problem):
    """Gay 1979: Broyden's method ends after at most 2n steps on a linear system."""
    problem = make_problem(n=4, norm=3.0, nonlinear=False)
    assert not picard(problem.f, problem.z0).converged.all()
    solution = broyden(problem.f, problem.z0, tol=1e-8, max_iter=12)
    assert solution.converged.all()
    assert (solution.steps <= 2 * 4 + 1).all()


def test_update_without_information_is_skipped(record):
    """z + 1 has Δg = 0 at every step: no division by zero, Picard steps go on."""
    f = record(lambda z: z + 1)
    solution = broyden(f, torch.zeros(1, 3), max_iter=9, stop_mode="abs")
    assert solution.status == (Status.MAX_ITER,)
    assert [z[0, 0].item() for z in f.seen] == list(range(9))
