"""Adaptive TAP: matched moments, derivatives, exact cases, priors on the vector."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.autograd import grad

from benchmarks.inference import BAR, adaptive_tap
from deep_implicit_attention.deq import ConvergenceWarning
from deep_implicit_attention.solvers import Status, anderson, broyden
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
from deep_implicit_attention.spins._consistency import AdaptiveTAPStep
from deep_implicit_attention.spins._frames import frame_of

TIGHT = AdaptiveTAP(tol=1e-13)


def symmetric(sites: int, d: int, scale: float, seed: int = 0) -> torch.Tensor:
    """Full couplings whose pairs i < j are scale · N(0, 1)."""
    generator = torch.Generator().manual_seed(seed)
    raw = scale * torch.randn(sites, sites, d, d, dtype=torch.float64, generator=generator)
    upper = raw * torch.ones(sites, sites).triu(1)[:, :, None, None]
    return upper + upper.permute(1, 0, 3, 2)


def gaussian_prior() -> GaussianPrior:
    return GaussianPrior(
        torch.tensor([0.3, -0.5], dtype=torch.float64),
        torch.tensor([[0.8, 0.2], [0.2, 0.5]], dtype=torch.float64),
    )


SYSTEMS = {
    "ising": lambda: SpinSystem(sherrington_kirkpatrick(5, 0.6)[0], IsingPrior()),
    "potts": lambda: SpinSystem(symmetric(4, 3, 0.3), PottsPrior(3)),
    "potts-scalar": lambda: SpinSystem(sherrington_kirkpatrick(4, 0.5)[0], PottsPrior(3)),
    "sphere": lambda: SpinSystem(symmetric(4, 3, 0.3), SphericalPrior(3, 1.0)),
    "gaussian": lambda: SpinSystem(symmetric(4, 2, 0.3), gaussian_prior()),
}


@pytest.fixture(params=list(SYSTEMS))
def system(request):
    return SYSTEMS[request.param]()


@pytest.fixture
def fields(system):
    torch.manual_seed(5)
    shape = (2, system.num_spins, *system.event_shape)
    return 0.5 * torch.randn(shape, dtype=torch.float64)


def test_single_spins_and_response_agree(system, fields):
    response = TIGHT(system, fields)
    m, V = response.magnetization, response.cavity_variance
    n, k = system.num_spins, system.event_shape.numel()
    echo = V * m if not system.event_shape else (V @ m.unsqueeze(-1)).squeeze(-1)
    field = fields + system.pull(m) - echo
    torch.testing.assert_close(system.prior.mean(field, V), m, rtol=0, atol=1e-10)
    single = system.prior.covariance(field, V).reshape(2, n, k, k)
    chi = response.covariance.reshape(2, n, k, n, k)
    for i in range(n):
        own, mine = chi[:, i, :, i], single[:, i]
        if isinstance(system.prior, SphericalPrior):  # only the traces
            own, mine = (t.diagonal(dim1=1, dim2=2).sum(dim=1) for t in (own, mine))
        torch.testing.assert_close(own, mine, rtol=0, atol=1e-10)


def test_derivatives_by_fields_are_magnetizations(system, fields):
    fields.requires_grad_()
    response = TIGHT(system, fields)
    gradient = grad(response.log_partition.sum(), fields)[0]
    torch.testing.assert_close(gradient, response.magnetization, rtol=0, atol=1e-8)


def test_derivatives_by_couplings_are_second_moments(system, fields):
    couplings = system.couplings.clone().requires_grad_()
    response = TIGHT(SpinSystem(couplings, system.prior), fields[0])
    gradient = grad(response.log_partition, couplings)[0]
    n, k = system.num_spins, system.event_shape.numel()
    m = response.magnetization.detach().reshape(n, k)
    chi = response.covariance.detach().reshape(n, k, n, k).transpose(1, 2)
    expected = torch.einsum("ia,jb->ijab", m, m) + chi
    if couplings.dim() == 2:
        expected = expected.diagonal(dim1=2, dim2=3).sum(dim=2)
    off = ~torch.eye(n, dtype=torch.bool)
    # Half for each of the pair, so that a step along the gradient leaves couplings symmetric.
    torch.testing.assert_close(2 * gradient[off], expected[off], rtol=0, atol=1e-8)


@pytest.mark.quick("ising", "potts*", "gaussian")
def test_energy_is_the_derivative_by_temperature(system, fields):
    h = 1e-5
    ends = [
        TIGHT(SpinSystem(s * system.couplings, system.prior), s * fields).log_partition
        for s in (1 + h, 1 - h)
    ]
    expected = -(ends[0] - ends[1]) / (2 * h)
    torch.testing.assert_close(TIGHT(system, fields).energy, expected, rtol=1e-6, atol=1e-7)


def test_susceptibility_is_the_total_derivative_and_not_the_covariance():
    couplings, x = sherrington_kirkpatrick(8, 0.7, 0.3, seed=0)
    system = SpinSystem(couplings, IsingPrior())
    response = TIGHT(system, x)
    susceptibility = response.susceptibility
    torch.testing.assert_close(susceptibility, susceptibility.T, rtol=0, atol=1e-9)
    step = torch.zeros(8, dtype=torch.float64)
    step[3] = 1e-5
    ends = [TIGHT(system, x + s * step).magnetization for s in (1, -1)]
    column = (ends[0] - ends[1]) / 2e-5
    torch.testing.assert_close(susceptibility[:, 3], column, rtol=1e-6, atol=1e-8)
    gap = (susceptibility - response.covariance).abs().max().item()
    assert 0.005 < gap < 0.1


def test_gaussian_prior_is_exact(fields):
    system = SYSTEMS["gaussian"]()
    x = torch.ones(4, 2, dtype=torch.float64)
    mine, exact = AdaptiveTAP()(system, x), Exact()(system, x)
    assert mine.solution is None
    for name in ("magnetization", "covariance", "log_partition", "energy"):
        torch.testing.assert_close(getattr(mine, name), getattr(exact, name))


def test_it_reaches_the_same_point_from_other_solvers():
    couplings, x = sherrington_kirkpatrick(12, 0.5, 0.3, seed=1)
    system = SpinSystem(couplings, IsingPrior())
    base = TIGHT(system, x)
    for solver in (anderson, broyden):
        other = AdaptiveTAP(tol=1e-13, solver=solver)(system, x)
        torch.testing.assert_close(other.magnetization, base.magnetization, rtol=0, atol=1e-8)
        torch.testing.assert_close(other.cavity_variance, base.cavity_variance, rtol=0, atol=1e-8)


def test_potts_errors_are_those_of_the_reference():
    """N = 5, q = 3, couplings 0.4 · N(0, 1): mean error of m 8e-4, of log Z 6e-3, by magnitude."""
    errors = []
    for seed in range(8):
        system = SpinSystem(symmetric(5, 3, 0.4, seed), PottsPrior(3))
        generator = torch.Generator().manual_seed(100 + seed)
        x = 0.3 * torch.randn(5, 3, dtype=torch.float64, generator=generator)
        mine, exact = AdaptiveTAP()(system, x), Exact()(system, x)
        m = (mine.magnetization - exact.magnetization).abs().mean().item()
        errors.append((m, abs((mine.log_partition - exact.log_partition).item())))
    m, log = np.median(np.array(errors), axis=0)
    assert 8e-4 / 4 < m < 8e-4 * 4
    assert 6e-3 / 4 < log < 6e-3 * 4


@pytest.mark.slow
def test_two_spherical_spins_against_quadrature():
    """One spin is summed by its own partition function, the other on a product grid."""
    errors = []
    for seed in range(5):
        couplings = symmetric(2, 3, 1.0, seed)
        prior = SphericalPrior(3, 1.0)
        torch.manual_seed(seed)
        x = (0.3 * torch.randn(2, 3, dtype=torch.float64)).requires_grad_()
        nodes, weights = np.polynomial.legendre.leggauss(24)
        angle = 2 * math.pi * torch.arange(48, dtype=torch.float64) / 48
        z = torch.from_numpy(nodes)[:, None].expand(-1, 48)
        r = (1 - z**2).sqrt()
        grid = torch.stack([r * angle.cos(), r * angle.sin(), z], dim=-1).reshape(-1, 3)
        w = (torch.from_numpy(weights)[:, None] / (2 * 48)).expand(-1, 48).flatten()
        inner = prior.log_partition(x[1] + grid @ couplings[0, 1])
        log = torch.logsumexp(w.log() + grid @ x[0] + inner, dim=0)
        m = grad(log, x)[0]
        response = AdaptiveTAP()(SpinSystem(couplings, prior), x.detach())
        errors.append(
            (
                (response.magnetization - m).abs().mean().item(),
                abs(response.log_partition.item() - log.item()),
            )
        )
    m, log = np.median(np.array(errors), axis=0)
    assert m < 4e-2
    assert log < 4e-2


def test_halving_the_couplings_divides_the_error_of_m_by_eight():
    """It is right to second order in the couplings, on a chain."""
    chain = torch.diag(torch.full((5,), 1.0, dtype=torch.float64), 1)
    chain = chain + chain.T
    torch.manual_seed(0)
    x = 0.5 * torch.randn(6, dtype=torch.float64)
    errors = []
    for scale in (0.1, 0.05):
        system = SpinSystem(scale * chain, IsingPrior())
        gap = TIGHT(system, x).magnetization - Exact()(system, x).magnetization
        errors.append(gap.norm().item())
    assert math.log2(errors[0] / errors[1]) > 2.7


def test_on_the_sphere_the_error_of_m_is_divided_by_four():
    """Matched traces are right to first order only; two spins on circles, against a grid."""
    prior, J = SphericalPrior(2), symmetric(2, 2, 1.0)
    torch.manual_seed(0)
    x = torch.randn(2, 2, dtype=torch.float64)
    angle = 2 * math.pi * torch.arange(64, dtype=torch.float64) / 64
    grid = torch.stack([angle.cos(), angle.sin()], dim=1)
    errors = []
    for scale in (0.02, 0.01):
        inner = x[1] + grid @ (scale * J[0, 1])
        p = torch.softmax(grid @ x[0] + prior.log_partition(inner), dim=0)
        m = torch.stack([p @ grid, p @ prior.mean(inner)])
        errors.append((TIGHT(SpinSystem(scale * J, prior), x).magnetization - m).norm().item())
    assert math.log2(errors[0] / errors[1]) == pytest.approx(2, abs=0.1)


def test_a_step_is_one_factorisation_and_its_inverse(monkeypatch):
    """And reading off everything else, the determinant included, one more of each."""
    calls: list[str] = []

    def count(module, name):
        original = getattr(module, name)

        def counted(matrix, *args, **options):
            if matrix.shape[-1] > 1:
                calls.append(name)
            return original(matrix, *args, **options)

        monkeypatch.setattr(module, name, counted)

    couplings, x = sherrington_kirkpatrick(12, 0.5, 0.3)
    names = (
        "cholesky_ex",
        "solve_triangular",
        "inv_ex",
        "solve_ex",
        "lu_factor",
        "slogdet",
        "eigvalsh",
    )
    for name in names:
        count(torch.linalg, name)
    count(torch, "cholesky_inverse")
    solution = AdaptiveTAP()(SpinSystem(couplings, IsingPrior()), x).solution
    assert calls == ["cholesky_ex", "cholesky_inverse"] * (int(solution.steps) + 1)


@pytest.mark.parametrize("field", [0.3, 9.0, 40.0, 400.0])
@pytest.mark.parametrize("graph", [False, True])
def test_a_step_is_that_of_the_equations(field, graph):
    """Away from a solution, where single spins and response disagree; also with frozen spins."""
    couplings, x = sherrington_kirkpatrick(9, 0.8, 0.3, 4)
    x = torch.where(torch.arange(9) < 4, field * x.sign(), x)
    frame = frame_of(SpinSystem(couplings, IsingPrior()), "AdaptiveTAP")
    m, V = 0.3 * x.tanh(), 0.4 + 0.1 * torch.arange(9, dtype=torch.float64)
    state = m.view(1, 9, 1), V.view(1, 9, 1, 1).requires_grad_(graph)
    new_m, new_V = AdaptiveTAPStep(frame.local)(state, frame.fields(x), frame.couplings)
    expected = np.tanh(h := (x + couplings @ m - V * m).detach().numpy())
    np.testing.assert_allclose(new_m.detach().flatten(), expected, rtol=1e-12)
    # χ = C (1 + KC)⁻¹ and V_i − T_i / (1 − T_i C_i) with T = diag(K − KχK), no C⁻¹ anywhere.
    C, K = np.diag(np.cosh(h.clip(-300, 300)) ** -2.0), np.diag(V.detach()) - couplings.numpy()
    T = np.diag(K - K @ C @ np.linalg.inv(np.eye(9) + K @ C) @ K)
    expected = V.detach().numpy() - T / (1 - T * np.diag(C))
    np.testing.assert_allclose(new_V.detach().flatten(), expected, rtol=1e-12)


@pytest.mark.parametrize("method", [AdaptiveTAP, ExpectationPropagation])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_strong_fields_take_no_digits(method, dtype):
    """C⁻¹ of a frozen spin is huge, and nothing is lost beside it."""
    couplings, x = sherrington_kirkpatrick(8, 0.7, 0.3, 2)
    tol = 1e-11 if dtype == torch.float64 else 1e-5
    solve = method(tol=tol, on_failure="raise")
    frozen = x.index_fill(0, torch.tensor([0]), 20.0)
    response = solve(SpinSystem(couplings.to(dtype), IsingPrior()), frozen.to(dtype))
    # A spin that is held at +1 is a field on the others.
    rest = SpinSystem(couplings[1:, 1:].contiguous(), IsingPrior())
    expected = TIGHT(rest, x[1:] + couplings[0, 1:])
    for name in ("magnetization", "cavity_variance"):
        mine = getattr(response, name)[1:].double()
        torch.testing.assert_close(mine, getattr(expected, name), rtol=0, atol=100 * tol)
    log = expected.log_partition + 20 - math.log(2)
    torch.testing.assert_close(response.log_partition.double(), log, rtol=10 * tol, atol=0)
    for strength in (2.0, 8.0, 25.0, 400.0):
        all_frozen = strength * x.sign()
        response = solve(SpinSystem(couplings.to(dtype), IsingPrior()), all_frozen.to(dtype))
        exact = Exact()(SpinSystem(couplings, IsingPrior()), all_frozen)
        log = response.log_partition.double()
        torch.testing.assert_close(log, exact.log_partition, rtol=1e-4, atol=1e-3)


def test_strong_fields_on_potts_spins():
    torch.manual_seed(0)
    system = SpinSystem(symmetric(4, 3, 0.3), PottsPrior(3))
    x = 60 * torch.nn.functional.one_hot(torch.tensor([0, 2, 1, 0]), 3).double()
    response = AdaptiveTAP(on_failure="raise")(system, x)
    exact = Exact()(system, x)
    torch.testing.assert_close(response.magnetization, exact.magnetization)
    torch.testing.assert_close(response.log_partition, exact.log_partition)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_thousand_spins_take_little_more_than_that(dtype):
    steps, ratio = adaptive_tap(1000, dtype)
    assert steps > 20
    assert ratio <= BAR


def test_without_a_distribution_there_are_no_numbers():
    """Two spins at the critical point: where the solve begins, Λ − J is singular."""
    system = SpinSystem(sherrington_kirkpatrick(2)[0], IsingPrior())
    system.couplings[0, 1] = system.couplings[1, 0] = 1.0
    x = torch.zeros(2, dtype=torch.float64)
    response = AdaptiveTAP(max_iter=1, on_failure="ignore")(system, x)
    assert torch.equal(response.magnetization, x)
    for value in (response.log_partition, response.energy, response.covariance):
        assert bool(value.isnan().all())
    solved = AdaptiveTAP()(system, x)  # it finds its way to V = 1/(1 + V) from there
    torch.testing.assert_close(solved.cavity_variance, x + (math.sqrt(5) - 1) / 2)


def test_failure_is_heard():
    couplings, x = sherrington_kirkpatrick(16, 3.0, 0.1, 0)
    system = SpinSystem(couplings, IsingPrior())
    with pytest.warns(ConvergenceWarning, match="AdaptiveTAP: 1 of 1"):
        response = AdaptiveTAP(max_iter=50)(system, x)
    assert not bool(response.solution.converged)


def test_what_counts_as_converged_has_a_log_partition():
    """A loose tolerance is met by states behind which no distribution stands."""
    loose = AdaptiveTAP(tol=0.9, max_iter=5, on_failure="ignore")
    found = set()
    for seed in range(4):
        couplings, x = sherrington_kirkpatrick(8, 3.0, 0.3, seed)
        response = loose(SpinSystem(couplings, IsingPrior()), x)
        finite = bool(torch.isfinite(response.log_partition))
        assert bool(response.solution.converged) == finite
        found.update(response.solution.status)
    assert found == {Status.CONVERGED, Status.INDEFINITE}
