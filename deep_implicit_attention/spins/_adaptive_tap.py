"""Adaptive TAP: the variance of the cavity fields from self-consistency with the response."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..deq._failure import report
from ..solvers import Solution, Status
from ._blocks import block_diagonal, diagonal_blocks
from ._exact import Exact
from ._frames import Frame, Local, frame_of
from ._gaussian import GaussianPrior
from ._method import IteratedMethod
from ._response import Response, total_derivative
from ._system import SpinSystem

State = tuple[Tensor, Tensor]


class AdaptiveTAP(IteratedMethod):
    """The equations of Opper and Winther (2001, Phys. Rev. E 64, 056131), for any prior:

        m_i = mean(h_i, V_i),   h_i = x_i + Σ_j J_ij m_j − V_i m_i,   C_i = covariance(h_i, V_i)
        Λ_i = V_i + C_i⁻¹,   χ = (blockdiag Λ − J)⁻¹,   V_i = Λ_i − (χ_ii)⁻¹

    so that χ_ii = C_i: single spins and linear response agree. With the cavity part
    a_i = Σ_j J_ij m_j − V_i m_i and g = (Λ − J) m,

        log Z = Σ_i log Z0(a_i + x_i, V_i) − ½ log det(Λ − J) + ½ gᵀm
                − Σ_i { ½ log det C_i + ½ m_iᵀ C_i⁻¹ m_i }

    Derivatives of `log_partition` are the magnetization (fields) and m_i m_jᵀ + χ_ij (couplings).
    `covariance` is χ, the response at fixed V; `susceptibility`, ∂m/∂x, also moves V and differs.
    Exact for a Gaussian prior, where nothing is iterated. Potts spins are treated in the q − 1
    dimensions across (1, …, 1); on the sphere only the traces of C_i and χ_ii are matched.

    Damped Picard iteration, the default, converges for weak and moderate couplings (all of the SK
    systems with N = 12 up to β = 1 in the tests); where it does not, that is reported. Cost:
    O(B N³ d³) a step, one Cholesky factorisation and its inverse.
    """

    def __call__(self, system: SpinSystem, fields: Tensor) -> Response:
        """Solve for fields `(*batch, N, *event)`."""
        system.check_fields(fields)
        if isinstance(system.prior, GaussianPrior):
            return _exact(system, system.prior, fields)
        frame = frame_of(system)
        batch = fields.shape[: fields.dim() - 1 - len(system.event_shape)]
        x = frame.fields(fields)
        solution = self._solve(frame, x)
        m, V = solution.value
        log, energy, chi = _read(frame, x, m, V)
        solution = self._judged(solution, chi)

        def respond(flat: Tensor) -> Tensor:
            return self._solve(frame, flat.view_as(x)).value[0].flatten(1)

        return Response(
            magnetization=frame.magnetization(m, batch),
            log_partition=(log + frame.constant(fields)).reshape(batch),
            energy=(energy - frame.constant(fields)).reshape(batch),
            cavity_variance=frame.variance(V, batch),
            solution=solution,
            method="AdaptiveTAP",
            _covariance=lambda: frame.pairs(chi, batch),
            _susceptibility=lambda: frame.pairs(total_derivative(respond, x.flatten(1)), batch),
        )

    def _solve(self, frame: Frame, x: Tensor) -> Solution:
        zero = x.new_zeros(*x.shape, x.shape[-1])
        start = frame.local.mean(x, zero), zero
        return self.fixed_point(_Step(frame.local), start, x, frame.couplings)

    def _judged(self, solution: Solution, chi: Tensor) -> Solution:
        """A solution whose Λ − J is not positive definite has no distribution behind it."""
        broken = solution.converged & ~torch.isfinite(chi.detach()).flatten(1).all(dim=1)
        solution = solution.with_status(broken, Status.INDEFINITE)
        report(solution, self.on_failure, "AdaptiveTAP", self.options["tol"], stacklevel=4)
        return solution


class _Step(nn.Module):
    """One step of the equations."""

    local: Local

    def __init__(self, local: Local) -> None:
        super().__init__()
        self.local = local

    def forward(self, state: State, x: Tensor, couplings: Tensor) -> State:
        m, V = state
        field = x + _pull(couplings, m) - (V @ m.unsqueeze(-1)).squeeze(-1)
        total = V + torch.linalg.inv_ex(self.local.covariance(field, V)).inverse
        chi, sound = _response(total, couplings)
        matched = self.local.match(diagonal_blocks(chi, x.shape[1]))
        # What matching does not determine (antisymmetric parts; on the sphere all but the trace)
        # would stay as it is for ever and make the equations singular.
        new_V = self.local.match(total - torch.linalg.inv_ex(matched).inverse)
        new_V = 0.5 * (new_V + new_V.mT)
        # Where Λ − J is not positive definite on the way, V stays and only m moves.
        new_V = torch.where(sound[:, None, None, None], new_V, V)
        return self.local.mean(field, V), new_V


def _pull(couplings: Tensor, m: Tensor) -> Tensor:
    return (m.flatten(1) @ couplings.mT).view_as(m)


def _response(total: Tensor, couplings: Tensor) -> tuple[Tensor, Tensor]:
    """χ = (blockdiag Λ − J)⁻¹ `(B, n, n)`, and where the matrix is positive definite."""
    operator = block_diagonal(total) - couplings
    factor, failed = torch.linalg.cholesky_ex(operator)
    sound = failed == 0
    identity = torch.eye(operator.shape[-1], dtype=operator.dtype, device=operator.device)
    safe = torch.where(sound[:, None, None], factor, identity)
    return torch.cholesky_inverse(safe), sound


def _read(frame: Frame, x: Tensor, m: Tensor, V: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """log Z, energy and χ at a fixed point; χ is NaN where Λ − J is not positive definite."""
    couplings = frame.couplings
    pulled = _pull(couplings, m)
    field = x + pulled - (V @ m.unsqueeze(-1)).squeeze(-1)
    covariance = frame.local.covariance(field, V)
    inverse = torch.linalg.inv_ex(covariance).inverse
    total = V + inverse
    chi, sound = _response(total, couplings)
    chi = torch.where(sound[:, None, None], chi, torch.nan)
    g = (total @ m.unsqueeze(-1)).squeeze(-1) - pulled
    operator = block_diagonal(total) - couplings
    log = (
        frame.local.log_partition(field, V).sum(dim=1)
        - 0.5 * torch.linalg.slogdet(operator).logabsdet
        + 0.5 * (g * m).flatten(1).sum(dim=1)
        - 0.5 * torch.linalg.slogdet(covariance).logabsdet.sum(dim=1)
        - 0.5 * (m * (inverse @ m.unsqueeze(-1)).squeeze(-1)).flatten(1).sum(dim=1)
    )
    pair = (couplings * chi).sum(dim=(1, 2))
    energy = -0.5 * ((m * pulled).flatten(1).sum(dim=1) + pair) - (x * m).flatten(1).sum(dim=1)
    return log, energy, chi


def _exact(system: SpinSystem, prior: GaussianPrior, fields: Tensor) -> Response:
    """The closed form: χ = (P − J)⁻¹, m = χ (x + Pμ), V_i = P − (χ_ii)⁻¹."""
    response = Exact()(system, fields)
    n, d = system.num_spins, system.event_shape[0]
    flat = response.covariance.reshape(-1, n * d, n * d)
    V = prior.precision() - torch.linalg.inv(diagonal_blocks(flat, n))
    return Response(
        magnetization=response.magnetization,
        log_partition=response.log_partition,
        energy=response.energy,
        cavity_variance=V.reshape(*fields.shape, d),
        solution=None,
        method="AdaptiveTAP",
        _covariance=lambda: response.covariance,
        _susceptibility=lambda: response.covariance,
    )
