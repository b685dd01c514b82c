"""Sums over all 2^N states, from the two halves of the spins.

With a state a of the first half (and the spin always up) and b of the second, the exponent is
½ aᵀΘa + ½ bᵀΘb + aᵀΘb: a table of 2^(N/2) rows and columns that is one small matrix product, and so
are the moments. The states themselves are never written out, which takes `spins.Exact` most of its
time.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Entries of the table that are worked on at a time.
_CHUNK = 2**20


class Enumeration:
    """All states of `n` spins; `theta` is that of `pack`, `(n+1, n+1)`."""

    def __init__(self, n: int, device: torch.device | str = "cpu") -> None:
        first = n // 2
        left = _states(first, device)
        self.n, self.split = n, first + 1
        self.left = torch.cat([left.new_ones(len(left), 1), left], dim=1)
        self.right = _states(n - first, device)
        self.rows = max(1, _CHUNK // len(self.right))

    def log_partition(self, theta: Tensor) -> Tensor:
        """log Σ_S exp(½ sᵀΘs). Cost: O(2^N N)."""
        parts = [
            self._exponent(theta, first).flatten().logsumexp(dim=0)
            for first in range(0, len(self.left), self.rows)
        ]
        return torch.stack(parts).logsumexp(dim=0)

    def distribution(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """log Z and the probabilities of all states, `(2^(N/2), 2^(N/2))`."""
        table = self._exponent(theta, 0, len(self.left))
        high = table.max()
        table = table.sub_(high).exp_()
        total = table.sum()
        return high + total.log(), table.div_(total)

    def second_moments(self, weights: Tensor) -> Tensor:
        """Σ_S w(S) s sᵀ `(n+1, n+1)` for weights of all states."""
        left, right, k = self.left, self.right, self.split
        out = left.new_empty(self.n + 1, self.n + 1)
        out[:k, :k] = left.mT @ (weights.sum(dim=1, keepdim=True) * left)
        out[k:, k:] = right.mT @ (weights.sum(dim=0)[:, None] * right)
        out[:k, k:] = left.mT @ (weights @ right)
        out[k:, :k] = out[:k, k:].mT
        return out

    def curvature(self, probabilities: Tensor, moments: Tensor, direction: Tensor) -> Tensor:
        """The covariance of s sᵀ and ½ sᵀDs, `(n+1, n+1)`: the Hessian of log Z times D."""
        exponent = self._exponent(direction, 0, len(self.left))
        mean = 0.5 * (moments * direction).sum()
        return self.second_moments(exponent.sub_(mean).mul_(probabilities))

    def posterior(self, theta: Tensor, spins: Tensor, weights: Tensor) -> Tensor:
        """Σ_rows w p(S | the row) for the states in the table, rows `(B, n)` with 0 for a gap.

        Cost: O(B 2^n).
        """
        table = self._exponent(theta, 0, len(self.left))
        out, size = torch.zeros_like(table), max(1, _CHUNK // table.numel())
        for some, w in zip(spins.split(size), weights.split(size), strict=True):
            left = _agreement(some[:, : self.split - 1], self.left[:, 1:])
            right = _agreement(some[:, self.split - 1 :], self.right)
            exponent = table + left[:, :, None] + right[:, None, :]
            out += (w @ exponent.flatten(1).softmax(dim=1)).view_as(table)
        return out

    def states(self, index: Tensor) -> Tensor:
        """Spins `(len(index), n)` of states by their place in the flattened table."""
        row, column = index // len(self.right), index % len(self.right)
        return torch.cat([self.left[row, 1:], self.right[column]], dim=1)

    def _exponent(self, theta: Tensor, first: int, rows: int | None = None) -> Tensor:
        """½ sᵀΘs of some rows of the table."""
        k = self.split
        left = self.left[first : first + (rows or self.rows)]
        own = 0.5 * ((left @ theta[:k, :k]) * left).sum(dim=1)
        other = 0.5 * ((self.right @ theta[k:, k:]) * self.right).sum(dim=1)
        table = (left @ theta[:k, k:]) @ self.right.mT
        return table.add_(own[:, None]).add_(other)


def _agreement(spins: Tensor, states: Tensor) -> Tensor:
    """0 for the `states` that a row of `spins` may be, −∞ for the others."""
    known = spins.abs().sum(dim=1, keepdim=True)
    return torch.where(spins @ states.mT == known, 0.0, -torch.inf)


def _states(n: int, device: torch.device | str) -> Tensor:
    """All states of n spins, `(2^n, n)`."""
    number = torch.arange(2**n, device=device)[:, None]
    bits = (number >> torch.arange(n - 1, -1, -1, device=device)) & 1
    return 2.0 * bits.double() - 1
