"""In a batch of fields everyone takes the steps that it needs, and costs no more."""

import pytest
import torch

from deep_implicit_attention.solvers import Status
from deep_implicit_attention.spins import (
    TAP,
    AdaptiveTAP,
    ExpectationPropagation,
    IsingPrior,
    NaiveMeanField,
    PottsPrior,
    SelfAveragingTAP,
    SpinSystem,
    _closure,
    _consistency,
    _expectation_propagation,
    _naive,
    _self_averaging_tap,
    ferromagnet,
    sherrington_kirkpatrick,
)
from deep_implicit_attention.spins._double_loop import DoubleLoop
from deep_implicit_attention.spins._frames import _Ising

METHODS = {
    "naive": (NaiveMeanField(), _naive._Step),
    "tap": (TAP(), _closure._Step),
    "self-averaging": (SelfAveragingTAP(), _self_averaging_tap._Step),
    "adaptive": (AdaptiveTAP(), _consistency.AdaptiveTAPStep),
    "parallel": (ExpectationPropagation(schedule="parallel"), _consistency.AdaptiveTAPStep),
}
# With couplings near to where they order by themselves.
PRIORS = {"ising": (IsingPrior(), 0.9), "potts": (PottsPrior(3), 2.0)}


@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("name", METHODS)
def test_fields_that_are_solved_are_left_out(name, prior, monkeypatch):
    method, step = METHODS[name]
    prior, beta = PRIORS[prior]
    system = SpinSystem(ferromagnet(5, beta).double(), prior)
    size = torch.logspace(-1.5, 2, 9, dtype=torch.float64)
    x = size.view(-1, *[1] * (1 + len(system.event_shape)))
    x = (
        x
        * torch.rand(9, 5, *system.event_shape, generator=torch.Generator().manual_seed(0)).double()
    )
    sizes, forward = [], step.forward

    def counted(self, state, *args):
        sizes.append(len(args[0]))
        return forward(self, state, *args)

    monkeypatch.setattr(step, "forward", counted)
    with torch.no_grad():
        together = method(system, x)
        assert together.solution.all_converged()
        assert min(sizes) <= 4
        for i in (0, 4, 8):
            alone = method(system, x[i : i + 1])
            for name in ("magnetization", "log_partition", "energy"):
                torch.testing.assert_close(
                    getattr(together, name)[i], getattr(alone, name)[0], rtol=1e-7, atol=1e-8
                )
            assert abs(int(alone.solution.steps) - int(together.solution.steps[i])) <= 2


def test_the_double_loop_is_given_who_failed_alone(monkeypatch):
    """Where parallel updates fail, the equations are asked of those samples only."""
    asked = []
    monkeypatch.setattr(DoubleLoop, "__init__", _counted(DoubleLoop.__init__, asked))
    monkeypatch.setattr(_expectation_propagation, "_AUTO_LIMIT", 36)
    system = SpinSystem(0.9 * ferromagnet(5, 1.0).double(), IsingPrior())
    x = torch.linspace(0.01, 1.5, 8, dtype=torch.float64)[:, None].expand(8, 5)
    method = ExpectationPropagation()
    response = method(system, x)
    assert len(asked) == 1
    assert 0 < asked[0] < 8
    alone = [method(system, one[None]) for one in x]
    torch.testing.assert_close(
        response.magnetization, torch.cat([one.magnetization for one in alone]), atol=1e-6, rtol=0
    )


def _counted(init, asked):
    def counted(self, local, couplings, x):
        asked.append(len(x))
        init(self, local, couplings, x)

    return counted


def test_spins_that_are_all_but_fixed_begin_alone_as_in_company():
    """Rounding of their terms decided where they began, with up to 18 steps in the place of few."""
    system = SpinSystem(sherrington_kirkpatrick(5, 0.5)[0].float(), PottsPrior(3))
    generator = torch.Generator().manual_seed(1)
    x = 20 * torch.randn(40, 5, 3, generator=generator, dtype=torch.float64).float()
    method = ExpectationPropagation(schedule="parallel", tol=1e-5, on_failure="raise")
    together = method(system, x).solution.steps.tolist()
    assert together == [int(method(system, one).solution.steps) for one in x]


@pytest.mark.quick("sequential")
@pytest.mark.parametrize("schedule", ["sequential", "double loop"])
def test_rounding_at_the_step_limit_is_no_divergence(schedule):
    couplings, _ = sherrington_kirkpatrick(6)
    x = 3 * torch.randn(10, 6, generator=torch.Generator().manual_seed(0))
    method = ExpectationPropagation(schedule=schedule, max_iter=60, tol=0, on_failure="ignore")
    solution = method(SpinSystem(couplings.float(), IsingPrior()), x).solution
    assert set(solution.status) == {Status.MAX_ITER}


def test_samples_leave_the_double_loop_one_by_one(monkeypatch):
    """Each where its own free energy falls no more, whatever its mates do."""
    falls = torch.tensor([False, True])
    monkeypatch.setattr(DoubleLoop, "falls", lambda self, steps: falls)
    couplings, x = sherrington_kirkpatrick(6, 0.75, 0.5)
    method = ExpectationPropagation(schedule="double loop", tol=0, max_iter=60, on_failure="ignore")
    solution = method(SpinSystem(couplings, IsingPrior()), torch.stack([x, 2 * x])).solution
    assert solution.steps.tolist() == [25, 60]


def test_terms_without_a_distribution_spoil_no_other_sample():
    """Rounding may leave such terms of spins that are all but fixed; the solve ended in an error of
    torch's."""
    couplings, x = sherrington_kirkpatrick(6, 0.75, 0.5)
    x = x.view(1, 6, 1).expand(2, 6, 1)
    total = torch.ones(2, 6, 1, 1, dtype=torch.float64)
    total[0] = 0
    total[1] *= 3
    found = DoubleLoop(_Ising(IsingPrior()), couplings, x)(0 * x, total)
    alone = DoubleLoop(_Ising(IsingPrior()), couplings, x[1:])(0 * x[1:], total[1:])
    for mine, its in zip(found, alone, strict=True):
        torch.testing.assert_close(mine[1:], its)
