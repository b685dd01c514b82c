"""One self-contained HTML page: sections of text, tables and figures, and a part that moves.

Nothing is fetched: styles, script, figures (SVG) and data are in the file. Colours follow the
reader's light or dark scheme.
"""

from __future__ import annotations

import base64
import io
import json
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from importlib.resources import files
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

_POINTS = 1.25  # pixels on the page for a point of a figure
# Colours that the page has another shade of where it is dark; blues are too dark there.
_SCHEME = {"#000000": "--ink", "#ffffff": "--paper", "#0072b2": "--blue", "#56b4e9": "--sky"}
_NOT_FINITE = -32768  # no code of a number, which are from −32767 to 32767
_READABLE = 0.72  # figures are never shrunk below this; narrow screens scroll them instead


@dataclass
class Section:
    """A heading and what stands below it: strings of HTML, made by the functions below."""

    title: str
    parts: list[str] = field(default_factory=list)

    def add(self, *parts: str) -> None:
        """More parts."""
        self.parts += parts


def page(title: str, lead: Sequence[str], sections: Sequence[Section], data: Any = None) -> str:
    """The page. `lead` stands above the sections; sections without parts are left out.

    `data` is what the script shows in the elements of `explorer`; None without one.
    """
    assets = files(__package__ or __name__)
    style, script = (assets.joinpath(name).read_text("utf-8") for name in ("page.css", "page.js"))
    shown = [section for section in sections if section.parts]
    contents = "".join(
        f'<li><a href="#{_slug(section.title)}">{escape(section.title)}</a></li>'
        for section in shown
    )
    body = "\n".join(
        f'<section id="{_slug(section.title)}">\n<h2>{escape(section.title)}</h2>\n'
        + "\n".join(section.parts)
        + "\n</section>"
        for section in shown
    )
    moving = "" if data is None else (
        f'<script type="application/json" id="data">{_json(data)}</script>\n'
        f"<script>\n{script}</script>\n"
    )  # fmt: skip
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        '<link rel="icon" href="data:,">\n'
        f"<title>{escape(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n"
        f"<header>\n<h1>{escape(title)}</h1>\n{''.join(lead)}\n"
        f'<nav aria-label="Sections"><ul>{contents}</ul></nav>\n</header>\n'
        f"<main>\n{body}\n</main>\n{moving}</body>\n</html>\n"
    )


def paragraph(text: str) -> str:
    """A paragraph of plain text."""
    return f"<p>{escape(text)}</p>"


def notice(text: str) -> str:
    """A paragraph that says that something is missing or wrong."""
    return f'<p class="notice" role="note">{escape(text)}</p>'


def preformatted(text: str) -> str:
    """A text whose lines are kept."""
    return f"<pre>{escape(text)}</pre>"


def table(
    rows: Sequence[Sequence[Any]], head: Sequence[str] = (), caption: str = "", key: str = ""
) -> str:
    """A table; the first cell of a row is its name. Numbers are shown to six digits.

    With `key`, the exact value of a row's second cell stands in its attribute ``data-KEY``, as
    JSON, under the row's name.
    """
    kind = ' class="wide"' if len(head) > 2 else ""  # cells of wide tables are not broken
    lines = [f'<div class="scroll"><table{kind}>']
    if caption:
        lines.append(f"<caption>{escape(caption)}</caption>")
    if head:
        lines.append("<tr>" + "".join(f'<th scope="col">{escape(h)}</th>' for h in head) + "</tr>")
    for name, *cells in rows:
        exact = ""
        if key:
            exact = f' data-{key}="{escape(str(name))}" data-value="{escape(_json(cells[0]))}"'
        lines.append(
            f'<tr{exact}><th scope="row">{escape(str(name))}</th>'
            + "".join(f"<td>{escape(_shown(cell))}</td>" for cell in cells)
            + "</tr>"
        )
    return "\n".join(lines) + "\n</table></div>"


def folded(summary: str, *parts: str) -> str:
    """Parts that are shown on demand."""
    return f"<details><summary>{escape(summary)}</summary>\n" + "\n".join(parts) + "\n</details>"


