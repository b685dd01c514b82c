"""Expectation propagation: the fixed points of adaptive TAP by three other ways."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import grad
from torch.autograd.functional import hessian

from deep_implicit_attention.deq import ConvergenceError, ConvergenceWarning
from deep_implicit_attention.spins import (
    AdaptiveTAP,
    Exact,
    ExpectationPropagation,
    GaussianPrior,
    IsingPrior,
    PottsPrior,
    SphericalPrior,
    SpinSystem,
    sherrington_kirkpatrick,
)
from deep_implicit_attention.spins._double_loop import _statistics
from deep_implicit_attention.spins._prior import Prior

SCHEDULES = ["parallel", "sequential", "double loop"]


def symmetric(sites: int, d: int, scale: float, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    raw = scale * torch.randn(sites, sites, d, d, dtype=torch.float64, generator=generator)
    upper = raw * torch.ones(sites, sites).triu(1)[:, :, None, None]
    return upper + upper.permute(1, 0, 3, 2)


SYSTEMS = {
    "ising": lambda: SpinSystem(sherrington_kirkpatrick(6, 0.75)[0], IsingPrior()),
    "potts": lambda: SpinSystem(symmetric(4, 3, 0.3), PottsPrior(3)),
    "potts-scalar": lambda: SpinSystem(sherrington_kirkpatrick(4, 0.5)[0], PottsPrior(4)),
    "sphere": lambda: SpinSystem(symmetric(4, 3, 0.3), SphericalPrior(3, 1.0)),
}


@pytest.fixture(params=list(SYSTEMS))
def system(request):
    return SYSTEMS[request.param]()


@pytest.fixture
def fields(system):
    torch.manual_seed(5)
    shape = (2, system.num_spins, *system.event_shape)
    return 0.5 * torch.randn(shape, dtype=torch.float64)


def spin_glass(seed: int, beta: float = 1.5, field: float = 0.1, num_spins: int = 16):
    couplings, x = sherrington_kirkpatrick(num_spins, beta, field, seed)
    return SpinSystem(couplings, IsingPrior()), x


@pytest.mark.quick("ising-*", "potts-[!s]*")
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_reaches_the_fixed_point_of_adaptive_tap(system, fields, schedule):
    mine = ExpectationPropagation(schedule=schedule, tol=1e-12)(system, fields)
    other = AdaptiveTAP(tol=1e-12)(system, fields)
    for name in ("magnetization", "cavity_variance", "log_partition", "energy", "covariance"):
        torch.testing.assert_close(getattr(mine, name), getattr(other, name), rtol=0, atol=1e-9)


@pytest.mark.parametrize("beta", [0.25, 0.5, 0.75])
@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))]
)
@pytest.mark.slow
def test_one_fixed_point_from_different_starts(beta, seed):
    system, x = spin_glass(seed, beta, 0.3, 12)
    reference = AdaptiveTAP(tol=1e-12)(system, x)
    torch.manual_seed(seed)
    starts = [2 * torch.rand(12, dtype=torch.float64) - 1 for _ in range(2)]
    starts.append(torch.ones(12, dtype=torch.float64))
    methods = [AdaptiveTAP(tol=1e-12)]
    methods += [ExpectationPropagation(schedule=s, tol=1e-12) for s in SCHEDULES]
    for start in starts:
        for method in methods:
            response = method(system, x, start=0.95 * start)
            for name in ("magnetization", "cavity_variance"):
                gap = getattr(response, name) - getattr(reference, name)
                assert gap.abs().max() < 1e-8


def test_a_start_is_where_the_solve_begins():
    system, x = spin_glass(0, 0.5)
    start = torch.linspace(-0.9, 0.9, 16, dtype=torch.float64)
    short = {"max_iter": 1, "on_failure": "ignore"}
    begun = AdaptiveTAP(**short)(system, x, start=start)
    assert torch.equal(begun.magnetization, start)
    for schedule in SCHEDULES:
        method = ExpectationPropagation(schedule=schedule, **short)
        ends = [method(system, x, start=s).magnetization for s in (start, -start, None)]
        assert (ends[0] - ends[1]).abs().max() > 0.01
        assert (ends[0] - ends[2]).abs().max() > 0.01


@pytest.mark.parametrize("count", [5, pytest.param(100, marks=pytest.mark.slow)])
def test_the_double_loop_goes_downhill_to_a_solution_on_every_spin_glass(count):
    method = ExpectationPropagation(schedule="double loop", on_failure="raise")
    for seed in range(count):
        system, x = spin_glass(seed)
        response = method(system, x)
        assert response.objective is not None
        rises = response.objective.diff()
        assert rises.max() < 1e-12 * (1 + response.objective.abs().max())
        end = -response.log_partition
        torch.testing.assert_close(response.objective[-1], end, rtol=1e-9, atol=0)


@pytest.mark.slow
def test_single_loops_fail_on_some_of_them_and_auto_comes_to_their_help():
    hard, easy = spin_glass(16), spin_glass(16, field=3.0)
    system = hard[0]
    x = torch.stack([hard[1], easy[1]])
    limits = {"max_iter": 300, "on_failure": "ignore"}
    single = ExpectationPropagation(schedule="parallel", **limits)(system, x)
    assert single.solution.converged.tolist() == [False, True]
    assert single.objective is None
    auto = ExpectationPropagation(max_iter=300, on_failure="raise")(system, x)
    loop = ExpectationPropagation(schedule="double loop", on_failure="raise")(system, x)
    torch.testing.assert_close(auto.magnetization, loop.magnetization, rtol=0, atol=1e-8)
    assert auto.solution.steps[1] == single.solution.steps[1]
    assert auto.solution.steps[0] > 300
    assert torch.isnan(auto.objective[:, 1]).all()
    torch.testing.assert_close(auto.objective[-1, 0], -auto.log_partition[0])


def test_a_double_loop_that_rounding_has_stopped_is_ended():
    """Terms of spins that are almost frozen are so large that F cannot be seen to fall."""
    couplings, x = sherrington_kirkpatrick(6, 0.5, 0.3, 1)
    method = ExpectationPropagation(schedule="double loop", on_failure="ignore", tol=1e-14)
    response = method(SpinSystem(couplings, IsingPrior()), 8 * x.sign())
    assert int(response.solution.steps) < 200
    exact = Exact()(SpinSystem(couplings, IsingPrior()), 8 * x.sign())
    torch.testing.assert_close(response.magnetization, exact.magnetization, rtol=0, atol=1e-8)


def test_auto_returns_the_better_of_its_two_answers():
    """Where spins are almost frozen, in float32, the double loop ends far from the solution, at
    0.014 whatever its steps."""
    couplings, x = sherrington_kirkpatrick(4, 0.5, 8.0, 3)
    system, x = SpinSystem(couplings.float(), IsingPrior()), x.float()
    kept = ExpectationPropagation(schedule="parallel", max_iter=4, on_failure="ignore")(system, x)
    lost = ExpectationPropagation(schedule="double loop", max_iter=4, on_failure="ignore")(
        system, x
    )
    auto = ExpectationPropagation(max_iter=4, on_failure="ignore")(system, x)
    assert lost.solution.residual > 1.5 * kept.solution.residual
    assert auto.solution.residual == kept.solution.residual
    assert auto.solution.status == kept.solution.status
    assert torch.equal(auto.magnetization, kept.magnetization)
    assert auto.solution.steps > kept.solution.steps


def test_zero_fields_and_empty_batches_have_an_objective_too():
    system = spin_glass(0)[0]
    method = ExpectationPropagation(schedule="double loop", on_failure="raise")
    response = method(system, torch.zeros(16, dtype=torch.float64))
    torch.testing.assert_close(response.objective[-1], -response.log_partition)
    assert method(system, torch.zeros(0, 16, dtype=torch.float64)).objective.shape[1:] == (0,)


def test_the_objective_of_potts_spins_ends_at_log_z():
    """Their log Z is that of the frame and a constant beside it."""
    system = SYSTEMS["potts"]()
    x = torch.linspace(-0.5, 0.8, 12, dtype=torch.float64).view(4, 3)
    response = ExpectationPropagation(schedule="double loop", tol=1e-6)(system, x)
    torch.testing.assert_close(response.objective[-1], -response.log_partition, rtol=1e-9, atol=0)


@pytest.mark.slow
def test_potts_and_spherical_glasses_on_which_single_loops_fail():
    for system in (
        SpinSystem(symmetric(6, 3, 1.0, 1), SphericalPrior(3, 1.0)),
        SpinSystem(symmetric(5, 3, 1.0, 1), PottsPrior(3)),
    ):
        torch.manual_seed(0)
        x = 0.1 * torch.randn(system.num_spins, 3, dtype=torch.float64)
        response = ExpectationPropagation(schedule="double loop", on_failure="raise")(system, x)
        assert response.objective.diff().max() < 1e-12


def test_derivatives_of_log_partition(system, fields):
    couplings = system.couplings.clone().requires_grad_()
    x = fields[0].requires_grad_()
    system = SpinSystem(couplings, system.prior)
    response = ExpectationPropagation(tol=1e-13)(system, x)
    by_field, by_coupling = grad(response.log_partition, (x, couplings))
    torch.testing.assert_close(by_field, response.magnetization, rtol=0, atol=1e-8)
    n, k = system.num_spins, system.event_shape.numel()
    m = response.magnetization.detach().reshape(n, k)
    chi = response.covariance.detach().reshape(n, k, n, k).transpose(1, 2)
    expected = torch.einsum("ia,jb->ijab", m, m) + chi
    both = by_coupling + by_coupling.transpose(0, 1)
    if couplings.dim() == 2:
        expected = expected.diagonal(dim1=2, dim2=3).sum(dim=2)
    else:
        both = by_coupling + by_coupling.permute(1, 0, 3, 2)
    off = ~torch.eye(n, dtype=torch.bool)
    torch.testing.assert_close(both[off], expected[off], rtol=0, atol=1e-8)


def test_it_is_closer_than_its_prior_to_the_exact_answer():
    """Errors of the inference table: the medians of adaptive TAP, N = 12, β = 0.5."""
    errors = []
    for seed in range(8):
        system, x = spin_glass(seed, 0.5, 0.3, 12)
        mine, exact = ExpectationPropagation()(system, x), Exact()(system, x)
        errors.append((mine.magnetization - exact.magnetization).abs().mean())
    median = torch.stack(errors).sort().values[3:5].mean().item()
    assert median == pytest.approx(3.4e-3, rel=0.05)


def test_gaussian_spins_are_exact():
    prior = GaussianPrior(torch.tensor([0.3, -0.5]).double(), torch.eye(2).double())
    system = SpinSystem(symmetric(4, 2, 0.2), prior)
    x = torch.ones(4, 2, dtype=torch.float64)
    mine, exact = ExpectationPropagation()(system, x), Exact()(system, x)
    torch.testing.assert_close(mine.magnetization, exact.magnetization)
    torch.testing.assert_close(mine.log_partition, exact.log_partition)
    assert mine.method == "ExpectationPropagation"


def test_covariances_of_gaussian_statistics_are_second_derivatives():
    """The Hessian of the inner problem against automatic derivatives of log Z_r."""
    torch.manual_seed(0)
    sites, k = 3, 2
    basis = torch.tensor([[[1.0, 0], [0, 0]], [[0, 0], [0, 1]], [[0, 0.5**0.5], [0.5**0.5, 0]]])
    basis = basis.double()
    raw = torch.randn(sites * k, sites * k, dtype=torch.float64)
    operator = raw @ raw.T + 3 * torch.eye(sites * k)
    b = torch.randn(sites, k, dtype=torch.float64)

    def log(theta):
        theta = theta.view(sites, k + len(basis))
        shift = torch.block_diag(*torch.einsum("na,aij->nij", theta[:, k:], basis))
        field = (b + theta[:, :k]).flatten()
        return 0.5 * field @ torch.linalg.solve(operator - shift, field) - 0.5 * torch.logdet(
            operator - shift
        )

    zero = torch.zeros(sites * (k + len(basis)), dtype=torch.float64, requires_grad=True)
    chi = torch.linalg.inv(operator)
    mean = (chi @ b.flatten()).view(1, sites, k)
    moments, covariance = _statistics(mean, chi[None], basis)
    torch.testing.assert_close(moments.flatten(), grad(log(zero), zero)[0])
    torch.testing.assert_close(covariance[0], hessian(log, zero.detach()))


class TestRefusals:
    def test_options(self):
        with pytest.raises(ValueError, match=r"schedule must be one of.*got 'random'"):
            ExpectationPropagation(schedule="random")
        with pytest.raises(ValueError, match="damping must be"):
            ExpectationPropagation(damping=1.0)

    def test_start(self):
        system, x = spin_glass(0, 0.5)
        for method in (AdaptiveTAP(), ExpectationPropagation()):
            with pytest.raises(ValueError, match=r"start must be magnetizations.*\(16,\).*\(3,\)"):
                method(system, x, start=x[:3])
            with pytest.raises(ValueError, match="finite"):
                method(system, x, start=x / 0)

    def test_a_prior_without_equations(self):
        class Other(Prior):
            event_shape = torch.Size()

        system = SpinSystem(sherrington_kirkpatrick(4)[0], Other())
        with pytest.raises(TypeError, match="ExpectationPropagation has no equations for Other"):
            ExpectationPropagation()(system, torch.zeros(4).double())

    def test_failure_is_heard(self):
        system, x = spin_glass(16)
        with pytest.warns(ConvergenceWarning, match="ExpectationPropagation: 1 of 1"):
            response = ExpectationPropagation(max_iter=3)(system, x)
        assert not bool(response.solution.converged)
        with pytest.raises(ConvergenceError):
            ExpectationPropagation(max_iter=3, on_failure="raise")(system, x)
