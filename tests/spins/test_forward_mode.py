"""Forward-mode derivatives of what has a closed form, against finite differences."""

import pytest
import torch
from torch import nn
from torch.func import functional_call, jvp

from deep_implicit_attention.spins import AdaptiveTAP, Exact, GaussianPrior, IsingPrior, SpinSystem

N, D = 3, 2


def _along(f):
    """df/dt at 0, forward and by differences."""
    zero, one, step = torch.tensor([0.0, 1.0, 1e-5], dtype=torch.float64)
    _, found = jvp(f, (zero,), (one,))
    expected = (f(step) - f(-step)) / (2 * step)
    torch.testing.assert_close(found, expected.detach(), rtol=1e-6, atol=1e-7)


@pytest.fixture
def couplings():
    torch.manual_seed(0)
    J = torch.randn(2, N, N, D, D, dtype=torch.float64)
    J = J + J.permute(0, 2, 1, 4, 3)
    J[:, range(N), range(N)] = 0
    return 0.1 * J[0], J[1]


@pytest.fixture
def prior():
    return GaussianPrior(torch.tensor([0.3, -1.0]), torch.tensor([[1.3, 0.5], [0.5, 0.8]])).double()


@pytest.fixture
def x():
    torch.manual_seed(1)
    return torch.randn(N, D, dtype=torch.float64)


class _Read(nn.Module):
    def __init__(self, prior, read):
        super().__init__()
        self.prior, self.read = prior, read

    def forward(self):
        return self.read(self.prior)


def _by_parameters(prior, read):
    torch.manual_seed(2)
    where = {f"prior.{name}": p.detach() for name, p in prior.named_parameters()}
    way = {name: torch.randn_like(p) for name, p in where.items()}
    module = _Read(prior, read)
    _along(lambda t: functional_call(module, {k: p + t * way[k] for k, p in where.items()}, ()))


@pytest.mark.parametrize("moment", ["log_partition", "mean", "covariance"])
def test_gaussian_moments_by_the_parameters(prior, x, moment):
    V = torch.full((N, 1, 1), 0.2) * torch.eye(D, dtype=x.dtype)
    _by_parameters(prior, lambda prior: getattr(prior, moment)(x, V))
    _by_parameters(prior, lambda prior: prior.precision())


@pytest.mark.parametrize("method", [Exact, AdaptiveTAP])
@pytest.mark.parametrize("answer", ["magnetization", "log_partition", "covariance"])
def test_gaussian_systems(couplings, prior, x, method, answer):
    J, way = couplings
    ask = lambda J, prior: getattr(method()(SpinSystem(J, prior), x), answer)  # noqa: E731
    _along(lambda t: ask(J + t * way, prior))
    _by_parameters(prior, lambda prior: ask(J, prior))


def test_what_is_computed_when_asked_for_keeps_its_tangent(couplings, x):
    J, way = (part[..., 0, 0] for part in couplings)
    _along(lambda t: Exact()(SpinSystem(J + t * way, IsingPrior()), x[:, 0]).covariance)
