"""What adaptive TAP and expectation propagation share: single spins and response in agreement.

Both solve the same equations, for the magnetizations m and the variances V of the cavity fields in
the coordinates of a frame, and read the same answers off them. They differ in how they iterate.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..deq._failure import report
from ..deq._watched import transformed, watched
from ..solvers import Solution, Status
from ..solvers._scale import is_host
from ._blocks import diagonal_blocks
from ._exact import Exact
from ._frames import Frame, Local, frame_of
from ._gaussian import GaussianPrior
from ._method import IteratedMethod, check_start, on_ordinary_tensors
from ._response import Later, Response, total_derivative
from ._system import SpinSystem, check_system

State = tuple[Tensor, Tensor]


class ConsistentMethod(IteratedMethod):
    """The frame of such a method. A subclass supplies `solve`."""

    def solve(
        self, frame: Frame, x: Tensor, start: Tensor | None
    ) -> tuple[Solution, Tensor | None]:
        """The solution for fields `x` in the frame, `value` = (m, V), and the `objective`."""
        raise NotImplementedError

    @on_ordinary_tensors
    def __call__(
        self, system: SpinSystem, fields: Tensor, *, start: Tensor | None = None
    ) -> Response:
        """Solve for fields `(*batch, N, *event)`.

        `start` are magnetizations to begin with, of the shape of `fields`; by default those of
        spins without couplings. Raises `TypeError` for a prior that is no instance of
        `IsingPrior`, as a subclass for any other scalar spin is, `PottsPrior`, `SphericalPrior` or
        `GaussianPrior`.
        """
        check_system(system)
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
            objective = (objective - constant.detach()).reshape(len(objective), *batch)
        solution = self._judged(solution, chi)

        def respond(flat: Tensor) -> Tensor:
            step, fields = AdaptiveTAPStep(frame.local), flat.view_as(x)
            return self.attached(step, (m, V), fields, frame.couplings)[0].flatten(1)

        def susceptibility() -> Tensor:
            return frame.pairs(total_derivative(respond, x.flatten(1)), batch)

        return Response(
            magnetization=frame.magnetization(m, batch),
            log_partition=(log + constant).reshape(batch),
            energy=(energy - constant).reshape(batch),
            cavity_variance=frame.variance(V, batch),
            solution=solution,
            method=type(self).__name__,
            _covariance=Later(lambda: frame.pairs(chi, batch), chi),
            _susceptibility=Later(susceptibility, frame.couplings, x, *system.prior.parameters()),
            objective=objective,
        )

    def _judged(self, solution: Solution, chi: Tensor) -> Solution:
        """A solution whose Λ − J is not positive definite has no distribution behind it."""
        broken = solution.converged & ~torch.isfinite(chi.detach()).flatten(1).all(dim=1)
        solution = solution.with_status(broken, Status.INDEFINITE)
        report(solution, self.on_failure, type(self).__name__, self.options["tol"], stacklevel=5)
        return solution


class AdaptiveTAPStep(nn.Module):
    """One step of the equations, from fields `(B, N, k)` and couplings `(N·k, N·k)`."""

    local: Local

    def __init__(self, local: Local) -> None:
        super().__init__()
        self.local = local

    def forward(self, state: State, x: Tensor, couplings: Tensor) -> State:
        m, V = state
        field = x + pull(couplings, m) - apply(V, m)
        covariance = self.local.covariance(field, V)
        return self.local.mean(field, V), next_variance(self.local, covariance, V, couplings)[0]

    def select_samples(self, index: Tensor, x: Tensor, couplings: Tensor) -> tuple[Tensor, Tensor]:
        """The arguments of some samples."""
        return x[index], couplings


def next_variance(
    local: Local, covariance: Tensor, V: Tensor, couplings: Tensor
) -> tuple[Tensor, Tensor, Whitened]:
    """V_i = Λ_i − (χ_ii)⁻¹ from covariances C_i, and Q_i with χ_ii = C_i Q_i.

    Written as V_i − Q_i⁻¹T_i, Q_i = 1 − T_i C_i, in which nothing is large.
    """
    white = whiten(covariance, V, couplings)
    gap = mismatch(local, white, V)
    k = V.shape[-1]
    Q = torch.eye(k, dtype=V.dtype, device=V.device) - gap @ covariance
    # What matching does not determine (antisymmetric parts; on the sphere all but the trace)
    # would stay as it is for ever and make the equations singular.
    new_V = local.match(V - inverse(Q) @ gap)
    new_V = 0.5 * (new_V + new_V.mT)
    # Where Λ − J is not positive definite on the way, V grows, slowly: m has time to move, and no
    # such state is a fixed point.
    sound = white.sound[:, None, None, None]
    typical = covariance.diagonal(dim1=-2, dim2=-1).flatten(1).mean(dim=1)[:, None, None, None]
    # Saturated spins have none, and the derivative of 1/0 is NaN even where it is not wanted.
    typical = torch.where(sound, 1.0, typical)
    grown = V + 0.1 / typical * torch.eye(k, dtype=V.dtype, device=V.device)
    return torch.where(sound, new_V, grown), Q, white


def pull(couplings: Tensor, m: Tensor) -> Tensor:
    """Σ_j J_ij m_j for couplings `(n, n)`."""
    return (m.flatten(1) @ couplings.mT).view_as(m)


def apply(blocks: Tensor, m: Tensor) -> Tensor:
    """B_i m_i for blocks `(B, N, k, k)`."""
    return (blocks @ m.unsqueeze(-1)).squeeze(-1)


def inverse(blocks: Tensor) -> Tensor:
    """The inverse of each block; not finite, instead of an error, for a singular one."""
    return 1 / blocks if blocks.shape[-1] == 1 else torch.linalg.inv_ex(blocks).inverse


class Whitened(NamedTuple):
    """1 + cᵀKc with c cᵀ = C and K = blockdiag V − J, in the place of Λ − J = C⁻¹ + K.

    Of strongly polarised spins C⁻¹ is a number so large that V is lost beside it; here it never
    appears. χ = c (1 + cᵀKc)⁻¹ cᵀ.
    """

    factor: Tensor  # Cholesky factor `(B, n, n)`; 1 where the matrix is not positive definite
    sound: Tensor  # `(B,)`, where it is
    root: Tensor  # c, `(B, N, k, k)`
    pulled: Tensor  # cᵀK, `(B, n, n)`


def whiten(covariance: Tensor, V: Tensor, couplings: Tensor) -> Whitened:
    """The bulk of a step's work, with few temporaries of the size of the couplings."""
    batch, sites, k = covariance.shape[:3]
    root = _root(covariance)
    pulled = _rows(-root, couplings.expand(batch, -1, -1))
    _diagonal(pulled, k).add_((root.mT @ V).movedim(1, -1))
    operator = _columns(pulled, root)
    operator.diagonal(dim1=1, dim2=2).add_(1.0)
    factor, failed = torch.linalg.cholesky_ex(operator)
    sound = failed == 0
    if not is_host(sound) or watched(sound) or not bool(sound.all()):
        identity = torch.eye(sites * k, dtype=factor.dtype, device=factor.device)
        factor = torch.where(sound[:, None, None], factor, identity)
    return Whitened(factor, sound, root, pulled)


