"""Self-averaging TAP: one variance of the cavity fields for all sites."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..deq._failure import report
from ._frames import Local, frame_of
from ._gaussian import GaussianPrior
from ._method import IteratedMethod, check_start, on_ordinary_tensors
from ._response import Later, Response, total_derivative
from ._system import SpinSystem, check_system

State = tuple[Tensor, Tensor]

# More than the tests' spectra need; a step costs O(N).
_NEWTON_STEPS = 40


class SelfAveragingTAP(IteratedMethod):
    """Adaptive TAP with one number V for all sites (Opper, Winther 2001, Phys. Rev. E 64, 056131),
    for couplings `(N, N)`: J_ij between scalar spins or J_ij · 1 between vectors. With {e_k} the
    spectrum of J and χ̄ = (1/N) Σ_i tr C_i / d,

        find λ > max e_k with (1/N) Σ_k 1/(λ − e_k) = χ̄,   V = λ − 1/χ̄
        m_i = mean(h_i, V),   h_i = x_i + Σ_j J_ij m_j − V m_i,   C_i = covariance(h_i, V)
        log Z = Σ_i log Z0(h_i, V) − (d/2) Σ_k log(λ − e_k) + ½ mᵀ(λ − J)m − (d/2) N log χ̄
                − ½ mᵀm/χ̄

    and χ = (λ − J)⁻¹ · 1. Potts spins are treated in the q − 1 dimensions across (1, …, 1), so
    there d = q − 1. For the SK model of Ising spins V tends to β²(1 − q). Derivatives of
    `log_partition` are the magnetization (fields) and m_i·m_j + tr χ_ij (couplings).

    Cost: one eigendecomposition for each system, O(N³), which `SpinSystem.spectrum` keeps for
    further fields, then O(B N² d) a step. Memory without gradients: one array `(N, N)` beside J,
    two on spheres far from the default radius. Derivatives by couplings, and `covariance`, take an
    inverse for each sample, O(B N³).

    Options are those of `IteratedMethod`.
    """

    @on_ordinary_tensors
    def __call__(
        self, system: SpinSystem, fields: Tensor, *, start: Tensor | None = None
    ) -> Response:
        """Solve for fields `(*batch, N, *event)`.

        `start` are magnetizations to begin with, of the shape of `fields`; by default those of
        spins without couplings. Raises `TypeError` for a Gaussian prior and for couplings
        `(N, N, d, d)`, which `AdaptiveTAP` has equations for, and for the priors it has none for.
        """
        check_system(system)
        if isinstance(system.prior, GaussianPrior):
            raise TypeError(
                "SelfAveragingTAP has no equations for GaussianPrior: use AdaptiveTAP, which is "
                "exact there"
            )
        frame = frame_of(system, "SelfAveragingTAP")
        if system.couplings.dim() != 2:
            raise TypeError(
                "SelfAveragingTAP needs couplings (N, N), the same for all components, got "
                f"{tuple(system.couplings.shape)}: use AdaptiveTAP"
            )
        system.check_fields(fields)
        check_start(start, fields)
        batch = fields.shape[: fields.dim() - 1 - len(system.event_shape)]
        local, couplings = frame.local, frame.stretched(system.couplings)
        spectrum = frame.stretched(system.spectrum())
        x = frame.fields(fields)
        zero = torch.zeros_like(x[:, :1, 0])

        def respond(flat: Tensor) -> Tensor:
            found = self.attached(_Step(local), (m, V), flat.view_as(x), couplings, spectrum)
            return found[0].flatten(1)

        alone = local.mean(x, _everywhere(zero, x))
        begin = alone if start is None else frame.coordinates(start.detach())
        solution = self.fixed_point(
            _Step(local), (begin, zero), x, couplings, spectrum, rounding=local.rounding
        )
        report(solution, self.on_failure, "SelfAveragingTAP", self.options["tol"], stacklevel=4)
        m, V = solution.value
        log, energy, mean_chi = _read(local, x, couplings, spectrum, m, V)
        constant = frame.constant(fields)

        def covariance() -> Tensor:
            return frame.pairs(_response(couplings, V, mean_chi, x), batch)

        def susceptibility() -> Tensor:
            return frame.pairs(total_derivative(respond, x.flatten(1)), batch)

        return Response(
            magnetization=frame.magnetization(m, batch),
            log_partition=(log + constant).reshape(batch),
            energy=(energy - constant).reshape(batch),
            cavity_variance=frame.variance(_everywhere(V, x), batch),
            solution=solution,
            method="SelfAveragingTAP",
            _covariance=Later(covariance, couplings, x),
            _susceptibility=Later(susceptibility, couplings, x, *system.prior.parameters()),
        )


class _Step(nn.Module):
    """One step for the state (m, V), m `(B, N, k)` and V `(B, 1)`."""

    local: Local

    def __init__(self, local: Local) -> None:
        super().__init__()
        self.local = local

    def forward(self, state: State, x: Tensor, couplings: Tensor, spectrum: Tensor) -> State:
        m, V = state
        field = x + _pull(couplings, m) - V.unsqueeze(-1) * m
        everywhere = _everywhere(V, x)
        mean_chi = _mean_chi(self.local.covariance(field, everywhere))
        return self.local.mean(field, everywhere), _variance(mean_chi, couplings, spectrum)

    def select_samples(
        self, index: Tensor, x: Tensor, couplings: Tensor, spectrum: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The arguments of some samples."""
        return x[index], couplings, spectrum


