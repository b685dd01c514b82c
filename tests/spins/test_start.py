"""Where a solve begins: with several solutions the start decides."""

from __future__ import annotations

import math

import pytest
import torch

from deep_implicit_attention.deq import ConvergenceWarning
from deep_implicit_attention.solvers import picard
from deep_implicit_attention.spins import (
    TAP,
    IsingPrior,
    NaiveMeanField,
    PottsPrior,
    SelfAveragingTAP,
    SphericalPrior,
    SpinSystem,
    ferromagnet,
    sherrington_kirkpatrick,
)

METHODS = [NaiveMeanField, TAP, SelfAveragingTAP]


@pytest.fixture(params=METHODS, ids=lambda kind: kind.__name__)
def kind(request):
    return request.param


def test_a_ferromagnet_keeps_its_sign(kind):
    system = SpinSystem(ferromagnet(30, 1.6), IsingPrior())
    none = torch.zeros(30, dtype=torch.float64)
    method = kind(tol=1e-12)
    starts = torch.stack([none + 0.9, none - 0.9, none])
    up, down, zero = method(system, none.expand(3, 30), start=starts).magnetization
    assert up.min() > 0.5
    torch.testing.assert_close(up, -down)
    assert not bool(zero.any())
    assert not bool(method(system, none).magnetization.any())


@pytest.mark.parametrize("strength", [1.05, 1.2, 2.0, 3.0])
@pytest.mark.parametrize("field", [0.001, 0.05, 0.2])
@pytest.mark.parametrize("method", [NaiveMeanField(), TAP()], ids=["naive", "tap"])
def test_spins_order_along_a_weak_field(method, field, strength):
    """Against the field there is a saddle, or a state that decays; log Z is less there."""
    system = SpinSystem(ferromagnet(100, strength), IsingPrior())
    x = torch.full((100,), field, dtype=torch.float64)
    response = method(system, x)
    assert bool(response.solution.converged)
    up = method(system, x, start=torch.ones_like(x))
    torch.testing.assert_close(response.magnetization, up.magnetization, rtol=1e-6, atol=0)
    torch.testing.assert_close(response.log_partition, up.log_partition)
    assert response.magnetization.min() > field


@pytest.mark.quick("3.2-*", "1.05-*")
@pytest.mark.parametrize(
    ("strength", "weak"), [(3.1, 1e-3), (3.2, 1e-4), (3.3, -1e-4), (1.05, 1e-4)]
)
def test_tap_goes_on_where_damped_steps_leave_a_saddle_or_pass_where_one_was(strength, weak):
    """Slowly: 300 steps lead nowhere. The last are Ising spins. A strong field is no hindrance."""
    fields, prior = torch.tensor([weak, 0.5], dtype=torch.float64), PottsPrior(3)
    if strength > 3:
        couplings = ferromagnet(30, strength)[..., None, None] * torch.eye(3).double()
        fields = fields[:, None, None] * torch.eye(3).double()[0].expand(30, 3)
    else:
        couplings, prior, fields = ferromagnet(100, strength), IsingPrior(), fields[:, None]
        fields = fields.expand(2, 100)
    system = SpinSystem(couplings, prior)
    found = TAP()(system, fields)
    assert bool(found.solution.converged.all())
    expected = TAP(solver=picard, damping=0.5, max_iter=2000)(system, fields)
    m = found.magnetization
    torch.testing.assert_close(m, expected.magnetization, rtol=0, atol=1e-6)
    torch.testing.assert_close(TAP()(system, fields[0]).magnetization, m[0], rtol=0, atol=1e-8)


def test_tap_takes_options_of_its_second_solver_and_no_more_steps_than_told():
    couplings, x = sherrington_kirkpatrick(40, beta=1.5, field=0.3, seed=0)
    system = SpinSystem(couplings, IsingPrior())
    for limit in (1, 2, 7, 50):
        assert TAP(max_iter=limit, on_failure="ignore")(system, x).solution.steps.item() == limit
    short, long = (TAP(max_iter=400, m=m, on_failure="ignore")(system, x).solution for m in (2, 6))
    assert bool(long.converged)
    assert bool((long.steps > 200).all())
    assert bool((short.residual != long.residual).all())
    with pytest.raises(TypeError, match="unknown option 'memory'"):
        TAP(memory=3)


def test_it_settles_in_the_root_of_one_spin():
    """Naive: m = tanh(Jm) with J = β(N − 1)/N; TAP: less V m, V = β²(N − 1)/N² (1 − m²)."""
    n, beta = 30, 1.6
    system = SpinSystem(ferromagnet(n, beta), IsingPrior())
    none = torch.zeros(n, dtype=torch.float64)
    for method, echo in ((NaiveMeanField(), 0.0), (TAP(), beta**2 * (n - 1) / n**2)):
        root = 0.9
        for _ in range(500):
            root = math.tanh(beta * (n - 1) / n * root - echo * (1 - root**2) * root)
        m = method(system, none, start=none + 0.9).magnetization
        torch.testing.assert_close(m, torch.full_like(m, root))


