"""What the figures draw is what they were given, in colours everyone can tell apart."""

from __future__ import annotations

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from deep_implicit_attention.plots import (
    confusion_matrix,
    convergence,
    coupling_graph,
    learning_curves,
    relaxation,
)

OKABE_ITO = {
    "#000000", "#e69f00", "#56b4e9", "#009e73", "#f0e442", "#0072b2", "#d55e00", "#cc79a7",
}  # fmt: skip


@pytest.fixture
def random() -> np.random.Generator:
    return np.random.default_rng(0)


def luminance(colour: object) -> float:
    """Relative luminance of WCAG 2."""
    channels = np.array(to_rgb(colour))  # type: ignore[arg-type]
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def labelled(axes: Axes, label: str) -> Line2D:
    return next(line for line in axes.lines if line.get_label() == label)


def named(axes: Axes) -> bool:
    """Both axes say what they show, and the legend names every labelled line."""
    legend = axes.get_legend()
    labels = {line.get_label() for line in axes.lines if not line.get_label().startswith("_")}
    shown = {text.get_text() for text in legend.get_texts()} if legend else set()
    return bool(axes.get_xlabel() and axes.get_ylabel()) and labels == shown


def seen(figure: Figure, line: Line2D) -> bool:
    """Whether the picture is another one without the line (and its legend)."""
    canvas = FigureCanvasAgg(figure)
    if legend := line.axes.get_legend():  # type: ignore[union-attr]
        legend.remove()
    pictures = []
    for visible in (True, False):
        line.set_visible(visible)
        canvas.draw()
        pictures.append(np.array(canvas.buffer_rgba()))
    line.set_visible(True)
    return bool((pictures[0] != pictures[1]).any())


# --- learning curves ------------------------------------------------------------------------


TRAINING = "training (augmented, as trained)"


def test_learning_curves_draw_the_metrics() -> None:
    figure = learning_curves(
        [1, 2, 3], [2.0, 1.0, 0.5], [2.2, 1.1, 0.9], [0.3, 0.6, 1.0], [0.25, 0.5, 0.8]
    )
    assert isinstance(figure, Figure)
    loss, error = figure.axes
    expected = {
        (0, TRAINING): [2.0, 1.0, 0.5],
        (0, "validation"): [2.2, 1.1, 0.9],
        (1, TRAINING): [70.0, 40.0, 0.0],
        (1, "validation"): [75.0, 50.0, 20.0],
    }
    for (place, label), values in expected.items():
        line = labelled(figure.axes[place], label)
        np.testing.assert_array_equal(line.get_xdata(), [1, 2, 3])
        np.testing.assert_allclose(line.get_ydata(), values, atol=1e-12)
    for axes in (loss, error):
        assert named(axes)
        colours = [to_hex(line.get_color()) for line in axes.lines]
        assert len(set(colours)) == 2
        assert set(colours) <= OKABE_ITO
    assert "nats" in loss.get_ylabel()
    assert "%" in error.get_ylabel()
    # A perfect score is drawn as what it is.
    assert loss.get_yscale() == "log"
    assert error.get_yscale() == "symlog"
    assert error.get_ylim()[0] == 0
    same = [labelled(axes, TRAINING).get_color() for axes in (loss, error)]
    assert same[0] == same[1]


# --- confusion matrix -----------------------------------------------------------------------

COUNTS = np.array([[8, 2, 0], [0, 0, 0], [5, 1, 4]])


def test_confusion_matrix_rows_are_true_classes() -> None:
    figure = confusion_matrix(COUNTS, ["a", "b", "c"], "heading")
    axes, bar = figure.axes
    image = axes.images[0]
    np.testing.assert_allclose(
        image.get_array(), [[0.8, 0.2, 0.0], [0.0, 0.0, 0.0], [0.5, 0.1, 0.4]]
    )
    assert image.get_clim() == (0, 1)
    assert image.get_cmap().name == "cividis"
    assert "true" in axes.get_ylabel()
    assert "predicted" in axes.get_xlabel()
    assert axes.get_title() == "heading"
    assert bar.get_ylabel() == "share of the true class"
    for ticks, labels in (
        (axes.get_xticks(), axes.get_xticklabels()),
        (axes.get_yticks(), axes.get_yticklabels()),
    ):
        assert list(ticks) == [0, 1, 2]
        assert [label.get_text() for label in labels] == ["a", "b", "c"]


def test_confusion_matrix_writes_the_counts() -> None:
    texts = confusion_matrix(COUNTS, ["a", "b", "c"]).axes[0].texts
    written = {(int(t.get_position()[1]), int(t.get_position()[0])): t.get_text() for t in texts}
    expected = {place: str(count) for place, count in np.ndenumerate(COUNTS) if count}
    assert {place: text for place, text in written.items() if text != "0"} == expected


