"""Persistent contrastive divergence: averages from Markov chains that are never restarted."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from ..spins import BlockGibbs, IsingPrior, SpinSystem
from ._data import Data
from ._parameters import rows_with_one, unpack


class Chains:
    """The free phase, from chains that go on while the parameters change slowly (Tieleman 2008,
    ICML; Younes 1999, Stochastics 65, 177).

    A call makes a block sweep of all chains with the new parameters and returns the second moments
    of their states, `(N+1, N+1)`. Cost: O(C N²) for C chains. Biased as long as the parameters
    change faster than the chains mix, and noisy as 1/√C: let the learning rate fall.
    """

    def __init__(self, theta: Tensor, num_chains: int, generator: Generator) -> None:
        self.generator = generator
        fields = unpack(theta)[1].expand(num_chains, -1)
        self.states = IsingPrior().sample(fields, generator)

    def __call__(self, theta: Tensor) -> Tensor:
        J, h = unpack(theta)
        self.states = _sweep(J, self.states, h, self.generator)
        ones = rows_with_one(self.states)
        return ones.mT @ ones / len(ones)


class ClampedChains:
    """The clamped phase of rows with gaps: a persistent chain for every row of the data.

    A spin that is known is in a field that nothing turns.
    """

    def __init__(self, data: Data, hidden: int, generator: Generator) -> None:
        self.generator = generator
        self.hidden = hidden
        spins = torch.nn.functional.pad(data.spins, (0, hidden))
        drawn = IsingPrior().sample(torch.zeros_like(spins), generator)
        self.states = torch.where(spins != 0, spins, drawn)

    def __call__(self, theta: Tensor, data: Data, rows: Tensor | None) -> Tensor:
        """Second moments `(N+1, N+1)` of some rows after a sweep."""
        ones = rows_with_one(self.sweep(theta, data, rows))
        weights = data.weights if data.weights is not None else torch.ones(len(data)).to(ones)
        return ones.mT @ (weights[:, None] * ones) / weights.sum()

    def sweep(self, theta: Tensor, data: Data, rows: Tensor | None) -> Tensor:
        """The states of some rows, all if it is None, after a sweep."""
        J, h = unpack(theta)
        where = slice(None) if rows is None else rows
        states = self.states[where]
        known = torch.nn.functional.pad(data.spins, (0, self.hidden))
        strong = 40 + h.abs() + J.abs().sum(dim=0)
        states = _sweep(J, states, torch.where(known != 0, strong * known, h), self.generator)
        self.states[where] = states
        return states


def _sweep(J: Tensor, states: Tensor, fields: Tensor, generator: Generator) -> Tensor:
    system = SpinSystem.unchecked(J, IsingPrior())
    return BlockGibbs(system)(states, fields, generator=generator)
