"""Sampled answers against enumeration, closed forms and quadrature, with calibrated errors.

Tolerances come from the sampler's own standard errors: over many components z-scores must have a
root mean square near one, which a bias fails, and an error estimate that is too large or small.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd import grad

from deep_implicit_attention.deq import ConvergenceError, ConvergenceWarning
from deep_implicit_attention.spins import (
    Exact,
    GaussianPrior,
    GibbsSampler,
    IsingPrior,
    SphericalPrior,
    SpinSystem,
    _tempering,
    ferromagnet,
)
from deep_implicit_attention.spins._tempering import bennett, exchange


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=seeded(seed), dtype=torch.float64)


def rms(z: Tensor) -> float:
    return z.square().mean().sqrt().item()


ENUMERATED = ["ising", "ising-lattice", "potts", "potts-scalar", "gaussian", "gaussian-scalar"]


@pytest.mark.quick("ising")
@pytest.mark.parametrize("system", ENUMERATED, indirect=True)
def test_against_exact_answers(system):
    batch = 24
    fields = 0.5 * randn(batch, system.num_spins, *system.event_shape)
    sampler = GibbsSampler(num_samples=300, burn_in=60, num_temperatures=4, on_failure="ignore")
    sampled, exact = sampler(system, fields), Exact()(system, fields)
    evidence = sampled.sampling
    z = {
        "m": (sampled.magnetization - exact.magnetization) / evidence.standard_error,
        "energy": (sampled.energy - exact.energy) / evidence.energy_standard_error,
        "log Z": (sampled.log_partition - exact.log_partition)
        / evidence.log_partition_standard_error,
    }
    for quantity, values in z.items():
        # Over many seeds the mean is 1.0 (log Z 1.07, Student's t), extremes 0.72 and 1.8.
        assert 0.55 < rms(values.detach()) < 2, (quantity, rms(values.detach()))
        assert abs(values.sum() / values.numel() ** 0.5) < 4 or quantity == "m", quantity
    # Covariances have no error estimate of their own: that of products of unit spread.
    scale = exact.covariance.flatten(1).abs().amax(dim=1).mean()
    gap = (sampled.covariance - exact.covariance).abs().max()
    assert gap < 8 * scale / evidence.effective_size.min().sqrt()
    assert torch.equal(sampled.susceptibility, sampled.covariance)


@pytest.mark.slow
def test_two_spins_on_a_sphere_against_quadrature():
    prior = SphericalPrior(3, 1.4)
    J = 1.2 * randn(3, 3, seed=2)
    zero = torch.zeros_like(J)
    system = SpinSystem(torch.stack([torch.stack([zero, J]), torch.stack([J.T, zero])]), prior)
    nodes, weights = np.polynomial.legendre.leggauss(60)
    angle = torch.arange(80).double() * (2 * math.pi / 80)
    height = torch.from_numpy(nodes)[:, None]
    ring = (1 - height.square()).sqrt()
    points = torch.stack(
        [ring * angle.cos(), ring * angle.sin(), height.expand(-1, 80)], dim=-1
    ).reshape(-1, 3)
    weight = (torch.from_numpy(weights) / 2 / 80).repeat_interleave(80)

    couplings = J.clone().requires_grad_()
    x = 0.5 * randn(2, 3).requires_grad_()

    def log_partition(x: Tensor) -> Tensor:
        """The second spin integrated in closed form, the first on the grid."""
        first = prior.radius * points
        pulled = first @ couplings + x[1]
        return (weight.log() + first @ x[0] + prior.log_partition(pulled)).logsumexp(dim=0)

    log = log_partition(x)
    m, moment = grad(log, (x, couplings))
    energy = -(couplings * moment).sum() - (x * m).sum()
    covariance = torch.autograd.functional.hessian(log_partition, x)
    response = GibbsSampler(num_samples=400, burn_in=100, num_chains=32, num_temperatures=4)(
        system, x
    )
    evidence = response.sampling
    assert rms((response.magnetization - m) / evidence.standard_error) < 2
    assert abs(response.energy - energy) < 4 * evidence.energy_standard_error
    assert abs(response.log_partition - log) < 4 * evidence.log_partition_standard_error
    assert (response.covariance - covariance).abs().max() < 0.03


class TestTempering:
    @pytest.mark.slow
    def test_a_magnet_needs_it(self):
        """Two states, up and down, that single spins never connect: N = 16, β = 3."""
        system = SpinSystem(ferromagnet(16, 3.0), IsingPrior())
        x = torch.zeros(16, dtype=torch.float64)
        with pytest.warns(ConvergenceWarning, match=r"1 of 1 systems.*raise num_temperatures"):
            stuck = GibbsSampler(num_samples=200, burn_in=50, num_temperatures=1)(system, x)
        assert stuck.sampling.worst_r_hat > 1.5
        assert stuck.sampling.effective_size.max() < 100
        free = GibbsSampler(num_samples=600, burn_in=100, max_r_hat=1.03)(system, x)
        evidence = free.sampling
        assert evidence.worst_r_hat < 1.03
        assert (free.magnetization / evidence.standard_error).abs().max() < 4
        exact = Exact()(system, x)
        assert evidence.log_partition_standard_error < 0.05
        gap = free.log_partition - exact.log_partition
        assert abs(gap) < 4 * evidence.log_partition_standard_error
        assert (free.covariance - exact.covariance).abs().max() < 0.02

    def test_weights_belong_to_the_states(self, system):
        """After exchanges, f = ½ SᵀJS + x·S of the states at β = 1, for every chain and system."""
        x = randn(3, system.num_spins, *system.event_shape, seed=1)
        replicas = GibbsSampler(num_chains=5, num_temperatures=4)._start(system, x, None)
        for _ in range(7):  # the last one exchanges with the coldest
            replicas.step()
        assert replicas.acceptance().min() > 0
        spins = replicas.cold()
        own = 0.5 * spins * system.pull(spins) + x * spins
        torch.testing.assert_close(replicas.log_weight[-1], own.flatten(2).sum(dim=2))

    @pytest.mark.slow
    def test_ladder_is_spaced_by_rejections(self):
        system = SpinSystem(ferromagnet(30, 4.0), IsingPrior())
        x = torch.full((2, 30), 0.1, dtype=torch.float64)
        options = {"num_samples": 100, "num_temperatures": 6, "on_failure": "ignore"}
        even = GibbsSampler(burn_in=0, **options)(system, x).sampling
        spaced = GibbsSampler(burn_in=400, **options)(system, x).sampling
        steps = even.inverse_temperatures.diff(dim=1)
        torch.testing.assert_close(steps, torch.full_like(steps, 0.2))
        assert spaced.inverse_temperatures.shape == (2, 6)
        assert (spaced.inverse_temperatures[:, 0] == 0).all()
        assert (spaced.inverse_temperatures[:, -1] == 1).all()
        assert (spaced.inverse_temperatures.diff(dim=1) > 0).all()

        def uneven(acceptance: Tensor) -> float:
            return (acceptance.amax(dim=1) - acceptance.amin(dim=1)).max().item()

        assert uneven(even.swap_acceptance) > 0.3
        assert uneven(spaced.swap_acceptance) < 0.12

    def test_a_ladder_on_which_nothing_is_rejected_stays_even(self):
        system = SpinSystem(torch.zeros(3, 3).double(), IsingPrior())
        sampler = GibbsSampler(
            num_samples=4, burn_in=8, num_chains=2, num_temperatures=4, on_failure="ignore"
        )
        response = sampler(system, torch.zeros(3).double())
        even = torch.linspace(0, 1, 4, dtype=torch.float64)
        torch.testing.assert_close(response.sampling.inverse_temperatures, even)
        assert response.log_partition == 0

    def test_the_error_of_log_z_is_that_of_a_mean_over_chains(self):
        """Two chains whose estimates are 0.01 and −0.01, in every draw and at every temperature."""
        estimates = torch.tensor([0.01, -0.01], dtype=torch.float64)
        betas = torch.linspace(0, 1, 3, dtype=torch.float64)[:, None]
        log, error = bennett(estimates.expand(5, 3, 2)[..., None], betas)
        expected = estimates.std(correction=1, dim=0) / 2**0.5
        torch.testing.assert_close(error, expected[None], rtol=1e-4, atol=0)
        assert log.abs() < 1e-12

    def test_acceptances_are_those_of_the_draws(self, monkeypatch):
        exchanged = []

        def recorded(*args):
            places, probability = exchange(*args)
            exchanged.append(probability.mean(dim=1))
            return places, probability

        monkeypatch.setattr(_tempering, "exchange", recorded)
        system = SpinSystem(ferromagnet(6, 3.0), IsingPrior())
        sampler = GibbsSampler(
            num_samples=5, burn_in=20, thin=2, num_temperatures=3, on_failure="ignore"
        )
        response = sampler(system, torch.zeros(6, dtype=torch.float64))
        assert len(exchanged) == 30
        of_draws = torch.stack(exchanged[20:]).mean(dim=0)[:, 0]
        torch.testing.assert_close(response.sampling.swap_acceptance, of_draws)

    def test_without_a_ladder_there_is_no_log_partition(self):
        system = SpinSystem(ferromagnet(4), IsingPrior())
        x = torch.full((4,), 0.3, dtype=torch.float64, requires_grad=True)
        response = GibbsSampler(num_samples=200, num_temperatures=1)(system, x)
        assert response.log_partition.isnan()
        assert response.sampling.log_partition_standard_error.isnan()
        assert response.sampling.swap_acceptance.shape == (0,)
        assert "no log Z" in repr(response.sampling)
        assert torch.equal(grad(response.log_partition, x)[0], response.magnetization)


class TestDerivatives:
    @pytest.mark.quick("ising-lattice")
    @pytest.mark.parametrize("system", ENUMERATED[1:5], indirect=True)
    def test_first_derivatives_are_the_sampled_moments(self, system):
        x = 0.5 * randn(system.num_spins, *system.event_shape)
        couplings = system.couplings.clone().requires_grad_()
        system = SpinSystem(couplings, system.prior)
        inputs = [x.requires_grad_(), couplings, *system.prior.parameters()]
        sampler = GibbsSampler(
            num_samples=400, burn_in=100, num_temperatures=2, on_failure="ignore"
        )
        response = sampler(system, x)
        found = grad(response.log_partition, inputs)
        torch.testing.assert_close(found[0], response.magnetization)
        flat = sampler.sample(system, x).flatten(0, 1).flatten(1)
        second = flat.mT @ flat / len(flat)
        n, k = system.num_spins, system.event_shape.numel()
        second = second.reshape(n, k, n, k).permute(0, 2, 1, 3)
        if couplings.dim() == 2:
            second = second.diagonal(dim1=2, dim2=3).sum(dim=-1)
        torch.testing.assert_close(found[1], second / 2)
        exact = grad(Exact()(system, x).log_partition, inputs)
        for sampled, wanted in zip(found, exact, strict=True):
            assert (sampled - wanted).abs().max() < 0.03 * (1 + wanted.abs().max())

    def test_second_ones_are_refused(self):
        system = SpinSystem(ferromagnet(4), IsingPrior())
        x = torch.zeros(4, dtype=torch.float64, requires_grad=True)
        response = GibbsSampler(num_samples=200, num_temperatures=2)(system, x)
        first = grad(response.log_partition, x, create_graph=True)[0]
        with pytest.raises(RuntimeError, match="second derivatives would be wrong"):
            first.sum().backward()

    def test_the_rest_has_no_graph(self):
        system = SpinSystem(ferromagnet(4).requires_grad_(), IsingPrior())
        response = GibbsSampler(num_samples=200, num_temperatures=2)(system, torch.ones(4).double())
        assert response.log_partition.requires_grad
        for name in ("magnetization", "covariance", "susceptibility", "energy"):
            assert not getattr(response, name).requires_grad


class TestUse:
    SMALL: ClassVar = {"num_samples": 20, "burn_in": 8, "num_chains": 3, "num_temperatures": 3}

    @pytest.mark.quick("ising", "potts", "gaussian", "circle")
    def test_equal_seeds_give_equal_numbers(self, system):
        x = randn(2, system.num_spins, *system.event_shape)
        first, again, other = (
            GibbsSampler(**self.SMALL, seed=seed, on_failure="ignore")(system, x)
            for seed in (1, 1, 2)
        )
        assert torch.equal(first.magnetization, again.magnetization)
        assert torch.equal(first.covariance, again.covariance)
        assert torch.equal(first.log_partition, again.log_partition)
        assert not torch.equal(first.magnetization, other.magnetization)
        torch.manual_seed(5)  # nothing is drawn from the global stream
        before = torch.random.get_rng_state()
        GibbsSampler(**self.SMALL, on_failure="ignore")(system, x)
        assert torch.equal(before, torch.random.get_rng_state())

    @pytest.mark.quick("*-dtype1-batch2", "*-dtype0-batch3")
    @pytest.mark.parametrize("batch", [(), (2,), (2, 3), (0,)])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_shapes(self, system, batch, dtype):
        system = SpinSystem(system.couplings.to(dtype), system.prior)
        event = (system.num_spins, *system.event_shape)
        x = torch.zeros(*batch, *event, dtype=dtype)
        sampler = GibbsSampler(**self.SMALL, on_failure="ignore")
        response = sampler(system, x)
        assert response.magnetization.shape == (*batch, *event)
        assert response.covariance.shape == (*batch, *event, *event)
        assert response.energy.shape == response.log_partition.shape == batch
        evidence = response.sampling
        assert evidence.r_hat.shape == evidence.standard_error.shape == (*batch, *event)
        assert evidence.effective_size.shape == (*batch, *event)
        assert evidence.energy_r_hat.shape == evidence.energy_standard_error.shape == batch
        assert evidence.worst_r_hat.shape == evidence.log_partition_standard_error.shape == batch
        assert evidence.inverse_temperatures.shape == (*batch, 3)
        assert evidence.swap_acceptance.shape == (*batch, 2)
        assert evidence.draws == 60
        for value in (response.magnetization, response.log_partition, response.energy):
            assert value.dtype == dtype
            assert value.isfinite().all()
        draws = sampler.sample(system, x)
        assert draws.shape == (20, 3, *batch, *event)
        assert draws.dtype == dtype
        assert system.prior.supports(draws).all()
        if 0 not in batch:
            mean = draws.mean(dim=(0, 1))
            torch.testing.assert_close(mean, response.magnetization)
            assert repr(response).startswith("Response(GibbsSampler")

    def test_burn_in_and_thinning_leave_draws_out(self, system):
        x = randn(system.num_spins, *system.event_shape)

        def draws(**options: int) -> Tensor:
            return GibbsSampler(num_chains=2, num_temperatures=1, **options).sample(system, x)

        every = draws(num_samples=20, burn_in=0)
        assert torch.equal(draws(num_samples=15, burn_in=5), every[5:])
        assert torch.equal(draws(num_samples=5, burn_in=5, thin=3), every[7::3])

    def test_chains_start_where_they_are_told(self):
        system = SpinSystem(ferromagnet(20, 6.0), IsingPrior())
        x = torch.zeros(2, 20, dtype=torch.float64)
        start = torch.ones(3, 2, 20, dtype=torch.float64)
        start[1], start[:, 1] = -start[1], -start[:, 1].clone()
        sampler = GibbsSampler(num_samples=10, burn_in=0, num_chains=3, num_temperatures=1)
        means = sampler.sample(system, x, start=start).mean(dim=(0, 3))
        assert (means * start[..., 0] > 0.9).all()

    def test_failures_are_reported_as_asked(self):
        system = SpinSystem(ferromagnet(10, 5.0), IsingPrior())
        x = torch.zeros(3, 10, dtype=torch.float64)
        x[2] = 6.0  # this one has a single state
        options = {"num_samples": 200, "burn_in": 20, "num_temperatures": 1}
        GibbsSampler(**options, on_failure="ignore")(system, x)
        with pytest.raises(ConvergenceError, match="2 of 3 systems") as caught:
            GibbsSampler(**options, on_failure="raise")(system, x)
        assert (caught.value.solution.worst_r_hat > 1.01).tolist() == [True, True, False]
        evidence = replace(caught.value.solution, energy_r_hat=torch.tensor([1.0, 1.0, 9.0]))
        assert evidence.worst_r_hat[2] == 9
        GibbsSampler(**options, max_r_hat=1e300, on_failure="raise")(system, x[2])

    def test_a_seed_may_be_any_integer(self):
        assert GibbsSampler(seed=np.int64(3)).seed == 3

    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            ({"num_samples": 3}, ValueError, "num_samples must be at least 4"),
            ({"num_chains": 1}, ValueError, "num_chains at least 2"),
            ({"num_samples": 10.0}, TypeError, "num_samples must be an integer"),
            ({"burn_in": -1}, ValueError, "burn_in must be at least 0"),
            ({"burn_in": 0.0}, TypeError, "burn_in must be an integer"),
            ({"num_temperatures": 0}, ValueError, "num_temperatures must be at least 1"),
            ({"thin": 0}, ValueError, "thin must be at least 1"),
            ({"seed": 0.5}, TypeError, "seed must be an integer"),
            ({"seed": 2**64}, ValueError, r"seed must be from.* to 2\*\*64 - 1"),
            ({"max_r_hat": 0.9}, ValueError, "max_r_hat must be at least 1"),
            ({"on_failure": "shout"}, ValueError, "on_failure must be one of"),
        ],
    )
    def test_bad_options(self, options, error, message):
        with pytest.raises(error, match=message):
            GibbsSampler(**options)

    def test_bad_input(self):
        sampler = GibbsSampler(**self.SMALL)
        system = SpinSystem(ferromagnet(4), IsingPrior())
        x = torch.zeros(2, 4, dtype=torch.float64)
        with pytest.raises(ValueError, match=r"fields must have shape \(\*batch, 4\)"):
            sampler(system, x[:, :3])
        with pytest.raises(ValueError, match=r"start must have shape \(3, 2, 4\), got \(2, 4\)"):
            sampler.sample(system, x, start=x)
        with pytest.raises(TypeError, match="start must be a tensor, got list"):
            sampler.sample(system, x, start=[1, 2])
        with pytest.raises(ValueError, match="spins must be values of IsingPrior"):
            sampler.sample(system, x, start=torch.zeros(3, 2, 4, dtype=torch.float64))
        prior = GaussianPrior(torch.zeros(2), torch.eye(2))
        strong = SpinSystem(ferromagnet(4, 3.0), prior)
        with pytest.raises(ValueError, match=r"P − J must be positive.*eigenvalue is -1\.25"):
            sampler(strong, torch.zeros(4, 2, dtype=torch.float64))
