"""How magnetizations settle: step by step, as maps, and how many steps are enough."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike

from ._curves import Panel, curves
from ._figures import COLOURS, mark_lone


def relaxation(
    magnetizations: ArrayLike,
    residuals: ArrayLike,
    *,
    steps: ArrayLike | None = None,
    emphasised: int | None = None,
    name: str | None = None,
    tolerance: float | None = None,
    title: str = "",
) -> Figure:
    """Magnetizations of one sample against relaxation steps, beside the residual.

    `magnetizations` are `(steps, N)`, of scalar spins, or `(steps, N, d)`, whose lengths ‖z_i‖ are
    drawn, one line a site; the site `emphasised` is thick, and has `name` in the legend, by
    default its number. `residuals` `(steps,)` are relative, ‖F(z) − z‖ / ‖F(z)‖. `steps` are the
    numbers of the steps, by default 1, 2, ...

    Raises:
        ValueError: for arrays of other shapes, a site `emphasised` that is not there, and a `name`
            without one.
    """
    z, residuals = np.asarray(magnetizations, float), np.asarray(residuals, float)
    if z.ndim not in (2, 3) or residuals.shape != z.shape[:1]:
        raise ValueError(
            "magnetizations must have shape (steps, N) or (steps, N, d) and residuals (steps,), "
            f"got {z.shape} and {residuals.shape}"
        )
    if name is not None and emphasised is None:
        raise ValueError(f"name is that of the site emphasised, of which there is none: {name!r}")
    if emphasised is not None and not 0 <= emphasised < z.shape[1]:
        raise ValueError(f"emphasised must be one of {z.shape[1]} sites, got {emphasised}")
    lines = z if z.ndim == 2 else np.linalg.norm(z, axis=-1)
    at = np.arange(1, len(z) + 1) if steps is None else np.asarray(steps)
    if at.shape != residuals.shape:
        raise ValueError(f"steps must have shape {residuals.shape} as residuals, got {at.shape}")
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    alpha = min(1.0, max(0.15, 6 / max(1, lines.shape[1])))
    for site, line in enumerate(lines.T):
        if site != emphasised:
            left.plot(at, line, color=COLOURS[2], alpha=alpha, linewidth=1, label=f"_site {site}")
    if emphasised is not None:
        label = f"site {emphasised}" if name is None else name
        left.plot(at, lines[:, emphasised], color=COLOURS[4], linewidth=2.2, label=label)
    mark_lone(left.lines)
    if emphasised is not None:
        left.legend(frameon=False)
    what = "magnetization $m_i$" if z.ndim == 2 else "length ‖$z_i$‖ of the magnetization"
    left.set(xlabel="relaxation step", ylabel=f"{what} (dimensionless)", title=title)
    right.plot(at, residuals, color=COLOURS[0], marker="o", markersize=3, label="residual")
    if tolerance is not None:
        right.axhline(tolerance, color=COLOURS[4], linestyle="--", label=f"tolerance {tolerance:g}")
    right.set(
        xlabel="relaxation step", ylabel="relative residual ‖F(z) − z‖ / ‖F(z)‖", yscale="log"
    )
    right.legend(frameon=False)
    for axes in (left, right):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
    return figure


def magnetization_maps(
    maps: ArrayLike,
    captions: Sequence[str],
    *,
    image: ArrayLike | None = None,
    label: str = "length ‖z_i‖ of the magnetization (dimensionless)",
    title: str = "",
) -> Figure:
    """Maps `(n, H, W)` of magnetizations over the sites of an image, one colour scale for all.

    From 0 where no number is negative; else blue below 0 and red above, white at 0. NaN are grey.
    With `image` `(h, w)` or `(h, w, 3)`, whose patches the sites are, the outline of what is bright
    in it lies over the maps: a line at half of its range, which leaves their colours alone.
    """
    maps = np.asarray(maps, float)
    if maps.ndim != 3 or not len(maps) or len(maps) != len(captions):
        raise ValueError(
            f"maps must have shape (n, H, W), n at least 1, with n captions, got {maps.shape} and "
            f"{len(captions)}"
        )
    bright = None if image is None else np.asarray(image, float)
    if bright is not None and bright.ndim not in (2, 3):
        raise ValueError(f"image must have shape (h, w) or (h, w, 3), got {bright.shape}")
    largest = np.nanmax(np.abs(maps), initial=0.0) or 1.0
    signed = bool((maps < 0).any())
    low, colours = (-largest, "RdBu_r") if signed else (0.0, "cividis")
    figure = Figure(figsize=(0.9 + 1.45 * len(maps), 2.4), layout="constrained")
    grid = figure.subplots(1, len(maps), squeeze=False)[0]
    drawn = None
    for axes, values, caption in zip(grid, maps, captions, strict=True):
        axes.set_facecolor("#9a9a9a")
        drawn = axes.imshow(values, cmap=colours, vmin=low, vmax=largest)
        if bright is not None:
            _outline(axes, bright, values.shape)
        axes.set(xticks=[], yticks=[])
        axes.set_title(caption, fontsize=9)
    if drawn is not None:
        figure.colorbar(drawn, ax=list(grid), label="\n".join(_halves(label)))
    figure.suptitle(title, fontsize=10, parse_math=False)
    return figure


def _outline(axes: Axes, image: np.ndarray, sites: tuple[int, ...]) -> None:
    """A line around the bright parts of an image that covers a map of so many sites."""
    grey = image if image.ndim == 2 else image.mean(axis=-1)
    if grey.min() == grey.max():
        return
    # One more pixel on each side, so that lines run to the border.
    wider = np.pad(grey, 1, mode="edge")
    y, x = ((np.arange(n + 2) - 0.5) * m / n - 0.5 for n, m in zip(grey.shape, sites, strict=True))
    level = (grey.min() + grey.max()) / 2
    limits = axes.get_xlim(), axes.get_ylim()
    # White on black is seen on every colour.
    for colour, width in (("black", 2.6), ("white", 1.2)):
        axes.contour(x, y, wider, levels=[level], colors=colour, linewidths=width)
    axes.set(xlim=limits[0], ylim=limits[1])


def relaxation_horizon(
    steps: Sequence[int],
    by_steps: Mapping[str, ArrayLike],
    at_equilibrium: Mapping[str, float],
    label: str,
    title: str = "",
) -> Figure:
    """A score of the weights used as an explicit network of so many steps, for each name; dashed,
    that at equilibrium.

    `label` says what the score is, with its unit. At most three equilibria can be told apart.

    Raises:
        ValueError: for no steps, or another number of scores than of steps.
    """
    if not len(steps):
        raise ValueError("steps must hold at least one number of steps, got none")
    for name, values in by_steps.items():
        if np.shape(values) != (len(steps),):
            raise ValueError(
                f"{name} must have a score for each of {len(steps)} steps, got shape "
                f"{np.shape(values)}"
            )
    ends = [min(steps), max(steps)]
    lines: dict[str, tuple[ArrayLike, ArrayLike]] = {
        name: (steps, values) for name, values in by_steps.items()
    }
    references = [_equilibrium(name, len(at_equilibrium)) for name in at_equilibrium]
    for reference, value in zip(references, at_equilibrium.values(), strict=True):
        lines[reference] = (ends, [value, value])
    panel = Panel("steps of z ← F(z; x)", label, lines, title=title, xscale="log")
    return curves(panel, reference=references)


def _equilibrium(name: str, count: int) -> str:
    return "equilibrium" if count == 1 else f"{name}, equilibrium"


def _halves(label: str) -> list[str]:
    """Two lines of about the same length, for the side of a low figure."""
    words = label.split()
    best = min(
        range(1, len(words) + 1), key=lambda k: abs(2 * len(" ".join(words[:k])) - len(label))
    )
    return [" ".join(words[:best]), " ".join(words[best:])]
