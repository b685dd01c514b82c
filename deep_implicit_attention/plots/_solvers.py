"""Solvers beside each other: how residuals fall, and how stable the answers are."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from ._figures import COLOURS
from ._inference import STYLES


def solver_comparison(
    traces: Mapping[str, ArrayLike],
    radii: Mapping[str, ArrayLike],
    tolerance: float,
    title: str = "",
) -> Figure:
    """Relative residuals of each solver against steps, and spectral radii at its answers.

    `traces` `(steps, samples)` by solver: the median over samples, and the band from the first to
    the third quartile. A sample that is done is NaN from there on; a solver is drawn while half of
    its samples go on. `radii` `(samples,)` by solver: the spectral radius of ∂F/∂z at the answer of
    every sample, sorted; below 1 plain iteration contracts.

    Raises:
        ValueError: for more solvers than there are styles, six, names in `radii` that are not in
            `traces`, or a trace of another shape.
    """
    if len(traces) > len(STYLES):
        raise ValueError(f"at most {len(STYLES)} solvers can be told apart, got {len(traces)}")
    unknown = [name for name in radii if name not in traces]
    if unknown:
        raise ValueError(f"radii must be of solvers in traces, got {', '.join(unknown)}")
    figure = Figure(figsize=(9, 3.9), layout="constrained")
    left, right = figure.subplots(1, 2)
    for (name, trace), (colour, marker, size) in zip(traces.items(), STYLES, strict=False):
        trace = np.asarray(trace, float)
        if trace.ndim != 2 or not trace.shape[1]:
            raise ValueError(
                f"the trace of {name} must have shape (steps, samples) with at least one sample, "
                f"got {trace.shape}"
            )
        going = np.isfinite(trace).mean(axis=1) >= 0.5
        steps = np.arange(1, len(trace) + 1)[going]
        low, middle, high = (
            np.nanquantile(trace[going], [0.25, 0.5, 0.75], axis=1)
            if going.any()
            else np.empty((3, 0))  # most samples are NaN from the first step on
        )
        shown = name if going.any() else f"{name} (most residuals are not finite)"
        style = {"color": colour, "marker": marker, "markersize": size, "markerfacecolor": "none"}
        left.plot(steps, middle, label=shown, linewidth=1.5, **style)
        left.fill_between(steps, low, high, color=colour, alpha=0.2, linewidth=0)
        if name in radii:
            ordered = np.sort(np.asarray(radii[name], float))
            part = (np.arange(len(ordered)) + 0.5) / len(ordered)
            right.plot(100 * part, ordered, label=name, linestyle="none", **style)
    left.axhline(tolerance, color=COLOURS[0], linestyle="--", linewidth=1, label="tolerance")
    right.axhline(1.0, color=COLOURS[0], linestyle=":", linewidth=1, label="_one")
    left.set(
        xlabel="solver step", ylabel="relative residual ‖F(z) − z‖ / ‖F(z)‖", yscale="log",
        title=title,
    )  # fmt: skip
    right.set(
        xlabel="samples (%), sorted", ylabel="spectral radius of ∂F/∂z (dimensionless)",
        xlim=(0, 100),
    )  # fmt: skip
    for axes in (left, right):
        axes.grid(alpha=0.3)
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    return figure
