"""Self-averaging TAP: its own self-consistency, the SK limit, derivatives, every prior."""

from __future__ import annotations

import math

import pytest
import torch
from torch.autograd import grad, gradcheck, gradgradcheck

from deep_implicit_attention.spins import (
    AdaptiveTAP,
    GaussianPrior,
    IsingPrior,
    PottsPrior,
    SelfAveragingTAP,
    SphericalPrior,
    SpinSystem,
    ferromagnet,
    hopfield,
    sherrington_kirkpatrick,
)
from deep_implicit_attention.spins._self_averaging_tap import _variance

TIGHT = SelfAveragingTAP(tol=1e-13)

SYSTEMS = {
    "ising": lambda: SpinSystem(sherrington_kirkpatrick(8, 0.5)[0], IsingPrior()),
    "potts": lambda: SpinSystem(sherrington_kirkpatrick(6, 1.0)[0], PottsPrior(3)),
    "sphere": lambda: SpinSystem(sherrington_kirkpatrick(3, 0.8)[0], SphericalPrior(3, 1.2)),
}


@pytest.fixture(params=list(SYSTEMS))
def system(request):
    return SYSTEMS[request.param]()


@pytest.fixture
def fields(system):
    torch.manual_seed(5)
    return 0.4 * torch.randn(2, system.num_spins, *system.event_shape, dtype=torch.float64)


def ising(num_spins=8, beta=0.5, seed=0):
    couplings, x = sherrington_kirkpatrick(num_spins, beta, 0.3, seed)
    return SpinSystem(couplings, IsingPrior()), x


def test_mean_response_matches_the_mean_of_single_spins(system, fields):
    response = TIGHT(system, fields)
    m, V = response.magnetization, response.cavity_variance
    echo = V * m if not system.event_shape else (V @ m.unsqueeze(-1)).squeeze(-1)
    field = fields + system.pull(m) - echo
    torch.testing.assert_close(m, system.prior.mean(field, V), rtol=0, atol=1e-11)
    assert torch.equal(V, V[:, :1].expand_as(V))
    k = system.event_shape.numel()
    single = system.prior.covariance(field, V).reshape(2, -1, k, k)
    mean = single.diagonal(dim1=2, dim2=3).sum(dim=(1, 2))
    trace = response.covariance.reshape(2, fields[0].numel(), -1).diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(trace.sum(dim=1), mean)


@pytest.mark.parametrize("beta", [0.3, 0.7])
def test_v_of_a_large_sk_model_is_its_thermodynamic_value(beta):
    system, x = ising(400, beta)
    response = SelfAveragingTAP()(system, x)
    q = response.magnetization.square().mean()
    V = response.cavity_variance[0]
    torch.testing.assert_close(V, beta**2 * (1 - q), rtol=1e-2, atol=0)


def test_it_is_adaptive_tap_where_all_sites_are_alike():
    couplings = ferromagnet(10, 0.6)
    x = torch.full((10,), 0.3, dtype=torch.float64)
    system = SpinSystem(couplings, IsingPrior())
    mine, other = TIGHT(system, x), AdaptiveTAP(tol=1e-13)(system, x)
    for name in ("magnetization", "log_partition", "energy", "covariance"):
        torch.testing.assert_close(getattr(mine, name), getattr(other, name))


def test_spherical_spins_that_are_all_alike():
    """There adaptive TAP, which matches traces too, has the same V everywhere."""
    system = SpinSystem(ferromagnet(6, 1.0), SphericalPrior(3, 1.2))
    x = torch.tensor([0.3, -0.2, 0.5], dtype=torch.float64).expand(6, 3)
    mine, other = TIGHT(system, x), AdaptiveTAP(tol=1e-13)(system, x)
    for name in ("magnetization", "log_partition", "energy", "covariance", "cavity_variance"):
        torch.testing.assert_close(getattr(mine, name), getattr(other, name))


