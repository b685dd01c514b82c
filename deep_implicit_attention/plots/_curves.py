"""Named curves side by side: one colour and marker for each name in all panels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullLocator
from numpy.typing import ArrayLike

from ._figures import COLOURS
from ._inference import STYLES

Series = Mapping[str, tuple[ArrayLike, ArrayLike]]

# With more points than this on a line, markers would run into each other.
_MARKED = 16
_DASHES = ("--", ":", "-.")


@dataclass(frozen=True)
class Panel:
    """One set of axes: `lines` and `points` by name, each a pair of arrays x and y.

    NaN are gaps. `xscale` and `yscale` are those of matplotlib; labels carry the units.
    """

    xlabel: str
    ylabel: str
    lines: Series = field(default_factory=dict)
    points: Series = field(default_factory=dict)
    title: str = ""
    xscale: str = "linear"
    yscale: str = "linear"


def curves(*panels: Panel, reference: Sequence[str] = ("exact",)) -> Figure:
    """A figure of panels side by side, with one legend for all names in them.

    The names of `reference`, three at most, are what others are compared with: black, the first
    dashed, then dotted, then dash-dotted, their points as dots.

    Raises:
        ValueError: without a panel or anything in it, and for more other names than there are
            styles, six.
    """
    if not panels:
        raise ValueError("panels must be one at least, got none")
    named = dict.fromkeys(name for panel in panels for name in (*panel.lines, *panel.points))
    if not named:
        raise ValueError("panels must have a line or points, got none")
    others = [name for name in named if name not in reference]
    if len(others) > len(STYLES) or len(reference) > len(_DASHES):
        raise ValueError(
            f"at most {len(STYLES)} names and {len(_DASHES)} references can be told apart, got "
            f"{len(others)} and {len(reference)}"
        )
    styles: dict[str, dict[str, Any]] = {
        name: {"color": colour, "marker": marker, "markersize": size, "markerfacecolor": "none"}
        for name, (colour, marker, size) in zip(others, STYLES, strict=False)
    }
    for name, dash in zip(reference, _DASHES, strict=False):
        styles[name] = {"color": COLOURS[0], "marker": ".", "linestyle": dash}
    figure = Figure(figsize=(4.2 * len(panels), 3.9), layout="constrained")
    for panel, axes in zip(
        panels, figure.subplots(1, len(panels), squeeze=False).flat, strict=True
    ):
        _draw(axes, panel, styles, set(reference))
    lines = [_handle(name, figure) for name in named]
    width = sum(len(name) + 8 for name in named)
    columns = -(-len(lines) // -(-width // (55 * len(panels))))
    figure.legend(handles=lines, loc="outside lower center", ncols=columns, frameon=False)
    return figure


def _draw(axes: Axes, panel: Panel, styles: dict[str, dict[str, Any]], black: set[str]) -> None:
    # Scales first: a logarithmic axis whose lines are all gaps would keep limits below zero.
    axes.set(xlabel=panel.xlabel, ylabel=panel.ylabel, xscale=panel.xscale, yscale=panel.yscale)
    for name, (x, y) in panel.lines.items():
        plain = name in black or name in panel.points or len(np.asarray(x)) > _MARKED
        own = {**styles[name], "marker": "None"} if plain else styles[name]
        axes.plot(x, y, label=name, linewidth=1.3, zorder=3 if name in black else 2, **own)
    for name, (x, y) in panel.points.items():
        axes.plot(x, y, label=name, **{**styles[name], "linestyle": "None"})
    if panel.xscale == "log":
        decades = np.diff(np.log10(axes.get_xlim()))[0]
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 3 else (1,)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_locator(NullLocator())
    axes.set_title(panel.title, fontsize=10)
    axes.grid(alpha=0.3)


def _handle(name: str, figure: Figure) -> Line2D:
    """What stands for a name in the legend: a line, a marker, or both, as in any of the panels."""
    drawn = [line for axes in figure.axes for line in axes.lines if line.get_label() == name]
    handle = Line2D([], [], label=name, color=drawn[0].get_color(), markerfacecolor="none")
    for line in drawn:
        if line.get_marker() != "None":
            handle.set(marker=line.get_marker(), markersize=line.get_markersize())
    styles: list[Any] = [line.get_linestyle() for line in drawn if line.get_linestyle() != "None"]
    handle.set_linestyle(styles[0] if styles else "None")
    return handle
