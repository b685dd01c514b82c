"""Magnetizations in weak fields: a linear response, to the tolerance relative to their own size."""

import functools

import pytest
import torch

from deep_implicit_attention.solvers import newton_krylov
from deep_implicit_attention.spins import (
    TAP,
    AdaptiveTAP,
    ExpectationPropagation,
    IsingPrior,
    NaiveMeanField,
    PottsPrior,
    SelfAveragingTAP,
    SphericalPrior,
    SpinSystem,
    _method,
    ferromagnet,
    sherrington_kirkpatrick,
)

METHODS = [NaiveMeanField, TAP, AdaptiveTAP, SelfAveragingTAP, ExpectationPropagation]
CONSISTENT = [AdaptiveTAP, SelfAveragingTAP, ExpectationPropagation]
PRIORS = {"ising": IsingPrior(), "sphere": SphericalPrior(3, 1.0)}
CASES = [(kind, name) for name in PRIORS for kind in METHODS if (kind, name) != (TAP, "sphere")]


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def system(name: str) -> SpinSystem:
    couplings, _ = sherrington_kirkpatrick(8, 0.5, 0.3, 0)
    return SpinSystem(couplings, PRIORS[name])


@pytest.mark.quick("1e-09-NaiveMeanField-ising", "1e-09-TAP-ising", "1e-09-AdaptiveTAP-ising")
@pytest.mark.parametrize(("kind", "name"), CASES)
@pytest.mark.parametrize("size", [1e-5, 1e-9, 1e-30])
def test_the_response_is_linear(kind, name, size):
    spins = system(name)
    event = spins.num_spins, *spins.event_shape
    x = randn(2, *event)
    x[0] *= size
    n = x[0].numel()
    response = kind()(spins, x)
    alone = kind()(spins, 0 * x[0]).susceptibility.view(n, n)
    expected = alone @ (x[0] / size).flatten()
    found = (response.magnetization[0] / size).flatten()
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(response.susceptibility[0].view(n, n), alone, rtol=1e-7, atol=1e-8)
    # Another sample of the batch has what it has alone.
    other = kind()(spins, x[1])
    torch.testing.assert_close(response.magnetization[1], other.magnetization, rtol=1e-12, atol=0)
    assert bool((response.solution.residual <= 1e-10).all())


@pytest.mark.parametrize("kind", [TAP, AdaptiveTAP, SelfAveragingTAP])
def test_variances_do_not_hide_magnetizations_of_a_few_hundredths(kind):
    """Their errors were 50 to 420 tolerances."""
    couplings, _ = sherrington_kirkpatrick(20, 0.6, 0.0, 0)
    spins, x = SpinSystem(couplings, IsingPrior()), 0.01 * randn(4, 20)
    found, right = (kind(tol=tol)(spins, x).magnetization for tol in (1e-8, 1e-12))
    assert float(((found - right).norm(dim=1) / right.norm(dim=1)).max()) < 5e-8


def test_their_mates_are_not_solved_again(monkeypatch):
    """Those that failed went on to the limit of steps; a batch took fifteen times as long."""
    seen = []

    @functools.wraps(newton_krylov)
    def spy(f, z, **options):
        seen.append(len(z))
        return newton_krylov(f, z, **options)

    monkeypatch.setattr(_method, "newton_krylov", spy)
    couplings, _ = sherrington_kirkpatrick(8, 0.5, 0.0, 0)
    x = torch.tensor([[1e-9], [0.3], [100.0]]).double() * randn(3, 8)
    method = AdaptiveTAP(tol=1e-6, max_iter=20, on_failure="ignore")
    response = method(SpinSystem(couplings, IsingPrior()), x)
    assert response.solution.converged.tolist() == [True, False, True]
    assert seen == [1]


@pytest.mark.parametrize("kind", CONSISTENT)
@pytest.mark.parametrize("size", [1e-5, 1e-8, 1e-20])
def test_probabilities_of_potts_spins_are_right_to_rounding(kind, size):
    """Their deviations from 1/q cannot be solved to less than their rounding."""
    generator = torch.Generator().manual_seed(0)
    upper = 0.4 * torch.randn(5, 5, generator=generator, dtype=torch.float64).triu(1)
    x = torch.randn(5, 4, generator=generator, dtype=torch.float64)
    spins = SpinSystem(upper + upper.mT, PottsPrior(4))
    alone = kind()(spins, 0 * x).susceptibility.view(20, 20)
    response = kind(on_failure="raise", max_iter=60)(spins, size * x)
    expected = 1 / 4 + (alone @ (size * x).flatten()).view(5, 4)
    torch.testing.assert_close(response.magnetization, expected, rtol=0, atol=size**2 + 1e-15)