def test_potts_spins_that_are_all_alike():
    system = SpinSystem(ferromagnet(6, 1.0), PottsPrior(4))
    x = torch.full((6, 4), 0.3, dtype=torch.float64)
    mine, other = TIGHT(system, x), AdaptiveTAP(tol=1e-13)(system, x)
    for name in ("magnetization", "log_partition", "energy", "covariance", "cavity_variance"):
        torch.testing.assert_close(getattr(mine, name), getattr(other, name))


def test_two_potts_states_are_an_ising_spin():
    """S_i·S_j = (1 + s_i s_j)/2 and x·S = (x_0 + x_1)/2 + s (x_0 − x_1)/2."""
    couplings, _ = sherrington_kirkpatrick(8, 1.2)
    torch.manual_seed(0)
    x = torch.randn(8, 2, dtype=torch.float64)
    potts = TIGHT(SpinSystem(couplings, PottsPrior(2)), x)
    ising = TIGHT(SpinSystem(couplings / 2, IsingPrior()), (x[:, 0] - x[:, 1]) / 2)
    up, down = potts.magnetization.unbind(dim=1)
    torch.testing.assert_close(up - down, ising.magnetization)
    constant = couplings.sum() / 4 + x.sum() / 2
    torch.testing.assert_close(potts.log_partition, ising.log_partition + constant)
    torch.testing.assert_close(potts.energy, ising.energy - constant)
    sign = torch.tensor([1.0, -1.0], dtype=torch.float64)
    difference = torch.einsum("iajb,a,b->ij", potts.covariance, sign, sign)
    torch.testing.assert_close(difference, ising.covariance)


@pytest.mark.quick("ising")
def test_derivatives_by_fields(system, fields):
    x = fields[0].requires_grad_()
    response = TIGHT(system, x)
    by_field = grad(response.log_partition, x, create_graph=True)[0]
    torch.testing.assert_close(by_field, response.magnetization, rtol=0, atol=1e-8)
    with torch.no_grad():
        susceptibility = response.susceptibility.reshape(x.numel(), x.numel())
    torch.testing.assert_close(susceptibility, susceptibility.T, rtol=0, atol=1e-9)
    row = grad(by_field.flatten()[2], x)[0].flatten()
    torch.testing.assert_close(susceptibility[2], row, rtol=0, atol=1e-8)
    step = torch.zeros_like(x)
    step.view(-1)[1] = 1e-5
    ends = [TIGHT(system, x.detach() + s * step).magnetization for s in (1, -1)]
    column = ((ends[0] - ends[1]) / 2e-5).flatten()
    torch.testing.assert_close(susceptibility[:, 1], column, rtol=1e-6, atol=1e-8)


def test_derivatives_by_couplings_are_second_moments(system, fields):
    couplings = system.couplings.clone().requires_grad_()
    response = TIGHT(SpinSystem(couplings, system.prior), fields[0])
    gradient = grad(response.log_partition, couplings)[0]
    n, k = system.num_spins, system.event_shape.numel()
    m = response.magnetization.detach().reshape(n, k)
    chi = response.covariance.detach().reshape(n, k, n, k)
    expected = m @ m.T + chi.diagonal(dim1=1, dim2=3).sum(dim=2)
    off = ~torch.eye(n, dtype=torch.bool)
    torch.testing.assert_close((gradient + gradient.T)[off], expected[off], rtol=0, atol=1e-8)


@pytest.mark.parametrize("name", ["sk", "equal eigenvalues"])
@pytest.mark.slow
def test_second_derivatives(name):
    couplings, x = sherrington_kirkpatrick(3, 0.5, 0.3)
    if name == "equal eigenvalues":
        couplings = ferromagnet(3, 0.6)
    off = 1 - torch.eye(3, dtype=torch.float64)

    def log_partition(couplings, x):
        symmetric = off * (couplings + couplings.T) / 2
        response = TIGHT(SpinSystem(symmetric, IsingPrior()), x)
        return response.log_partition, response.energy

    inputs = couplings.requires_grad_(), x.requires_grad_()
    assert gradcheck(log_partition, inputs)
    assert gradgradcheck(lambda *inputs: log_partition(*inputs)[0], inputs, fast_mode=True)


