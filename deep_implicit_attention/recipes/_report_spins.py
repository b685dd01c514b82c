"""What the report says of runs that train no network: of `dia ising` and `dia boltzmann`."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from .. import plots
from ..plots._page import Section, folded, image, paragraph
from ._boltzmann import COMPLETIONS, KNOWN, PARAMETERS, SAMPLES
from ._compare import ANSWERS, FIGURE
from ._report_page import Drawn, Story, alone, records_table

_MOST_SPINS = 40  # as circles in a graph

_NO_NETWORK = (
    "No network is trained, so there are no learning curves and no relaxation to move through."
)


def headline(story: Story) -> str:
    """What kind of run this is, and what it cannot show."""
    if story.config["recipe"] == "ising":
        return f"Methods of inference on one system of spins. {_NO_NETWORK}"
    scores = ("l2", "validation_error", "test_error")
    machines = [r for r in story.records if all(r.get(name) is not None for name in scores)]
    best = ""
    if story.records and not machines:
        story.missing.append(
            f"No line of the metrics has all of {', '.join(scores)}, so no machine is named best."
        )
    if machines:
        one = min(machines, key=lambda record: record["validation_error"])
        best = (
            f" The best on the validation images, {one['method']}, gets {one['test_error']:.1%} of "
            "the pixels of unseen lower halves wrong."
        )
    return f"Boltzmann machines that learned binarised digits.{best} {_NO_NETWORK}"


def ising_sections(story: Story) -> list[Section]:
    """The methods at the β of the table, the figure of the run, couplings."""
    results, drawn = Section("Results"), Section("Pictures")
    records, beta = story.records, story.config.get("beta")
    at_beta = [_by_method(record) for record in records if record.get("beta") == beta]
    if beta is not None and at_beta:
        results.add(paragraph(f"At β = {beta}:"), records_table(at_beta))
    elif records:
        which = "The settings hold no beta" if beta is None else f"No answer is at beta = {beta}"
        story.missing.append(f"{which}, so there is no table of the answers at it alone.")
    if records:
        every = records_table([_by_method(record) for record in records])
        results.add(folded(f"All {len(records)} answers", every))
    _add_image(story, drawn, FIGURE, "Answers against the exact ones, and errors against β")
    couplings = story.section(
        "Couplings", "The couplings cannot be drawn", lambda part: _add_graph(story, part)
    )
    return [results, drawn, couplings]


def _by_method(record: dict[str, Any]) -> dict[str, Any]:
    """The method first, which names the row."""
    return {"method": record.get("method"), **record}


def _add_graph(story: Story, section: Section) -> None:
    strengths = _array(story, ANSWERS, "couplings")
    if strengths is None:
        return
    if strengths.ndim != 2 or strengths.shape[0] != strengths.shape[1]:
        raise ValueError(f"those in {ANSWERS} must have shape (N, N), got {strengths.shape}")
    if not 2 <= len(strengths) <= _MOST_SPINS:
        section.add(paragraph(f"{len(strengths)} spins: the graph of 2 to {_MOST_SPINS} is drawn."))
        return
    names = [str(i) for i in range(len(strengths))]
    figure = plots.coupling_graph(np.abs(strengths), _circle(len(strengths)), names)
    section.add(alone(figure, "Sizes |J_ij| of the couplings between the spins"))


def boltzmann_sections(story: Story) -> list[Section]:
    """The methods, what they completed and drew, and the parameters of the best machine."""
    results, drawn = Section("Results"), Section("Pictures")
    if story.records:
        results.add(records_table([_by_method(record) for record in story.records]))
    _add_image(story, drawn, COMPLETIONS, "Lower halves of held-out digits, by each method")
    if story.config.get("samples") != 0:
        _add_image(story, drawn, SAMPLES, "Digits drawn from the best machine")
    couplings = story.section(
        "Couplings", "The couplings cannot be drawn", lambda part: _add_machine(story, part)
    )
    return [results, drawn, couplings]


def _add_machine(story: Story, section: Section) -> None:
    couplings, fields = (_array(story, PARAMETERS, name) for name in ("couplings", "fields"))
    shown = None
    if fields is not None:
        shown = story.attempt("The fields cannot be drawn", lambda: _field_map(fields))
    over = "" if shown is None else ", over the fields, dark to bright"

    def graph() -> Drawn | None:
        if couplings is None:
            return None
        figure = _coupling_graph(couplings, fields, shown)
        return figure, f"Sizes |J_ij| of the couplings between pixels{over}"

    def fields_map() -> Drawn | None:
        if shown is None:
            return None
        label = "field on a pixel (dimensionless)"
        figure = plots.magnetization_maps([shown], ["fields"], label=label)
        return figure, "Blue: rather black. Red: rather white"

    story.add_pictures(
        section,
        ("The fields cannot be drawn", fields_map),
        ("The couplings cannot be drawn", graph),
    )
    if section.parts:
        section.parts.insert(0, paragraph("Of the best machine on the validation images:"))


def _field_map(fields: np.ndarray) -> np.ndarray:
    """The fields of the pixels, as an image. Hidden units come last and have no place in it."""
    pixels = len(KNOWN)
    if fields.ndim != 1 or len(fields) < pixels:
        raise ValueError(
            f"those in {PARAMETERS} must have shape (N,) of at least {pixels} units, got "
            f"{fields.shape}"
        )
    if not np.isfinite(fields).all():
        raise ValueError(f"those in {PARAMETERS} must be finite, got {fields.min()}")
    return fields[:pixels].reshape(round(pixels**0.5), -1)


def _coupling_graph(
    couplings: np.ndarray, fields: np.ndarray | None, ground: np.ndarray | None
) -> Figure:
    """The couplings between the pixels over their fields `ground`, or else over nothing."""
    pixels = len(KNOWN)
    count = fields.size if fields is not None else max(couplings.shape, default=0)
    if count < pixels or couplings.shape != (count, count):
        many = "" if fields is None else f"for {count} fields, "
        raise ValueError(
            f"those in {PARAMETERS} must have shape (N, N), {many}of at least {pixels} units, got "
            f"{couplings.shape}"
        )
    side = round(pixels**0.5)
    places = np.indices((side, side)).reshape(2, -1).T[:, ::-1]
    image = np.ones((side, side))
    if ground is not None:
        low, high = ground.min(), ground.max()
        image = (ground - low) / ((high - low) or 1.0)
    return plots.couplings_over_image(np.abs(couplings[:pixels, :pixels]), image, places)


def _add_image(story: Story, section: Section, name: str, description: str) -> None:
    path = story.run.folder / name
    if not path.exists():
        story.missing.append(f"There is no {name}: the run is still being written, or was killed.")
        return
    content = story.attempt(f"{name} is damaged", lambda: _picture(path))
    if content is not None:
        section.add(image(content, "png", description))


def _picture(path: Path) -> bytes:
    """The bytes of a PNG file that a browser will show."""
    content = path.read_bytes()
    if not content:
        raise ValueError("it is empty")
    with Image.open(io.BytesIO(content), formats=["PNG"]) as opened:
        opened.load()
    return content


def _array(story: Story, name: str, key: str) -> np.ndarray | None:
    return story.attempt(f"{key} are missing", lambda: _read(story.run.folder / name, key))


def _read(path: Path, key: str) -> np.ndarray:
    if not path.exists():
        raise FileNotFoundError(f"there is no {path.name}")
    try:
        with np.load(path) as arrays:
            found: Any = arrays[key]
    except (zipfile.BadZipFile, EOFError, OSError, ValueError) as error:
        raise ValueError(f"{path.name} is damaged: {error}") from error
    return found


def _circle(count: int) -> np.ndarray:
    angles = 2 * np.pi * np.arange(count) / count
    return np.stack([np.sin(angles), -np.cos(angles)], axis=1)
