"""The likeliest parameters of an ascent whose steps do not climb the likelihood itself.

Mean-field responses stand for the averages in its gradient, so that an ascent may leave good
parameters for bad ones. What it passed through is judged by the likelihood.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..deq import ConvergenceWarning
from ._data import Data
from ._likelihood import log_partition, log_weights
from ._parameters import Learned, is_coupling, unpack
from ._warnings import warn

# Judgements of an ascent: where log Z is a sum over few states, and where it costs seconds.
_CHECKS, _FEW_CHECKS, _CHEAP = 100, 10, 20
_PARTICLES, _STEPS = 100, 300
# Loss of log-likelihood per row, in nats, that is worth a warning.
_LOSS = 0.01


@dataclass(frozen=True)
class _Seen:
    """Parameters after how many updates, and how they were judged.

    Attributes:
        likelihood: log-likelihood of the rows, per row, in nats.
        objective: what is compared: that of the rows of the pseudocount too, minus the penalty and
            `doubt`.
        doubt: two standard errors of log Z.
        residual: of the ascent at these parameters; at its end, one update before.
    """

    theta: Tensor
    likelihood: float
    objective: float
    doubt: float
    update: int
    residual: float


class Best:
    """Keeps the parameters with the largest log-likelihood per row minus the penalty of l2.

    log Z is exact up to 24 spins, and beyond an estimate by annealed importance sampling, two
    standard errors to its bad side. The rows that count are those without gaps. Cost: O(M N²) and
    one log Z for each of at most 101 judgements, 11 beyond 20 spins.

    Args:
        data: the rows; those of the pseudocount last.
        rows: how many come before those.
        start: parameters at the start.
        l2: of the penalty.
        updates: of the ascent.
        seed: of the estimates.
    """

    def __init__(
        self, data: Data, rows: int, start: Tensor, l2: float, updates: int, seed: int
    ) -> None:
        if data.observed is not None:
            whole = data.observed.all(dim=1).nonzero().flatten()
            data, rows = data[whole], int((whole < rows).sum())
        self.data, self.rows, self.seed = data, rows, seed
        self.base = unpack(start)[1]
        self.penalty = 0.25 * l2 * is_coupling(len(start), start)
        checks = _CHECKS if len(start) <= _CHEAP + 1 else _FEW_CHECKS
        self.every = math.ceil(updates / checks)
        self.first = self.best = self.last = self._judge(start, 0, torch.nan)

    @staticmethod
    def possible(data: Data, rows: int) -> bool:
        """Whether one of the first `rows` rows has no gap and a weight."""
        whole = torch.ones(len(data), dtype=torch.bool, device=data.spins.device)
        if data.observed is not None:
            whole = data.observed.all(dim=1)
        if data.weights is not None:
            whole = whole & (data.weights > 0)
        return bool(whole[:rows].any())

    def see(self, theta: Tensor, update: int, residual: float, always: bool = False) -> None:
        """Judge the parameters after `update` updates, if it is time to or `always`."""
        if update == 0:  # judged already
            self.first = self.best = self.last = dataclasses.replace(self.first, residual=residual)
            return
        if not always and update % self.every:
            return
        self.last = self._judge(theta, update, residual)
        if self.last.objective >= self.best.objective:
            self.best = self.last

    def learned(self, steps: int, broken: bool) -> Learned:
        """The best that was seen, and a warning if the ascent broke off or went astray."""
        best, last = self.best, self.last
        lost = best.objective - last.objective
        if broken or lost > max(_LOSS, last.doubt):
            which = f"the likeliest that were seen, those after {best.update} updates"
            if not best.update:
                which = (
                    "those of nearly independent spins at the start, which no update made likelier"
                )
            warn(
                f"{_broken(steps) if broken else _astray(steps)} The parameters returned are "
                f"{which}. The log-likelihood per row is {best.likelihood:.5g}; it was "
                f"{self.first.likelihood:.5g} at the start and {last.likelihood:.5g} at the end"
                f"{_beside(bool(self.penalty.any()))}. Set l2, or choose method='pcd' or 'exact'.",
                ConvergenceWarning,
            )
        return Learned(best.theta, steps=max(steps, 1), residual=best.residual)

    def _judge(self, theta: Tensor, update: int, residual: float) -> _Seen:
        log_z = log_partition(theta, self.base, particles=_PARTICLES, steps=_STEPS, seed=self.seed)
        rows = log_weights(theta, self.data)
        weights = self.data.weights if self.data.weights is not None else torch.ones_like(rows)
        own = weights[: self.rows]
        likelihood = (own @ rows[: self.rows] / own.sum()).item() - log_z.value
        joint = (weights @ rows / weights.sum()).item() - log_z.value
        penalty = (self.penalty * theta * theta).sum().item()
        doubt = 2 * log_z.standard_error
        objective = joint - penalty - doubt
        return _Seen(theta.clone(), likelihood, objective, doubt, update, residual)


def _beside(penalty: bool) -> str:
    return " (to which the penalty of l2 comes)" if penalty else ""


def _broken(update: int) -> str:
    return (
        f"the response that stands for the free averages has no stable solution after {update} "
        "updates: the couplings have become too strong for it."
    )


def _astray(update: int) -> str:
    return (
        f"the responses that stand for the averages led away from likely parameters in {update} "
        "updates: the couplings have become too strong for them."
    )


def report_broken(update: int) -> None:
    """Warn of an ascent that broke off where no row could judge its parameters."""
    warn(
        f"{_broken(update)} The parameters are those before; no row is complete, so their "
        "likelihood was not compared. Set l2, or choose method='pcd' or 'exact'.",
        ConvergenceWarning,
    )
