"""Couplings as a graph between sites: anywhere, over an image, over a text."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch

from ._figures import COLOURS

# Strongest couplings that are drawn; more arrows than `_MOST` hide each other.
SHARE = 0.2
_MOST = 120
# J_ij and J_ji that differ by less than this part of the strongest coupling are drawn as one line.
_SYMMETRIC = 1e-3
STRENGTH = "coupling strength ‖J_ij‖_F (dimensionless)"


def coupling_graph(
    strengths: np.ndarray, positions: np.ndarray, names: Sequence[str], title: str = ""
) -> Figure:
    """Coupling strengths `(N, N)` as a matrix, and as a graph between sites.

    `positions` `(N, 2)` are the places of the sites, x to the right and y downwards, as in an
    image. Lines are as wide and as dark as a coupling is strong; the strongest fifth is drawn.
    Where J_ij and J_ji differ, each is an arrow from the site j that pulls to the site i that is
    pulled, and at most 120 are drawn.
    """
    strengths, positions = _checked(strengths, positions)
    figure = Figure(figsize=(10, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    apart = strengths[~np.eye(len(strengths), dtype=bool)]
    image = left.imshow(strengths, cmap="cividis", vmin=apart.min(), vmax=apart.max())
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
    _bare(right)
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
    # Pale, so that lines are seen on black and on white.
    axes.imshow(0.55 + 0.45 * image, cmap="gray", vmin=0, vmax=1, zorder=0)
    drawn = draw_couplings(axes, strengths, positions, weakest, strongest)
    axes.scatter(*positions.T, s=26, color="white", edgecolors=COLOURS[0], zorder=2)
    axes.set(title=title, xlabel=drawn, xlim=(left, right), ylim=(bottom, top))
    axes.set(xticks=[], yticks=[])
    _bare(axes)
    return figure


def couplings_over_text(
    strengths: np.ndarray, tokens: Sequence[str], title: str = "", per_line: int = 32
) -> Figure:
    """The couplings `(T, T)` between the tokens of a text, written in lines of `per_line`.

    For every token i an arrow from the other token j that pulls it most, as wide and as dark as
    J_ij is strong. (The strongest of all would be those of the first tokens, which have few others
    to share their attention among.)
    """
    if per_line < 1:
        raise ValueError(f"per_line must be at least 1, got {per_line}")
    rows, columns = np.divmod(np.arange(len(tokens)), per_line)
    positions = np.stack([columns, 3.5 * rows], axis=1)
    strengths, positions = _checked(strengths, positions)
    width, lines = min(per_line, len(tokens)), (rows[-1] + 1 if len(rows) else 1)
    figure = Figure(figsize=(0.6 + 0.28 * width, 1.4 + 1.0 * lines), layout="constrained")
    axes = figure.subplots()
    others = np.where(np.eye(len(strengths), dtype=bool), -np.inf, strengths)
    sources = others.argmax(axis=1) if len(others) else np.zeros(0, int)
    pulled = np.nonzero(others.max(axis=1, initial=-np.inf) > 0)[0]
    values = others[pulled, sources[pulled]]
    high = values.max(initial=0.0)
    _arrows(axes, positions, pulled, sources[pulled], values / (high or 1.0), bend=-0.35)
    drawn = "strongest coupling J_ij of every token i, j → i"
    for token, place in zip(tokens, positions, strict=True):
        axes.annotate(
            _visible(token), place, ha="center", va="center", fontsize=10, family="monospace",
            zorder=3, bbox={"boxstyle": "round,pad=0.12", "fc": "white", "ec": "none"},
        )  # fmt: skip
    axes.set(title=title, xlabel=drawn, xticks=[], yticks=[])
    axes.set(xlim=(-1, width), ylim=(3.5 * (lines - 1) + 1.5, -4.0))
    _bare(axes)
    return figure


def draw_couplings(
    axes: Axes,
    strengths: np.ndarray,
    positions: np.ndarray,
    weakest: float | None = None,
    strongest: float | None = None,
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
        _arrows(axes, positions, rows[order], columns[order], weight)
        return f"the {len(drawn)} strongest couplings ‖J_ij‖, j → i: {span}"
    lines = np.stack([positions[rows[order]], positions[columns[order]]], axis=1)
    axes.add_collection(
        LineCollection(list(lines), linewidths=0.3 + 4 * weight**2, colors=COLOURS[2],
                       alpha=0.15 + 0.75 * weight, zorder=1)
    )  # fmt: skip
    return f"strongest fifth of the couplings ‖J_ij‖: {span}"


def _arrows(
    axes: Axes,
    positions: np.ndarray,
    targets: np.ndarray,
    sources: np.ndarray,
    weights: np.ndarray,
    bend: float = 0.25,
) -> None:
    """Arrows from sources to targets, labelled ``_source→target``, weighted from 0 to 1."""
    for i, j, weight in zip(targets, sources, weights, strict=True):
        width = 0.3 + 2 * weight**2
        axes.add_patch(
            FancyArrowPatch(
                tuple(positions[j]), tuple(positions[i]), label=f"_{j}→{i}",
                connectionstyle=f"arc3,rad={bend}", arrowstyle="-|>",
                mutation_scale=5 + 3 * width, shrinkA=5, shrinkB=5, linewidth=width,
                color=COLOURS[2], alpha=0.3 + 0.6 * weight, zorder=1,
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
    return strengths, positions


def _visible(token: str) -> str:
    return token.replace("\n", "↵").replace(" ", "␣").replace("$", r"\$")


def _bare(axes: Axes) -> None:
    axes.set_aspect("equal")
    for side in axes.spines.values():
        side.set_visible(False)
