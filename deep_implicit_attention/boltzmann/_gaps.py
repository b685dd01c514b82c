"""Means and covariances of rows with gaps, for the methods that learn from those alone.

What a gap holds is its linear response to the spins that are clamped in its row. With precision
Λ = C⁻¹, which adaptive TAP has exactly and naive mean field and TAP have off the diagonal,

    ⟨δS_f⟩ = −(Λ_ff)⁻¹ Λ_fo δS_o,   ⟨δS_f δS_f⟩ − ⟨δS_f⟩⟨δS_f⟩ = (Λ_ff)⁻¹,   δS = S − m

and the rounds of filling in and estimating are expectation maximisation of a Gaussian (Little,
Rubin 2002, *Statistical Analysis with Missing Data*, section 11.2). Its m and C are consistent for
spins as well if entries are missing completely at random, because they rest on regressions only.
Where gaps depend on spins that are observed they are approximate, because regressions of spins on
several others are not linear: C_ij is off by some hundredths, and where gaps hide what regressions
extrapolate to, means may leave [−1, 1], which is refused. The nonlinear clamped response is not the
one that maximising matches, and inflates couplings.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..deq import ConvergenceWarning
from ._clamped import patterns_of
from ._data import Data
from ._moments import Moments, inverse_covariance, optimal_shrinkage
from ._settings import Settings
from ._warnings import FitWarning, warn

# Largest change of a first or second moment at which gaps count as filled.
FILLED = 1e-6
# Part of a variance that rounds which end there may have left of one on its way to zero. Of equal
# columns it falls by the part of rows with gaps in each round: to less than this up to 99 %.
_ROUNDING = 100 * FILLED
# Observations of a pair, per spin, below which C⁻¹ is not trusted to fill gaps. From n rows it is
# too large by n/(n − N − 1), twice at this many, and what it fills in only confirms it.
_ENOUGH = 2.0
# Numbers in the matrices of a batch of rows.
_NUMBERS = 2**22


@dataclass(frozen=True)
class Filled:
    """Moments of rows whose gaps are filled in, the shrinkage that took, and the rounds."""

    moments: Moments
    shrinkage: float | None
    steps: int


def fill(settings: Settings, data: Data, names: Sequence[str]) -> Filled:
    """m and C of rows with gaps, from rounds until they settle.

    The covariance that fills the gaps is regularised as in `inverse_covariance`, by the same
    shrinkage in all rounds. Where none is asked for it is 0 if pairs of spins are observed often
    enough and the rounds settle; otherwise `optimal_shrinkage` of the pairs that are observed,
    with a `FitWarning`. Cost: O(M N²) a round, and O(f³) for each pattern of f gaps.

    Raises:
        ValueError: where what is filled in takes the mean of a column to ±1 or beyond.
    """
    given = settings.shrinkage
    free_to_choose = given is None and not settings.l2 and not settings.pseudocount
    pairs = observed_pairs(data)
    n = len(pairs.mean)
    # Independent spins; with a pseudocount none of them is constant.
    m = pairs.mean * data.total() / (data.total() + settings.pseudocount)
    start = Moments(m, torch.outer(m, m).fill_diagonal_(1.0), 1.0)
    gaps = list(_parts(data))
    often, short = f"pairs of {n} spins are observed {pairs.count:.4g} times,", "too few"
    if not free_to_choose or pairs.count > _ENOUGH * n:
        filled, change = _rounds(settings, data, gaps, start, given)
        if filled is not None and (change <= FILLED or not free_to_choose):
            _check_means(settings, data, filled, pairs, names)
            report_unsettled(change)
            return filled
        short = f"but max_iter={settings.max_iter} rounds do not suffice"
        if filled is None:
            short = "but some follow from others too closely"
    rho = optimal_shrinkage(pairs)
    warn(
        f"{often} {short} to fill in missing entries by their covariance; it is shrunk by "
        f"{rho:.3g} towards its diagonal (Schäfer, Strimmer 2005). Set l2, pseudocount or "
        "shrinkage to choose otherwise.",
        FitWarning,
    )
    filled, change = _rounds(settings, data, gaps, start, rho)
    assert filled is not None  # a shrunk covariance has an inverse
    _check_means(settings, data, filled, pairs, names)
    report_unsettled(change)
    return filled


def _check_means(
    settings: Settings, data: Data, filled: Filled, pairs: Moments, names: Sequence[str]
) -> None:
    """Refuse means nearer to ±1 than what is observed and half an observation against it.

    Regressions extrapolate, and C_ii = 1 − m_i² would vanish.
    """
    total = data.total() + settings.pseudocount
    furthest = pairs.mean.abs().clamp(min=total / (total + min(1.0, data.total() / data.counted())))
    m = filled.moments.mean
    beyond = (1 - m.abs() < 0.5 * (1 - furthest)).nonzero().flatten().tolist()
    if beyond:
        shown = ", ".join(f"{names[i]} ({m[i]:.3g})" for i in beyond)
        raise ValueError(
            f"the regressions that fill in missing entries of X take the mean of columns to ±1 or "
            f"beyond: {shown}. Their gaps depend too much on other columns for "
            f"method={settings.method!r}: choose 'exact' or 'pseudolikelihood', or set l2"
        )


def observed_pairs(data: Data) -> Moments:
    """Moments of the rows in which both spins of a pair are observed.

    `second` holds C_ij + m_i m_j with C_ij of those rows only and m_i of all that have S_i, and
    `count` is the harmonic mean of their numbers, which is what a mean of the variances of C_ij
    goes by; 1 stands for no row. No covariance matrix: it need not be positive.
    """
    assert data.observed is not None
    there = data.observed.to(data.spins)
    weighed = data.weighed(there)
    number = there.mT @ weighed
    total = number.diagonal()
    m = data.weighed(data.spins).sum(dim=0) / total
    often = number.clamp(min=1e-300)
    first = data.spins.mT @ weighed / often
    second = data.spins.mT @ data.weighed(data.spins) / often
    second = second - first * first.mT + torch.outer(m, m)
    second.fill_diagonal_(1.0)
    apart = ~torch.eye(len(m), dtype=torch.bool, device=m.device)
    # Weights below 1 are shares of a row, not less than an observation.
    scale = max(1.0, data.counted() / data.total())
    often = (scale * (number[apart] if len(m) > 1 else total)).clamp(min=1.0)
    return Moments(m, second, len(often) / (1 / often).sum().item())


@dataclass(frozen=True)
class _Part:
    """Rows with gaps that are filled in together.

    Attributes:
        rows: their numbers, `(b,)`.
        sites: what is missing in each pattern, `(p, f)`; N where a pattern has fewer gaps.
        pattern: of each row, `(b,)`.
    """

    rows: Tensor
    sites: Tensor
    pattern: Tensor


def _parts(data: Data) -> Iterator[_Part]:
    """Rows with gaps, those with similarly many together."""
    assert data.observed is not None
    free, n = ~data.observed, data.spins.shape[1]
    rows = free.any(dim=1).nonzero().flatten()
    patterns, group = patterns_of(free[rows])
    sizes = patterns.sum(dim=1)
    order = torch.argsort(sizes[group] * len(patterns) + group, stable=True)
    most = int(sizes.max())
    # In ascending order; what is observed comes last and is cut off.
    numbers = torch.arange(n, device=free.device)
    sites = torch.where(patterns, numbers, n).sort(dim=1).values[:, :most]
    for part in order.split(max(1, _NUMBERS // most**2)):
        here, local = torch.unique(group[part], return_inverse=True)
        yield _Part(rows[part], sites[here, : int(sizes[here].max())], local)


def _rounds(
    settings: Settings, data: Data, gaps: list[_Part], start: Moments, rho: float | None
) -> tuple[Filled | None, float]:
    """Rounds until the moments settle, and their last change; None without an inverse."""
    total, extra = data.total(), settings.pseudocount
    share = total / (total + extra)
    moments = dataclasses.replace(start, count=total + extra)
    change, step = torch.inf, 0
    while step < settings.max_iter and change > FILLED:
        precision, used = _inverse(moments, settings.l2, rho)
        if rho is None and used:
            return None, torch.inf
        m, second = _expect(data, gaps, moments.mean, precision)
        m, second = share * m, share * second
        second.diagonal().add_(1 - share)
        moved = second - moments.second, m - moments.mean
        change = max(difference.abs().max().item() for difference in moved)
        moments, step = Moments(m, second, total + extra), step + 1
    if not extra:  # with which no variance goes to zero
        moments = dataclasses.replace(moments, rounding=_ROUNDING)
        if rho is None and _inverse(moments, settings.l2, rho)[1]:
            return None, torch.inf
    # Spins have C_ii = 1 − m_i², which regressions know on average only; correlations stay.
    C, m = moments.covariance, moments.mean
    scale = ((1 - m.square()) / C.diagonal()).sqrt()
    second = torch.outer(scale, scale) * C + torch.outer(m, m)
    second.fill_diagonal_(1.0)
    return Filled(dataclasses.replace(moments, second=second), rho, step), change


def _inverse(moments: Moments, l2: float, rho: float | None) -> tuple[Tensor, float]:
    """`inverse_covariance` without a word on shrinkage."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return inverse_covariance(moments, l2, rho)


