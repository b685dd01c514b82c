"""Draws of single spins, and the diagnostics of chains, against closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from deep_implicit_attention.spins import (
    GaussianPrior,
    IsingPrior,
    PottsPrior,
    SphericalPrior,
    effective_sample_size,
    split_r_hat,
)
from deep_implicit_attention.spins._mcmc import summarise
from deep_implicit_attention.spins._tempering import bennett, exchange


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=seeded(seed), dtype=torch.float64)


GAUSSIAN = GaussianPrior(
    torch.tensor([0.5, -1.0]).double(), torch.tensor([[1.0, 0.4], [0.4, 0.5]]).double()
)
PRIORS = [IsingPrior(), PottsPrior(4), GAUSSIAN, *(SphericalPrior(d, 0.8) for d in (2, 3, 7))]


class TestDraws:
    @pytest.mark.parametrize("prior", PRIORS, ids=str)
    @pytest.mark.parametrize("strength", [0.0, 1.0, 4.0])
    def test_moments(self, prior, strength):
        count, shape = 20_000, prior.event_shape
        field = strength * randn(*shape, seed=8)
        with torch.no_grad():
            spins = prior.sample(field.expand(count, *shape), seeded(1))
            assert prior.supports(spins).all()
            centred = (spins - prior.mean(field)).reshape(count, -1)
            covariance = prior.covariance(field).reshape(centred.shape[1], -1)
        z = centred.mean(dim=0) / (covariance.diagonal() / count).sqrt().clamp(min=1e-12)
        assert z.abs().max() < 4.5
        products = torch.einsum("ma,mb->mab", centred, centred) - covariance
        z = products.mean(dim=0) / (products.std(dim=0) / count**0.5).clamp(min=1e-12)
        assert z.abs().max() < 4.5

    @pytest.mark.parametrize("dim", [2, 3, 8])
    @pytest.mark.parametrize("kappa", [0.5, 5.0, 1e5])
    def test_angles_on_the_sphere(self, dim, kappa):
        """Kolmogorov–Smirnov against the density ∝ sin^{d−2}θ exp(κ cos θ) of the angle."""
        count = 20_000
        field = torch.zeros(count, dim, dtype=torch.float64)
        field[:, 1] = kappa / 2
        spins = SphericalPrior(dim, 2.0).sample(field, seeded(dim)) / 2
        across = spins[:, [0, *range(2, dim)]].norm(dim=1)
        angle = torch.atan2(across, spins[:, 1]).sort().values
        grid = torch.linspace(0, min(math.pi, 12 / kappa**0.5), 20_001).double()
        density = grid.sin() ** (dim - 2) * (-2 * kappa * (grid / 2).sin().square()).exp()
        mass = torch.cat([torch.zeros(1), torch.cumulative_trapezoid(density, grid)])
        mass = mass / mass[-1]
        right = torch.searchsorted(grid, angle).clamp(1, len(grid) - 1)
        part = (angle - grid[right - 1]) / (grid[right] - grid[right - 1])
        expected = mass[right - 1] + part * (mass[right] - mass[right - 1])
        observed = (torch.arange(count) + 0.5) / count
        assert (observed - expected).abs().max() < 1.9 / count**0.5  # exceeded once in 700

    def test_strong_fields_in_float32(self):
        field = torch.zeros(20_000, 3)
        field[:, 0] = 1e7
        spins = SphericalPrior(3, 1.0).sample(field, seeded())
        assert spins.isfinite().all()
        torch.testing.assert_close(
            spins[:, 1:].var(dim=0), torch.full((2,), 1e-7), rtol=0.05, atol=0
        )
        states = PottsPrior(3).sample(torch.tensor([1e30, 0.0, -1e30]).expand(50, 3), seeded())
        assert (states.argmax(dim=1) == 0).all()
        assert (IsingPrior().sample(torch.tensor([-1e30, 1e30])) == torch.tensor([-1, 1])).all()

    @pytest.mark.parametrize("prior", PRIORS, ids=str)
    def test_support(self, prior):
        shape = (6, *prior.event_shape)
        with torch.no_grad():
            inside = prior.sample(randn(*shape), seeded())
        assert prior.supports(inside).tolist() == [True] * 6
        outside = inside.clone()
        outside[2] = torch.nan
        if prior is not GAUSSIAN:
            outside[4] *= 1.1
        wrong = [2] if prior is GAUSSIAN else [2, 4]
        assert (~prior.supports(outside)).nonzero().flatten().tolist() == wrong
        assert not PottsPrior(3).supports(torch.tensor([1.0, 1.0, 0.0]))

    def test_shape_of_the_field(self):
        for prior in PRIORS[1:]:
            with pytest.raises(ValueError, match="field must have shape"):
                prior.sample(torch.zeros(5, 11, dtype=torch.float64))


def autoregressive(phi: float, samples: int, chains: int, width: int) -> Tensor:
    """Chains s_t = φ s_{t−1} + √(1 − φ²) ε in equilibrium: autocorrelations φ^t, variance 1."""
    noise = randn(samples, chains, width)
    states = [noise[0]]
    for step in noise[1:]:
        states.append(phi * states[-1] + (1 - phi**2) ** 0.5 * step)
    return torch.stack(states)


class TestDiagnostics:
    @pytest.mark.quick("0.9", "-0.4")
    @pytest.mark.parametrize("phi", [0.0, 0.5, 0.9, -0.4])
    def test_effective_size_of_autoregressive_chains(self, phi):
        draws = autoregressive(phi, 2000, 6, 40)
        expected = 12_000 * (1 - phi) / (1 + phi)
        sizes = effective_sample_size(draws)
        assert abs(sizes.mean() / expected - 1) < 0.06
        assert (sizes / expected - 1).abs().max() < 0.35
        r_hat, size, error = summarise(draws)
        assert torch.equal(size, sizes)
        assert 0.75 < (draws.mean(dim=(0, 1)) / error).square().mean().sqrt() < 1.3
        torch.testing.assert_close(error.mean().item(), expected**-0.5, rtol=0.06, atol=0)
        assert r_hat.max() < 1.03

    def test_r_hat_of_independent_draws_is_one(self):
        draws = randn(1000, 8, 50)
        assert (split_r_hat(draws) - 1).abs().max() < 5e-3
        # By ranks: a mean need not exist, and tails do not hide that places differ.
        cauchy = torch.tan(math.pi * (torch.rand(1000, 8, 50, generator=seeded()).double() - 0.5))
        assert (split_r_hat(cauchy) - 1).abs().max() < 5e-3
        cauchy[:, ::2] += 3
        assert split_r_hat(cauchy).min() > 1.1

    def test_r_hat_by_the_formula(self):
        """Two values are a linear function of their ranks, so R̂ is that of the draws."""
        draws = (torch.rand(400, 3, generator=seeded()) < torch.tensor([0.3, 0.4, 0.6])).double()
        halves = torch.cat([draws[:200], draws[200:]], dim=1)
        within, between = halves.var(dim=0).mean(), 200 * halves.mean(dim=0).var()
        expected = ((199 / 200 * within + between / 200) / within).sqrt()
        torch.testing.assert_close(split_r_hat(draws), expected)

    def test_r_hat_sees_what_chains_disagree_about(self):
        draws = randn(500, 4, 3)
        apart, wide, drift = draws.clone(), draws.clone(), draws.clone()
        apart[:, 0] += 3
        wide[:, 0] *= 4
        drift += torch.linspace(0, 3, 500)[:, None, None]
        for bad in (apart, wide, drift):
            assert (split_r_hat(bad) > 1.1).all()
        assert (effective_sample_size(apart) < 20).all()
        assert (effective_sample_size(drift) < 40).all()

    def test_draws_that_do_not_move(self):
        same = torch.full((100, 4, 2), 0.1, dtype=torch.float64)
        assert split_r_hat(same).tolist() == [1, 1]
        assert effective_sample_size(same).tolist() == [400, 400]
        stuck = same * torch.tensor([1.0, 1.0, -1.0, 1.0])[:, None]
        assert (split_r_hat(stuck) > 1e3).all()
        assert (effective_sample_size(stuck) < 20).all()

    @pytest.mark.parametrize("bad", [torch.nan, torch.inf])
    def test_draws_that_are_not_finite_are_no_agreement(self, bad):
        draws = randn(100, 4, 3)
        draws[:, 2, 0], draws[7, 1, 1] = bad, bad
        for diagnostic in (split_r_hat, effective_sample_size):
            assert torch.isnan(diagnostic(draws)).tolist() == [True, True, False]
        draws[:] = bad
        assert torch.isnan(split_r_hat(draws)).all()

    def test_draws_that_are_integers(self):
        spins = torch.where(randn(100, 4, 3) > 0, 1, -1)
        for diagnostic in (split_r_hat, effective_sample_size):
            torch.testing.assert_close(diagnostic(spins), diagnostic(spins.double()))

    def test_refusals(self):
        for diagnostic in (split_r_hat, effective_sample_size):
            with pytest.raises(TypeError, match="draws must be a tensor, got list"):
                diagnostic([[1.0]])
        for bad in (torch.zeros(3, 4), torch.zeros(10), torch.zeros(10, 0)):
            for diagnostic in (split_r_hat, effective_sample_size):
                with pytest.raises(ValueError, match="at least 4 samples"):
                    diagnostic(bad)


class TestLadder:
    def test_bennett_is_calibrated(self):
        """One Gaussian spin in a field x: p_β = N(βx, 1), f = x S, log Z = x²/2."""
        draws, chains, systems = 50, 8, 400
        x = torch.linspace(-3, 3, systems).double()
        betas = torch.tensor([0.0, 0.4, 0.7, 1.0]).double()[:, None].expand(-1, systems)
        spins = randn(draws, 4, chains, systems) + (betas * x)[:, None]
        log, error = bennett(x * spins, betas)
        z = (log - x.square() / 2) / error
        assert 0.9 < z.square().mean().sqrt() < 1.35  # Student's t with 7 degrees: 1.18
        assert abs(z.mean()) < 0.25
        assert error.max() < 0.2

    def test_bennett_where_nothing_overlaps_says_so(self):
        betas = torch.tensor([[0.0], [1.0]]).double()
        weight = 1e4 * torch.tensor([-1.0, 1.0]).double()[:, None, None].expand(10, 2, 3, 1)
        log, error = bennett(weight + randn(10, 2, 3, 1), betas)
        assert log.isfinite()
        assert not error < 1e4

    @pytest.mark.parametrize("parity", [0, 1])
    def test_exchange(self, parity):
        """Pairs of one parity, with probability min(1, exp((β′ − β)(f − f′)))."""
        chains = 20_000
        betas = torch.tensor([0.0, 0.3, 0.7, 1.0]).double()[:, None]
        f = torch.tensor([1.0, 2.5, -0.5, 0.7]).double()[:, None, None].expand(-1, chains, 1)
        places, probability = exchange(f, betas, parity, seeded())
        ratio = torch.tensor([0.3 * (1.0 - 2.5), 0.4 * (2.5 + 0.5), 0.3 * (-0.5 - 0.7)]).double()
        expected = ratio.exp().clamp(max=1)
        torch.testing.assert_close(probability[:, 0, 0], expected)
        assert (places.sort(dim=0).values[:, :, 0] == torch.arange(4)[:, None]).all()
        for low in range(3):
            swapped = (places[low] == low + 1).double().mean().item()
            back = (places[low + 1] == low).double().mean().item()
            wanted = expected[low].item() if low % 2 == parity else 0.0
            assert swapped == back
            assert abs(swapped - wanted) <= 4 * (wanted * (1 - wanted) / chains) ** 0.5