def _pull(couplings: Tensor, m: Tensor) -> Tensor:
    """Σ_j J_ij m_j for couplings `(N, N)`, m `(B, N, k)`."""
    return torch.einsum("ij,bja->bia", couplings, m)


def _everywhere(V: Tensor, like: Tensor) -> Tensor:
    """V · 1 at every site, `(B, N, k, k)`, of V `(B, 1)`."""
    k = like.shape[-1]
    identity = torch.eye(k, dtype=like.dtype, device=like.device)
    return (V[..., None, None] * identity).expand(*like.shape, k)


def _mean_chi(covariance: Tensor) -> Tensor:
    """χ̄ `(B, 1)`, the mean over sites and components."""
    return covariance.diagonal(dim1=-2, dim2=-1).flatten(1).mean(dim=1, keepdim=True)


def _variance(mean_chi: Tensor, couplings: Tensor, spectrum: Tensor) -> Tensor:
    """V `(B, 1)` such that λ = V + 1/χ̄ is above the spectrum and (1/N) Σ_k 1/(λ − e_k) = χ̄.

    Newton's method on G = 1/χ̄ with G the harmonic mean of the gaps λ − e_k. G increases and is
    concave, so from the left of the root the steps approach it monotonically. There are
    λ = max e + 1/(N χ̄), where the largest eigenvalue alone reaches χ̄, and the λ whose mean gap is
    1/χ̄. All is written in R = χ/χ̄, whose trace at the root is N, since λ and 1/χ̄ are large beside
    V in strong fields. The last two steps carry the graph: each doubles the order to which
    derivatives are right, so they are to third order.
    """

    def newton(V: Tensor) -> Tensor:
        mean, square, pulled, sound = _traces(mean_chi, V, couplings, spectrum)
        excess = V * mean - pulled  # (1 − mean) / χ̄
        return torch.where(sound, V - excess * mean / square, torch.nan)

    with torch.no_grad():
        # (One spin has no others, however small χ̄ is.)
        others = len(spectrum) - 1
        V = spectrum[-1] - (others / len(spectrum) / mean_chi if others else 0 * mean_chi)
        V = V.clamp(min=0)  # the mean of the spectrum
        for _ in range(_NEWTON_STEPS):
            before = V
            V = torch.maximum(newton(V), V)  # a sample that stands still does not move again
            if torch.equal(V, before):
                break
    return newton(newton(V))