def _expect(data: Data, gaps: list[_Part], m: Tensor, precision: Tensor) -> tuple[Tensor, Tensor]:
    """First and second moments of the rows with their gaps filled in."""
    assert data.observed is not None
    n = len(m)
    weights = data.weights if data.weights is not None else torch.ones(len(data)).to(m)
    delta = torch.where(data.observed, data.spins - m, 0.0)
    force = delta @ precision
    # A site N that nothing is coupled to takes what pads the patterns.
    padded = torch.nn.functional.pad(precision, (0, 1, 0, 1))
    inside = torch.nn.functional.pad(delta, (0, 1))
    pull = torch.nn.functional.pad(force, (0, 1))
    spread = m.new_zeros((n + 1) ** 2)
    for part in gaps:
        sites = part.sites
        inner = padded[sites[:, :, None], sites[:, None, :]]
        inner.diagonal(dim1=1, dim2=2).add_((sites == n).to(m))
        chi = torch.linalg.inv(inner)
        own = sites[part.pattern]
        answer = torch.einsum("bij,bj->bi", chi[part.pattern], pull[part.rows[:, None], own])
        inside[part.rows[:, None], own] = -answer
        often = m.new_zeros(len(sites)).index_add_(0, part.pattern, weights[part.rows])
        place = sites[:, :, None] * (n + 1) + sites[:, None, :]
        spread.index_add_(0, place.flatten(), (often[:, None, None] * chi).flatten())
    delta = inside[:, :n]
    total = weights.sum()
    shift = weights @ delta / total
    about = (delta.mT @ (weights[:, None] * delta) + spread.view(n + 1, n + 1)[:n, :n]) / total
    mean = m + shift
    return mean, about + torch.outer(m, mean) + torch.outer(shift, m)


def report_unsettled(change: float) -> None:
    """Warn if the rounds ended before the moments settled."""
    if change <= FILLED:
        return
    if change < math.inf:
        said = f"still change by {change:.1e} after the last round of filling them in"
    else:
        said = "were filled in one round only"
    warn(
        f"the conditional means of missing entries {said}: raise max_iter, or set l2 or "
        "pseudocount.",
        ConvergenceWarning,
    )
