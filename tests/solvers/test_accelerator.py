"""How solves run on an accelerator, on the host: the same answers, and the host seldom asks."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from deep_implicit_attention.solvers import _anderson, _iterate, _scale, anderson, broyden, picard

SOLVE = {"tol": 1e-10, "max_iter": 60}


class Questions(TorchDispatchMode):
    """Counts the operations whose answer a host would have to wait for."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (
            torch.ops.aten._local_scalar_dense.default,
            torch.ops.aten.is_nonzero.default,
            torch.ops.aten.nonzero.default,
        )
        return func(*args, **(kwargs or {}))


def leave_the_host(monkeypatch):
    for part in (_iterate, _anderson, _scale):
        monkeypatch.setattr(part, "is_host", lambda z: False)


@pytest.mark.parametrize("solver", [picard, anderson, broyden])
@pytest.mark.parametrize("scale", [None, 1.0, -1.0])
def test_same_answers_and_evidence(solver, scale, make_problem, monkeypatch):
    problem = make_problem(norm=0.6)
    options = {} if scale is None else {"preconditioner": lambda r: scale * r}
    expected = solver(problem.f, problem.z0, **SOLVE, **options)
    leave_the_host(monkeypatch)
    found = solver(problem.f, problem.z0, **SOLVE, **options)
    assert bool(found.converged.all())
    torch.testing.assert_close(found.value, expected.value, rtol=0, atol=1e-9)
    for name in ("steps", "codes", "converged"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    torch.testing.assert_close(found.residual, expected.residual, rtol=1e-2, atol=1e-12)


@pytest.mark.parametrize("solver", [picard, anderson, broyden])
@pytest.mark.parametrize("preconditioner", [None, lambda r: 0.9 * r])
def test_the_host_asks_every_fourth_step_at_most(solver, preconditioner, make_problem, monkeypatch):
    leave_the_host(monkeypatch)
    problem = make_problem(norm=0.6)
    with Questions() as questions:
        solution = solver(problem.f, problem.z0, preconditioner=preconditioner, **SOLVE)
    steps = int(solution.steps.max())
    assert steps > 8
    # One for each fourth step, and one for the length of the trace.
    assert questions.count <= steps // 4 + 2


@pytest.mark.parametrize("solver", [picard, anderson, broyden])
def test_an_empty_batch(solver, monkeypatch):
    leave_the_host(monkeypatch)
    found = solver(lambda z: 0.5 * z, torch.zeros(0, 4), **SOLVE)
    assert found.value.shape == (0, 4)
    assert found.steps.shape == found.residual.shape == (0,)
