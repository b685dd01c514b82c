"""Couplings over images and texts: which are drawn, from where to where, and how wide."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.colors import to_hex
from matplotlib.patches import FancyArrowPatch
from matplotlib.path import Path

from deep_implicit_attention.plots import (
    coupling_graph,
    couplings_over_image,
    couplings_over_text,
)

PLACES = np.array([[-2.0, 1.5], [0.5, 0.5], [2.5, 0.5], [0.5, 2.5], [2.5, 2.5]])
PIXELS = np.linspace(0, 1, 16).reshape(4, 4)


@pytest.fixture
def strengths() -> np.ndarray:
    return np.random.default_rng(0).uniform(0.1, 1, (5, 5))


def arrows(axes: Axes) -> dict[tuple[int, int], FancyArrowPatch]:
    """By source and target."""
    found = {}
    for patch in axes.patches:
        if isinstance(patch, FancyArrowPatch):
            source, target = str(patch.get_label()).removeprefix("_").split("→")
            found[int(source), int(target)] = patch
    return found


def ends(arrow: FancyArrowPatch) -> tuple[np.ndarray, np.ndarray]:
    """Where an arrow starts and stops."""
    start, stop = arrow._posA_posB  # type: ignore[attr-defined]  # matplotlib tells it nowhere else
    return np.asarray(start), np.asarray(stop)


def test_symmetric_couplings_are_lines_and_others_arrows(strengths: np.ndarray) -> None:
    both = strengths + strengths.T
    axes = couplings_over_image(both, PIXELS, PLACES).axes[0]
    (lines,) = (c for c in axes.collections if isinstance(c, LineCollection))
    assert not arrows(axes)
    pairs = sorted(((i, j) for i in range(5) for j in range(i)), key=lambda p: -both[p])[:2]
    where = {tuple(place): site for site, place in enumerate(PLACES)}
    drawn = {frozenset(where[tuple(end)] for end in line) for line in lines.get_segments()}
    assert drawn == {frozenset(pair) for pair in pairs}
    high, low = (f"{both[pair]:.2g}" for pair in pairs)
    said = axes.get_xlabel().replace("\n", " ")
    assert said == f"strongest fifth of the couplings ‖J_ij‖: {low} to {high} (dimensionless)"

    axes = couplings_over_image(strengths, PIXELS, PLACES).axes[0]
    assert not any(isinstance(c, LineCollection) for c in axes.collections)
    ordered = [(i, j) for i in range(5) for j in range(5) if i != j]
    strongest = sorted(ordered, key=lambda p: -strengths[p])[:4]
    assert set(arrows(axes)) == {(j, i) for i, j in strongest}


def test_an_arrow_runs_from_the_site_that_pulls(strengths: np.ndarray) -> None:
    """J_ij is what j does to i: strengths[i, j] is an arrow from j to i."""
    strengths[3, 1] = 9.0
    axes = couplings_over_image(strengths, PIXELS, PLACES).axes[0]
    found = arrows(axes)
    start, stop = ends(found[1, 3])
    np.testing.assert_array_equal(start, PLACES[1])
    np.testing.assert_array_equal(stop, PLACES[3])
    order = sorted(found, key=lambda pair: strengths[pair[1], pair[0]])
    widths = [found[pair].get_linewidth() for pair in order]
    assert np.all(np.diff(widths) > 0)
    assert order[-1] == (1, 3)
    opacities = [found[pair].get_alpha() for pair in order]
    assert np.all(np.diff(opacities) > 0)
    (_, right, *_) = coupling_graph(strengths, PLACES, list("abcde")).axes
    assert set(arrows(right)) == set(found)


def test_arrows_are_few_enough_to_be_told_apart() -> None:
    strengths = np.arange(900.0).reshape(30, 30)  # a fifth of 870 pairs are 174
    axes = couplings_over_image(strengths, PIXELS, np.indices((30, 2))[0] / 10).axes[0]
    assert len(arrows(axes)) == 120
    strongest = sorted((i, j) for i in range(30) for j in range(30) if i != j)[-120:]
    assert set(arrows(axes)) == {(j, i) for i, j in strongest}
    assert axes.get_xlabel().startswith("the 120 strongest")


@pytest.mark.parametrize("side", [1, 7, 8])
def test_what_was_drawn_is_said_within_the_figure(side: int) -> None:
    rows, columns = np.divmod(np.arange(side**2), side)
    places = np.concatenate([[[-1.5, (side - 1) / 2]], np.stack([columns, rows], axis=1)])
    drawn = np.random.default_rng(0).random((len(places), len(places)))
    figure = coupling_graph(drawn + drawn.T, places, [str(i) for i in range(len(places))])
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    title = figure.axes[1].title.get_window_extent(canvas.get_renderer())
    assert title.y1 <= figure.bbox.y1
    assert title.x0 >= 0
    assert title.x1 <= figure.bbox.x1


def test_the_image_lies_under_the_graph_where_its_pixels_are(strengths: np.ndarray) -> None:
    axes = couplings_over_image(strengths, PIXELS, PLACES, "heading").axes[0]
    (image,) = axes.images
    assert tuple(image.get_extent()) == (-0.5, 3.5, 3.5, -0.5)
    shown = np.asarray(image.get_array())
    assert np.corrcoef(shown.ravel(), PIXELS.ravel())[0, 1] == pytest.approx(1)
    assert shown.min() > 0.5  # pale, so that lines are seen
    (points,) = (c for c in axes.collections if not isinstance(c, LineCollection))
    np.testing.assert_array_equal(points.get_offsets(), PLACES)
    assert axes.get_title() == "heading"
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    assert left < PLACES[:, 0].min()
    assert right > 3.5 - 0.5
    assert bottom > top  # rows count downwards


def test_fixed_widths_can_be_compared_between_figures(strengths: np.ndarray) -> None:
    both = strengths + strengths.T

    def widest(scale: float) -> float:
        axes = couplings_over_image(scale * both, PIXELS, PLACES, "", 0.0, both.max()).axes[0]
        (lines,) = (c for c in axes.collections if isinstance(c, LineCollection))
        return max(lines.get_linewidths())

    assert widest(0.5) < 0.5 * widest(1.0)
    assert widest(2.0) == pytest.approx(4.3)


def test_every_token_has_an_arrow_from_the_one_that_pulls_it_most() -> None:
    strengths = np.zeros((5, 5))
    strengths[1, 0], strengths[2, 0], strengths[2, 1] = 0.6, 0.1, 0.5
    strengths[3, 3], strengths[3, 2] = 0.9, 0.2  # itself does not count
    strengths[4, 1], strengths[4, 0] = 1.0, 0.3
    axes = couplings_over_text(strengths, ["a", " ", "\n", "$", "e"], "heading", per_line=3).axes[0]
    found = arrows(axes)
    assert set(found) == {(0, 1), (1, 2), (2, 3), (1, 4)}
    widths = {pair: arrow.get_linewidth() for pair, arrow in found.items()}
    assert sorted(widths, key=widths.__getitem__) == [(2, 3), (1, 2), (0, 1), (1, 4)]
    texts = {text.get_text(): tuple(text.xy) for text in axes.texts}  # type: ignore[attr-defined]
    assert list(texts) == ["a", "␣", "↵", r"\$", "e"]
    assert texts["a"][1] == texts["↵"][1] < texts[r"\$"][1] == texts["e"][1]
    assert texts["a"][0] == texts[r"\$"][0] < texts["e"][0] == texts["␣"][0]
    start, stop = ends(found[1, 4])  # from the lower edge of one to the upper edge of the other
    assert (start[0], stop[0]) == (texts["␣"][0], texts["e"][0])
    assert texts["␣"][1] < start[1] < stop[1] < texts["e"][1]
    assert "j → i" in axes.get_xlabel()
    assert "0.2 (thin, pale) to 1 (wide, dark)" in axes.get_xlabel()
    assert "dimensionless" in axes.get_xlabel()


def outline(arrow: FancyArrowPatch) -> np.ndarray:
    """Points on the line and the head of an arrow `(n, 2)`, where sites are measured."""
    path = arrow.get_path().cleaned(curves=False)  # straight pieces instead of curves
    assert path.codes is not None
    return np.asarray(path.vertices)[np.isin(path.codes, (Path.MOVETO, Path.LINETO))]


@pytest.mark.parametrize(("tokens", "per_line"), [(4, 32), (64, 32), (64, 10), (1, 32)])
def test_a_text_has_room_for_all_arrows_and_words(tokens: int, per_line: int) -> None:
    """Nothing is cut off: no arc, however long, at the border of the axes, no label at that of the
    figure; and no arc within a line reaches another line."""
    random = np.random.default_rng(0)
    strengths = random.uniform(0, 1, (tokens, tokens))
    strengths[per_line - 1 : per_line, 0] = 2.0  # the longest arc there can be in a line
    strengths[:1, per_line - 1 : per_line] = 2.0
    figure = couplings_over_text(strengths, ["x"] * tokens, "heading", per_line=per_line)
    (axes,) = figure.axes
    figure.draw_without_rendering()
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    for arrow in arrows(axes).values():
        x, y = outline(arrow).T
        assert left <= x.min() <= x.max() <= right
        assert top <= y.min() <= y.max() <= bottom
        start, stop = ends(arrow)
        if start[1] == stop[1]:
            assert np.abs(y - start[1]).max() < 3.5 - 0.5
    page = figure.bbox
    for label in (axes.xaxis.label, axes.title):
        box = label.get_window_extent()
        assert page.x0 <= box.x0 <= box.x1 <= page.x1
        assert page.y0 <= box.y0 <= box.y1 <= page.y1


def test_an_arrow_between_neighbours_is_seen_beside_them() -> None:
    strengths = np.array([[0.0, 1.0], [1.0, 0.0]])
    figure = couplings_over_text(strengths, ["a", "b"])
    (axes,) = figure.axes
    figure.draw_without_rendering()
    for (source, _), arrow in arrows(axes).items():
        heights = outline(arrow)[:, 1]
        furthest = heights.min() if source == 0 else heights.max()
        assert abs(furthest) > 1.0  # the edge of a token is at 0.5
        assert np.sign(furthest) == (-1 if source == 0 else 1)  # there and back lie apart


def test_arrows_over_text_can_be_compared_between_figures() -> None:
    strengths = np.array([[0.0, 0.0], [0.5, 0.0]])

    def width(strongest: float | None) -> float:
        return arrows(couplings_over_text(strengths, "ab", strongest=strongest).axes[0])[
            0, 1
        ].get_linewidth()

    assert width(1.0) < width(None) == width(0.5) == width(0.1)


@pytest.mark.parametrize(
    ("strongest", "said"),
    [
        (None, "from 0.3 (thin, pale) to 0.5 (wide, dark)"),
        (1.0, "from 0.3 to 0.5; wide and dark: 1 or more"),
        (0.4, "from 0.3 to 0.5; wide and dark: 0.4 or more"),
    ],
)
def test_what_a_wide_arrow_over_text_stands_for(strongest: float | None, said: str) -> None:
    """Of all that are compared, not the widest in this figure."""
    strengths = np.array([[0.0, 0.0, 0.0], [0.3, 0.0, 0.0], [0.5, 0.0, 0.0]])
    figure = couplings_over_text(strengths, "abc", strongest=strongest)
    (axes,) = figure.axes
    assert axes.get_xlabel().splitlines()[1] == said
    figure.draw_without_rendering()
    box = axes.xaxis.label.get_window_extent()
    assert figure.bbox.x0 <= box.x0 <= box.x1 <= figure.bbox.x1


def test_colours_and_emptiness(strengths: np.ndarray) -> None:
    axes = couplings_over_text(strengths, list("abcde")).axes[0]
    assert {to_hex(arrow.get_edgecolor()) for arrow in arrows(axes).values()} == {"#0072b2"}
    nothing = couplings_over_text(np.zeros((3, 3)), list("abc")).axes[0]
    assert not arrows(nothing)
    assert not arrows(couplings_over_image(np.zeros((5, 5)), PIXELS, PLACES).axes[0])


def test_bad_input(strengths: np.ndarray) -> None:
    with pytest.raises(ValueError, match="place for each of 5 sites"):
        couplings_over_image(strengths, PIXELS, PLACES[:4])
    with pytest.raises(ValueError, match="strengths must have shape"):
        couplings_over_image(strengths[:4], PIXELS, PLACES)
    with pytest.raises(ValueError, match="image must have shape"):
        couplings_over_image(strengths, PIXELS[0], PLACES)
    with pytest.raises(ValueError, match="tokens must be one for each of 5 sites, got 3"):
        couplings_over_text(strengths, list("abc"))
    with pytest.raises(ValueError, match="per_line"):
        couplings_over_text(strengths, list("abcde"), per_line=0)
    with pytest.raises(ValueError, match="at least 2 sites, got 1"):
        coupling_graph(np.zeros((1, 1)), PLACES[:1], ["a"])
    with pytest.raises(ValueError, match="names must be one for each of 5 sites, got 3"):
        coupling_graph(strengths, PLACES, list("abc"))
    strengths[1, 3] = np.nan
    for figure in (
        lambda: coupling_graph(strengths, PLACES, list("abcde")),
        lambda: couplings_over_image(strengths, PIXELS, PLACES),
        lambda: couplings_over_text(strengths, list("abcde")),
    ):
        with pytest.raises(ValueError, match=r"strengths must be finite, got nan at \(1, 3\)"):
            figure()
