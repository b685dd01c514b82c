"""Symmetries of spin systems: what turns or renames the spins does the same to every answer.

With an orthogonal matrix R_i at every site that leaves the prior as it is (Ising: a sign, a gauge;
Potts: a permutation of the states; sphere: a rotation or reflection) and an order π of the sites,

    J_ij → R_i J_π(i)π(j) R_jᵀ,   x_i → R_i x_π(i)

takes m_i to R_i m_π(i), χ_ij to R_i χ_π(i)π(j) R_jᵀ, V_i to R_i V_π(i) R_iᵀ, and leaves log Z,
energy and entropy alone. For couplings J_ij · 1, and a Gaussian prior, which turns too, R_i is the
same everywhere. Couplings are weak: there is one fixed point.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from deep_implicit_attention.solvers import anderson
from deep_implicit_attention.spins import (
    TAP,
    AdaptiveTAP,
    Exact,
    ExpectationPropagation,
    GaussianPrior,
    IsingPrior,
    NaiveMeanField,
    PottsPrior,
    SelfAveragingTAP,
    SphericalPrior,
    SpinSystem,
)
from deep_implicit_attention.spins._prior import Prior

SITES = 4
METHODS = {
    "naive": NaiveMeanField(tol=1e-12, solver=anderson),
    "tap": TAP(tol=1e-12),
    "adaptive": AdaptiveTAP(tol=1e-12, solver=anderson),
    "self-averaging": SelfAveragingTAP(tol=1e-12, solver=anderson),
    "ep": ExpectationPropagation(tol=1e-12, damping=0.1),
    "exact": Exact(),
}
# Kind of system, standard deviation of its couplings, and the methods with equations for it.
SYSTEMS = {
    "ising": (0.3, ["naive", "tap", "adaptive", "self-averaging", "ep", "exact"]),
    "potts": (0.4, ["naive", "tap", "adaptive", "ep", "exact"]),
    "potts-scalar": (0.4, ["naive", "tap", "adaptive", "self-averaging", "ep", "exact"]),
    "gaussian": (0.1, ["naive", "tap", "adaptive", "ep", "exact"]),
    "gaussian-scalar": (0.1, ["naive", "tap", "adaptive", "ep", "exact"]),
    "sphere": (0.2, ["naive", "adaptive", "ep"]),
    "sphere-scalar": (0.2, ["naive", "adaptive", "self-averaging", "ep"]),
}
CASES = [(kind, name) for kind, (_, names) in SYSTEMS.items() for name in names]


class Random:
    """Everything a seed stands for."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def couplings(self, k: int, scale: float) -> Tensor:
        """`(N, N, k, k)`, with J_ij = J_jiᵀ and no self-coupling."""
        upper = scale * self.normal(SITES, SITES, k, k)
        upper = upper * torch.ones(SITES, SITES).triu(1)[:, :, None, None]
        return upper + upper.permute(1, 0, 3, 2)

    def orthogonal(self, k: int) -> Tensor:
        return torch.linalg.qr(self.normal(k, k)).Q

    def permutation(self, k: int) -> Tensor:
        return torch.eye(k, dtype=torch.float64)[torch.randperm(k, generator=self.generator)]

    def sign(self) -> Tensor:
        return self.normal(1, 1).sign()


def priors(kind: str, random: Random) -> tuple[Prior, Prior, Tensor]:
    """The prior, the prior after the turn, and the turn R_i `(N, k, k)`."""
    if kind == "ising":
        return IsingPrior(), IsingPrior(), torch.stack([random.sign() for _ in range(SITES)])
    one = kind.endswith("-scalar") or kind == "gaussian"
    if kind.startswith("gaussian"):
        root, mean, turn = random.normal(2, 2), random.normal(2), random.orthogonal(2)
        covariance = 0.1 * root @ root.T + 0.5 * torch.eye(2, dtype=torch.float64)
        before = GaussianPrior(mean, covariance)
        return before, GaussianPrior(turn @ mean, turn @ covariance @ turn.T), turn.repeat(4, 1, 1)
    if kind.startswith("potts"):
        prior, draw = PottsPrior(3), random.permutation
    else:
        prior, draw = SphericalPrior(3, 1.1), random.orthogonal
    turns = torch.stack([draw(3) for _ in range(SITES)])
    return prior, prior, turns[:1].expand(SITES, -1, -1) if one else turns


@pytest.mark.quick(
    "ising-*",
    "potts-naive",
    "potts-adaptive",
    "potts-ep",
    "potts-exact",
    "gaussian-[!st]*",
    "gaussian-scalar-[!t]*",
    "sphere-naive",
    "sphere-adaptive",
    "*-self-averaging",
)
@pytest.mark.parametrize(("kind", "name"), CASES)
@settings(max_examples=3, deadline=None, derandomize=True, database=None)
@given(seed=st.integers(0, 2**16), order=st.permutations(range(SITES)))
def test_answers_turn_with_the_system(kind: str, name: str, seed: int, order: list[int]) -> None:
    random, method = Random(seed), METHODS[name]
    prior, turned_prior, turn = priors(kind, random)
    k = prior.event_shape.numel()
    scalar = kind.endswith("-scalar")
    couplings = random.couplings(1 if scalar else k, SYSTEMS[kind][0])
    x = 0.5 * random.normal(SITES, k)
    turned = couplings[order][:, order]
    if not scalar:
        turned = torch.einsum("iab,ijbc,jdc->ijad", turn, turned, turn)
    if scalar or kind == "ising":
        couplings, turned = couplings[..., 0, 0], turned[..., 0, 0]
    turned_x = torch.einsum("iab,ib->ia", turn, x[order])
    shape = (SITES, *prior.event_shape)
    before = method(SpinSystem(couplings, prior), x.view(shape))
    after = method(SpinSystem(turned, turned_prior), turned_x.view(shape))

    def same(mine: Tensor, expected: Tensor) -> None:
        torch.testing.assert_close(mine.flatten(), expected.flatten(), rtol=1e-8, atol=1e-9)

    for quantity in ("log_partition", "energy", "entropy"):
        same(getattr(after, quantity), getattr(before, quantity))
    same(after.magnetization, turn @ before.magnetization.view(SITES, k, 1)[order])
    chi = before.covariance.view(SITES, k, SITES, k)[order][:, :, order]
    same(after.covariance, torch.einsum("iab,ibjc,jdc->iajd", turn, chi, turn))
    if before.cavity_variance is not None and after.cavity_variance is not None:
        V = before.cavity_variance.view(SITES, k, k)[order]
        same(after.cavity_variance, turn @ V @ turn.mT)
    has_variance = name not in ("naive", "exact")
    assert (before.cavity_variance is not None) == has_variance
