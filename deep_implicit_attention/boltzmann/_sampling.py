"""Draws from a learned machine."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from ..deq import ConvergenceWarning
from ..spins import GibbsSampler, IsingPrior, SpinSystem, split_r_hat
from ._enumeration import Enumeration
from ._exact import MAX_SPINS
from ._parameters import unpack
from ._warnings import warn

_MIN_CHAINS, _CHAINS, _BURN_IN, _THIN, _MIN_DRAWS = 16, 100, 100, 5, 20
_MAX_R_HAT = 1.1


def draw(theta: Tensor, count: int, seed: int) -> Tensor:
    """`count` states `(count, N)`.

    Up to 20 spins they are independent draws among all states. Beyond, they come from 16 to 100
    chains with parallel tempering (`spins.GibbsSampler`) after a burn-in of 100 sweeps, 5 sweeps
    apart; chains that do not agree are reported by a `ConvergenceWarning`. (Of fewer chains R-hat
    is noise that passes the threshold.)
    """
    n = len(theta) - 1
    if n <= MAX_SPINS:
        generator = Generator(theta.device).manual_seed(seed)
        states = Enumeration(n, theta.device)
        cumulative = states.distribution(theta)[1].flatten().cumsum(dim=0)
        uniform = torch.rand(count, generator=generator, dtype=theta.dtype, device=theta.device)
        index = torch.searchsorted(cumulative, uniform * cumulative[-1], right=True)
        return states.states(index.clamp(max=len(cumulative) - 1))
    J, h = unpack(theta)
    chains = max(_MIN_CHAINS, min(count, _CHAINS))
    kept = -(-count // chains)
    sampler = GibbsSampler(
        num_samples=max(kept, _MIN_DRAWS), burn_in=_BURN_IN, num_chains=chains, thin=_THIN,
        seed=seed,
    )  # fmt: skip
    draws = sampler.sample(SpinSystem.unchecked(J, IsingPrior()), h)
    worst = split_r_hat(draws).max().item()
    if not worst <= _MAX_R_HAT:
        warn(
            f"the chains that were sampled do not agree: R-hat is {worst:.2f}, above {_MAX_R_HAT}. "
            "The machine has states that are far apart; the draws may miss some.",
            ConvergenceWarning,
        )
    return draws[-kept:].flatten(0, 1)[:count]