def test_counts_can_be_read_on_their_colour() -> None:
    counts = np.zeros((101, 101), int)
    counts[:, :2] = [[n, 100 - n] for n in range(101)]
    axes = confusion_matrix(counts, [str(n) for n in range(101)]).axes[0]
    colours = matplotlib.colormaps["cividis"]
    for text in axes.texts:
        column, row = (int(p) for p in text.get_position())
        pair = [luminance(text.get_color()), luminance(colours(counts[row, column] / 100)[:3])]
        assert (max(pair) + 0.05) / (min(pair) + 0.05) > 3
    # On a page black and white become the reader's colours; the colours of the cells stay.
    assert not {to_hex(text.get_color()) for text in axes.texts} & {"#000000", "#ffffff"}


# --- convergence ----------------------------------------------------------------------------


@pytest.mark.parametrize("samples", [1, 4, 7])
def test_convergence_draws_every_sample_and_the_median(
    samples: int, random: np.random.Generator
) -> None:
    trace = 10 ** -random.uniform(0, 5, (6, samples))
    figure = convergence(trace, 3e-3, "heading")
    (axes,) = figure.axes
    assert named(axes)
    assert axes.get_yscale() == "log"
    assert axes.get_title() == "heading"
    tolerance = next(line for line in axes.lines if "tolerance" in str(line.get_label()))
    assert set(tolerance.get_ydata()) == {3e-3}
    assert "0.003" in str(tolerance.get_label())
    median = labelled(axes, "median")
    ordered = np.array([sorted(row) for row in trace])
    middle = (ordered[:, (samples - 1) // 2] + ordered[:, samples // 2]) / 2
    np.testing.assert_allclose(median.get_ydata(), middle)
    others = [line for line in axes.lines if line not in (median, tolerance)]
    drawn = {tuple(np.asarray(line.get_ydata())) for line in others}
    assert drawn == {tuple(column) for column in trace.T}
    for line in (median, *others):
        np.testing.assert_array_equal(line.get_xdata(), [1, 2, 3, 4, 5, 6])
        assert to_hex(line.get_color()) in OKABE_ITO
    groups = [{to_hex(line.get_color()) for line in part} for part in (others, [median])]
    assert groups[0].isdisjoint(groups[1])
    assert to_hex(tolerance.get_color()) in OKABE_ITO - groups[0] - groups[1]


def test_the_median_ends_where_most_samples_are_done() -> None:
    trace = np.array([[0.9, 0.5, 0.3, 0.7], [0.2, 0.4, np.nan, np.nan], [0.1] + 3 * [np.nan]])
    median = labelled(convergence(trace, 1e-3).axes[0], "median")
    np.testing.assert_allclose(median.get_ydata(), [0.6, 0.3, np.nan])


def test_convergence_of_no_samples() -> None:
    for trace in (np.zeros((4, 0)), np.zeros(4)):
        with pytest.raises(ValueError, match=r"trace must have shape \(steps, samples\)"):
            convergence(trace, 1e-3)


# --- couplings ------------------------------------------------------------------------------


def graph(strengths: np.ndarray, positions: np.ndarray) -> tuple[Axes, Axes, LineCollection]:
    names = [f"s{i}" for i in range(len(strengths))]
    left, right, *_ = coupling_graph(strengths, positions, names, "heading").axes
    lines = [c for c in right.collections if isinstance(c, LineCollection)]
    assert len(lines) == 1
    return left, right, lines[0]


@pytest.mark.parametrize("sites", [5, 10, 16])
def test_the_strongest_fifth_of_the_couplings_is_drawn(
    sites: int, random: np.random.Generator
) -> None:
    strengths = random.uniform(0, 1, (sites, sites))
    strengths = strengths + strengths.T
    np.fill_diagonal(strengths, 0)
    positions = random.permutation(sites**2)[: 2 * sites].reshape(sites, 2).astype(float)
    _, right, lines = graph(strengths, positions)
    pairs = sorted(((i, j) for i in range(sites) for j in range(i)), key=lambda p: -strengths[p])
    expected = {frozenset(p) for p in pairs[: len(pairs) // 5]}
    where = {tuple(place): i for i, place in enumerate(positions)}
    drawn = [frozenset(where[tuple(end)] for end in segment) for segment in lines.get_segments()]
    assert len(drawn) == sites * (sites - 1) // 10
    assert set(drawn) == expected
    # As wide and as dark as the coupling is strong.
    order = np.argsort([strengths[tuple(pair)] for pair in drawn])
    assert np.all(np.diff(np.asarray(lines.get_linewidths())[order]) > 0)
    colours = lines.get_colors()
    alpha = np.broadcast_to(np.asarray(lines.get_alpha()), len(drawn))
    assert np.all(np.diff(alpha[order]) > 0)
    assert {to_hex(c[:3]) for c in colours} <= OKABE_ITO
    assert right.yaxis_inverted()  # rows count downwards, as in an image


def test_coupling_matrix_and_sites(random: np.random.Generator) -> None:
    strengths = random.uniform(0, 3, (5, 5))
    strengths = strengths + strengths.T
    positions = np.array([[-1.5, 0.5], [0, 0], [1, 0], [0, 1], [1, 1]])
    left, right, _ = graph(strengths, positions)
    image = left.images[0]
    np.testing.assert_array_equal(image.get_array(), strengths)
    apart = strengths[~np.eye(5, dtype=bool)]
    assert image.get_clim() == (apart.min(), apart.max())
    assert image.get_cmap().name == "cividis"
    assert left.get_xlabel()
    assert left.get_ylabel()
    assert left.get_title() == "heading"
    for labels in (left.get_xticklabels(), left.get_yticklabels()):
        assert [label.get_text() for label in labels] == ["s0", "s1", "s2", "s3", "s4"]
    assert right.get_title()
    (points,) = (c for c in right.collections if not isinstance(c, LineCollection))
    np.testing.assert_array_equal(points.get_offsets(), positions)
    places = {text.get_text(): tuple(text.xy) for text in right.texts}  # type: ignore[attr-defined]
    assert places == {f"s{i}": tuple(place) for i, place in enumerate(positions)}


def test_no_coupling_to_itself_has_no_colour(random: np.random.Generator) -> None:
    strengths = random.uniform(1, 2, (4, 4)) * (1 - np.eye(4))
    strengths = strengths + strengths.T
    strengths[2, 2] = 1.5
    left, *_ = graph(strengths, np.arange(8.0).reshape(4, 2))
    blank = np.ma.getmaskarray(left.images[0].get_array())
    np.testing.assert_array_equal(blank, np.diag([True, True, False, True]))


def test_epochs_and_steps_are_whole() -> None:
    few = [0.5, 0.4, 0.3]
    for figure in (learning_curves([1, 2, 3], few, few, few, few),
                   convergence(np.array(few)[:, None], 0.1)):  # fmt: skip
        for axes in figure.axes:
            np.testing.assert_array_equal(axes.get_xticks() % 1, 0)


def test_a_row_of_the_matrix_is_the_site_that_is_pulled() -> None:
    strengths = np.array([[0.0, 0.2, 0.3], [0.4, 0.0, 0.5], [0.6, 0.7, 0.0]])
    left, *_ = coupling_graph(strengths, np.eye(3, 2), list("abc")).axes
    np.testing.assert_array_equal(left.images[0].get_array(), strengths)
    assert (left.get_ylabel(), left.get_xlabel()) == ("site i", "site j")


def test_many_sites_have_few_ticks_and_the_right_names() -> None:
    left, *_ = graph(np.ones((50, 50)), np.arange(100.0).reshape(50, 2))
    ticks = [round(t) for t in left.get_xticks()]
    assert len(ticks) <= 15
    assert [label.get_text() for label in left.get_xticklabels()] == [f"s{t}" for t in ticks]


def test_no_couplings_at_all() -> None:
    _, _, lines = graph(np.zeros((5, 5)), np.arange(10.0).reshape(5, 2))
    assert np.all(np.isfinite(lines.get_linewidths()))


def test_what_cannot_be_drawn_is_named() -> None:
    with pytest.raises(ValueError, match=r"counts must have shape \(1, 1\) for 1 names"):
        confusion_matrix(np.eye(3), ["a"])
    with pytest.raises(ValueError, match="validation_loss must have 2 numbers as epochs, got 1"):
        learning_curves([1, 2], [1, 1], [1], [1, 1], [1, 1])
    trace = torch.rand(4, 3, requires_grad=True)
    assert len(convergence(trace, 1e-3).axes[0].lines) == 5


# --- lone points ----------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["one epoch", "one step", "samples done at once", "one state"])
def test_points_that_no_line_joins_are_seen(what: str) -> None:
    trace = np.array([[0.5, 1e-4], [1e-3, np.nan], [1e-4, np.nan]])
    figure = {
        "one epoch": lambda: learning_curves([1], [2.0], [1.9], [0.4], [0.5]),
        "one step": lambda: convergence(trace[:1], 1e-3),
        "samples done at once": lambda: convergence(trace, 1e-3),
        "one state": lambda: relaxation(np.array([[0.5, 0.3]]), [0.1], emphasised=1),
    }[what]()
    for axes in figure.axes:
        for line in axes.lines:
            assert seen(figure, line), line.get_label()


def test_a_single_epoch_is_inside_the_axes() -> None:
    _, error = learning_curves([1], [2.0], [1.9], [0.1], [0.12]).axes
    _, top = error.transAxes.inverted().transform(error.transData.transform((1, 90.0)))
    assert 0.5 < top < 0.995


def test_points_that_a_line_joins_have_no_marks() -> None:
    trace = 10.0 ** -np.arange(6).reshape(3, 2)
    assert {line.get_marker() for line in convergence(trace, 1e-3).axes[0].lines} == {"None"}
