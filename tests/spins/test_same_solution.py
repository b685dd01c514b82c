"""Where there are several solutions, every part of a response speaks of the one that was found."""

from __future__ import annotations

import warnings

import pytest
import torch

from deep_implicit_attention.spins import (
    TAP,
    AdaptiveTAP,
    BlockGibbs,
    Exact,
    ExpectationPropagation,
    GibbsSampler,
    IsingPrior,
    NaiveMeanField,
    PottsPrior,
    SelfAveragingTAP,
    SpinSystem,
    sherrington_kirkpatrick,
)


def glass(beta: float, seed: int, samples: int) -> tuple[SpinSystem, torch.Tensor, torch.Tensor]:
    """A system at low temperature, weak fields, and starts of their own for the samples."""
    couplings, _ = sherrington_kirkpatrick(8, beta, seed=seed)
    random = torch.Generator().manual_seed(seed)
    fields = 0.2 * torch.randn(8, dtype=torch.float64, generator=random).expand(samples, 8)
    starts = 0.9 * torch.randn(samples, 8, dtype=torch.float64, generator=random).sign()
    return SpinSystem(couplings, IsingPrior()), fields, starts


@pytest.mark.quick("NaiveMeanField", "TAP")
@pytest.mark.parametrize(
    "method",
    [
        NaiveMeanField(on_failure="ignore", max_iter=500),
        TAP(on_failure="ignore", max_iter=300),
        AdaptiveTAP(on_failure="ignore", max_iter=500),
        SelfAveragingTAP(on_failure="ignore", max_iter=500),
        ExpectationPropagation(on_failure="ignore"),
    ],
    ids=lambda method: type(method).__name__,
)
def test_susceptibility_is_the_derivative_of_the_magnetization(method):
    spread = []
    for seed in range(3):
        system, fields, starts = glass(2.0, seed, 12)
        x = fields.clone().requires_grad_()
        response = method(system, x, start=starts)
        m, fine = response.magnetization, response.solution.converged
        own = [torch.autograd.grad(m[:, i].sum(), x, retain_graph=True)[0] for i in range(8)]
        found = response.susceptibility[fine]
        torch.testing.assert_close(found, torch.stack(own, dim=1)[fine], rtol=1e-6, atol=1e-6)
        spread += (m[fine] - m[fine][:1]).abs().flatten().tolist()
    assert len(spread) > 8
    if not isinstance(method, SelfAveragingTAP):  # of which few solves converge here
        assert max(spread) > 0.1


def test_covariance_of_tap_is_the_closed_form_at_its_solution():
    system, fields, starts = glass(2.0, 0, 12)
    method = TAP(max_iter=300, on_failure="ignore")
    response = method(system, fields, start=starts)
    J, one = system.couplings, torch.eye(8, dtype=torch.float64)
    count = 0
    for k in response.solution.converged.nonzero().flatten().tolist():
        m = response.magnetization[k]
        rest = 1 - m.square()
        inverse = torch.diag(1 / rest + J.square() @ rest) - J - 2 * J.square() * torch.outer(m, m)
        size = torch.linalg.inv(inverse).abs().max()
        gap = (response.covariance[k] @ inverse - one).abs().max()
        assert gap < 1e-6 * (1 + size), k
        count += 1
    assert count > 3


class Biased(IsingPrior):
    """±1 with weights in proportion to e^±1."""

    def log_partition(self, field, V=None):
        return super().log_partition(field + 1, V) - super().log_partition(torch.ones_like(field))

    def mean(self, field, V=None):
        return super().mean(field + 1, V)

    def covariance(self, field, V=None):
        return super().covariance(field + 1, V)


class SpinOne(IsingPrior):
    """−1, 0 and 1, equally likely: unlike that of ±1, the mean depends on V."""

    def log_partition(self, field, V=None):
        levels = torch.tensor([-1.0, 0.0, 1.0], dtype=field.dtype)
        half = 0 if V is None else 0.5 * V
        return torch.logsumexp(
            field[..., None] * levels + torch.as_tensor(half)[..., None] * levels.square(), dim=-1
        ) - torch.log(torch.tensor(3.0, dtype=field.dtype))

    def mean(self, field, V=None):
        with torch.enable_grad():
            h = field if field.requires_grad else field.detach().requires_grad_()
            graph = torch.is_grad_enabled()
            return torch.autograd.grad(self.log_partition(h, V).sum(), h, create_graph=graph)[0]

    def covariance(self, field, V=None):
        weight = 0 if V is None else 0.5 * V
        up, down = torch.exp(field + weight), torch.exp(-field + weight)
        square = (up + down) / (1 + up + down)
        return square - ((up - down) / (1 + up + down)).square()


def test_a_subclass_of_a_prior_is_not_taken_for_its_base():
    none = torch.zeros(2, dtype=torch.float64)
    system = SpinSystem(torch.zeros(2, 2, dtype=torch.float64), Biased())
    expected = torch.full_like(none, torch.tensor(1.0).tanh().item())
    for method in (NaiveMeanField(), AdaptiveTAP()):
        torch.testing.assert_close(method(system, none).magnetization, expected, rtol=1e-6, atol=0)
    for method in (Exact(), GibbsSampler()):
        with pytest.raises(TypeError, match="Biased"):
            method(system, none)

    class Named(PottsPrior):
        pass

    potts = SpinSystem(torch.zeros(2, 2, dtype=torch.float64), Named(3))
    Exact()(potts, torch.zeros(2, 3, dtype=torch.float64))
    BlockGibbs(potts)


def test_a_subclass_with_weights_of_its_own_is_sampled_by_its_own_sample():
    class Drawn(Biased):
        def sample(self, field, generator=None):
            return super().sample(field + 1, generator)

    couplings, x = sherrington_kirkpatrick(4, 0.5, 0.3, seed=0)
    sampler = GibbsSampler(num_samples=200, burn_in=50, num_temperatures=3, on_failure="ignore")
    response = sampler(SpinSystem(couplings, Drawn()), x)
    exact = Exact()(SpinSystem(couplings, IsingPrior()), x + 1).magnetization
    gap = (response.magnetization - exact).abs() / response.sampling.standard_error
    assert gap.max() < 5


def test_the_moments_of_a_subclass_may_depend_on_the_variance_of_the_field():
    couplings = 0.6 * torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=torch.float64)
    x = torch.tensor([0.4, -0.1], dtype=torch.float64, requires_grad=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        response = AdaptiveTAP()(SpinSystem(couplings, SpinOne()), x)
    levels = torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64)
    states = torch.cartesian_prod(levels, levels)
    weights = torch.softmax(
        states @ x.detach() + couplings[0, 1] * states[:, 0] * states[:, 1], dim=0
    )
    exact = weights @ states
    assert (response.magnetization - exact).abs().max() < 5e-3
    by_field = torch.autograd.grad(response.log_partition, x)[0]
    torch.testing.assert_close(by_field, response.magnetization.detach(), rtol=0, atol=1e-8)