@pytest.mark.quick("ising", "potts")
def test_energy_is_the_derivative_by_temperature(system, fields):
    h = 1e-5
    ends = [
        TIGHT(SpinSystem(s * system.couplings, system.prior), s * fields).log_partition
        for s in (1 + h, 1 - h)
    ]
    expected = -(ends[0] - ends[1]) / (2 * h)
    torch.testing.assert_close(TIGHT(system, fields).energy, expected, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("kind", ["sk", "one large eigenvalue", "degenerate"])
@pytest.mark.parametrize("mean_chi", [1e-4, 0.1, 0.9, 0.9999, 3.0])
def test_variance_solves_its_equation_to_second_order(kind, mean_chi):
    couplings = {
        "sk": sherrington_kirkpatrick(50)[0],
        "one large eigenvalue": ferromagnet(50, 30.0),
        "degenerate": hopfield(torch.ones(1, 50, dtype=torch.float64)),
    }[kind]
    spectrum = torch.linalg.eigvalsh(couplings)
    chi = torch.tensor([[mean_chi]], dtype=torch.float64, requires_grad=True)
    level = _variance(chi, couplings, spectrum) + 1 / chi
    assert level.item() > spectrum[-1].item()
    torch.testing.assert_close((1 / (level - spectrum)).mean(dim=-1, keepdim=True), chi)
    if 0.05 < mean_chi < 2:
        assert gradgradcheck(lambda c: _variance(c, couplings, spectrum), chi, atol=1e-4, rtol=1e-4)


def test_variance_where_hardly_anything_fluctuates():
    """V → χ̄ (1/N) Σ_k e_k², lost in λ − 1/χ̄; and 0 without fluctuations."""
    couplings, _ = sherrington_kirkpatrick(50)
    spectrum = torch.linalg.eigvalsh(couplings)
    chi = torch.tensor([[1e-15], [0.0]], dtype=torch.float64)
    expected = chi * spectrum.square().mean()
    torch.testing.assert_close(_variance(chi, couplings, spectrum), expected, rtol=1e-9, atol=1e-15)


def test_strong_fields():
    couplings, _ = sherrington_kirkpatrick(8, 0.5)
    x = torch.full((8,), 60.0, dtype=torch.float64).requires_grad_()
    response = TIGHT(SpinSystem(couplings, IsingPrior()), x)
    ground = 0.5 * couplings.sum() + x.sum() - 8 * math.log(2)
    torch.testing.assert_close(response.log_partition, ground)
    torch.testing.assert_close(grad(response.log_partition, x)[0], torch.ones_like(x))


@pytest.mark.parametrize(("dtype", "tol"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_one_spin_in_a_field_that_fixes_it(dtype, tol):
    x = torch.tensor([0.3, 400.0], dtype=dtype)[:, None]
    response = SelfAveragingTAP(tol=tol)(
        SpinSystem(torch.zeros(1, 1, dtype=dtype), IsingPrior()), x
    )
    torch.testing.assert_close(response.magnetization, x.tanh())
    expected = torch.logaddexp(x, -x)[:, 0] - math.log(2)
    torch.testing.assert_close(response.log_partition, expected)


@pytest.mark.parametrize("prior", [PottsPrior(3), SphericalPrior(3)])
def test_the_couplings_of_all_components_are_never_built(prior, monkeypatch):
    monkeypatch.setattr(SpinSystem, "matrix", None)
    system = SpinSystem(ferromagnet(5), prior)
    assert bool(SelfAveragingTAP()(system, torch.ones(5, 3).double()).solution.converged)


def test_what_it_has_no_equations_for():
    x = torch.zeros(3, 2, dtype=torch.float64)
    gaussian = GaussianPrior(x[0], torch.eye(2, dtype=torch.float64))
    with pytest.raises(TypeError, match=r"GaussianPrior: use AdaptiveTAP"):
        SelfAveragingTAP()(SpinSystem(ferromagnet(3, 0.1), gaussian), x)
    full = torch.zeros(3, 3, 2, 2, dtype=torch.float64)
    with pytest.raises(TypeError, match=r"\(N, N\).*got \(3, 3, 2, 2\): use AdaptiveTAP"):
        SelfAveragingTAP()(SpinSystem(full, PottsPrior(2)), x)


@pytest.mark.parametrize("attached", [False, True])
def test_without_a_distribution_there_are_no_numbers(attached):
    """Before the first step V = 0 and χ̄ = 1, so 1 + χ̄(V − J) has the eigenvalue −1."""
    couplings = torch.tensor([[0.0, 2.0], [2.0, 0.0]], dtype=torch.float64)
    x = torch.zeros(2, dtype=torch.float64)
    system = SpinSystem(couplings.requires_grad_(attached), IsingPrior())
    response = SelfAveragingTAP(max_iter=1, on_failure="ignore")(system, x)
    assert torch.equal(response.magnetization, x)
    assert bool(response.log_partition.isnan())
    assert bool(response.covariance.isnan().all())


@pytest.mark.parametrize("read", ["log_partition", "energy", "covariance"])
def test_a_sample_without_a_distribution_leaves_the_gradients_of_others(read):
    couplings, _ = sherrington_kirkpatrick(6, beta=6, seed=0)
    strong = torch.linspace(20, 70, 6, dtype=torch.float64)
    method = SelfAveragingTAP(on_failure="ignore", max_iter=200)

    def slope(fields):
        J = couplings.clone().requires_grad_()
        response = method(SpinSystem(J, IsingPrior()), fields)
        value = getattr(response, read)
        assert not bool(torch.isfinite(value[:-1].detach()).any())
        return grad(value[-1].sum(), J)[0]

    alone, beside = slope(strong[None]), slope(torch.stack([1e-3 * strong, strong]))
    assert bool(torch.isfinite(alone).all())
    torch.testing.assert_close(beside, alone)


def test_float32():
    for name in ("ising", "potts", "sphere"):
        system = SYSTEMS[name]()
        torch.manual_seed(5)
        x = 0.4 * torch.randn(system.num_spins, *system.event_shape, dtype=torch.float64)
        narrow = SpinSystem(system.couplings.float(), system.prior)
        mine, wide = SelfAveragingTAP(tol=1e-6)(narrow, x.float()), TIGHT(system, x)
        assert mine.magnetization.dtype == mine.covariance.dtype == torch.float32
        for quantity in ("magnetization", "log_partition", "energy", "covariance"):
            close = getattr(mine, quantity).double()
            torch.testing.assert_close(close, getattr(wide, quantity), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "strength"), [(torch.float32, 1e-6), (torch.float64, 1e-14)], ids=["single", "double"]
)
@pytest.mark.parametrize("seed", range(3))
def test_weak_couplings_without_fields(seed, dtype, strength):
    """V = ⟨e²⟩ + ⟨e³⟩ + … at m = 0: eigenvalues cancel in ⟨e⟩ = 0, and with them V was lost.

    Backward, which sums no eigenvalues, took what was left for another map and said so.
    """
    couplings = strength * sherrington_kirkpatrick(5, 1.0, seed=seed)[0].to(dtype)
    couplings.requires_grad_()
    x = torch.zeros(5, dtype=dtype, requires_grad=True)
    method = SelfAveragingTAP(tol=1e-5, on_failure="raise")
    response = method(SpinSystem(couplings, IsingPrior()), x)
    V = (couplings.square().sum() / 5).expand(5)
    torch.testing.assert_close(response.cavity_variance, V, rtol=2e-5, atol=0)
    grad(response.log_partition, (x, couplings))
