"""Pictures and arrays in the folder of a run; each appears whole or not at all."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np

from ..training._files import write_whole


def save_figure(path: Path, figure: Any) -> None:
    """Write a matplotlib figure as a PNG file."""
    write_whole(path, _drawn(figure))


def _drawn(figure: Any) -> bytes:
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=130)
    return drawn.getvalue()


def save_arrays(path: Path, **arrays: Any) -> None:
    """Write an .npz file."""
    packed = io.BytesIO()
    np.savez(packed, **arrays)
    write_whole(path, packed.getvalue())
