"""Exact draws from the von Mises–Fisher distribution on the sphere."""

from __future__ import annotations

import torch
from torch import Generator, Tensor


def von_mises_fisher(field: Tensor, generator: Generator | None = None) -> Tensor:
    """Unit vectors S with density ∝ exp(h·S), one for every h = `field` `(..., d)`, d ≥ 2.

    The rejection method of Ulrich (1984) as corrected by Wood (1994, Commun. Stat. Simul. Comput.
    23, 157), without a rotation of coordinates. With κ = ‖h‖, h = κ ĥ and a uniform unit vector
    u = t ĥ + u⊥, the proposal is the Möbius map of the sphere

        S = [ (c + t) ĥ + √(1 − c²) u⊥ ] / (1 + c t),   b = (d−1) / (2κ + √(4κ² + (d−1)²)),
        c = (1 − b)/(1 + b)

    accepted with probability exp( κ (1 − c²) t/(1 + c t) − (d−1) log(1 + c t) ), which is 1 at
    t = 0. No term cancels or overflows for large κ. Computed in float64 whatever the dtype of the
    field. Cost: O(d) a proposal, and fewer than two proposals a draw on average for any κ and d.
    """
    h = field.reshape(-1, field.shape[-1]).double()
    spins = torch.empty_like(h)
    pending = torch.arange(len(h), device=h.device)
    while len(pending):
        proposal, log_accept = _propose(h[pending], generator)
        uniform = torch.rand(len(pending), generator=generator, dtype=h.dtype, device=h.device)
        # A field that is not finite gives NaN once instead of proposals for ever.
        rejected = uniform.log() > log_accept
        spins[pending] = proposal
        pending = pending[rejected]
    return spins.reshape(field.shape).to(field.dtype)


def _propose(h: Tensor, generator: Generator | None) -> tuple[Tensor, Tensor]:
    """Proposals `(M, d)` and the logarithms of their probabilities of acceptance `(M,)`."""
    order = h.shape[-1] - 1
    kappa = h.norm(dim=-1, keepdim=True)
    axis = torch.where(kappa > 0, h / kappa, 0.0)  # without a field c = 0: any axis would do
    noise = torch.randn(h.shape, generator=generator, dtype=h.dtype, device=h.device)
    u = noise / noise.norm(dim=-1, keepdim=True)
    t = (u * axis).sum(dim=-1, keepdim=True).clamp(-1, 1)
    b = order / (2 * kappa + (4 * kappa.square() + order**2).sqrt())
    c = (1 - b) / (1 + b)
    gap = 4 * b / (1 + b).square()  # 1 − c²
    below = 2 * b / (1 + b) + c * (1 + t)  # 1 + c t, at least 1 − c > 0
    proposal = ((c + t) * axis + gap.sqrt() * (u - t * axis)) / below
    log_accept = kappa * gap * t / below - order * below.log()
    return proposal / proposal.norm(dim=-1, keepdim=True), log_accept.squeeze(-1)
