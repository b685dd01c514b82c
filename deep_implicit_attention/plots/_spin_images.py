"""Images of two colours, in rows."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure


def image_rows(rows: Mapping[str, np.ndarray], title: str = "") -> Figure:
    """Rows of images `(n, H, W)`, n the same for all, each row under its name.

    Values are from −1 (black) to 1 (white); NaN are drawn grey-blue, as what is not known.

    Raises:
        ValueError: for no rows or images, or rows of different lengths.
    """
    if not rows:
        raise ValueError("there must be at least one row of images")
    counts = {name: len(images) for name, images in rows.items()}
    if len(set(counts.values())) != 1:
        raise ValueError(f"rows must have equally many images, got {counts}")
    columns = next(iter(counts.values()))
    if not columns:
        raise ValueError("rows must have at least one image each, got none")
    figure = Figure(figsize=(1.9 + 0.62 * columns, 0.4 + 0.66 * len(rows)), layout="constrained")
    grid = figure.subplots(len(rows), columns, squeeze=False)
    for axes, (name, images) in zip(grid, rows.items(), strict=True):
        for one, image in zip(axes, images, strict=True):
            one.set_facecolor("#8fa8c8")
            one.imshow(image, cmap="gray", vmin=-1, vmax=1, interpolation="nearest")
            one.set(xticks=[], yticks=[])
        axes[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9)
    figure.suptitle(title, fontsize=10, parse_math=False)
    return figure
