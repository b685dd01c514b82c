"""What adaptive TAP and expectation propagation share: single spins and response in agreement.

Both solve the same equations, for the magnetizations m and the variances V of the cavity fields in
the coordinates of a frame, and read the same answers off them. They differ in how they iterate.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..deq._failure import report
from ..solvers import Solution, Status
from ._blocks import diagonal_blocks
from ._exact import Exact
from ._frames import Frame, Local, frame_of
from ._gaussian import GaussianPrior
from ._method import IteratedMethod, check_start
from ._response import Response, total_derivative
from ._system import SpinSystem


class ConsistentMethod(IteratedMethod):
    """The frame of such a method. A subclass supplies `solve`."""

    def solve(
        self, frame: Frame, x: Tensor, start: Tensor | None
    ) -> tuple[Solution, Tensor | None]:
        """The solution for fields `x` in the frame, `value` = (m, V), and the `objective`."""
        raise NotImplementedError

    def __call__(
        self, system: SpinSystem, fields: Tensor, *, start: Tensor | None = None
    ) -> Response:
        """Solve for fields `(*batch, N, *event)`.

        `start` are magnetizations to begin with, of the shape of `fields`; by default those of
        spins without couplings.
        """
        system.check_fields(fields)
        check_start(start, fields)
        if isinstance(system.prior, GaussianPrior):
            return _exact(system, system.prior, fields, type(self).__name__)
        frame = frame_of(system, type(self).__name__)
        batch = fields.shape[: fields.dim() - 1 - len(system.event_shape)]
        x = frame.fields(fields)
        begin = None if start is None else frame.coordinates(start.detach())
        solution, objective = self.solve(frame, x, begin)
        m, V = solution.value
        log, energy, chi = _read(frame, x, m, V)
        constant = frame.constant(fields)
        if objective is not None:
            objective = (objective - constant.detach()).reshape(-1, *batch)
        solution = self._judged(solution, chi)

        def respond(flat: Tensor) -> Tensor:
            return self.solve(frame, flat.view_as(x), m.detach())[0].value[0].flatten(1)

        return Response(
            magnetization=frame.magnetization(m, batch),
            log_partition=(log + constant).reshape(batch),
            energy=(energy - constant).reshape(batch),
            cavity_variance=frame.variance(V, batch),
            solution=solution,
            method=type(self).__name__,
            _covariance=lambda: frame.pairs(chi, batch),
            _susceptibility=lambda: frame.pairs(total_derivative(respond, x.flatten(1)), batch),
            objective=objective,
        )

    def _judged(self, solution: Solution, chi: Tensor) -> Solution:
        """A solution whose Λ − J is not positive definite has no distribution behind it."""
        broken = solution.converged & ~torch.isfinite(chi.detach()).flatten(1).all(dim=1)
        solution = solution.with_status(broken, Status.INDEFINITE)
        report(solution, self.on_failure, type(self).__name__, self.options["tol"], stacklevel=4)
        return solution


def pull(couplings: Tensor, m: Tensor) -> Tensor:
    """Σ_j J_ij m_j for couplings `(n, n)`."""
    return (m.flatten(1) @ couplings.mT).view_as(m)


def apply(blocks: Tensor, m: Tensor) -> Tensor:
    """B_i m_i for blocks `(B, N, k, k)`."""
    return (blocks @ m.unsqueeze(-1)).squeeze(-1)


def inverse(blocks: Tensor) -> Tensor:
    """The inverse of each block; not finite, instead of an error, for a singular one."""
    return 1 / blocks if blocks.shape[-1] == 1 else torch.linalg.inv_ex(blocks).inverse


def cholesky(total: Tensor, couplings: Tensor) -> tuple[Tensor, Tensor]:
    """The factor of blockdiag Λ − J `(B, n, n)`, and where that is positive definite.

    Elsewhere the factor is 1. It is the bulk of a step's work, so it makes one temporary only.
    """
    batch, sites, k = total.shape[:3]
    operator = -couplings.expand(batch, -1, -1)
    blocks = operator.view(batch, sites, k, sites, k).diagonal(dim1=1, dim2=3)
    blocks += total.movedim(1, -1)
    factor, failed = torch.linalg.cholesky_ex(operator)
    sound = failed == 0
    if torch.compiler.is_compiling() or not bool(sound.all()):
        identity = torch.eye(sites * k, dtype=factor.dtype, device=factor.device)
        factor = torch.where(sound[:, None, None], factor, identity)
    return factor, sound


def response(total: Tensor, couplings: Tensor) -> tuple[Tensor, Tensor]:
    """χ = (blockdiag Λ − J)⁻¹ `(B, n, n)`, and where the matrix is positive definite."""
    factor, sound = cholesky(total, couplings)
    return torch.cholesky_inverse(factor), sound


def matched(local: Local, chi: Tensor, sites: int) -> Tensor:
    """The part of the blocks χ_ii that single spins must agree with, exactly symmetric."""
    blocks = local.match(diagonal_blocks(chi, sites))
    return 0.5 * (blocks + blocks.mT)


def reaction(local: Local, couplings: Tensor, covariance: Tensor) -> Tensor:
    """Σ_j J_ij C_j J_ijᵀ `(B, N, k, k)`, the variance of the cavity fields for weak couplings."""
    sites, k = covariance.shape[1:3]
    blocks = couplings.view(sites, k, sites, k)
    return local.match(torch.einsum("iajb,zjbc,idjc->ziad", blocks, covariance, blocks))


def _read(frame: Frame, x: Tensor, m: Tensor, V: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """log Z, energy and χ at a fixed point, NaN where Λ − J is not positive definite."""
    couplings = frame.couplings
    pulled = pull(couplings, m)
    field = x + pulled - apply(V, m)
    covariance = frame.local.covariance(field, V)
    inverse_covariance = inverse(covariance)
    total = V + inverse_covariance
    factor, sound = cholesky(total, couplings)
    chi = torch.where(sound[:, None, None], torch.cholesky_inverse(factor), torch.nan)
    g = apply(total, m) - pulled
    log = (
        frame.local.log_partition(field, V).sum(dim=1)
        - factor.diagonal(dim1=-2, dim2=-1).log().sum(dim=-1)  # ½ log det(Λ − J)
        + 0.5 * (g * m).flatten(1).sum(dim=1)
        - 0.5 * torch.linalg.slogdet(covariance).logabsdet.sum(dim=1)
        - 0.5 * (m * apply(inverse_covariance, m)).flatten(1).sum(dim=1)
    )
    log = torch.where(sound, log, torch.nan)
    pair = (couplings * chi).sum(dim=(1, 2))
    energy = -0.5 * ((m * pulled).flatten(1).sum(dim=1) + pair) - (x * m).flatten(1).sum(dim=1)
    return log, energy, chi


def _exact(system: SpinSystem, prior: GaussianPrior, fields: Tensor, method: str) -> Response:
    """The closed form: χ = (P − J)⁻¹, m = χ (x + Pμ), V_i = P − (χ_ii)⁻¹."""
    answer = Exact()(system, fields)
    n, d = system.num_spins, system.event_shape[0]
    flat = answer.covariance.reshape(-1, n * d, n * d)
    V = prior.precision() - torch.linalg.inv(diagonal_blocks(flat, n))
    return Response(
        magnetization=answer.magnetization,
        log_partition=answer.log_partition,
        energy=answer.energy,
        cavity_variance=V.reshape(*fields.shape, d),
        solution=None,
        method=method,
        _covariance=lambda: answer.covariance,
        _susceptibility=lambda: answer.covariance,
    )