def test_many_potts_spins_are_not_asked_for_less_than_their_rounding():
    """Its norm grows with N, that of the one V does not: Newton's method found no end."""
    fields = torch.logspace(-9, -5, 9).double()[:, None, None] * randn(9, 100, 4)
    for couplings in (ferromagnet(100, 2.0), sherrington_kirkpatrick(100, 1.2, 0.0, 0)[0]):
        spins = SpinSystem(couplings, PottsPrior(4))
        SelfAveragingTAP(on_failure="raise", max_iter=200)(spins, fields)


@pytest.mark.parametrize("kind", CONSISTENT)
@pytest.mark.parametrize(("size", "power"), [(0.5, 10), (1e-7, -10)])
def test_the_radius_is_a_unit(kind, size, power):
    """A power of two changes no digit, also where V, which goes as d/R², is 1e-6 or 1e6."""
    couplings, _ = sherrington_kirkpatrick(3, 0.8, 0.0, 1)

    def found(radius):
        x = (size / radius * randn(3, 3)).requires_grad_()
        spins = SpinSystem(couplings / radius**2, SphericalPrior(3, radius))
        response = kind(on_failure="raise")(spins, x)
        m = response.magnetization / radius
        (slope,) = torch.autograd.grad(m.square().sum() + response.log_partition, x)
        return (
            m,
            response.log_partition,
            response.cavity_variance * radius**2,
            response.covariance / radius**2,
            slope / radius,
        )

    for ours, theirs in zip(found(2.0**power), found(1.0), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", PRIORS)
@pytest.mark.parametrize("kind", CONSISTENT)
def test_derivatives_by_variances_do_not_hide_others(kind, name):
    """Those of V and log Z by V are of order one, those by m as small as m."""
    spins, size = system(name), 1e-4
    x, way = size * randn(8, *spins.event_shape), randn(*spins.event_shape, 8).movedim(-1, 0)

    def loss(x, **options):
        found = kind(**options)(spins, x)
        small = found.magnetization.square().sum() + found.cavity_variance.sum()
        return small + found.log_partition

    at = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(loss(at), at)
    ends = [loss(x + s * size * way, tol=1e-13) for s in (1, -1)]
    expected = (ends[0] - ends[1]) / (2 * size)
    torch.testing.assert_close((slope * way).sum(), expected, rtol=2e-5, atol=0)


@pytest.mark.parametrize("kind", METHODS)
def test_derivatives(kind):
    couplings, x = sherrington_kirkpatrick(5, 0.5, 1e-4, 0)
    couplings.requires_grad_()
    x.requires_grad_()
    response = kind(tol=1e-12)(SpinSystem(couplings, IsingPrior()), x)
    by_field = torch.autograd.grad(response.log_partition, x, create_graph=True)[0]
    torch.testing.assert_close(by_field, response.magnetization, rtol=1e-8, atol=1e-15)
    row = torch.autograd.grad(by_field[2], (x, couplings))
    torch.testing.assert_close(row[0], response.susceptibility[2], rtol=1e-7, atol=1e-9)
    step = randn(5, 5) * (1 - torch.eye(5))
    step = 1e-5 * (step + step.T)
    ends = [
        kind(tol=1e-12)(SpinSystem(couplings.detach() + s * step, IsingPrior()), x.detach())
        for s in (1, -1)
    ]
    change = (ends[0].magnetization[2] - ends[1].magnetization[2]) / 2
    torch.testing.assert_close((row[1] * step).sum(), change, rtol=1e-5, atol=1e-14)


@pytest.mark.parametrize("kind", METHODS)
def test_single_precision(kind):
    spins = system("ising")
    x = randn(8)
    exact = kind()(spins, 1e-6 * x).magnetization
    single = SpinSystem(spins.couplings.float(), spins.prior)
    found = kind(tol=1e-5)(single, (1e-6 * x).float()).magnetization
    torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-10)


@pytest.mark.parametrize("kind", METHODS)
def test_nothing_is_small_without_fields(kind):
    """From a start, m → 0 is reached when it is small beside spins of order one."""
    spins = system("ising")
    response = kind()(spins, torch.zeros(8).double(), start=torch.full((8,), 0.5).double())
    assert bool(response.solution.converged)
    assert response.magnetization.abs().max() < 1e-8


@pytest.mark.parametrize("kind", [TAP, AdaptiveTAP, ExpectationPropagation])
def test_a_magnet_in_a_weak_field_is_magnetized(kind):
    spins = SpinSystem(ferromagnet(20, 1.5), IsingPrior())
    x = torch.full((20,), 1e-9).double()
    start = torch.full((20,), 0.8).double()
    response = kind(on_failure="raise")(spins, x, start=start)
    assert response.magnetization.min() > 0.5
