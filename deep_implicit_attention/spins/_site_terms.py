"""Gaussian terms (g, Λ) in the place of priors, and how expectation propagation updates them.

Parallel updates are written for the cavities (h, V) that go with the terms.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._consistency import (
    apply,
    inverse,
    matched,
    next_variance,
    pull,
    reaction,
    respond,
    response,
    whiten,
)
from ._frames import Local

Terms = tuple[Tensor, Tensor]  # g (B, N, k), Λ (B, N, k, k)
Cavities = tuple[Tensor, Tensor]  # h (B, N, k), V (B, N, k, k)


def begin(local: Local, x: Tensor, couplings: Tensor, start: Tensor | None) -> Cavities:
    """Cavities with the V of weak couplings, in the spins' own fields or, given magnetizations
    `start`, in the fields of those; Λ − J is made positive definite."""
    zero = x.new_zeros(*x.shape, x.shape[-1])
    V = reaction(local, couplings, local.covariance(x, zero))
    h = x if start is None else x + pull(couplings, start) - apply(V, start)
    # Asked of the whitened matrix: of spins that are all but fixed Λ is large, and its rounding.
    sound = whiten(local.covariance(h, V), V, couplings).sound
    return h, torch.where(_wide(sound), V, V + _dominance(couplings, V))


def terms_of(local: Local, h: Tensor, V: Tensor) -> Terms:
    """The terms that single spins in these cavities ask for."""
    narrow = inverse(local.covariance(h, V))
    return apply(narrow, local.mean(h, V)) - h, V + narrow


def cavity(
    local: Local, x: Tensor, couplings: Tensor, g: Tensor, total: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """h and V of the cavities, and where Λ − J is positive definite, so that they exist."""
    chi, sound = response(total, couplings)
    mean = (chi @ (x + g).flatten(1).unsqueeze(-1)).view_as(x)
    narrow = inverse(matched(local, chi, x.shape[1]))
    return apply(narrow, mean) - g, total - narrow, sound


def parallel(
    local: Local, x: Tensor, couplings: Tensor, h: Tensor, V: Tensor, damping: float
) -> Cavities:
    """Update all terms at once, and with them the cavities, keeping `damping` of the old ones.

    With the residual r = x + Jm − Vm − h the mean of the Gaussian is μ = m + χr, and the new cavity
    field χ_ii⁻¹μ_i − g_i is written without the terms, which in strong fields are huge.
    """
    m, covariance = local.mean(h, V), local.covariance(h, V)
    new_V, Q, white = next_variance(local, covariance, V, couplings)
    r = x + pull(couplings, m) - apply(V, m) - h
    moved = respond(white, r)
    rest = r - apply(V, moved) + pull(couplings, moved)  # (1 + KC)⁻¹ r
    new_h = h - apply(new_V - V, m) + apply(inverse(Q), rest)
    new_h = torch.where(white.sound[:, None, None], new_h, h)
    return h + (1 - damping) * (new_h - h), V + (1 - damping) * (new_V - V)


def sequential(
    local: Local, x: Tensor, couplings: Tensor, g: Tensor, total: Tensor, damping: float
) -> Terms:
    """Update the term of one spin after the other, keeping `damping` of the old ones.

    χ follows each update by the formula of Woodbury, O(n² k) a spin.
    """
    sites, k = x.shape[1:]
    chi, sound = response(total, couplings)
    new_g, new_total = g.clone(), total.clone()
    identity = torch.eye(k, dtype=x.dtype, device=x.device)
    for i in range(sites):
        column = chi[:, :, i * k : (i + 1) * k]
        block = column[:, i * k : (i + 1) * k]
        mean = (column.mT @ (x + new_g).flatten(1).unsqueeze(-1)).squeeze(-1)
        narrow = inverse(local.match(block))
        h = apply(narrow, mean) - g[:, i]
        V = total[:, i] - narrow
        precision = inverse(local.covariance(h[:, None], V[:, None]))[:, 0]
        target = apply(precision, local.mean(h[:, None], V[:, None])[:, 0]) - h
        change = (1 - damping) * (V + precision - total[:, i])
        new_g[:, i] += (1 - damping) * (target - g[:, i])
        new_total[:, i] += change
        # (Λ + Δ − J)⁻¹ = χ − χ_i Δ (1 + χ_ii Δ)⁻¹ χ_iᵀ
        gain = change @ inverse(identity + block @ change)
        chi = chi - column @ gain @ column.mT
    return _sound_only(couplings, (g, total), (new_g, new_total), sound)


def _sound_only(couplings: Tensor, old: Terms, new: Terms, sound: Tensor) -> Terms:
    """The new terms; where Λ − J is not positive definite, and no cavity exists, a larger Λ."""
    g = torch.where(sound[:, None, None], new[0], old[0])
    return g, torch.where(_wide(sound), new[1], old[1] + _dominance(couplings, old[1]))


def _wide(sound: Tensor) -> Tensor:
    return sound[:, None, None, None]


def _dominance(couplings: Tensor, like: Tensor) -> Tensor:
    """Blocks that added to positive Λ make Λ − J diagonally dominant (Gershgorin)."""
    sites, k = like.shape[1:3]
    rows = couplings.abs().sum(dim=1).view(sites, k).amax(dim=1)
    return rows[:, None, None] * torch.eye(k, dtype=like.dtype, device=like.device)
