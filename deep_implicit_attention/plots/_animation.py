"""Figures one after the other, as a GIF."""

from __future__ import annotations

import io
import struct
from collections.abc import Iterable

from matplotlib.figure import Figure
from PIL import Image

# A GIF counts hundredths of a second in 16 bits, and the last figure is shown for longer.
_LONGEST = 600


def animation(figures: Iterable[Figure], seconds: float = 0.4, dpi: int = 80) -> bytes:
    """A GIF of figures of one size, each shown for `seconds`, the last for longer; it repeats.

    The figures are drawn and left as they are.

    Raises:
        ValueError: for no figures, figures of different sizes, or `seconds` that a GIF cannot hold.
    """
    if not 0 < seconds <= _LONGEST:
        raise ValueError(f"seconds must be above 0 and at most {_LONGEST}, got {seconds}")
    frames = []
    for figure in figures:
        drawn = io.BytesIO()
        # Unlike a canvas of one's own, this gives the figure its canvas and resolution back.
        figure.savefig(drawn, format="png", dpi=dpi)
        with Image.open(drawn) as frame:
            frames.append(frame.convert("RGB").quantize(64, Image.Quantize.MEDIANCUT))
    if len({frame.size for frame in frames}) != 1:
        raise ValueError(
            "figures must be of one size, and there must be one; got sizes "
            f"{sorted({frame.size for frame in frames})}"
        )
    each = max(20, round(1000 * seconds))  # browsers slow down what is faster
    written = io.BytesIO()
    try:
        frames[0].save(
            written, "GIF", save_all=True, append_images=frames[1:], loop=0, optimize=True,
            duration=[each] * (len(frames) - 1) + [each + 2000],
        )  # fmt: skip
    except (OverflowError, struct.error) as error:
        raise ValueError(
            "seconds must be fewer: equal figures in a row become one, which is shown for as long "
            f"as all of them, more than the 655 s that a GIF can hold; got {seconds}"
        ) from error
    return written.getvalue()
