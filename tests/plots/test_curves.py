"""Panels of curves draw what they were given, and a name looks the same wherever it appears."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from deep_implicit_attention.plots import Panel, curves

X = np.array([0.1, 0.5, 1.0])
FINE = np.linspace(0.1, 1, 50)
LEFT = Panel(
    "x here", "y here", {"a": (X, [1.0, np.nan, 3.0]), "truth": (FINE, FINE**2)}, title="left",
    xscale="log", yscale="log",
)  # fmt: skip
RIGHT = Panel(
    "x there", "y there", {"b": (FINE, -FINE)}, {"b": (X, -X), "c": (X, X), "a": (X, 2 * X)}
)


def draw() -> Figure:
    return curves(LEFT, RIGHT, reference=("truth",))


def lines(figure: Figure, panel: int, name: str) -> list[Line2D]:
    return [line for line in figure.axes[panel].lines if line.get_label() == name]


def test_every_array_is_drawn() -> None:
    figure = draw()
    for number, panel in enumerate((LEFT, RIGHT)):
        axes = figure.axes[number]
        given = [*panel.lines.items(), *panel.points.items()]
        assert len(axes.lines) == len(given)
        for line, (name, (x, y)) in zip(axes.lines, given, strict=True):
            assert line.get_label() == name
            np.testing.assert_array_equal(line.get_xdata(), x)
            np.testing.assert_array_equal(line.get_ydata(), y)
        assert (axes.get_xlabel(), axes.get_ylabel()) == (panel.xlabel, panel.ylabel)
        assert (axes.get_xscale(), axes.get_yscale()) == (panel.xscale, panel.yscale)
        assert axes.get_title() == panel.title


def test_lines_and_points_look_like_that() -> None:
    figure = draw()
    (few,), (many, dots), (alone,) = (lines(figure, *at) for at in ((0, "a"), (1, "b"), (1, "c")))
    assert few.get_linestyle() == "-"
    assert few.get_marker() != "None"
    assert (many.get_linestyle(), many.get_marker()) == ("-", "None")  # markers would merge
    for points in (dots, alone):
        assert points.get_linestyle() == "None"
        assert points.get_marker() != "None"
    (truth,) = lines(figure, 0, "truth")
    assert to_hex(truth.get_color()) == "#000000"
    assert truth.get_linestyle() == "--"


def test_references_differ_in_their_dashes() -> None:
    names = ("one", "two", "three")
    figure = curves(Panel("x", "y", dict.fromkeys(names, (X, X))), reference=names)
    drawn = {line.get_label(): line.get_linestyle() for line in figure.axes[0].lines}
    assert drawn == {"one": "--", "two": ":", "three": "-."}


def test_a_name_keeps_its_colour_and_the_legend_names_all() -> None:
    figure = draw()
    colours = {}
    for axes in figure.axes:
        for line in axes.lines:
            colour = to_hex(line.get_color())
            assert colours.setdefault(line.get_label(), colour) == colour
    assert len(set(colours.values())) == 4
    (legend,) = figure.legends
    told = {t.get_text(): h for t, h in zip(legend.get_texts(), legend.get_lines(), strict=True)}
    assert {name: to_hex(handle.get_color()) for name, handle in told.items()} == colours
    shown = {name: (h.get_linestyle(), h.get_marker() != "None") for name, h in told.items()}
    assert shown == {
        "a": ("-", True),
        "b": ("-", True),
        "c": ("None", True),
        "truth": ("--", False),
    }


def test_ticks_of_a_logarithmic_axis_are_numbers_and_apart() -> None:
    figure = draw()
    figure.draw_without_rendering()
    axes = figure.axes[0]
    low, high = axes.get_xlim()
    labels = [text for text in axes.get_xticklabels() if low <= text.get_position()[0] <= high]
    assert 2 <= len(labels) <= 8
    for label in labels:
        assert float(label.get_text()) == pytest.approx(label.get_position()[0])


def test_a_panel_of_gaps_on_logarithmic_axes_is_drawn() -> None:
    figure = curves(Panel("x", "y", {"a": (X, [np.nan] * 3)}, xscale="log", yscale="log"))
    figure.draw_without_rendering()
    assert min(*figure.axes[0].get_xlim(), *figure.axes[0].get_ylim()) > 0


def test_more_names_than_can_be_told_apart() -> None:
    seven = Panel("x", "y", {str(k): (X, X) for k in range(7)})
    with pytest.raises(ValueError, match="at most 6 names"):
        curves(seven)
    curves(seven, reference=("3",)).draw_without_rendering()
    with pytest.raises(ValueError, match="3 references"):
        curves(LEFT, reference=("p", "q", "r", "s"))


def test_no_panel() -> None:
    with pytest.raises(ValueError, match="panels"):
        curves()
    with pytest.raises(ValueError, match="panels must have a line or points, got none"):
        curves(Panel("x", "y"))
