"""Couplings as a graph between sites: anywhere, over an image, over a text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle

from ._figures import COLOURS

# Strongest couplings that are drawn; more arrows than `_MOST` hide each other.
SHARE = 0.2
_MOST = 120
# J_ij and J_ji that differ by less than this part of the strongest coupling are drawn as one line.
_SYMMETRIC = 1e-3
# Opacity of the weakest line, whose contrast is then above 2 on white and on a dark page.
PALEST = 0.6
# The blue of lines over an image.
OVER_IMAGE = "#0073b2"
# Between arrows and the centres of sites, and between them and the edges of tokens, in points.
_AT_SITE, _AT_TEXT = 5, 1
# Between two lines of a text, and the highest arc above one, in widths of a token.
_LINE, _HIGHEST = 3.5, 2.2
STRENGTH = "coupling strength ‖J_ij‖_F (dimensionless)"


def coupling_graph(
    strengths: np.ndarray, positions: np.ndarray, names: Sequence[str], title: str = ""
) -> Figure:
    """Coupling strengths `(N, N)` as a matrix, and as a graph between sites.

    `positions` `(N, 2)` are the places of the sites, x to the right and y downwards, as in an
    image. The matrix is blank where a site is not coupled to itself. Lines are as wide and as dark
    as a coupling is strong; the strongest fifth is drawn. Where J_ij and J_ji differ, each is an
    arrow from the site j that pulls to the site i that is pulled, and at most 120 are drawn.

    Raises:
        ValueError: for fewer than two sites, strengths that are not finite, or another number of
            positions or names than of sites.
    """
    strengths, positions = _checked(strengths, positions)
    if len(strengths) < 2:
        raise ValueError(f"strengths must be between at least 2 sites, got {len(strengths)}")
    if len(names) != len(strengths):
        raise ValueError(f"names must be one for each of {len(strengths)} sites, got {len(names)}")
    figure = Figure(figsize=(10, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    itself = np.eye(len(strengths), dtype=bool)
    apart = strengths[~itself]
    # J_ii = 0 is below the scale, which is that of the others.
    seen = np.ma.masked_where(itself & (strengths == 0), strengths)
    image = left.imshow(seen, cmap="cividis", vmin=apart.min(), vmax=apart.max())
    left.set(xlabel="site j", ylabel="site i", title=title)
    ticks = range(0, len(names), max(1, len(names) // 12))
    left.set_xticks(ticks, [names[i] for i in ticks], rotation=90, fontsize=8)
    left.set_yticks(ticks, [names[i] for i in ticks], fontsize=8)
    figure.colorbar(image, label=STRENGTH)

    drawn = draw_couplings(right, strengths, positions)
    right.scatter(*positions.T, s=330, color="white", edgecolors=COLOURS[0], zorder=2)
    for name, place in zip(names, positions, strict=True):
        right.annotate(name, place, ha="center", va="center", fontsize=7, zorder=3)
    right.set(title=drawn, xticks=[], yticks=[])
    right.margins(0.1)
    right.invert_yaxis()
    # Axes that keep their box: for those that shrink in it too little room is left for the title.
    _bare(right, adjustable="datalim")
    return figure


def couplings_over_image(
    strengths: np.ndarray,
    image: np.ndarray,
    positions: np.ndarray,
    title: str = "",
    weakest: float | None = None,
    strongest: float | None = None,
) -> Figure:
    """The graph of couplings `(N, N)` over an image `(H, W)` or `(H, W, 3)` from 0 to 1.

    `positions` `(N, 2)` are the sites in pixels, x to the right and y downwards; the centre of the
    first pixel is (0, 0), and sites may lie beside the image. Lines are drawn as in
    `coupling_graph`; `weakest` and `strongest` fix the strengths of the thinnest and the widest
    line, so that several figures can be compared.
    """
    strengths, positions = _checked(strengths, positions)
    image = np.asarray(image, dtype=float)
    if image.ndim not in (2, 3):
        raise ValueError(f"image must have shape (H, W) or (H, W, 3), got {image.shape}")
    height, width = image.shape[:2]
    margin = 0.5 + 0.03 * width
    left, top = np.minimum(positions.min(axis=0), 0) - margin
    right, bottom = np.maximum(positions.max(axis=0), [width - 1, height - 1]) + margin
    shape = (bottom - top) / (right - left)
    figure = Figure(figsize=(5.2, 0.8 + 5 * shape), layout="constrained")
    axes = figure.subplots()
    # Pale, so that lines are seen on black and on white; and the same on every page, light or dark,
    # so neither the ground nor the lines are quite of a colour that a page replaces.
    ground = Rectangle((left, top), right - left, bottom - top, facecolor="#fdfdfd", zorder=-1)
    axes.add_patch(ground)
    axes.imshow(0.75 + 0.25 * image, cmap="gray", vmin=0, vmax=1, zorder=0)
    drawn = draw_couplings(
        axes, strengths, positions, weakest, strongest, colour=OVER_IMAGE, palest=0.75
    )
    axes.scatter(*positions.T, s=26, color="white", edgecolors=COLOURS[0], zorder=2)
    axes.set(title=title, xlabel=drawn, xlim=(left, right), ylim=(bottom, top))
    axes.set(xticks=[], yticks=[])
    _bare(axes)
    return figure


def couplings_over_text(
    strengths: np.ndarray,
    tokens: Sequence[str],
    title: str = "",
    per_line: int = 32,
    strongest: float | None = None,
) -> Figure:
    """The couplings `(T, T)` between the tokens of a text, written in lines of `per_line`.

    For every token i an arrow from the other token j that pulls it most, as wide and as dark as
    J_ij is strong. (The strongest of all would be those of the first tokens, which have few others
    to share their attention among.) Within a line arrows to the right run above it, those to the
    left below. `strongest` fixes the strength of the widest arrow, and is said below the text, so
    that several figures can be compared.

    Raises:
        ValueError: for `per_line` below 1, strengths that are not finite, or another number of
            tokens.
    """
    if per_line < 1:
        raise ValueError(f"per_line must be at least 1, got {per_line}")
    if len(tokens) != len(strengths):
        raise ValueError(
            f"tokens must be one for each of {len(strengths)} sites, got {len(tokens)}"
        )
    rows, columns = np.divmod(np.arange(len(tokens)), per_line)
    positions = np.stack([columns, _LINE * rows], axis=1)
    strengths, positions = _checked(strengths, positions)
    others = np.where(np.eye(len(strengths), dtype=bool), -np.inf, strengths)
    sources = others.argmax(axis=1) if len(others) else np.zeros(0, int)
    pulled = np.nonzero(others.max(axis=1, initial=-np.inf) > 0)[0]
    values = others[pulled, sources[pulled]]
    high = (values.max(initial=0.0) if strongest is None else strongest) or 1.0

    # What the arrows reach beyond the text, found before the figure is made to hold it.
    width, lines = min(per_line, len(tokens)), (rows[-1] + 1 if len(rows) else 1)
    arcs = [_arc(positions[j], positions[i]) for i, j in zip(pulled, sources[pulled], strict=True)]
    reach = [[-1.0, -1.0], [width, _LINE * (lines - 1) + 1.0], *(p for a in arcs for p in a.path())]
    (left, top), (right, bottom) = np.min(reach, axis=0) - 0.3, np.max(reach, axis=0) + 0.3
    size = max(4.8, 0.6 + 0.28 * (right - left)), 1.1 + 0.28 * (bottom - top)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    for i, j, value, arc in zip(pulled, sources[pulled], values, arcs, strict=True):
        weight = min(1.0, value / high)
        _arrow(axes, f"_{j}→{i}", arc.start, arc.stop, weight, arc.bend, _AT_TEXT)
    drawn = "strongest coupling J_ij (dimensionless) of every token i, j → i"
    if len(values):
        low, most = f"{values.min():.2g}", f"{values.max():.2g}"
        if strongest is None:
            drawn += f"\nfrom {low} (thin, pale) to {most} (wide, dark)"
        else:
            drawn += f"\nfrom {low} to {most}; wide and dark: {high:.2g} or more"
    for token, place in zip(tokens, positions, strict=True):
        axes.annotate(
            _visible(token), place, ha="center", va="center", fontsize=10, family="monospace",
            zorder=3, bbox={"boxstyle": "round,pad=0.12", "fc": "white", "ec": "none"},
        )  # fmt: skip
    axes.set(title=title, xlabel=drawn, xticks=[], yticks=[])
    axes.set(xlim=(left, right), ylim=(bottom, top))
    _bare(axes)
    return figure


@dataclass(frozen=True)
class _Arc:
    """An arrow from the edge of one token to that of another; x to the right, y downwards."""

    start: np.ndarray
    stop: np.ndarray
    bend: float

    def path(self) -> list[np.ndarray]:
        """Points on it: of the quadratic curve that matplotlib's `arc3` draws."""
        across = self.stop - self.start
        middle = (self.start + self.stop) / 2 + self.bend * np.array([-across[1], across[0]])
        t = np.linspace(0, 1, 9)[:, None]
        return list((1 - t) ** 2 * self.start + 2 * t * (1 - t) * middle + t**2 * self.stop)


