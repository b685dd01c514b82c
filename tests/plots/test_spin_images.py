"""Rows of images: what is drawn in each place, and what is not known."""

from __future__ import annotations

import matplotlib
import numpy as np
import pytest

from deep_implicit_attention.plots import image_rows


def test_every_image_is_in_its_row_and_column() -> None:
    random = np.random.default_rng(0)
    rows = {name: random.choice([-1.0, 1.0], size=(3, 4, 5)) for name in ("image", "drawn")}
    rows["drawn"][1, 2:] = np.nan
    figure = image_rows(rows, "heading")
    assert figure.get_suptitle() == "heading"
    assert len(figure.axes) == 6
    for (row, column), axes in zip(np.ndindex(2, 3), figure.axes, strict=True):
        name = list(rows)[row]
        (shown,) = axes.images
        np.testing.assert_array_equal(np.ma.filled(shown.get_array(), np.nan), rows[name][column])
        assert axes.get_ylabel() == (name if column == 0 else "")
        place = axes.get_subplotspec()
        assert (place.rowspan.start, place.colspan.start) == (row, column)


def test_minus_one_is_black_and_the_unknown_is_neither() -> None:
    (axes,) = image_rows({"one": np.array([[[-1.0, 1.0, 0.0, np.nan]]])}).axes
    (shown,) = axes.images
    black, white, grey, unknown = shown.to_rgba(shown.get_array())[0]
    np.testing.assert_allclose(black, [0, 0, 0, 1])
    np.testing.assert_allclose(white, [1, 1, 1, 1])
    assert grey[0] == grey[1] == grey[2] == pytest.approx(0.5, abs=0.01)
    assert unknown[3] == 0  # what lies behind is seen
    assert matplotlib.colors.to_hex(axes.get_facecolor()) == "#8fa8c8"


def test_rows_of_different_lengths() -> None:
    with pytest.raises(ValueError, match=r"equally many images, got \{'a': 1, 'b': 2\}"):
        image_rows({"a": np.zeros((1, 2, 2)), "b": np.zeros((2, 2, 2))})
    with pytest.raises(ValueError, match="at least one row"):
        image_rows({})
    with pytest.raises(ValueError, match="at least one image"):
        image_rows({"a": np.zeros((0, 2, 2))})