def mismatch(local: Local, white: Whitened, V: Tensor) -> Tensor:
    """T_i = [K − KχK]_ii, `(B, N, k, k)`: χ_ii = C_i − C_i T_i C_i, so it is 0 at a solution."""
    batch, sites, k = V.shape[:3]
    if k == 1 and not (white.factor.requires_grad or transformed(white.factor)):
        return _scalar_mismatch(white, V)
    reached = torch.linalg.solve_triangular(white.factor, white.pulled, upper=False)
    columns = reached.view(batch, sites * k, sites, k)
    gap = local.match(V - torch.einsum("bnik,bnil->bikl", columns, columns))
    return 0.5 * (gap + gap.mT)


def _scalar_mismatch(white: Whitened, V: Tensor) -> Tensor:
    """`mismatch` of scalar spins from M = (1 + cKc)⁻¹, three quarters of the arithmetic.

    As (1 + cKc) M = 1, (KcM)_ij = −M_ij / c_i, but for j = i, where the 1 would swallow what is
    left of it: there it is the sum r_i = Σ_j M_ij c_j K_ji. Without a graph only, since derivatives
    of 1 / c_i are out of range for frozen spins.
    """
    M = torch.cholesky_inverse(white.factor)
    own = M.diagonal(dim1=1, dim2=2).clone().view_as(V)
    # It is symmetric, and transposed it lies in memory as cK does.
    reached = M.mT.mul_(white.pulled).sum(dim=1).view_as(V)
    return V * (1 - own) + reached / white.root - white.root * V * reached