def _arc(source: np.ndarray, target: np.ndarray) -> _Arc:
    """Between two tokens: above their line to the right, below it to the left, and from line to
    line between the facing edges."""
    across, down = target - source
    distance = float(np.hypot(across, down))
    edge = np.array([0.0, 0.5])
    if down == 0:
        # That of neighbours must be seen beside them, that of distant ones meet no other line.
        height = min(max(0.17 * distance, 0.7), _HIGHEST)
        side = -edge if across > 0 else edge
        return _Arc(source + side, target + side, -2 * height / distance)
    # Between lines nearly straight, not to dip below the line where an arrow ends.
    side = edge if down > 0 else -edge
    return _Arc(source + side, target - side, -0.35 * (abs(down) - 1) / distance)


def draw_couplings(
    axes: Axes,
    strengths: np.ndarray,
    positions: np.ndarray,
    weakest: float | None = None,
    strongest: float | None = None,
    colour: str = COLOURS[2],
    palest: float = PALEST,
) -> str:
    """Draw the strongest fifth of the couplings between places; returns what was drawn, in words.

    Lines, in one `LineCollection`, where the couplings are symmetric; else an arrow from j to i,
    labelled ``_j→i``, for every J_ij.
    """
    apart = ~np.eye(len(strengths), dtype=bool)
    largest = strengths[apart].max(initial=0.0)
    symmetric = np.abs(strengths - strengths.T).max() <= _SYMMETRIC * largest
    rows, columns = np.triu_indices(len(strengths), 1) if symmetric else np.nonzero(apart)
    values = np.maximum(strengths, strengths.T) if symmetric else strengths
    values = values[rows, columns]
    first = int((1 - SHARE) * len(values))
    if not symmetric:
        first = max(first, len(values) - _MOST, int((values <= 0).sum()))
    order = np.argsort(values, kind="stable")[first:]
    drawn = values[order]
    if not len(drawn):
        return "no couplings"
    span = f"{drawn[0]:.2g} to {drawn[-1]:.2g}"
    low = drawn[0] if weakest is None else weakest
    high = drawn[-1] if strongest is None else strongest
    weight = np.clip((drawn - low) / ((high - low) or 1.0), 0, 1)
    if not symmetric:
        for i, j, one in zip(rows[order], columns[order], weight, strict=True):
            ends = positions[j], positions[i]
            _arrow(axes, f"_{j}→{i}", *ends, one, 0.25, _AT_SITE, colour, palest)
        return f"the {len(drawn)} strongest couplings ‖J_ij‖, j → i:\n{span} (dimensionless)"
    lines = np.stack([positions[rows[order]], positions[columns[order]]], axis=1)
    axes.add_collection(
        LineCollection(list(lines), linewidths=0.6 + 3.7 * weight**2, colors=colour,
                       alpha=palest + (0.95 - palest) * weight, zorder=1)
    )  # fmt: skip
    return f"strongest fifth of the couplings ‖J_ij‖:\n{span} (dimensionless)"


