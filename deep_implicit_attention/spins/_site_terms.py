"""Gaussian terms (g, Λ) in the place of priors, and how expectation propagation updates them."""

from __future__ import annotations

import torch
from torch import Tensor

from ._consistency import apply, inverse, matched, pull, reaction, response
from ._frames import Local

Terms = tuple[Tensor, Tensor]  # g (B, N, k), Λ (B, N, k, k)


def begin(local: Local, x: Tensor, couplings: Tensor, start: Tensor | None) -> Terms:
    """Terms of spins with the V of weak couplings, in their own fields or, given magnetizations
    `start`, in the fields of those; Λ − J is made positive definite."""
    zero = x.new_zeros(*x.shape, x.shape[-1])
    V = reaction(local, couplings, local.covariance(x, zero))
    h = x if start is None else x + pull(couplings, start) - apply(V, start)
    narrow = inverse(local.covariance(h, V))
    total = V + narrow
    _, sound = response(total, couplings)
    total = torch.where(_wide(sound), total, total + _dominance(couplings, total))
    return apply(narrow, local.mean(h, V)) - h, total


def cavity(
    local: Local, x: Tensor, couplings: Tensor, g: Tensor, total: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """h and V of the cavities, and where Λ − J is positive definite, so that they exist."""
    chi, sound = response(total, couplings)
    mean = (chi @ (x + g).flatten(1).unsqueeze(-1)).view_as(x)
    narrow = inverse(matched(local, chi, x.shape[1]))
    return apply(narrow, mean) - g, total - narrow, sound


def parallel(
    local: Local, x: Tensor, couplings: Tensor, g: Tensor, total: Tensor, damping: float
) -> Terms:
    """Update all terms at once, keeping `damping` of the old ones."""
    h, V, sound = cavity(local, x, couplings, g, total)
    narrow = inverse(local.covariance(h, V))
    new_g = apply(narrow, local.mean(h, V)) - h
    new_g = g + (1 - damping) * (new_g - g)
    new_total = total + (1 - damping) * (V + narrow - total)
    return _sound_only(couplings, (g, total), (new_g, new_total), sound)


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
