"""Relaxation, maps, horizons, solvers, exactness and phases draw what they were given."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
from matplotlib.collections import QuadMesh
from matplotlib.colors import to_hex
from matplotlib.contour import ContourSet
from matplotlib.figure import Figure
from PIL import Image

from deep_implicit_attention.plots import (
    against_exact,
    animation,
    magnetization_maps,
    phase_diagram,
    relaxation,
    relaxation_horizon,
    solver_comparison,
)

RANDOM = np.random.default_rng(0)
OKABE_ITO = {
    "#000000", "#e69f00", "#56b4e9", "#009e73", "#f0e442", "#0072b2", "#d55e00", "#cc79a7",
}  # fmt: skip


def lines(axes) -> dict[str, tuple[list[float], list[float]]]:
    return {
        str(line.get_label()): (list(line.get_xdata()), list(line.get_ydata()))
        for line in axes.lines
    }


# --- relaxation -----------------------------------------------------------------------------


@pytest.mark.parametrize("components", [None, 3])
def test_relaxation_draws_every_site(components: int | None) -> None:
    shape = (4, 5) if components is None else (4, 5, components)
    z, residuals = RANDOM.normal(size=shape), [0.5, 0.1, 0.01, 0.001]
    figure = relaxation(
        z, residuals, steps=[1, 2, 4, 8], emphasised=2, tolerance=0.003, title="heading"
    )
    left, right = figure.axes
    expected = z if components is None else np.sqrt((z**2).sum(axis=-1))
    drawn = lines(left)
    for site in range(5):
        at, values = drawn["site 2" if site == 2 else f"_site {site}"]
        assert at == [1, 2, 4, 8]
        np.testing.assert_allclose(values, expected[:, site])
    assert len(drawn) == 5
    assert lines(right)["residual"] == ([1, 2, 4, 8], residuals)
    assert set(lines(right)["tolerance 0.003"][1]) == {0.003}
    assert right.get_yscale() == "log"
    assert left.get_title() == "heading"
    assert ("‖" in left.get_ylabel()) == (components is not None)
    for axes in (left, right):
        assert "step" in axes.get_xlabel()
        assert axes.get_ylabel()
        assert {to_hex(line.get_color()) for line in axes.lines} <= OKABE_ITO


def test_relaxation_names_the_emphasised_site() -> None:
    z = np.zeros((3, 2))
    left, _ = relaxation(z, [0.3, 0.2, 0.1], emphasised=0, name="class token").axes
    (text,) = left.get_legend().get_texts()
    assert text.get_text() == "class token"
    with pytest.raises(ValueError, match="name"):
        relaxation(z, [0.3, 0.2, 0.1], name="class token")


def test_relaxation_counts_steps_from_one() -> None:
    left, right = relaxation(np.zeros((3, 2)), [0.3, 0.2, 0.1]).axes
    for axes in (left, right):
        assert {tuple(at) for at, _ in lines(axes).values()} == {(1, 2, 3)}


def test_relaxation_without_a_residual_for_each_step() -> None:
    with pytest.raises(ValueError, match="residuals"):
        relaxation(np.zeros((3, 2)), [0.1, 0.2])
    with pytest.raises(ValueError, match="magnetizations"):
        relaxation(np.zeros(3), [0.1, 0.2, 0.3])
    with pytest.raises(ValueError, match=r"steps must have shape \(2,\) as residuals, got \(3,\)"):
        relaxation(np.zeros((2, 2)), [0.1, 0.2], steps=[1, 2, 3])


@pytest.mark.parametrize("site", [-1, 2])
def test_relaxation_emphasises_a_site_that_is_there(site: int) -> None:
    with pytest.raises(ValueError, match=f"emphasised must be one of 2 sites, got {site}"):
        relaxation(np.zeros((2, 2)), [0.1, 0.2], emphasised=site)


# --- maps -----------------------------------------------------------------------------------


def test_maps_share_one_scale() -> None:
    maps = RANDOM.uniform(0, 2, (3, 2, 4))
    figure = magnetization_maps(maps, ["a", "b", "c"], label="what it is (unit)", title="heading")
    *drawn, bar = figure.axes
    for axes, values, caption in zip(drawn, maps, "abc", strict=True):
        (image,) = axes.images
        np.testing.assert_array_equal(image.get_array(), values)
        assert image.get_clim() == (0, maps.max())
        assert image.get_cmap().name == "cividis"
        assert axes.get_title() == caption
    assert bar.get_ylabel().replace("\n", " ") == "what it is (unit)"


def test_maps_with_signs_are_white_at_zero() -> None:
    maps = np.array([[[1.0, -3.0]], [[0.5, np.nan]]])
    figure = magnetization_maps(maps, ["a", "b"])
    for axes in figure.axes[:2]:
        assert axes.images[0].get_clim() == (-3, 3)
        assert axes.images[0].get_cmap()(0.5)[:3] == pytest.approx((1, 1, 1), abs=0.05)
        for value, strong, weak in ((-3.0, 2, 0), (3.0, 0, 2)):  # blue below 0, red above
            colour = axes.images[0].to_rgba(value)
            assert colour[strong] > 2 * colour[weak]
    magnetization_maps(np.zeros((1, 2, 2)), ["none"]).draw_without_rendering()


def test_the_outline_of_the_image_lies_over_the_maps() -> None:
    maps, pixels = np.arange(8.0).reshape(2, 2, 2), np.zeros((8, 6))
    pixels[:, 4:] = 1
    plain = magnetization_maps(maps, ["a", "b"])
    for image in (pixels, np.stack([pixels] * 3, axis=-1)):
        figure = magnetization_maps(maps, ["a", "b"], image=image)
        for k in range(2):
            (shown,), (before,) = figure.axes[k].images, plain.axes[k].images
            assert np.array_equal(shown.to_rgba(maps[k]), before.to_rgba(maps[k]))
            assert shown.get_alpha() is None
            lines = [c for c in figure.axes[k].collections if isinstance(c, ContourSet)]
            assert len(lines) == 2
            for line in lines:
                (path,) = line.get_paths()
                # Between the pixels 3 and 4 of six, which are two sites from -0.5 to 1.5.
                np.testing.assert_allclose(path.vertices[:, 0], -0.5 + 2 * 4 / 6)
                assert sorted(path.vertices[[0, -1], 1]) == pytest.approx([-0.625, 1.625])
            assert figure.axes[k].get_xlim() == plain.axes[k].get_xlim() == (-0.5, 1.5)
            assert figure.axes[k].get_ylim() == plain.axes[k].get_ylim() == (1.5, -0.5)
    assert not magnetization_maps(maps, ["a", "b"], image=0 * pixels).axes[0].collections
    with pytest.raises(ValueError, match=r"image must have shape .* got \(6,\)"):
        magnetization_maps(maps, ["a", "b"], image=pixels[0])


def test_maps_without_captions() -> None:
    with pytest.raises(ValueError, match="captions"):
        magnetization_maps(np.zeros((2, 2, 2)), ["a"])
    with pytest.raises(ValueError, match="n at least 1"):
        magnetization_maps(np.zeros((0, 2, 2)), [])


# --- horizon --------------------------------------------------------------------------------


def test_horizon_draws_scores_and_equilibrium() -> None:
    figure = relaxation_horizon([1, 2, 8], {"steps": [3.0, 2.0, 1.0]}, {"here": 0.5}, "error (%)")
    (axes,) = figure.axes
    assert lines(axes) == {
        "steps": ([1, 2, 8], [3.0, 2.0, 1.0]),
        "equilibrium": ([1, 8], [0.5, 0.5]),
    }
    assert axes.get_ylabel() == "error (%)"
    assert axes.get_xscale() == "log"
    two = {"a": [1.0, 2.0], "b": [2.0, 3.0]}
    figure = relaxation_horizon([1, 4], two, {"a": 1.5, "b": 2.5}, "loss (nats)")
    names = {"a", "b", "a, equilibrium", "b, equilibrium"}
    drawn = lines(figure.axes[0])
    assert set(drawn) == names
    assert drawn["a, equilibrium"][1] == [1.5, 1.5]
    assert drawn["b, equilibrium"][1] == [2.5, 2.5]
    (legend,) = figure.legends
    assert {text.get_text() for text in legend.get_texts()} == names


def test_horizon_without_steps_or_with_other_scores() -> None:
    with pytest.raises(ValueError, match="steps must hold at least one"):
        relaxation_horizon([], {"a": []}, {"b": 0.5}, "error (%)")
    with pytest.raises(ValueError, match=r"a must have a score for each of 2 steps, got .*\(3,\)"):
        relaxation_horizon([1, 2], {"a": [1.0, 2.0, 3.0]}, {"b": 0.5}, "error (%)")


# --- solvers --------------------------------------------------------------------------------


def test_solvers_have_medians_bands_and_radii() -> None:
    fast = 10 ** -RANDOM.uniform(0, 4, (3, 5))
    fast[2, :3] = np.nan  # most are done
    slow = 10 ** -RANDOM.uniform(0, 2, (6, 5))
    radii = {"fast": RANDOM.uniform(0, 1, 5)}
    figure = solver_comparison({"fast": fast, "slow": slow}, radii, 1e-3, "heading")
    left, right = figure.axes
    assert lines(left)["fast"][0] == [1, 2]
    np.testing.assert_allclose(lines(left)["fast"][1], [sorted(row)[2] for row in fast[:2]])
    np.testing.assert_allclose(lines(left)["slow"][1], [sorted(row)[2] for row in slow])
    assert set(lines(left)["tolerance"][1]) == {1e-3}
    bands = [np.asarray(band.get_paths()[0].vertices) for band in left.collections]
    assert [len(np.unique(band[:, 0])) for band in bands] == [2, 6]
    for band, trace in zip(bands, (fast, slow), strict=True):
        at_one = band[band[:, 0] == 1, 1]
        assert at_one.min() == pytest.approx(sorted(trace[0])[1])
        assert at_one.max() == pytest.approx(sorted(trace[0])[3])
    np.testing.assert_array_equal(lines(right)["fast"][1], np.sort(radii["fast"]))
    np.testing.assert_allclose(lines(right)["fast"][0], [10, 30, 50, 70, 90])
    assert "slow" not in lines(right)
    assert set(lines(right)["_one"][1]) == {1.0}
    colours = {line.get_label(): line.get_color() for line in left.lines}
    assert colours["fast"] == right.lines[0].get_color() != colours["slow"]
    with pytest.raises(ValueError, match="radii must be of solvers"):
        solver_comparison({"a": fast}, {"b": [0.1]}, 1e-3)
    with pytest.raises(ValueError, match="at most 6"):
        solver_comparison({str(k): slow for k in range(7)}, {}, 1e-3)


def test_a_solver_whose_residuals_are_not_finite_is_named() -> None:
    fine, lost = 10 ** -RANDOM.uniform(0, 4, (3, 5)), np.full((3, 5), np.nan)
    lost[:, 0] = 0.1  # one sample of five goes on
    figure = solver_comparison({"fine": fine, "lost": lost}, {"lost": np.ones(5)}, 1e-3)
    figure.draw_without_rendering()
    drawn = lines(figure.axes[0])
    assert drawn["lost (most residuals are not finite)"] == ([], [])
    assert drawn["fine"][0] == [1, 2, 3]
    with pytest.raises(ValueError, match=r"trace of a must have shape .* got \(3, 0\)"):
        solver_comparison({"a": np.zeros((3, 0))}, {}, 1e-3)


# --- approximate against exact --------------------------------------------------------------


def test_estimates_have_points_and_bars_of_two_standard_errors() -> None:
    exact = np.array([-0.5, 0.0, 0.7])
    estimates = {"method": exact + 0.1, "sampler": exact - 0.1}
    errors = {"sampler": np.array([0.01, 0.02, 0.03])}
    (axes,) = against_exact(exact, estimates, errors, label="m (unit)", title="heading").axes
    drawn = {str(c.get_label()): c for c in axes.containers}
    assert set(drawn) == {"method", "sampler, ± 2 standard errors"}
    for name, values in zip(drawn, estimates.values(), strict=True):
        points = drawn[name][0]
        np.testing.assert_array_equal(points.get_xdata(), exact)
        np.testing.assert_array_equal(points.get_ydata(), values)
    assert drawn["method"].has_yerr is False
    (bars,) = drawn["sampler, ± 2 standard errors"][2]
    for segment, x, y, error in zip(
        bars.get_segments(), exact, estimates["sampler"], errors["sampler"], strict=True
    ):
        np.testing.assert_allclose(segment, [[x, y - 2 * error], [x, y + 2 * error]])
    diagonal = lines(axes)["_exact"]
    assert diagonal[0] == diagonal[1]
    assert axes.get_xlim() == axes.get_ylim()
    assert axes.get_xlabel() == "exact m (unit)"
    with pytest.raises(ValueError, match="other must have shape"):
        against_exact(exact, {"other": [1.0]})
    with pytest.raises(ValueError, match="standard errors"):
        against_exact(exact, estimates, {"nobody": exact})
    with pytest.raises(ValueError, match="at most 6"):
        against_exact(exact, {str(k): exact for k in range(7)})


def test_estimates_that_are_not_finite_are_counted() -> None:
    exact = np.array([-0.5, 0.0, 0.7])
    (axes,) = against_exact(exact, {"method": [np.nan, 0.1, np.inf]}).axes
    axes.figure.draw_without_rendering()
    (container,) = axes.containers
    assert container.get_label() == "method (2 of 3 not finite)"
    assert np.all(np.isfinite(axes.get_xlim()))
    assert "dimensionless" in axes.get_ylabel()
    with pytest.raises(ValueError, match=r"exact must be finite, got exact\[1\] = nan"):
        against_exact([0.0, np.nan], {"method": [0.0, 0.1]})


# --- phases ---------------------------------------------------------------------------------


def test_phases_of_each_method_and_where_it_failed() -> None:
    temperatures, fields = [0.5, 1.0, 2.0], [0.0, 0.1]
    exact = np.arange(6.0).reshape(3, 2) / 10
    answers = {"exact": exact, "method": exact + 0.2}
    # Not symmetric: what exchanges temperatures and fields fails.
    converged = {"method": np.array([[True, False], [True, True], [False, True]])}
    figure = phase_diagram(temperatures, fields, answers, converged, order_label="|m| (unit)")
    first, second, bar = figure.axes
    for axes, values in ((first, exact), (second, exact + 0.2)):
        (mesh,) = (c for c in axes.collections if isinstance(c, QuadMesh))
        np.testing.assert_allclose(np.asarray(mesh.get_array()), values)
        assert mesh.get_clim() == (0, 0.7)
        assert mesh.get_cmap().name == "cividis"
        corners = mesh.get_coordinates()
        assert np.all(np.diff(corners[:, 0, 1]) > 0)  # temperatures upwards
        assert corners[0, 0, 0] < 0.0 < corners[0, 1, 0] < 0.1 < corners[0, 2, 0]
        assert axes.get_xlabel().startswith("field")
    crosses = {
        str(line.get_label()): set(zip(line.get_xdata(), line.get_ydata(), strict=True))
        for line in second.lines
    }
    assert crosses == {"_failed": {(0.1, 0.5), (0.0, 2.0)}}
    assert "33% not converged" in second.get_title()
    assert "converged" not in first.get_title()
    assert first.get_ylabel().startswith("temperature")
    assert bar.get_ylabel() == "|m| (unit)"
    with pytest.raises(ValueError, match="3 temperatures and 2 fields"):
        phase_diagram(temperatures, fields, {"a": exact.T})
    with pytest.raises(ValueError, match="at least one method, got none"):
        phase_diagram(temperatures, fields, {})


# --- animation ------------------------------------------------------------------------------


def frame(value: float) -> Figure:
    figure = Figure(figsize=(2, 1))
    figure.subplots().plot([0, 1], [0, value])
    return figure


def test_animation_has_every_figure_once_and_waits_at_the_end() -> None:
    film = Image.open(io.BytesIO(animation([frame(v) for v in (1, 2, 3)], seconds=0.1, dpi=50)))
    assert film.format == "GIF"
    assert (film.n_frames, film.size) == (3, (100, 50))
    assert film.info["loop"] == 0
    shown, durations = [], []
    for number in range(3):
        film.seek(number)
        durations.append(film.info["duration"])
        shown.append(np.asarray(film.convert("L"), dtype=float))
    assert durations == [100, 100, 2100]
    again = animation([frame(v) for v in (1, 2, 3)], seconds=0.1, dpi=50)
    assert again == animation([frame(v) for v in (1, 2, 3)], seconds=0.1, dpi=50)
    # The axis numbers differ, so no two frames are the same.
    assert len({picture.tobytes() for picture in shown}) == 3


def test_animation_of_nothing_or_of_different_sizes() -> None:
    with pytest.raises(ValueError, match="one size"):
        animation([])
    with pytest.raises(ValueError, match="one size"):
        animation([frame(1), Figure(figsize=(3, 1))])
    for seconds in (0, 601, math.inf, math.nan):
        with pytest.raises(ValueError, match="seconds"):
            animation([frame(1)], seconds=seconds)
    with pytest.raises(ValueError, match="equal figures in a row"):
        animation([frame(1)] * 3, seconds=300)
    assert animation([frame(1)], seconds=600)


def test_animation_leaves_the_figures_as_they_are() -> None:
    figures = [frame(1), frame(2)]
    before = [(figure.dpi, figure.canvas, tuple(figure.get_size_inches())) for figure in figures]
    animation(figures, dpi=50)
    for figure, (dpi, canvas, size) in zip(figures, before, strict=True):
        assert figure.dpi == dpi != 50
        assert figure.canvas is canvas
        assert tuple(figure.get_size_inches()) == size
