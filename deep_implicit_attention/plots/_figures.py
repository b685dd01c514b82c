"""Arrays in, matplotlib figures out. Colours that colour-blind readers can tell apart."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from torch import Tensor

# Okabe, Ito 2008: black, orange, blue, green, vermilion.
COLOURS = ("#000000", "#E69F00", "#0072B2", "#009E73", "#D55E00")


def learning_curves(
    epochs: Sequence[int],
    train_loss: Sequence[float],
    validation_loss: Sequence[float],
    train_accuracy: Sequence[float],
    validation_accuracy: Sequence[float],
) -> Figure:
    """Loss (nats) and error (one minus accuracy) against epochs, training and validation.

    The axis of the error is linear below one per cent and logarithmic above.

    Raises:
        ValueError: unless there is a number of each for every epoch.
    """
    for name, values in (
        ("train_loss", train_loss), ("validation_loss", validation_loss),
        ("train_accuracy", train_accuracy), ("validation_accuracy", validation_accuracy),
    ):  # fmt: skip
        if len(values) != len(epochs):
            raise ValueError(f"{name} must have {len(epochs)} numbers as epochs, got {len(values)}")
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes, title, train, validation in (
        (left, "cross-entropy (nats)", train_loss, validation_loss),
        (right, "error (%)", _error(train_accuracy), _error(validation_accuracy)),
    ):
        axes.plot(epochs, train, color=COLOURS[1], label="training (augmented, as trained)")
        axes.plot(epochs, validation, color=COLOURS[2], label="validation")
        axes.set(xlabel="epoch", ylabel=title, yscale="log")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        mark_lone(axes.lines)
        axes.legend(frameon=False)
        axes.grid(alpha=0.3, which="both")
    right.set_yscale("symlog", linthresh=1.0)
    right.set_ylim(0, 1.1 * right.get_ylim()[1])  # its own limit cuts marks in half
    return figure


def mark_lone(lines: Iterable[Line2D]) -> None:
    """Mark the points that have no neighbour to be joined with: a line alone does not show them."""
    for line in lines:
        there = np.isfinite(np.asarray(line.get_ydata(), float))
        joined = np.zeros_like(there)
        joined[1:] |= there[:-1]
        joined[:-1] |= there[1:]
        lone = there & ~joined
        if lone.any():
            line.set(marker=".", markevery=lone)


def _error(accuracy: Sequence[float]) -> np.ndarray:
    """Per cent."""
    return 100 * (1 - np.asarray(accuracy))


def confusion_matrix(counts: np.ndarray, names: Sequence[str], title: str = "") -> Figure:
    """Counts `(classes, classes)` of true class (rows) against predicted class (columns).

    Raises:
        ValueError: unless `counts` is square, with a name for each class.
    """
    counts = np.asarray(counts)
    if counts.shape != (len(names), len(names)):
        raise ValueError(
            f"counts must have shape ({len(names)}, {len(names)}) for {len(names)} names, got "
            f"{counts.shape}"
        )
    figure = Figure(figsize=(5.2, 4.6), layout="constrained")
    axes = figure.subplots()
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    image = axes.imshow(share, cmap="cividis", vmin=0, vmax=1)
    for (row, column), count in np.ndenumerate(counts):
        if count:
            # Not quite black and white, which a page would turn into its reader's colours.
            colour = "#0a0a0a" if share[row, column] > 0.5 else "#f5f5f5"
            axes.text(column, row, str(count), ha="center", va="center", color=colour, fontsize=9)
    axes.set(xlabel="predicted class", ylabel="true class", title=title)
    axes.set_xticks(range(len(names)), names)
    axes.set_yticks(range(len(names)), names)
    figure.colorbar(image, label="share of the true class")
    return figure


def convergence(trace: np.ndarray | Tensor, tolerance: float, title: str = "") -> Figure:
    """Relative residual of every sample, `trace` `(steps, samples)`, against solver steps.

    A sample that is done is NaN from there on; the median is drawn while half of them go on.

    Raises:
        ValueError: for a trace of another shape, or of no samples.
    """
    if isinstance(trace, Tensor):
        trace = trace.detach().cpu().numpy()
    trace = np.asarray(trace, float)
    if trace.ndim != 2 or not trace.shape[1]:
        raise ValueError(
            f"trace must have shape (steps, samples) with at least one sample, got {trace.shape}"
        )
    going = np.isfinite(trace).mean(axis=1) >= 0.5
    middle = np.full(len(trace), np.nan)
    middle[going] = np.nanmedian(trace[going], axis=1)
    figure = Figure(figsize=(5.2, 4), layout="constrained")
    axes = figure.subplots()
    steps = np.arange(1, len(trace) + 1)
    alpha = min(1.0, max(0.3, 2 / trace.shape[1]))
    axes.plot(steps, trace, color=COLOURS[2], alpha=alpha, linewidth=1)
    axes.plot(steps, middle, color=COLOURS[0], linewidth=2, label="median")
    mark_lone(axes.lines)
    axes.axhline(tolerance, color=COLOURS[4], linestyle="--", label=f"tolerance {tolerance:g}")
    axes.set(
        xlabel="solver step", ylabel="relative residual ‖f(z) − z‖ / ‖f(z)‖", yscale="log",
        title=title,
    )  # fmt: skip
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    return figure
