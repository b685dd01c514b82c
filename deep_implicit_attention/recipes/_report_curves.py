"""What the metrics of any run tell of its training, by the names that occur in them."""

from __future__ import annotations

import math
from typing import Any

from .. import plots
from ..plots._page import Section
from ._report_page import Story, pictures

Column = tuple[list[float], list[float]]
_ONE = "plain iteration contracts below"


def training_section(story: Story) -> Section:
    """Curves of a run that learned from images, from a text, or by a recipe that is not known."""
    return story.section("Training", "The metrics cannot be drawn", lambda part: _add(story, part))


def _add(story: Story, section: Section) -> None:
    history = story.history
    if not history:
        if story.records:
            story.missing.append(
                "The metrics hold no evaluations, so there are no learning curves."
            )
        return
    names = {name for record in history for name in record}
    panels = _image_panels(history) if "validation_accuracy" in names else _text_panels(history)
    drawn = []
    for panel, what in panels:
        if any(math.isfinite(y) for name in panel.lines for y in _drawn(panel, name)):
            drawn.append((plots.curves(panel, reference=(_ONE,)), what))
        else:
            story.missing.append(
                f"The metrics hold no finite numbers for a curve of: {panel.ylabel}."
            )
    section.add(pictures(*drawn))


def _drawn(panel: plots.Panel, name: str) -> list[float]:
    return [] if name == _ONE else list(panel.lines[name][1])  # type: ignore[arg-type]


def _column(history: list[dict[str, Any]], at: str, name: str, scale: float = 1.0) -> Column:
    """Numbers of the metrics `name` against those of `at`, or else steps; null, which is not
    finite, is a gap."""
    values = [record.get(name) for record in history]
    numbers = [math.nan if value is None else scale * float(value) for value in values]
    counted = all(record.get(at) is not None for record in history)
    return [float(record[at if counted else "step"]) for record in history], numbers


def _image_panels(history: list[dict[str, Any]]) -> list[tuple[plots.Panel, str]]:
    def column(name: str, scale: float = 1.0) -> Column:
        return _column(history, "epoch", name, scale)

    def error(name: str) -> Column:
        epochs, accuracies = column(name, 100)
        return epochs, [100 - accuracy for accuracy in accuracies]

    radius = column("spectral_radius")
    loss = {"training": column("train_loss"), "validation": column("validation_loss")}
    wrong = {"training": error("train_accuracy"), "validation": error("validation_accuracy")}
    return [
        (plots.Panel("epoch", "cross-entropy (nats)", loss, yscale="log"),
         "Loss by epoch; training images are augmented"),
        (plots.Panel("epoch", "error (%)", wrong), "Error by epoch"),
        (plots.Panel("epoch", "solver steps (mean)", {"training": column("solver_steps")}),
         "How many steps the solver takes"),
        (plots.Panel("epoch", "spectral radius of ∂F/∂z (dimensionless)",
                     {"validation": radius, **_one(radius)}),
         "How close the update is to not contracting"),
    ]  # fmt: skip


def _text_panels(history: list[dict[str, Any]]) -> list[tuple[plots.Panel, str]]:
    def column(name: str) -> Column:
        return _column(history, "step", name)

    learned = "train_cross_entropy" if "train_cross_entropy" in history[0] else "train_loss"
    radius = column("spectral_radius")
    loss = {"training": column(learned), "validation": column("validation_loss")}
    return [
        (plots.Panel("iteration", "cross-entropy (nats per character)", loss),
         "Loss; validation is at equilibrium"),
        (plots.Panel("iteration", "mean relative residual",
                     {"validation": column("validation_residual")}, yscale="log"),
         "How far from equilibrium the solver ends"),
        (plots.Panel("iteration", "solver steps (mean)",
                     {"validation": column("validation_solver_steps")}),
         "How many steps the solver takes"),
        (plots.Panel("iteration", "spectral radius of ∂F/∂z (dimensionless)",
                     {"validation": radius, **_one(radius)}),
         "How close the update is to not contracting"),
    ]  # fmt: skip


def _one(radius: Column) -> dict[str, Column]:
    """The line below which plain iteration contracts."""
    return {_ONE: ([radius[0][0], radius[0][-1]], [1.0, 1.0])}
