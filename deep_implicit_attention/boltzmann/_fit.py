"""The fit of all columns: those that change are learned, the others get a field of their own."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ._data import Data
from ._learn import Settings, learn_from_moments, learn_from_rows, report_few
from ._moments import Sums, report_constant
from ._parameters import Learned


@dataclass(frozen=True)
class Fitted:
    """A machine of all columns.

    Attributes:
        learned: parameters of all spins, hidden ones last, and how they were found.
        constant: columns that never change, `(n_features,)`.
        base: fields of independent spins with the same means, `(N,)`, 0 for hidden units.
    """

    learned: Learned
    constant: Tensor
    base: Tensor


def fit_columns(
    settings: Settings, sums: Sums | None, data: Data | None, names: Sequence[str]
) -> Fitted:
    """Learn from sums over rows or, if they are None, from the rows.

    A column that never changes has an infinite field and no couplings. Without a pseudocount it
    gets the field of one more observation, half up and half down, and the others are learned as if
    it were not there.
    """
    first, seen, rows, total = _counts(sums, data)
    if bool((seen == 0).any()):
        empty = int((seen == 0).nonzero()[0])
        raise ValueError(f"X has no entry in column {names[empty]}: all are missing")
    n, hidden = len(first), settings.num_hidden
    constant = first.abs() >= seen * (1 - 1e-12)
    if settings.pseudocount:
        constant = torch.zeros_like(constant)
    # Of weights that sum to less than the rows, as shares do, an observation is a share as well.
    extra = torch.full_like(first, settings.pseudocount)
    extra[constant] = min(1.0, total / rows)
    base = torch.atanh(first / (seen + extra))
    report_constant(constant, names, first)
    kept = ~constant
    theta = base.new_zeros(n + hidden + 1, n + hidden + 1)
    theta[0, 1 : n + 1] = theta[1 : n + 1, 0] = base
    learned = Learned(theta)
    if bool(kept.any()):
        report_few(settings, rows, int(kept.sum()))
        left = None if data is None else data.columns(kept)
        complete = None if sums is None else sums.columns(kept)
        if left is not None and left.observed is None and not settings.needs_rows:
            complete = Sums.of(left)  # all gaps were in columns that never change
        if complete is not None:
            learned = learn_from_moments(settings, complete.moments(settings.pseudocount))
        else:
            assert left is not None
            left_names = [name for name, there in zip(names, kept.tolist(), strict=True) if there]
            learned = learn_from_rows(settings, left, left_names)
        always = torch.ones(1, dtype=torch.bool, device=kept.device)
        there = torch.cat([always, kept, always.expand(hidden)]).nonzero().flatten()
        theta[there[:, None], there] = learned.theta
    base = torch.cat([base, base.new_zeros(hidden)])
    return Fitted(dataclasses.replace(learned, theta=theta), constant, base)


def _counts(sums: Sums | None, data: Data | None) -> tuple[Tensor, Tensor, int, float]:
    """Σ w S_i and Σ w over the entries of each column, the rows of positive weight, and Σ w."""
    if data is None:
        assert sums is not None
        return sums.first, torch.full_like(sums.first, sums.total), sums.rows, sums.total
    weights = data.weights if data.weights is not None else torch.ones(len(data)).to(data.spins)
    return (
        weights @ data.spins,
        weights @ (data.spins != 0).to(data.spins),
        data.counted(),
        data.total(),
    )