@pytest.mark.quick("NaiveMeanField", "TAP")
def test_the_response_is_that_of_the_solution_found(kind):
    system = SpinSystem(ferromagnet(6, 2.5), IsingPrior())
    none = torch.zeros(6, dtype=torch.float64)
    method = kind(tol=1e-13)
    response = method(system, none, start=none + 0.9)
    step = 1e-5 * torch.eye(6, dtype=torch.float64)[2]
    ends = [method(system, s * step, start=none + 0.9).magnetization for s in (1, -1)]
    column = (ends[0] - ends[1]) / 2e-5
    torch.testing.assert_close(response.susceptibility[:, 2], column, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("prior", [IsingPrior(), PottsPrior(3), SphericalPrior(3, 1.0)])
def test_without_a_step_the_start_is_the_answer(kind, prior):
    if kind is TAP and isinstance(prior, SphericalPrior):
        pytest.skip("TAP has no equations on the sphere")
    system = SpinSystem(sherrington_kirkpatrick(5)[0], prior)
    torch.manual_seed(0)
    x = torch.randn(2, 5, *prior.event_shape, dtype=torch.float64)
    start = prior.mean(torch.randn_like(x)).requires_grad_()
    found = kind(max_iter=1, on_failure="ignore")(system, x, start=start).magnetization
    torch.testing.assert_close(found, start.detach())
    assert not found.requires_grad


def test_bad_starts(kind):
    system = SpinSystem(sherrington_kirkpatrick(5)[0], IsingPrior())
    x = torch.zeros(5, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"start must be magnetizations.*\(5,\).*\(3,\)"):
        kind()(system, x, start=x[:3])
    with pytest.raises(ValueError, match=r"float64 \(5,\), got torch.float32 \(5,\)"):
        kind()(system, x, start=x.float())
    with pytest.raises(ValueError, match="start must be finite"):
        kind()(system, x, start=x / 0)


@pytest.mark.parametrize(("kind", "smallest"), [(NaiveMeanField, -4 / 3), (TAP, -3.2)])
def test_covariance_of_an_unstable_solution(kind, smallest):
    """m = 0 below the transition: 1/χ is 1 − e, and 1 + V − e, with e = 2·7/8 and V = 7·(2/8)²."""
    system = SpinSystem(ferromagnet(8, 2.0), IsingPrior())
    fields = torch.zeros(3, 8, dtype=torch.float64)
    fields[1] = 0.5  # stable
    response = kind()(system, fields)
    says = rf"{kind.__name__}: .* 2 of 3 converged.*negative eigenvalue {smallest:.3g}"
    with pytest.warns(ConvergenceWarning, match=says):
        covariance = response.covariance
    eigenvalues = torch.linalg.eigvalsh(covariance.detach())[:, 0]
    assert eigenvalues[0].item() == pytest.approx(smallest)
    assert eigenvalues[1] > 0
    silent = kind(on_failure="ignore")(system, fields)
    assert torch.equal(silent.covariance, covariance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_infinite_covariance_at_a_critical_point_spoils_no_other(dtype):
    """Two spins at J = 1: m = 0 without fields, where 1 − J is singular; the others have χ."""
    couplings = torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=dtype, requires_grad=True)
    system = SpinSystem(couplings, IsingPrior())
    fields = torch.tensor([[0.0, 0.0], [0.5, 0.2]], dtype=dtype)
    response = NaiveMeanField(tol=1e-6)(system, fields)
    with pytest.warns(ConvergenceWarning, match="1 of 2 converged samples has no finite cov"):
        covariance = response.covariance
    assert covariance[0].isnan().all()
    alone = NaiveMeanField(tol=1e-6)(system, fields[1]).covariance
    torch.testing.assert_close(covariance[1], alone)
    slopes = [torch.autograd.grad(chi.sum(), couplings)[0] for chi in (covariance[1], alone)]
    torch.testing.assert_close(*slopes)


@pytest.mark.parametrize("kind", [NaiveMeanField, TAP])
def test_singular_covariance_is_stable(kind):
    """χ of Potts spins is zero along (1, …, 1), up to rounding of either sign."""
    for dtype in (torch.float32, torch.float64):
        system = SpinSystem(sherrington_kirkpatrick(6, 0.5)[0].to(dtype), PottsPrior(4))
        fields = torch.linspace(-1, 1, 24, dtype=dtype).reshape(6, 4)
        assert kind(tol=1e-6)(system, fields).covariance.isfinite().all()


@pytest.mark.parametrize("scale", [1e-3, 1e-5, 1e-12, 1e-30])
def test_small_magnetizations_solve_the_naive_equations(scale):
    """Linear in small fields: m = (1 − J)⁻¹ x."""
    couplings = torch.tensor([[0.0, 0.4], [0.4, 0.0]], dtype=torch.float64)
    x = scale * torch.tensor([1.0, 0.0], dtype=torch.float64)
    response = NaiveMeanField(tol=1e-5)(SpinSystem(couplings, IsingPrior()), x)
    assert response.solution is not None
    assert bool(response.solution.converged)
    expected = torch.linalg.solve(torch.eye(2, dtype=torch.float64) - couplings, x)
    rtol = 1e-4 + scale**2
    torch.testing.assert_close(response.magnetization, expected, rtol=rtol, atol=0)


def test_without_fields_magnetizations_decay_to_zero_or_stay(kind):
    """Above and below the critical temperature, from a start that is magnetized, beside a sample
    in a field."""
    n = 20
    x = torch.zeros(2, n, dtype=torch.float64)
    x[1] = 0.1
    for beta, least in ((0.7, 0.0), (2.0, 0.9)):
        system = SpinSystem(ferromagnet(n, beta), IsingPrior())
        response = kind()(system, x, start=torch.full_like(x, 0.5))
        assert bool(response.solution.converged.all())
        assert response.magnetization[0].min() >= least - 1e-8
        assert response.magnetization[0].max() < (1e-8 if least == 0 else 1)
