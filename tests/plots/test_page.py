"""Parts of the page: what the script can read, and what is seen on white and in the dark."""

from __future__ import annotations

import base64
import re
from importlib.resources import files

import numpy as np
import pytest
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from deep_implicit_attention.plots import (
    convergence,
    coupling_graph,
    couplings_over_image,
    couplings_over_text,
)
from deep_implicit_attention.plots._page import moving_image, packed, picture

PLACES = np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [2.0, 0.0]])


def colours_of_the_page(dark: bool) -> dict[str, str]:
    """The variables of the style sheet in a scheme, and the colours that they stand for."""
    style = files("deep_implicit_attention.plots").joinpath("page.css").read_text("utf-8")
    light, night = re.findall(r":root \{(.*?)\}", style, re.DOTALL)
    found = dict(re.findall(r"(--[\w-]+): (#\w{6});", light))
    return {**found, **dict(re.findall(r"(--[\w-]+): (#\w{6});", night))} if dark else found


def luminance(colour: np.ndarray) -> float:
    """That of WCAG 2."""
    linear = np.where(colour <= 0.04045, colour / 12.92, ((colour + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def contrasts(figure: Figure, least: str, dark: bool, ground: str | None = None) -> list[float]:
    """Of every line of the colour `least` in the page against the paper, or another `ground`,
    opacity included."""
    source, page = picture(figure, "a picture"), colours_of_the_page(dark)
    paper = np.array(to_rgb(ground or page["--paper"]))
    found = []
    for style in re.findall(r'style="([^"]*)"', source):
        given = dict(part.split(": ", 1) for part in style.split("; ") if ": " in part)
        ink = given.get("stroke", "none")
        colour = page.get(ink.removeprefix("var(").removesuffix(")"), ink)
        if not ink.startswith(("var", "#")) or ink != least:
            continue
        alpha = float(given.get("stroke-opacity", given.get("opacity", 1)))
        seen = alpha * np.array(to_rgb(colour)) + (1 - alpha) * paper
        pair = sorted([luminance(seen), luminance(paper)])
        found.append((pair[1] + 0.05) / (pair[0] + 0.05))
    assert found
    return found


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.slow
def test_the_weakest_lines_are_seen_in_both_schemes(dark: bool) -> None:
    random = np.random.default_rng(0)
    strengths = random.uniform(0.01, 1, (5, 5))
    strengths[0, 1:] = [1e-6, 1e-7, 1e-7, 1e-7]  # the weakest of all is drawn, too
    graphs = [
        couplings_over_text(strengths, list("abcde")),
        coupling_graph(strengths, PLACES, list("abcde")),
        coupling_graph(strengths + strengths.T, PLACES, list("abcde")),
    ]
    for figure in graphs:
        assert min(contrasts(figure, "var(--blue)", dark)) > 2
    # These lie over each other, two hundred and more of them.
    many = convergence(10 ** -random.uniform(0, 3, (5, 300)), 1e-3)
    assert min(contrasts(many, "var(--blue)", dark)) > 1.5
    assert min(contrasts(many, "var(--ink)", dark)) > 7


@pytest.mark.parametrize("dark", [False, True])
def test_lines_over_an_image_are_seen_on_all_of_it(dark: bool) -> None:
    """The image and what lies around it are the same on every page."""
    strengths = np.random.default_rng(0).uniform(0.01, 1, (5, 5))
    strengths[0, 1:] = 1e-6
    pixels = np.linspace(0, 1, 9).reshape(3, 3)
    figure = couplings_over_image(strengths, pixels, PLACES - [1.0, 0.0])  # one beside the image
    darkest = str(np.asarray(figure.axes[0].images[0].get_array()).min())
    (around,) = (p for p in figure.axes[0].patches if isinstance(p, Rectangle))
    assert around.get_bbox().x0 <= figure.axes[0].get_xlim()[0]
    colour = to_hex(around.get_facecolor())
    assert f"fill: {colour}" in picture(figure, "a picture")
    for ground in (darkest, colour):
        assert min(contrasts(figure, "#0073b2", dark, ground)) > 2


def test_colours_of_different_names_stay_different_in_the_dark() -> None:
    for dark in (False, True):
        page = colours_of_the_page(dark)
        plain = ["#E69F00", "#009E73", "#D55E00", "#CC79A7"]
        shown = [page["--blue"], page["--sky"], *map(to_hex, plain)]
        assert len(set(shown)) == 6


def test_what_is_not_finite_is_packed_as_such() -> None:
    values = np.array([[-1.0, 0.5, np.nan], [np.inf, -np.inf, 1.0]])
    found = packed(values)
    codes = np.frombuffer(base64.b64decode(found["codes"]), "<i2").reshape(found["shape"])
    np.testing.assert_array_equal(codes == -32768, ~np.isfinite(values))
    np.testing.assert_allclose(codes[np.isfinite(values)] / 32767, [-1, 0.5, 1], atol=1e-4)
    with pytest.raises(ValueError, match="from -1 to 1, got one of size 3"):
        packed(np.array([0.5, -3.0, np.nan]))


def test_readers_who_want_no_motion_get_the_still() -> None:
    html = moving_image(b"GIF", b"PNG", "what <moves>")
    still, moving = (base64.b64encode(content).decode() for content in (b"PNG", b"GIF"))
    source = re.search(r'<source media="([^"]*)" srcset="([^"]*)">', html)
    assert source
    assert source.groups() == ("(prefers-reduced-motion: reduce)", f"data:image/png;base64,{still}")
    assert f'src="data:image/gif;base64,{moving}" alt="what &lt;moves&gt;"' in html
