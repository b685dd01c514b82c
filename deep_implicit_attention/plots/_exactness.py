"""Approximate answers against exact ones, and where in a phase diagram methods have answers."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from ._figures import COLOURS
from ._inference import STYLES


def against_exact(
    exact: ArrayLike,
    estimates: Mapping[str, ArrayLike],
    standard_errors: Mapping[str, ArrayLike] | None = None,
    *,
    label: str = "magnetization ⟨$S_i$⟩ (dimensionless)",
    title: str = "",
) -> Figure:
    """Estimates `(n,)` by name against exact values `(n,)`, over the diagonal.

    `standard_errors` `(n,)` of the names that have them are drawn as bars, two standard errors to
    each side; an estimate that is right is within them 19 times of 20. Estimates that are not
    finite have no point; the legend says how many they are.

    Raises:
        ValueError: for arrays of other lengths, exact values that are not finite, standard errors
            of unknown names, or more than six names.
    """
    exact, errors = np.asarray(exact, float), dict(standard_errors or {})
    if len(estimates) > len(STYLES):
        raise ValueError(f"at most {len(STYLES)} names can be told apart, got {len(estimates)}")
    if not np.isfinite(exact).all():
        broken = int(np.flatnonzero(~np.isfinite(exact))[0])
        raise ValueError(f"exact must be finite, got exact[{broken}] = {exact.flat[broken]}")
    unknown = [name for name in errors if name not in estimates]
    if unknown:
        raise ValueError(f"standard errors must be of estimates, got {', '.join(unknown)}")
    figure = Figure(figsize=(4.6, 4.8), layout="constrained")
    axes = figure.subplots()
    everything = [exact]
    for (name, values), (colour, marker, size) in zip(estimates.items(), STYLES, strict=False):
        values = np.asarray(values, float)
        if values.shape != exact.shape:
            raise ValueError(f"{name} must have shape {exact.shape}, got {values.shape}")
        bars = 2 * np.asarray(errors[name], float) if name in errors else None
        shown = f"{name}, ± 2 standard errors" if name in errors else name
        if broken := int((~np.isfinite(values)).sum()):
            shown += f" ({broken} of {values.size} not finite)"
        axes.errorbar(
            exact, values, yerr=bars, fmt=marker, color=colour, markersize=size,
            markerfacecolor="none", elinewidth=1, capsize=2, label=shown,
        )  # fmt: skip
        everything.append(values[np.isfinite(values)])
    joined = np.concatenate(everything)
    low, high = (joined.min(), joined.max()) if joined.size else (0.0, 0.0)
    margin = 0.05 * (high - low) or 0.05
    ends = (low - margin, high + margin)
    axes.plot(ends, ends, color=COLOURS[0], linewidth=1, label="_exact", zorder=0)
    axes.set(xlim=ends, ylim=ends, aspect="equal", title=title)
    axes.set(xlabel=f"exact {label}", ylabel=f"estimated {label}")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)
    return figure


def phase_diagram(
    temperatures: ArrayLike,
    fields: ArrayLike,
    answers: Mapping[str, ArrayLike],
    converged: Mapping[str, ArrayLike] | None = None,
    *,
    order_label: str = "mean |magnetization| (dimensionless)",
    temperature_label: str = "temperature T (units of the coupling)",
    field_label: str = "field (units of the coupling)",
    title: str = "",
) -> Figure:
    """An order parameter over (temperature, field) by each method, with crosses where it failed.

    `answers` `(temperatures, fields)` by method, one colour scale for all; `converged`, boolean, of
    the same shape, for the methods that iterate.

    Raises:
        ValueError: for no method, or an array of another shape.
    """
    if not answers:
        raise ValueError("answers must hold those of at least one method, got none")
    temperatures, fields = np.asarray(temperatures, float), np.asarray(fields, float)
    shape = (len(temperatures), len(fields))
    given = {name: np.asarray(values, float) for name, values in answers.items()}
    verdicts = {name: np.asarray(values, bool) for name, values in (converged or {}).items()}
    for name, values in (*given.items(), *verdicts.items()):
        if values.shape != shape:
            raise ValueError(
                f"{name} must have a value for each of {shape[0]} temperatures and {shape[1]} "
                f"fields, got shape {values.shape}"
            )
    finite = np.concatenate([values[np.isfinite(values)] for values in given.values()])
    low, high = min(0.0, finite.min(initial=0.0)), finite.max(initial=0.0) or 1.0
    figure = Figure(figsize=(0.9 + 2.9 * len(given), 3.4), layout="constrained")
    grid = figure.subplots(1, len(given), squeeze=False, sharey=True)[0]
    mesh = None
    for axes, (name, values) in zip(grid, given.items(), strict=True):
        axes.set_facecolor("#9a9a9a")
        mesh = axes.pcolormesh(
            fields, temperatures, np.ma.masked_invalid(values), cmap="cividis", vmin=low,
            vmax=high, shading="nearest", rasterized=True,
        )  # fmt: skip
        failed = ~verdicts[name] if name in verdicts else np.zeros(shape, bool)
        rows, columns = np.nonzero(failed)
        axes.plot(
            fields[columns], temperatures[rows], linestyle="none", marker="x", markersize=4,
            color=COLOURS[4], label="_failed",
        )  # fmt: skip
        axes.set(xlabel=field_label)
        told = f"\n{failed.mean():.0%} not converged (×)" if name in verdicts else "\n"
        axes.set_title(name + told, fontsize=9)
    grid[0].set_ylabel(temperature_label)
    if mesh is not None:
        figure.colorbar(mesh, ax=list(grid), label=order_label)
    figure.suptitle(title, fontsize=10, parse_math=False)
    return figure
