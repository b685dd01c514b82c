"""The figure of approximate inference draws what it was given, and a gap where there is nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from deep_implicit_attention.plots import approximation_errors

OKABE_ITO = {
    "#000000", "#e69f00", "#56b4e9", "#009e73", "#f0e442", "#0072b2", "#d55e00", "#cc79a7",
}  # fmt: skip
BETAS = [0.1, 0.5, 1.0, 2.0]
EXACT_M, EXACT_C = np.array([-0.5, 0.1, 0.4]), np.array([0.3, -0.2, 0.0])
M = {"first": EXACT_M + 0.1, "third": 0.9 * EXACT_M}
C = {"first": 2 * EXACT_C, "third": EXACT_C - 0.05}
ERRORS = {
    "first": [1e-3, 1e-2, 1e-1, 0.3],
    "second": [1e-2, np.nan, np.nan, 0.2],  # no answer at β = 1
    "third": [0.0, 1e-3, 1e-2, np.nan],
}


def draw(**changes: Any) -> Figure:
    named = {"beta": 1.0, "title": "heading $5 _x", **changes}
    return approximation_errors(EXACT_M, M, EXACT_C, C, BETAS, ERRORS, **named)


def points(axes: Axes) -> list[Line2D]:
    """The lines with markers."""
    return [line for line in axes.lines if line.get_marker() != "None"]


def style(line: Line2D) -> tuple[str, object]:
    return to_hex(line.get_color()), line.get_marker()


@pytest.mark.parametrize(("place", "exact", "answers"), [(0, EXACT_M, M), (1, EXACT_C, C)])
def test_answers_against_exact_ones(
    place: int, exact: np.ndarray, answers: dict[str, np.ndarray]
) -> None:
    axes = draw().axes[place]
    drawn = points(axes)
    assert len(drawn) == len(answers)
    for line, values in zip(drawn, answers.values(), strict=True):
        np.testing.assert_array_equal(line.get_xdata(), exact)
        np.testing.assert_array_equal(line.get_ydata(), values)
        assert line.get_linestyle() == "None"
    (diagonal,) = (line for line in axes.lines if line not in drawn)
    np.testing.assert_array_equal(diagonal.get_xdata(), diagonal.get_ydata())
    everything = np.concatenate([exact, *answers.values()])
    for low, high in (axes.get_xlim(), axes.get_ylim()):
        assert low < everything.min()
        assert everything.max() < high
    assert axes.get_xlim() == axes.get_ylim() == tuple(diagonal.get_xdata())
    assert axes.get_aspect() == 1
    assert "exact" in axes.get_xlabel()
    assert "dimensionless" in axes.get_xlabel()
    assert ("magnetization", "covariance")[place] in axes.get_ylabel()
    assert axes.get_title() == "β = 1"


def test_errors_against_temperature() -> None:
    axes = draw(error_label="mean |error| of x", beta_label="inverse temperature").axes[2]
    drawn = {line.get_label(): line for line in points(axes)}
    assert list(drawn) == list(ERRORS)
    for name, errors in ERRORS.items():
        np.testing.assert_array_equal(drawn[name].get_xdata(), BETAS)
        y = np.asarray(drawn[name].get_ydata())
        np.testing.assert_array_equal(np.isnan(y), np.isnan(errors))
        known = np.isfinite(errors) & (np.array(errors) > 0)
        np.testing.assert_array_equal(y[known], np.array(errors)[known])
    assert 0 < np.asarray(drawn["third"].get_ydata())[0] < 1e-15  # an exact answer is no gap
    assert axes.get_xscale() == axes.get_yscale() == "log"
    assert axes.get_xlabel() == "inverse temperature"
    assert axes.get_ylabel() == "mean |error| of x (dimensionless)"
    (here,) = (line for line in axes.lines if line not in drawn.values())
    assert list(here.get_xdata()) == [1.0, 1.0]  # the temperature of the other panels


def test_another_reference_than_the_exact_answer() -> None:
    figure = draw(reference="sampling", reference_error=[0.1, 0.2, 0.1, 0.3])
    for axes in figure.axes[:2]:
        assert "sampling" in axes.get_xlabel()
        assert "exact" not in axes.get_xlabel()
    (noise,) = (line for line in figure.axes[2].lines if "sampling" in str(line.get_label()))
    np.testing.assert_array_equal(noise.get_xdata(), BETAS)
    np.testing.assert_array_equal(noise.get_ydata(), [0.1, 0.2, 0.1, 0.3])
    assert figure.legends[0].get_texts()[-1].get_text() == "standard error of sampling"


def test_a_method_looks_the_same_in_all_panels() -> None:
    figure = draw()
    left, middle, right = figure.axes
    styles = {str(line.get_label()): style(line) for line in points(right)}
    assert len(set(styles.values())) == 3
    assert len({marker for _, marker in styles.values()}) == 3
    assert len({colour for colour, _ in styles.values()}) == 3
    assert {colour for colour, _ in styles.values()} <= OKABE_ITO - {"#000000"}
    for axes in (left, middle):
        assert [style(line) for line in points(axes)] == [styles["first"], styles["third"]]
    (legend,) = figure.legends
    handles = zip(legend.get_texts(), legend.get_lines(), strict=True)
    assert {text.get_text(): style(line) for text, line in handles} == styles


def test_what_did_not_converge_is_named() -> None:
    figure = draw()
    for axes in figure.axes[:2]:
        (text,) = (text.get_text() for text in axes.texts)
        assert text.splitlines() == ["not converged:", "second"]
    everybody = {**M, "second": EXACT_M}, {**C, "second": EXACT_C}
    whole = approximation_errors(
        EXACT_M, everybody[0], EXACT_C, everybody[1], BETAS, ERRORS, beta=1.0
    )
    assert not any(axes.texts for axes in whole.axes)


def test_it_can_be_rendered() -> None:
    """With a title that is no formula; with nothing to show; at a single temperature."""
    figure = draw()
    figure.draw_without_rendering()
    assert figure.get_suptitle() == "heading $5 _x"
    nothing = np.empty(0)
    for errors in ([np.nan], [0.1]):
        bare = approximation_errors(
            np.zeros(1), {}, nothing, {}, [1.0], {"first": errors}, beta=1.0
        )
        bare.draw_without_rendering()
        assert np.all(np.isfinite([axes.get_xlim() for axes in bare.axes]))


@pytest.mark.parametrize("betas", [[0.7], [0.6, 0.9], [0.01, 1.0], [0.125, 0.25, 0.5, 1, 2]])
def test_the_axis_of_temperature_has_ticks(betas: list[float]) -> None:
    figure = approximation_errors(
        EXACT_M, {}, EXACT_C, {}, betas, {"first": [0.1] * len(betas)}, beta=betas[0]
    )
    figure.draw_without_rendering()
    axes = figure.axes[2]
    low, high = axes.get_xlim()
    assert low < 0.999 * min(betas)  # or half of a marker is beyond the edge
    assert high > 1.001 * max(betas)
    labels = [text for text in axes.get_xticklabels() if low <= text.get_position()[0] <= high]
    assert labels
    for label in labels:
        assert float(label.get_text()) == pytest.approx(label.get_position()[0])


def test_more_methods_than_can_be_told_apart() -> None:
    errors = {str(k): [0.1] for k in range(7)}
    with pytest.raises(ValueError, match="at most 6"):
        approximation_errors(EXACT_M, {}, EXACT_C, {}, [1.0], errors, beta=1.0)
