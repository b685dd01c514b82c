"""Gradient ascent on the likelihood: averages of the clamped phase minus those of the free one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from ._best import Best, report_broken
from ._data import Data
from ._moments import symmetric
from ._parameters import Learned, is_coupling

# From parameters to second moments (N+1, N+1), or None where the response has no answer; the
# clamped phase is told which rows are its batch.
FreePhase = Callable[[Tensor], Tensor | None]
ClampedPhase = Callable[[Tensor, Data, Tensor | None], Tensor]


@dataclass(frozen=True)
class Schedule:
    """How the ascent goes.

    Attributes:
        updates: of the parameters.
        learning_rate: of Adam; constant in the first half, then falling to 0 linearly.
        l2: of the penalty (l2/2) Σ_{i<j} J_ij².
        batch_size: rows an update, drawn in proportion to their weights; None for all.
    """

    updates: int
    learning_rate: float
    l2: float
    batch_size: int | None


def ascend(
    data: Data,
    start: Tensor,
    clamped: ClampedPhase,
    free: FreePhase,
    schedule: Schedule,
    generator: Generator,
    best: Best | None = None,
) -> Learned:
    """Parameters after the ascent from `start`, or the likeliest on the way if `best` judges them.

        dJ_ij ∝ ⟨S_i S_j⟩_clamped − ⟨S_i S_j⟩_free − l2 J_ij,   dh_i ∝ ⟨S_i⟩_clamped − ⟨S_i⟩_free

    (Ackley, Hinton, Sejnowski 1985, Cogn. Sci. 9, 147), with steps by Adam (Kingma, Ba 2015). Where
    `data` have fewer columns than there are spins, the others are hidden units, which have no
    couplings among each other. The residual is the largest gradient at what is returned; where that
    is the end of the ascent, before its last update.
    """
    n, visible = len(start) - 1, data.spins.shape[1]
    penalty = schedule.l2 * is_coupling(n + 1, start)
    allowed = 1 - torch.eye(n + 1).to(start)
    allowed[visible + 1 :, visible + 1 :] = 0
    theta = start.clone()
    optimizer = torch.optim.Adam([theta], lr=schedule.learning_rate, betas=(0.9, 0.99))
    constant = None
    if n == visible and data.observed is None:
        constant = clamped(theta, data, None)  # nothing in it depends on the parameters
    batches = None
    if schedule.batch_size is not None and schedule.batch_size < len(data):
        batches = _batches(data, schedule.batch_size, generator)
    residual, last = torch.nan, start
    for update in range(schedule.updates):
        left = 1 - update / schedule.updates
        optimizer.param_groups[0]["lr"] = schedule.learning_rate * min(1.0, 2 * left)
        second = constant
        if second is None:
            part, rows = (data, None) if batches is None else next(batches)
            second = clamped(theta, part, rows)
        average = free(theta)
        if average is None:
            if best is not None:
                best.see(last, max(update - 1, 0), residual, always=True)
                return best.learned(update, broken=True)
            report_broken(update)
            return Learned(last, steps=max(update, 1), residual=residual)
        last = theta.clone()
        gradient = symmetric((second - average - penalty * theta) * allowed)
        theta.grad = -gradient
        optimizer.step()
        residual = gradient.abs().max().item()
        if best is not None:
            best.see(last, update, residual)
    if best is not None:
        best.see(theta, schedule.updates, residual, always=True)
        return best.learned(schedule.updates, broken=False)
    return Learned(theta, steps=schedule.updates, residual=residual)


def _batches(data: Data, size: int, generator: Generator) -> Iterator[tuple[Data, Tensor]]:
    """Batches of rows for ever, each with the numbers of its rows.

    A pass holds each row as often as its weight says, M w / Σ w up to one, so the mean over a batch
    is that over the data in expectation. A row that a batch holds several times is there once, with
    their number as its weight.
    """
    while True:
        order = torch.randperm(len(data), generator=generator, device=data.spins.device)
        if data.weights is not None:
            order = _in_proportion(data.weights, generator)[order]
        for rows in order.split(size):
            if len(rows) < size:
                continue
            if data.weights is None:
                yield data[rows], rows
                continue
            rows, count = torch.unique(rows, return_counts=True)
            part = data[rows]
            yield Data(part.spins, part.observed, count.to(part.spins)), rows


def _in_proportion(weights: Tensor, generator: Generator) -> Tensor:
    """As many numbers of rows as there are rows, drawn in proportion to `weights`.

    Systematic: at even steps through the cumulated weights, from a random start.
    """
    count = len(weights)
    start = torch.rand(1, generator=generator, dtype=weights.dtype, device=weights.device)
    steps = (start + torch.arange(count).to(weights)) / count
    cumulated = weights.cumsum(dim=0)
    # Rounding must not reach past the last row that has a weight.
    last = int(weights.nonzero()[-1])
    rows = torch.searchsorted(cumulated, steps * cumulated[-1], right=True)
    return rows.clamp(max=last)


def with_hidden(theta: Tensor, hidden: int, generator: Generator) -> Tensor:
    """`theta` of visible spins with `hidden` more, weakly and randomly coupled to them."""
    n = len(theta) - 1
    out = theta.new_zeros(n + hidden + 1, n + hidden + 1)
    out[: n + 1, : n + 1] = theta
    weak = torch.randn(n, hidden, generator=generator, dtype=theta.dtype, device=theta.device)
    out[1 : n + 1, n + 1 :] = 0.1 / n**0.5 * weak
    out[n + 1 :, 1 : n + 1] = out[1 : n + 1, n + 1 :].mT
    return out
