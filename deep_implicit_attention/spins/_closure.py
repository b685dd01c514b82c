"""The frame of mean-field methods: solve for a state, read off the response."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

from ..deq._failure import ConvergenceWarning, report
from ..solvers import Solution
from ._blocks import block_diagonal
from ._exact import factorise
from ._gaussian import GaussianPrior
from ._method import IteratedMethod, check_start, on_ordinary_tensors
from ._prior import Prior
from ._response import Later, Response, total_derivative
from ._system import SpinSystem, check_system

State = tuple[Tensor, Tensor]


class Closure(IteratedMethod):
    """A closure of the mean-field equations: `method(system, fields) -> Response`.

    The equations are solved for the state (m, C) of magnetizations and single-spin covariances,
    with implicit gradients. A subclass supplies `V`, or solves for m alone. `covariance` of a
    solution that is not stable, so that χ has a negative eigenvalue, comes with a
    `ConvergenceWarning` unless `on_failure` is "ignore".
    """

    def check(self, prior: Prior) -> None:
        """Raise `TypeError` for a prior that the method has no equations for."""

    def V(self, system: SpinSystem, covariance: Tensor) -> Tensor | None:
        """The variance of the cavity fields, from single-spin covariances."""
        raise NotImplementedError

    def cavity(self, system: SpinSystem, covariance: Tensor) -> Tensor | None:
        """`V`, NaN where a spin has no distribution with it: so that sample fails, no other."""
        V = self.V(system, covariance)
        return None if V is None else system.prior.admissible(V)

    @on_ordinary_tensors
    def __call__(
        self, system: SpinSystem, fields: Tensor, *, start: Tensor | None = None
    ) -> Response:
        """Solve for fields `(*batch, N, *event)`.

        `start` are magnetizations to begin with, of the shape of `fields`; by default those of
        spins without couplings. Raises `ValueError` for a Gaussian system with P − J not positive
        definite, one Cholesky factorisation, O(N³ d³).
        """
        check_system(system)
        self.check(system.prior)
        system.check_fields(fields)
        check_start(start, fields)
        if isinstance(system.prior, GaussianPrior):
            with torch.no_grad():
                factorise(system, system.prior.precision().to(fields))
        event = (system.num_spins, *system.event_shape)
        batch = fields.shape[: fields.dim() - len(event)]
        x = fields.reshape(-1, *event)
        solution = self._solve(system, x, None if start is None else start.reshape(x.shape))
        report(solution, self.on_failure, type(self).__name__, self.options["tol"], stacklevel=4)
        m, covariance = solution.value
        V = self.cavity(system, covariance)
        interaction = 0.5 * _sites(m * system.pull(m))
        log = system.prior.log_partition(_field(system, x, m, V), V).sum(dim=1) - interaction
        energy = -interaction - _sites(x * m)
        if V is not None:
            echo = _sites(V * covariance)
            log = log + 0.5 * _sites(m * _apply(V, m)) - 0.25 * echo
            energy = energy - 0.5 * echo

        def susceptibility() -> Tensor:
            chi = self._susceptibility(system, x, m, covariance)
            return chi.reshape(*batch, *event, *event)

        def linear_response() -> Tensor:
            chi = self.linear_response(system, x, m, covariance)
            if self.on_failure != "ignore":
                _report_unstable(chi.detach()[solution.converged], type(self).__name__)
            return chi.reshape(*batch, *event, *event)

        inputs = system.couplings, x, *system.prior.parameters()
        return Response(
            magnetization=m.reshape(fields.shape),
            log_partition=log.reshape(batch),
            energy=energy.reshape(batch),
            cavity_variance=None if V is None else V.reshape(*batch, *V.shape[1:]),
            solution=solution,
            method=type(self).__name__,
            _covariance=Later(linear_response, *inputs),
            _susceptibility=Later(susceptibility, *inputs),
        )

    def linear_response(
        self, system: SpinSystem, x: Tensor, m: Tensor, covariance: Tensor
    ) -> Tensor:
        """χ, `(B, n, n)`: by default the total derivative ∂m/∂x."""
        return self._susceptibility(system, x, m, covariance)

    def _susceptibility(
        self, system: SpinSystem, x: Tensor, m: Tensor, covariance: Tensor
    ) -> Tensor:
        """∂m/∂x, `(B, n, n)`, at the solution (m, C)."""

        def respond(flat: Tensor) -> Tensor:
            return self._attached(system, flat.view_as(x), m, covariance).flatten(1)

        return total_derivative(respond, x.flatten(1))

    def _attached(self, system: SpinSystem, x: Tensor, m: Tensor, covariance: Tensor) -> Tensor:
        """m of the solution (m, C) with its implicit derivatives."""
        step = _Step(self, system.prior)
        return self.attached(step, (m, covariance), x, system.couplings)[0]

    def _solve(self, system: SpinSystem, x: Tensor, start: Tensor | None) -> Solution:
        """The solution for fields `x` `(B, N, *event)`, `value` = (m, C)."""
        m = system.prior.mean(x) if start is None else start.detach()
        field = x if start is None else x + system.pull(m)
        state = m, system.prior.covariance(field)
        return self.fixed_point(_Step(self, system.prior), state, x, system.couplings)


class _Step(nn.Module):
    """One step of the equations, a module so that the prior's parameters are differentiable."""

    def __init__(self, closure: Closure, prior: Prior) -> None:
        super().__init__()
        self.closure, self.prior = closure, prior

    def forward(self, state: State, x: Tensor, couplings: Tensor) -> State:
        system = SpinSystem.unchecked(couplings, self.prior)
        m, covariance = state
        V = self.closure.cavity(system, covariance)
        field = _field(system, x, m, V)
        return self.prior.mean(field, V), self.prior.covariance(field, V)

    def select_samples(self, index: Tensor, x: Tensor, couplings: Tensor) -> tuple[Tensor, Tensor]:
        """The arguments of some samples."""
        return x[index], couplings


