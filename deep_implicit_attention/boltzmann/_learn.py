"""From data to parameters: which method learns from what."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..deq import ConvergenceWarning
from ._adaptive_tap import adaptive_tap
from ._ascent import FreePhase, ascend, with_hidden
from ._best import Best
from ._clamped import Kind, clamped_phase, means
from ._data import Data
from ._enumeration import Enumeration
from ._exact import MAX_SPINS, exact
from ._gaps import FILLED, fill, report_unsettled
from ._independent import independent
from ._moments import Moments, join, pseudo_rows
from ._naive import naive
from ._parameters import Learned, pack, target, unpack
from ._pcd import Chains, ClampedChains
from ._pseudolikelihood import pseudolikelihood
from ._settings import Settings
from ._tap import tap
from ._warnings import FitWarning, warn

# The response that stands for missing spins where the method is not itself one.
RESPONSES: dict[str, Kind] = {
    "exact": "exact",
    "independent": "naive",
    "naive": "naive",
    "tap": "tap",
    "adaptive_tap": "adaptive_tap",
    "pseudolikelihood": "tap",
    "pcd": "tap",
}

# Of pseudolikelihood with gaps: copies of a row that has some, and rounds of drawing them.
_COPIES, _ROUNDS = 4, 40


def learn_from_moments(settings: Settings, moments: Moments) -> Learned:
    """Parameters from means and covariances alone, without hidden units."""
    method, l2 = settings.method, settings.l2
    if method == "independent":
        return independent(moments)
    if method in ("naive", "tap", "adaptive_tap"):
        solve = {"naive": naive, "tap": tap, "adaptive_tap": adaptive_tap}[method]
        return solve(moments, l2, settings.shrinkage)
    start = independent(moments).theta
    if method == "exact":
        _check_size(len(moments.mean))
        learned = exact(moments, l2, start, tol=settings.tol, max_iter=settings.max_iter)
        _report(settings, learned)
        return learned
    nothing = Data(start[:0, 1:], None, None)
    second = target(moments)
    generator = settings.generator(start.device)
    chains = Chains(start, settings.num_chains, generator)
    return ascend(nothing, start, lambda *_: second, chains, settings.schedule(), generator)


def learn_from_rows(settings: Settings, data: Data, names: Sequence[str]) -> Learned:
    """Parameters from rows, where there are hidden units or gaps, or the method needs them.

    `names` are those of the columns, for what is said of them.
    """
    rows = data
    if settings.pseudocount and (settings.needs_rows or settings.method == "pcd"):
        rows = join(data, pseudo_rows(data.spins.shape[1], settings.pseudocount))
    if settings.num_hidden or settings.method == "pcd":
        return _ascend(settings, rows, len(data))
    if settings.method in ("naive", "tap", "adaptive_tap"):
        filled = fill(settings, data, names)
        chosen = dataclasses.replace(settings, shrinkage=filled.shrinkage)
        learned = learn_from_moments(chosen, filled.moments)
        return dataclasses.replace(learned, steps=filled.steps)
    if settings.method != "pseudolikelihood":
        return _fill_and_learn(settings, data)
    options: dict[str, Any] = {"tol": settings.tol, "max_iter": settings.max_iter}
    if rows.observed is not None:
        return _draw_and_maximise(settings, rows, options)
    learned = pseudolikelihood(rows, settings.l2, _fields_only(rows), **options)
    _report(settings, learned)
    return learned


def _fill_and_learn(settings: Settings, data: Data) -> Learned:
    """Expectation maximisation of the exact and the independent model.

    Moments from the clamped response, parameters from moments.
    """
    kind = RESPONSES[settings.method]
    theta = _fields_only(data, settings.pseudocount)
    count = data.total() + settings.pseudocount
    clamped = clamped_phase(kind, data, data.spins.shape[1])
    learned, old = None, None
    for step in range(settings.max_iter):
        second = clamped(theta, data)
        second = second * (data.total() / count)
        second.diagonal().fill_(1.0)
        # Without couplings the rows that are filled in do not depend on each other.
        first = 0.0 if settings.method == "independent" else torch.inf
        change = first if old is None else (second - old).abs().max().item()
        last = change <= FILLED or step == settings.max_iter - 1
        moments = Moments(second[0, 1:], second[1:, 1:], count)
        with warnings.catch_warnings():
            if not last:
                warnings.simplefilter("ignore")
            learned = learn_from_moments(settings, moments)
        theta, old = learned.theta, second
        if last:
            report_unsettled(change)
            return dataclasses.replace(learned, steps=step + 1)
    raise AssertionError("max_iter is at least 1")


def _draw_and_maximise(settings: Settings, rows: Data, options: dict[str, Any]) -> Learned:
    """Pseudolikelihood with drawn spins in the gaps, by stochastic expectation maximisation.

    Conditional means in the place of the gaps would shrink the fields on other spins and so
    inflate the couplings. Clamped chains draw the gaps of several copies of each row that has some,
    with the parameters so far; the answer is the average of the second half of the rounds (Celeux,
    Diebolt 1985, Comput. Stat. Q. 2, 73).
    """
    assert rows.observed is not None
    broken = ~rows.observed.all(dim=1)
    copies = torch.where(broken, _COPIES, 1)
    index = torch.arange(len(rows), device=broken.device).repeat_interleave(copies)
    share = 1 / copies[index].to(rows.spins)
    weights = share if rows.weights is None else share * rows.weights[index]
    copied = Data(rows.spins[index], None, weights)
    chains = ClampedChains(copied, 0, settings.generator(rows.spins.device))
    learned = Learned(_fields_only(rows))
    average = torch.zeros_like(learned.theta)
    for step in range(_ROUNDS):
        spins = chains.sweep(learned.theta, copied, None)
        filled = Data(spins.clone(), None, weights)
        learned = pseudolikelihood(filled, settings.l2, learned.theta, **options)
        if step >= _ROUNDS // 2:
            average += learned.theta / (_ROUNDS - _ROUNDS // 2)
    _report(settings, learned)
    return dataclasses.replace(learned, theta=average, steps=_ROUNDS)


def _ascend(settings: Settings, data: Data, rows: int) -> Learned:
    """Gradient ascent on data whose first `rows` rows are no pseudo-rows."""
    generator = settings.generator(data.spins.device)
    hidden = settings.num_hidden
    start = with_hidden(_fields_only(data), hidden, generator)
    best = None
    if settings.method == "pcd":
        free: FreePhase = Chains(start, settings.num_chains, generator)
        if data.observed is not None:
            gaps = ClampedChains(data, hidden, generator)
            return ascend(data, start, gaps, free, settings.schedule(), generator)
    elif settings.method == "exact":
        _check_size(len(start) - 1)
        states = Enumeration(len(start) - 1, start.device)
        free = lambda theta: states.second_moments(states.distribution(theta)[1])  # noqa: E731
    else:
        free = _Response(RESPONSES[settings.method])
        if Best.possible(data, rows):
            best = Best(data, rows, start, settings.l2, settings.num_updates, settings.seed)
    clamped = clamped_phase(RESPONSES[settings.method], data, len(start) - 1)
    return ascend(
        data, start, lambda theta, part, _: clamped(theta, part), free,
        settings.schedule(), generator, best,
    )  # fmt: skip


class _Response:
    """The free phase by a mean-field response, each solve from the last solution."""

    def __init__(self, kind: Kind) -> None:
        self.kind: Kind = kind
        self.m: Tensor | None = None

    def __call__(self, theta: Tensor) -> Tensor | None:
        J, h = unpack(theta)
        response = means(self.kind, J, h[None], self.m)
        self.m = response.m
        m = response.m[0]
        second = torch.outer(m, m)
        if response.covariance is not None:
            chi = response.covariance()[0]
            _, unstable = torch.linalg.cholesky_ex(chi)
            if response.failed or int(unstable):
                return None
            second = second + chi
        second = pack(second, m)
        second.diagonal().fill_(1.0)
        return second


def _fields_only(data: Data, pseudocount: float = 0.0) -> Tensor:
    """Independent spins with the means of what is observed, and of rows of the pseudocount."""
    weights = data.weights if data.weights is not None else torch.ones(len(data)).to(data.spins)
    m = weights @ data.spins / (weights @ (data.spins != 0).to(data.spins) + pseudocount)
    theta = pack(m.new_zeros(len(m), len(m)), torch.atanh(m))
    return theta


def _check_size(n: int) -> None:
    if n > MAX_SPINS:
        raise ValueError(
            f"method='exact' enumerates all states of up to {MAX_SPINS} spins (hidden units among "
            f"them), here are {n}: choose 'pseudolikelihood', 'adaptive_tap' or 'pcd'"
        )


def _report(settings: Settings, learned: Learned) -> None:
    if learned.converged:
        return
    why = (
        "where some combination of spins never occurs there is no finite maximum: set l2 or "
        "pseudocount"
    )
    if learned.residual <= settings.tol:
        why = f"within the tolerance, but its steps do not get shorter: {why}"
    else:
        why = f"tolerance {settings.tol:g}: {why}, otherwise raise max_iter or tol"
    warn(
        f"method={settings.method!r}: Newton's method ended after {learned.steps} steps with a "
        f"largest gradient of {learned.residual:.2e}, {why}",
        ConvergenceWarning,
    )


def report_few(settings: Settings, rows: int, n: int) -> None:
    """Warn if there are fewer rows than spins and nothing that makes the maximum finite."""
    counted = settings.method in ("exact", "pseudolikelihood", "pcd") or settings.num_hidden > 0
    if counted and rows <= n and not settings.l2 and not settings.pseudocount:
        warn(
            f"{rows} rows are too few for {n} spins: the likelihood may have no finite maximum. "
            "Set l2 or pseudocount.",
            FitWarning,
        )