def respond(white: Whitened, b: Tensor) -> Tensor:
    """χ b for `b` `(B, N, k)`."""
    inner = apply(white.root.mT, b).flatten(1).unsqueeze(-1)
    solved = torch.cholesky_solve(inner, white.factor).squeeze(-1).view_as(b)
    return apply(white.root, solved)


def _root(covariance: Tensor) -> Tensor:
    """c with c cᵀ = C. A spin that is frozen up to rounding has a very small one, never zero."""
    limits = torch.finfo(covariance.dtype)
    if covariance.shape[-1] == 1:
        return covariance.clamp_min(limits.tiny).sqrt()
    k = covariance.shape[-1]
    identity = torch.eye(k, dtype=covariance.dtype, device=covariance.device)
    # That of Potts spins is singular. What is added is small beside it, however small it is.
    trace = covariance.diagonal(dim1=-2, dim2=-1).sum(dim=-1)
    least = limits.eps * trace + limits.tiny**0.75
    return torch.linalg.cholesky_ex(covariance + least[..., None, None] * identity).L


def _rows(left: Tensor, matrix: Tensor) -> Tensor:
    """lᵀ M for blocks l `(B, N, k, k)` on the diagonal, M `(B, n, n)`."""
    batch, sites, k = left.shape[:3]
    if k == 1:
        return matrix * left.view(batch, sites, 1)
    blocks = matrix.reshape(batch, sites, k, sites * k)
    return (left.mT @ blocks).view(batch, sites * k, sites * k)


def _columns(matrix: Tensor, right: Tensor) -> Tensor:
    """M r, likewise."""
    batch, sites, k = right.shape[:3]
    if k == 1:
        return matrix * right.view(batch, 1, sites)
    blocks = matrix.reshape(batch, sites * k, sites, k)
    return torch.einsum("bnik,bikl->bnil", blocks, right).reshape(batch, sites * k, sites * k)


def _diagonal(matrix: Tensor, k: int) -> Tensor:
    """The k×k blocks on the diagonal of `(B, n, n)`, a view `(B, k, k, N)`."""
    batch, size = matrix.shape[:2]
    return matrix.view(batch, size // k, k, size // k, k).diagonal(dim1=1, dim2=3)


def response(total: Tensor, couplings: Tensor) -> tuple[Tensor, Tensor]:
    """χ = (blockdiag Λ − J)⁻¹ `(B, n, n)`, and where the matrix is positive definite."""
    batch, sites, k = total.shape[:3]
    operator = -couplings.expand(batch, -1, -1)
    _diagonal(operator, k).add_(total.movedim(1, -1))
    factor, failed = torch.linalg.cholesky_ex(operator)
    sound = failed == 0
    identity = torch.eye(sites * k, dtype=factor.dtype, device=factor.device)
    return torch.cholesky_inverse(torch.where(sound[:, None, None], factor, identity)), sound


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
    echo = apply(V, m)
    field = x + pulled - echo
    factor, sound, root, _ = whiten(frame.local.covariance(field, V), V, couplings)
    chi = _columns(_rows(root.mT, torch.cholesky_inverse(factor)), root.mT)
    chi = torch.where(sound[:, None, None], chi, torch.nan)
    log = (
        frame.local.log_partition(field, V).sum(dim=1)
        - factor.diagonal(dim1=-2, dim2=-1).log().sum(dim=-1)  # ½ log det C(Λ − J)
        + 0.5 * (m * (echo - pulled)).flatten(1).sum(dim=1)
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
    V = prior.precision().to(flat) - torch.linalg.inv(diagonal_blocks(flat, n))
    return Response(
        magnetization=answer.magnetization,
        log_partition=answer.log_partition,
        energy=answer.energy,
        cavity_variance=V.reshape(*fields.shape, d),
        solution=None,
        method=method,
        _covariance=answer._covariance,
        _susceptibility=answer._susceptibility,
    )
