"""In a batch of fields everyone takes the steps that it needs, and costs no more."""

import pytest
import torch

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
)
from deep_implicit_attention.spins._double_loop import DoubleLoop

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
