"""What the metrics of any run tell of its training, by the names that occur in them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .. import plots
from ..plots._page import Section
from ._report_page import Drawn, Story

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
    story.add_pictures(
        section,
        *(
            (f"The curve of {curve.ylabel} cannot be drawn", lambda curve=curve: curve.drawn(story))
            for curve in panels
        ),
    )


@dataclass(frozen=True)
class _Curve:
    """One figure, whose columns are read from the metrics when it is drawn."""

    xlabel: str
    ylabel: str
    lines: Callable[[], dict[str, Column]]
    description: str
    yscale: str = "linear"

    def drawn(self, story: Story) -> Drawn | None:
        """The figure; None, and a sentence, where there is nothing to draw."""
        lines = self.lines()
        if any(math.isfinite(y) for name in lines if name != _ONE for y in lines[name][1]):
            panel = plots.Panel(self.xlabel, self.ylabel, lines, yscale=self.yscale)
            return plots.curves(panel, reference=(_ONE,)), self.description
        story.missing.append(f"The metrics hold no finite numbers for a curve of: {self.ylabel}.")
        return None


def _column(history: list[dict[str, Any]], at: str, name: str, scale: float = 1.0) -> Column:
    """Numbers of the metrics `name` against those of `at`, or else steps; null, which is not
    finite, is a gap."""
    counted = all(record.get(at) is not None for record in history)
    places = [_number(record, at if counted else "step") for record in history]
    return places, [scale * _number(record, name) for record in history]


def _number(record: dict[str, Any], name: str) -> float:
    value = record.get(name)
    try:
        return math.nan if value is None else float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be numbers, got {value!r}") from None


def _image_panels(history: list[dict[str, Any]]) -> list[_Curve]:
    def column(name: str, scale: float = 1.0) -> Column:
        return _column(history, "epoch", name, scale)

    def error(name: str) -> Column:
        epochs, accuracies = column(name, 100)
        return epochs, [100 - accuracy for accuracy in accuracies]

    return [
        _Curve(
            "epoch", "cross-entropy (nats)",
            lambda: {"training": column("train_loss"), "validation": column("validation_loss")},
            "Loss by epoch; training images are augmented", yscale="log",
        ),
        _Curve(
            "epoch", "error (%)",
            lambda: {"training": error("train_accuracy"),
                     "validation": error("validation_accuracy")},
            "Error by epoch",
        ),
        _Curve(
            "epoch", "solver steps (mean)", lambda: {"training": column("solver_steps")},
            "How many steps the solver takes",
        ),
        _Curve(
            "epoch", "spectral radius of ∂F/∂z (dimensionless)",
            lambda: _radius(column("spectral_radius")),
            "How close the update is to not contracting",
        ),
    ]  # fmt: skip


def _text_panels(history: list[dict[str, Any]]) -> list[_Curve]:
    def column(name: str) -> Column:
        return _column(history, "step", name)

    learned = "train_cross_entropy" if "train_cross_entropy" in history[0] else "train_loss"
    return [
        _Curve(
            "iteration", "cross-entropy (nats per character)",
            lambda: {"training": column(learned), "validation": column("validation_loss")},
            "Loss; validation is at equilibrium",
        ),
        _Curve(
            "iteration", "mean relative residual",
            lambda: {"validation": column("validation_residual")},
            "How far from equilibrium the solver ends", yscale="log",
        ),
        _Curve(
            "iteration", "solver steps (mean)",
            lambda: {"validation": column("validation_solver_steps")},
            "How many steps the solver takes",
        ),
        _Curve(
            "iteration", "spectral radius of ∂F/∂z (dimensionless)",
            lambda: _radius(column("spectral_radius")),
            "How close the update is to not contracting",
        ),
    ]  # fmt: skip


def _radius(radius: Column) -> dict[str, Column]:
    """With the line below which plain iteration contracts."""
    return {"validation": radius, _ONE: ([radius[0][0], radius[0][-1]], [1.0, 1.0])}
