"""Self-averaging TAP: its own self-consistency, the SK limit, derivatives."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import grad, gradgradcheck

from deep_implicit_attention.spins import (
    AdaptiveTAP,
    IsingPrior,
    PottsPrior,
    SelfAveragingTAP,
    SpinSystem,
    ferromagnet,
    hopfield,
    sherrington_kirkpatrick,
)
from deep_implicit_attention.spins._self_averaging_tap import _level

TIGHT = SelfAveragingTAP(tol=1e-13)


def ising(num_spins=8, beta=0.5, seed=0):
    couplings, x = sherrington_kirkpatrick(num_spins, beta, 0.3, seed)
    return SpinSystem(couplings, IsingPrior()), x


def test_mean_response_matches_the_mean_of_single_spins():
    system, x = ising(20, 0.6)
    response = TIGHT(system, torch.stack([x, 2 * x]))
    m, chi = response.magnetization, response.covariance
    diagonal = chi.diagonal(dim1=-2, dim2=-1).mean(dim=-1)
    torch.testing.assert_close(diagonal, (1 - m**2).mean(dim=-1))
    V = response.cavity_variance
    assert torch.equal(V, V[:, :1].expand_as(V))
    field = torch.stack([x, 2 * x]) + m @ system.couplings - V * m
    torch.testing.assert_close(m, field.tanh(), rtol=0, atol=1e-11)


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


def test_derivatives():
    system, x = ising()
    couplings = system.couplings.clone().requires_grad_()
    x = x.requires_grad_()
    response = TIGHT(SpinSystem(couplings, IsingPrior()), x)
    by_field, by_coupling = grad(response.log_partition, (x, couplings), create_graph=True)
    torch.testing.assert_close(by_field, response.magnetization, rtol=0, atol=1e-9)
    pair = response.magnetization[1] * response.magnetization[4] + response.covariance[1, 4]
    torch.testing.assert_close(by_coupling[1, 4] + by_coupling[4, 1], pair, rtol=0, atol=1e-9)
    susceptibility = response.susceptibility
    torch.testing.assert_close(susceptibility, susceptibility.T, rtol=0, atol=1e-9)
    row = grad(by_field[2], x, retain_graph=True)[0]
    torch.testing.assert_close(susceptibility[2], row, rtol=0, atol=1e-8)


def test_energy_is_the_derivative_by_temperature():
    system, x = ising()
    h = 1e-5
    ends = [
        TIGHT(SpinSystem(s * system.couplings, IsingPrior()), s * x).log_partition
        for s in (1 + h, 1 - h)
    ]
    expected = -(ends[0] - ends[1]) / (2 * h)
    torch.testing.assert_close(TIGHT(system, x).energy, expected, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("kind", ["sk", "one large eigenvalue", "degenerate"])
@pytest.mark.parametrize("mean_chi", [1e-4, 0.1, 0.9, 0.9999, 3.0])
def test_level_solves_its_equation_to_second_order(kind, mean_chi):
    couplings = {
        "sk": sherrington_kirkpatrick(50)[0],
        "one large eigenvalue": ferromagnet(50, 30.0),
        "degenerate": hopfield(torch.ones(1, 50, dtype=torch.float64)),
    }[kind]
    spectrum = torch.linalg.eigvalsh(couplings)
    chi = torch.tensor([[mean_chi]], dtype=torch.float64, requires_grad=True)
    level = _level(chi, spectrum)
    assert level.item() > spectrum[-1].item()
    torch.testing.assert_close((1 / (level - spectrum)).mean(dim=-1, keepdim=True), chi)
    if 0.05 < mean_chi < 2:
        assert gradgradcheck(lambda c: _level(c, spectrum), chi, atol=1e-4, rtol=1e-4)


def test_priors_it_has_no_equations_for():
    with pytest.raises(TypeError, match=r"PottsPrior.*AdaptiveTAP has"):
        SelfAveragingTAP()(
            SpinSystem(ferromagnet(3), PottsPrior(3)), torch.zeros(3, 3, dtype=torch.float64)
        )