def _traces(
    mean_chi: Tensor, V: Tensor, couplings: Tensor, spectrum: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """tr R, tr R² and tr JR over N, `(B, 1)`, of R = χ/χ̄ = (1 + χ̄(V − J))⁻¹, and where that is
    positive definite: elsewhere they mean nothing.

    Sums over eigenvalues, but for couplings with a graph: eigenvalues that are equal have no second
    derivatives, although the traces have. As tr J = 0, tr JR is tr J(R − 1), in which nothing
    cancels however weak the couplings are.
    """
    if _attached(couplings):
        factor, sound = _factor(mean_chi, V, couplings)
        ratio = torch.cholesky_inverse(factor)
        terms = ratio.diagonal(dim1=1, dim2=2), ratio.square(), ratio * couplings
    else:
        w = 1 / (1 + mean_chi * (V - spectrum))
        sound = (w > 0).all(dim=1, keepdim=True)
        terms = w, w.square(), mean_chi * (spectrum - V) * w * spectrum
    mean, square, pulled = (t.flatten(1).sum(dim=1, keepdim=True) / len(spectrum) for t in terms)
    return mean, square, pulled, sound


def _attached(couplings: Tensor) -> bool:
    return torch.is_grad_enabled() and couplings.requires_grad


def _factor(mean_chi: Tensor, V: Tensor, couplings: Tensor) -> tuple[Tensor, Tensor]:
    """The Cholesky factor of 1 + χ̄(V − J), `(B, N, N)`, and where that is positive definite,
    `(B, 1)`: elsewhere the factor of 1, as NaN would spoil the gradients of all samples by J."""
    identity = torch.eye(len(couplings), dtype=couplings.dtype, device=couplings.device)
    scaled = (1 + mean_chi * V)[..., None] * identity - mean_chi[..., None] * couplings
    factor, failed = torch.linalg.cholesky_ex(scaled)
    sound = (failed == 0)[:, None]
    if not bool(sound.all()):
        factor = torch.linalg.cholesky_ex(torch.where(sound[..., None], scaled, identity)).L
    return factor, sound


def _read(
    local: Local, x: Tensor, couplings: Tensor, spectrum: Tensor, m: Tensor, V: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """log Z and energy `(B,)`, NaN where λ − J is not positive definite, and χ̄ `(B, 1)`."""
    pulled = _pull(couplings, m)
    field = x + pulled - V.unsqueeze(-1) * m
    everywhere = _everywhere(V, x)
    mean_chi = _mean_chi(local.covariance(field, everywhere))
    if _attached(couplings):
        factor, _ = _factor(mean_chi, V, couplings)
        log_det = 2 * factor.diagonal(dim1=1, dim2=2).log().sum(dim=1)
    else:
        log_det = torch.log1p(mean_chi * (V - spectrum)).sum(dim=1)
    k = x.shape[-1]
    overlap = (m * pulled).flatten(1).sum(dim=1)
    log = (
        local.log_partition(field, everywhere).sum(dim=1)
        - 0.5 * k * log_det
        + 0.5 * (V * m.flatten(1).square()).sum(dim=1)
        - 0.5 * overlap
    )
    _, _, pair, sound = _traces(mean_chi, V, couplings, spectrum)
    pair = (k * len(spectrum) * mean_chi * pair)[:, 0]  # Σ_ij J_ij tr χ_ij
    energy = -0.5 * (overlap + pair) - (x * m).flatten(1).sum(dim=1)
    log, energy = (torch.where(sound[:, 0], value, torch.nan) for value in (log, energy))
    return log, energy, mean_chi


def _response(couplings: Tensor, V: Tensor, mean_chi: Tensor, like: Tensor) -> Tensor:
    """χ = (λ − J)⁻¹ · 1, `(B, N·k, N·k)`."""
    n, k = like.shape[1:]
    factor, sound = _factor(mean_chi, V, couplings)
    chi = mean_chi[..., None] * torch.cholesky_inverse(factor)
    chi = torch.where(sound[..., None], chi, torch.nan)
    component = torch.eye(k, dtype=like.dtype, device=like.device)
    return torch.einsum("bij,ac->biajc", chi, component).reshape(-1, n * k, n * k)