def _report_unstable(chi: Tensor, method: str) -> None:
    """Warn if a χ `(B, n, n)` has a negative eigenvalue, as no covariance has.

    Zero is no sign: the covariance of Potts spins is singular.
    """
    finite = torch.isfinite(chi).flatten(1).all(dim=1)
    if not bool(finite.all()):
        warnings.warn(
            f"{method}: the solution found for {int((~finite).sum())} of {len(chi)} converged "
            "samples has no finite covariance, as at a critical point, where the response to "
            "fields is infinite.",
            ConvergenceWarning,
            stacklevel=5,
        )
    chi = chi[finite]
    eigenvalues = torch.linalg.eigvalsh(0.5 * (chi + chi.mT))
    rounding = 1e-5 if chi.dtype == torch.float32 else 1e-10
    unstable = eigenvalues[:, 0] < -rounding * eigenvalues.abs().amax(dim=1)
    if bool(unstable.any()):
        warnings.warn(
            f"{method}: the solution found for {int(unstable.sum())} of {len(chi)} converged "
            "samples is not stable, its covariance has the negative eigenvalue "
            f"{eigenvalues[unstable, 0].min().item():.3g}. There is another solution: pass "
            "a start nearer to it, or make the couplings weaker.",
            ConvergenceWarning,
            stacklevel=5,  # past `Response.covariance`, which is computed later
        )


def _field(system: SpinSystem, x: Tensor, m: Tensor, V: Tensor | None) -> Tensor:
    """The field that acts on each spin, h_i = x_i + Σ_j J_ij m_j − V_i m_i."""
    field = x + system.pull(m)
    if V is not None:
        field = field - _apply(V, m)
    return field


def _apply(V: Tensor, m: Tensor) -> Tensor:
    """V_i m_i."""
    return V * m if V.dim() == m.dim() else (V @ m.unsqueeze(-1)).squeeze(-1)


def _sites(values: Tensor) -> Tensor:
    """Sum over sites and components, `(B,)`."""
    return values.flatten(1).sum(dim=1)


def naive_response(system: SpinSystem, covariance: Tensor) -> Tensor:
    """(blockdiag C⁻¹ − J)⁻¹ = (1 − C J)⁻¹ C, which needs no inverse of a singular C.

    NaN for a sample with singular 1 − C J, which is at a critical point.
    """
    k = system.event_shape.numel()
    c = block_diagonal(covariance.reshape(*covariance.shape[:2], k, k))
    identity = torch.eye(c.shape[-1], dtype=c.dtype, device=c.device)
    operator = identity - c @ system.matrix()
    chi, failed = torch.linalg.solve_ex(operator, c)
    singular = (failed != 0)[:, None, None]
    if bool(singular.any()):
        # Solved anew, for in backward the singular one would spoil the gradients of all samples.
        chi = torch.linalg.solve_ex(torch.where(singular, identity, operator), c).result
        chi = torch.where(singular, torch.nan, chi)
    return chi