def _arrow(
    axes: Axes,
    label: str,
    start: np.ndarray,
    stop: np.ndarray,
    weight: float,
    bend: float,
    shrink: float,
    colour: str = COLOURS[2],
    palest: float = PALEST,
) -> None:
    """An arrow weighted from 0 to 1; also the weakest is seen on the paper."""
    width = 0.6 + 1.9 * weight**2
    axes.add_patch(
        FancyArrowPatch(
            tuple(start), tuple(stop), label=label, connectionstyle=f"arc3,rad={bend}",
            arrowstyle="-|>", mutation_scale=5 + 3 * width, shrinkA=shrink, shrinkB=shrink,
            linewidth=width, color=colour, alpha=palest + (0.95 - palest) * weight, zorder=1,
        )
    )  # fmt: skip


def _checked(strengths: np.ndarray, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    strengths, positions = np.asarray(strengths, float), np.asarray(positions, float)
    if strengths.ndim != 2 or strengths.shape[0] != strengths.shape[1]:
        raise ValueError(f"strengths must have shape (N, N), got {strengths.shape}")
    if positions.shape != (len(strengths), 2):
        raise ValueError(
            f"there must be a place for each of {len(strengths)} sites, got {positions.shape}"
        )
    for what, array in (("strengths", strengths), ("positions", positions)):
        if not np.isfinite(array).all():
            broken = tuple(int(k) for k in np.argwhere(~np.isfinite(array))[0])
            raise ValueError(f"{what} must be finite, got {array[broken]} at {broken}")
    return strengths, positions


def _visible(token: str) -> str:
    return token.replace("\n", "↵").replace(" ", "␣").replace("$", r"\$")


def _bare(axes: Axes, adjustable: Literal["box", "datalim"] = "box") -> None:
    axes.set_aspect("equal", adjustable=adjustable)
    for side in axes.spines.values():
        side.set_visible(False)
