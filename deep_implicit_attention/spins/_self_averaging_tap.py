"""Self-averaging TAP: one variance of the cavity fields for all sites."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..deq._failure import report
from ..solvers import Solution
from ._ising import IsingPrior
from ._method import IteratedMethod
from ._response import Response, total_derivative
from ._system import SpinSystem

State = tuple[Tensor, Tensor]

# More than the tests' spectra need; a step costs O(N).
_NEWTON_STEPS = 40


class SelfAveragingTAP(IteratedMethod):
    """Adaptive TAP with one number V for all sites, for Ising spins (Opper, Winther 2001, Phys.
    Rev. E 64, 056131). With {e_k} the spectrum of J and χ̄ = (1/N) Σ_i C_i,

        find λ > max e_k with (1/N) Σ_k 1/(λ − e_k) = χ̄,   V = λ − 1/χ̄
        m_i = tanh(x_i + Σ_j J_ij m_j − V m_i)
        log Z = Σ_i log Z0(h_i, V) − ½ Σ_k log(λ − e_k) + ½ mᵀ(λ − J)m − ½ N log χ̄ − ½ mᵀm/χ̄

    and χ = (λ − J)⁻¹. For the SK model V tends to β²(1 − q). ∂ log Z/∂x is the magnetization.

    Cost: one eigendecomposition for each J, then O(B N²) a step.
    """

    def __call__(self, system: SpinSystem, fields: Tensor) -> Response:
        """Solve for fields `(*batch, N)`."""
        if not isinstance(system.prior, IsingPrior):
            raise TypeError(
                "SelfAveragingTAP has equations for IsingPrior, not "
                f"{type(system.prior).__name__}; AdaptiveTAP has"
            )
        system.check_fields(fields)
        n, batch = system.num_spins, fields.shape[:-1]
        x = fields.reshape(-1, n)
        couplings = system.couplings
        spectrum = torch.linalg.eigvalsh(couplings)
        step = _Step()

        def solve(x: Tensor) -> Solution:
            start = torch.tanh(x), torch.zeros_like(x[:, :1])
            return self.fixed_point(step, start, x, couplings, spectrum)

        solution = solve(x)
        report(solution, self.on_failure, "SelfAveragingTAP", self.options["tol"])
        m, V = solution.value
        pulled = m @ couplings.mT
        field = x + pulled - V * m
        mean_chi = system.prior.covariance(field).mean(dim=1)
        level = V[:, 0] + 1 / mean_chi  # λ
        gaps = level[:, None] - spectrum
        overlap, size = (m * pulled).sum(dim=1), m.square().sum(dim=1)
        log = (
            system.prior.log_partition(field, V).sum(dim=1)
            - 0.5 * gaps.log().sum(dim=1)
            + 0.5 * (level * size - overlap)
            - 0.5 * n * mean_chi.log()
            - 0.5 * size / mean_chi
        )
        # Σ_ij J_ij χ_ij = Σ_k e_k / (λ − e_k)
        energy = -0.5 * (overlap + (spectrum / gaps).sum(dim=1)) - (x * m).sum(dim=1)

        def covariance() -> Tensor:
            identity = torch.eye(n, dtype=x.dtype, device=x.device)
            chi = torch.linalg.inv(level[:, None, None] * identity - couplings)
            return chi.reshape(*batch, n, n)

        return Response(
            magnetization=m.reshape(fields.shape),
            log_partition=log.reshape(batch),
            energy=energy.reshape(batch),
            cavity_variance=V.expand_as(m).reshape(fields.shape),
            solution=solution,
            method="SelfAveragingTAP",
            _covariance=covariance,
            _susceptibility=lambda: total_derivative(lambda x: solve(x).value[0], x).reshape(
                *batch, n, n
            ),
        )


class _Step(nn.Module):
    """One step for the state (m, V); V is `(B, 1)`."""

    def forward(self, state: State, x: Tensor, couplings: Tensor, spectrum: Tensor) -> State:
        m, V = state
        m = torch.tanh(x + m @ couplings.mT - V * m)
        mean_chi = (1 - m.square()).mean(dim=1, keepdim=True)
        return m, _level(mean_chi, spectrum) - 1 / mean_chi


def _level(mean_chi: Tensor, spectrum: Tensor) -> Tensor:
    """λ `(B, 1)` above the spectrum with (1/N) Σ_k 1/(λ − e_k) = χ̄ `(B, 1)`.

    Newton's method on G(λ) = 1/χ̄ with G the harmonic mean of the gaps λ − e_k. G increases and is
    concave, so from the left of the root the steps approach it monotonically; at
    λ = max e + 1/(N χ̄) the largest eigenvalue alone reaches χ̄, so that is on the left. The last two
    steps carry the graph: each doubles the order to which derivatives are right, so they are to
    third order.
    """
    target = 1 / mean_chi

    def newton(level: Tensor) -> Tensor:
        inverse = 1 / (level - spectrum)
        mean = inverse.mean(dim=-1, keepdim=True)
        slope = inverse.square().mean(dim=-1, keepdim=True) / mean.square()
        return level + (target - 1 / mean) / slope

    with torch.no_grad():
        level = spectrum[-1] + target / len(spectrum)
        for _ in range(_NEWTON_STEPS):
            level = newton(level)
    return newton(newton(level))
