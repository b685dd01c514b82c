"""The couplings in training, as an animation made from the checkpoints that a run kept."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import nn

from .. import plots
from ..plots._page import Section, moving_image, paragraph
from ..training._files import write_whole
from ..training._state import weights
from ._report_page import Story

FILM = "couplings.gif"
_FRAMES, _FEWEST = 40, 3
_MOST_BYTES = 1_000_000  # in the page a third more

Frame = Callable[[np.ndarray, str, float, float], Figure]


def add_film(
    story: Story, section: Section, model: nn.Module, couplings: Callable[[], Any], draw: Frame
) -> None:
    """Add the animation to `section`, and write it beside the report if that lies in the run.

    `couplings()` are the strengths `(N, N)` by `model` as it stands; `draw(strengths, title,
    weakest, strongest)` is a figure of them, widths as these two numbers say.
    """
    film = coupling_film(story, model, couplings, draw)
    if film is None:
        section.add(
            paragraph(
                f"For an animation of the couplings in training at least {_FEWEST} checkpoints "
                "have to be kept: dia train ... --keep-checkpoints 40."
            )
        )
        return
    content, steps = film
    with Image.open(io.BytesIO(content)) as frames:
        frames.seek(frames.n_frames - 1)  # type: ignore[attr-defined]
        still = io.BytesIO()
        frames.convert("RGB").save(still, "PNG")
    section.add(
        moving_image(
            content, still.getvalue(),
            f"The couplings in training, from {len(steps)} checkpoints, step {steps[0]} to "
            f"{steps[-1]}",
        )
    )  # fmt: skip
    if story.owns_files:
        path = story.run.folder / FILM
        story.attempt(f"{FILM} cannot be written", lambda: write_whole(path, content))


@torch.no_grad()
def coupling_film(
    story: Story, model: nn.Module, couplings: Callable[[], Any], draw: Frame
) -> tuple[bytes, list[int]] | None:
    """A GIF of couplings at the checkpoints that were kept, and their steps; see `add_film`.

    None with fewer than three. Puts other weights into `model`, and its own back at the end.
    """
    every = story.run.checkpoints.steps()
    if len(every) < _FEWEST:
        return None
    best = {name: value.clone() for name, value in model.state_dict().items()}
    chosen = np.unique(np.linspace(0, len(every) - 1, _FRAMES).round().astype(int))
    found: dict[int, np.ndarray] = {}
    try:
        for step in (every[k] for k in chosen):
            strengths = story.attempt(
                f"The checkpoint of step {step} is left out",
                lambda step=step: _couplings_at(story, model, step, couplings),
            )
            if strengths is not None:
                found[step] = strengths
    finally:
        model.load_state_dict(best)
    if len(found) < _FEWEST:
        return None
    apart = ~np.eye(len(next(iter(found.values()))), dtype=bool)
    weakest = min(strengths[apart].min() for strengths in found.values())
    strongest = max(strengths[apart].max() for strengths in found.values())
    steps = list(found)
    while True:
        figures = (draw(found[step], f"step {step}", weakest, strongest) for step in steps)
        content = plots.animation(figures, seconds=0.3, dpi=72)
        if len(content) <= _MOST_BYTES or len(steps) < 2 * _FEWEST:
            return content, steps
        steps = [*steps[:-1:2], steps[-1]]


def _couplings_at(
    story: Story, model: nn.Module, step: int, couplings: Callable[[], Any]
) -> np.ndarray:
    model.load_state_dict(weights(story.run.checkpoints.read(step).parts))
    strengths = np.asarray(couplings(), dtype=float)
    if not np.isfinite(strengths).all():
        raise ValueError("its couplings are not finite")
    return strengths