def beside(*parts: str) -> str:
    """Parts side by side, where the screen is wide enough."""
    return '<div class="beside">' + "\n".join(parts) + "</div>"


def picture(figure: Figure, description: str) -> str:
    """A figure as SVG in the page, its blacks, whites and blues those of the reader's scheme."""
    drawn = io.StringIO()
    # Ids must be of one figure only, and the same every time.
    mark = f"f{_checksum(description)}"
    with matplotlib.rc_context({"svg.hashsalt": mark, "svg.fonttype": "path"}):
        metadata = {"Date": None, "Creator": None}
        figure.savefig(drawn, format="svg", transparent=True, metadata=metadata)
    svg = drawn.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{mark}-", svg)
    for colour, variable in _SCHEME.items():
        svg = svg.replace(colour, f"var({variable})")
    # A hundredth of a point is enough, but for factors below 1.
    svg = re.sub(r"(?<![\d.])([1-9]\d*\.\d\d)\d+", r"\1", svg)
    width = 72 * figure.get_size_inches()[0] * _POINTS
    svg = re.sub(r'^<svg [^>]*?viewBox="([^"]*)"[^>]*>',
                 rf'<svg style="width:{width:.0f}px;min-width:{_READABLE * width:.0f}px" '
                 rf'viewBox="\1" role="img" aria-label="{_plain(description)}">',
                 svg, count=1, flags=re.DOTALL)  # fmt: skip
    caption = f"<figcaption>{escape(description)}</figcaption>"
    return f'<figure style="width:{width:.0f}px"><div class="scroll">{svg}</div>{caption}</figure>'


def image(content: bytes, kind: str, description: str) -> str:
    """A picture file, of kind ``png`` or ``gif``, in the page."""
    source = f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
    return (
        f'<figure><div class="scroll"><img class="{kind}" src="{source}" '
        f'alt="{escape(description)}"></div>'
        f"<figcaption>{escape(description)}</figcaption></figure>"
    )


def moving_image(gif: bytes, still: bytes, description: str) -> str:
    """An animation, in whose place readers who want less motion see `still`, a PNG."""
    moving, calm = (base64.b64encode(content).decode() for content in (gif, still))
    return (
        '<figure><div class="scroll"><picture>'
        f'<source media="(prefers-reduced-motion: reduce)" srcset="data:image/png;base64,{calm}">'
        f'<img class="gif" src="data:image/gif;base64,{moving}" alt="{escape(description)}">'
        f"</picture></div><figcaption>{escape(description)}</figcaption></figure>"
    )


def explorer(kind: str) -> str:
    """The elements that the script fills: of an ``"image"`` or of a ``"text"``."""
    return files(__package__ or __name__).joinpath(f"explore_{kind}.html").read_text("utf-8")


def packed(array: np.ndarray) -> dict[str, Any]:
    """An array from −1 to 1 in 16 bits, base64, with its shape: 1/32767 is the last digit.

    What is not finite has the code −32768, and is NaN for the script.

    Raises:
        ValueError: for finite numbers beyond −1 or 1.
    """
    array = np.asarray(array, dtype=float)
    finite = np.isfinite(array)
    largest = np.abs(array[finite]).max(initial=0.0)
    if largest > 1 + 1e-9:
        raise ValueError(f"array must hold numbers from -1 to 1, got one of size {largest:g}")
    codes = np.where(finite, np.rint(32767 * np.clip(np.nan_to_num(array), -1, 1)), _NOT_FINITE)
    text = base64.b64encode(codes.astype("<i2").tobytes()).decode()
    return {"shape": list(array.shape), "codes": text}


def _json(data: Any) -> str:
    """JSON that can stand in a script element and is JSON for everyone: NaN becomes null."""
    text = json.dumps(_finite(data), ensure_ascii=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _finite(data: Any) -> Any:
    if isinstance(data, float):
        return data if np.isfinite(data) else None
    if isinstance(data, Mapping):
        return {name: _finite(value) for name, value in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(value) for value in data]
    return data


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if value is None:
        return "–"
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _plain(text: str) -> str:
    return escape(text).replace("\\", "/")


def _slug(title: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")


def _checksum(text: str) -> str:
    return f"{zlib.crc32(text.encode()):08x}"
