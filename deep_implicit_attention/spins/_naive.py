"""Naive mean field: every spin in the mean field of the others."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..solvers import Solution
from ._closure import Closure, naive_response
from ._prior import Prior
from ._system import SpinSystem

State = tuple[Tensor, Tensor]


class NaiveMeanField(Closure):
    """The Weiss equations, for any prior:

        m_i = mean(x_i + Σ_j J_ij m_j)
        log Z ≥ Σ_i log Z0(h_i) − ½ Σ_ij m_iᵀ J_ij m_j,   χ = (blockdiag C_i⁻¹ − J)⁻¹

    `log_partition` is a lower bound of the exact one (Gibbs–Bogoliubov). Derivatives of it are the
    magnetization (fields) and m_i m_jᵀ (couplings). Residuals are relative to m, however small;
    without fields, where m = 0 is a solution, to spins of order one. Cost: O(B N² d²) a step;
    `covariance` O(B N³ d³).

    With strong couplings there are several solutions. Damped Picard iteration, the default, settles
    in stable ones, which are maxima of the bound; accelerated solvers may find saddles.

    Options are those of `IteratedMethod`; call it as ``method(system, fields, start=None)``.
    """

    def V(self, system: SpinSystem, covariance: Tensor) -> None:
        return None

    def linear_response(
        self, system: SpinSystem, x: Tensor, m: Tensor, covariance: Tensor
    ) -> Tensor:
        return naive_response(system, covariance)

    def _solve(self, system: SpinSystem, x: Tensor, start: Tensor | None) -> Solution:
        # The covariances follow from m. As a part of the state they would swamp a small one.
        prior, unit = system.prior, _unit(system.prior, x)
        with torch.no_grad():
            begin = prior.mean(x) if start is None else start.detach()
        solution = self.fixed_point(_Step(prior), (begin, unit), x, system.couplings, unit)
        m = solution.value[0]
        return solution.with_value((m, prior.covariance(x + system.pull(m))))

    def _attached(self, system: SpinSystem, x: Tensor, m: Tensor, covariance: Tensor) -> Tensor:
        step, unit = _Step(system.prior), _unit(system.prior, x)
        return self.attached(step, (m, unit), x, system.couplings, unit)[0]


@torch.no_grad()
def _unit(prior: Prior, x: Tensor) -> Tensor:
    """1 for samples in whose fields `x` spins alone have no mean, so that m may vanish, else 0."""
    fieldless = (prior.mean(x) == 0).flatten(1).all(dim=1)
    return fieldless.to(x.dtype).view(-1, *[1] * (x.dim() - 1)).expand_as(x)


class _Step(nn.Module):
    """One step of the equations beside `unit`, which never moves: 1 where m may vanish, else 0."""

    def __init__(self, prior: Prior) -> None:
        super().__init__()
        self.prior = prior

    def forward(self, state: State, x: Tensor, couplings: Tensor, unit: Tensor) -> State:
        system = SpinSystem.unchecked(couplings, self.prior)
        return self.prior.mean(x + system.pull(state[0])), unit

    def select_samples(
        self, index: Tensor, x: Tensor, couplings: Tensor, unit: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The arguments of some samples."""
        return x[index], couplings, unit[index]
