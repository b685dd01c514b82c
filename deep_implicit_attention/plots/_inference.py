"""How good approximate inference is: answers against exact ones, errors against temperature."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from ._figures import COLOURS

# Okabe, Ito 2008 again, black left for what is exact. Markers tell methods apart without colour,
# and nest, so that equal answers are all seen.
STYLES = tuple(
    zip((*COLOURS[1:], "#CC79A7", "#56B4E9"), "os^Dv*", (7.5, 6.5, 5.5, 4.5, 4, 4), strict=True)
)

# Errors below this are rounding; a logarithmic axis has no place for zero.
_FLOOR = 1e-16


def approximation_errors(
    exact_m: np.ndarray,
    m_by_method: Mapping[str, np.ndarray],
    exact_C: np.ndarray,
    C_by_method: Mapping[str, np.ndarray],
    betas: Sequence[float],
    error_by_method: Mapping[str, Sequence[float]],
    *,
    beta: float,
    reference: str = "exact",
    reference_error: Sequence[float] = (),
    error_label: str = "mean |error| of magnetizations",
    beta_label: str = "inverse temperature β",
    title: str = "",
) -> Figure:
    """Magnetizations `(N,)` and covariances `(pairs,)` of each method against the exact ones, at
    inverse temperature `beta`; and `error_by_method` against inverse temperatures `betas`, both
    axes logarithmic. All quantities are dimensionless. Where the exact answer is out of reach,
    `reference` says what stands in its place, and `reference_error` how wrong it is at `betas`.

    `error_by_method` names all methods. Its NaN are gaps, where a method did not converge; one
    without an answer at `beta` is left out of the other two mappings, and the panels say so.

    Raises:
        ValueError: for more methods than there are styles, six.
    """
    if len(error_by_method) > len(STYLES):
        raise ValueError(
            f"at most {len(STYLES)} methods can be told apart, got {len(error_by_method)}"
        )
    styles: dict[str, dict[str, Any]] = {
        name: {"color": colour, "marker": marker, "markersize": size, "markerfacecolor": "none"}
        for name, (colour, marker, size) in zip(error_by_method, STYLES, strict=False)
    }
    figure = Figure(figsize=(13, 4.6), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    for axes, symbol, exact, answers in (
        (left, "magnetization ⟨$S_i$⟩", exact_m, m_by_method),
        (middle, "covariance of $S_i$ and $S_j$", exact_C, C_by_method),
    ):
        _against_exact(axes, np.asarray(exact), answers, styles)
        axes.set(xlabel=f"{symbol}, {reference} (dimensionless)", ylabel=f"{symbol} by the method")
        axes.set_title(f"β = {beta:g}", fontsize=10)
        missing = [name for name in error_by_method if name not in answers]
        if missing:
            axes.text(
                0.97, 0.03, "not converged:\n" + "\n".join(missing), transform=axes.transAxes,
                ha="right", va="bottom", fontsize=8,
            )  # fmt: skip

    for name, errors in error_by_method.items():
        right.plot(betas, np.maximum(errors, _FLOOR), label=name, **styles[name])
    if len(reference_error):
        right.plot(
            betas, reference_error, "--", color=COLOURS[0], label=f"standard error of {reference}"
        )
    right.axvline(beta, color=COLOURS[0], linestyle=":", linewidth=1, zorder=0)
    if len(set(betas)) == 1:
        right.set_xlim(betas[0] / 2, betas[0] * 2)  # its own limits cut the markers in half
    right.set(xlabel=beta_label, xscale="log", ylabel=f"{error_label} (dimensionless)")
    if any(np.isfinite(errors).any() for errors in error_by_method.values()):
        right.set_yscale("log")
    else:
        right.set_yticks([])  # a logarithmic axis without numbers cannot be drawn
    right.xaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7)))
    right.xaxis.set_major_formatter("{x:g}")
    right.xaxis.set_minor_locator(NullLocator())
    right.grid(alpha=0.3)
    handles, labels = right.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.suptitle(title, fontsize=11, parse_math=False)
    return figure


def _against_exact(
    axes: Axes,
    exact: np.ndarray,
    answers: Mapping[str, np.ndarray],
    styles: Mapping[str, dict[str, Any]],
) -> None:
    """Points of each method over the diagonal, both axes the same."""
    everything = np.concatenate([exact, *answers.values()])
    everything = everything[np.isfinite(everything)]
    low, high = (everything.min(), everything.max()) if len(everything) else (0.0, 0.0)
    margin = 0.05 * (high - low) or 0.05
    ends = low - margin, high + margin
    axes.plot(ends, ends, color=COLOURS[0], linewidth=1, label="_exact", zorder=0)
    for name, values in answers.items():
        axes.plot(exact, values, linestyle="none", label=f"_{name}", **styles[name])
    axes.set(xlim=ends, ylim=ends, aspect="equal")
    axes.grid(alpha=0.3)
