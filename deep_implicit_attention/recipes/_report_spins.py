"""What the report says of runs that train no network: of `dia ising` and `dia boltzmann`."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from .. import plots
from ..plots._page import Section, folded, image, paragraph
from ._boltzmann import COMPLETIONS, KNOWN, PARAMETERS, SAMPLES
from ._compare import ANSWERS, FIGURE
from ._report_page import Story, pictures, records_table

_MOST_SPINS = 40  # as circles in a graph

_NO_NETWORK = (
    "No network is trained, so there are no learning curves and no relaxation to move through."
)


def headline(story: Story) -> str:
    """What kind of run this is, and what it cannot show."""
    if story.config["recipe"] == "ising":
        return f"Methods of inference on one system of spins. {_NO_NETWORK}"
    machines = [r for r in story.records if r.get("l2") is not None]
    best = ""
    if machines:
        one = min(machines, key=lambda record: record["validation_error"])
        best = (
            f" The best on the validation images, {one['method']}, gets {one['test_error']:.1%} of "
            "the pixels of unseen lower halves wrong."
        )
    return f"Boltzmann machines that learned binarised digits.{best} {_NO_NETWORK}"


def ising_sections(story: Story) -> list[Section]:
    """The methods at the β of the table, the figure of the run, couplings."""
    results, drawn, couplings = Section("Results"), Section("Pictures"), Section("Couplings")
    records, beta = story.records, story.config.get("beta")
    at_beta = [record for record in records if record.get("beta") == beta]
    if at_beta:
        results.add(paragraph(f"At β = {beta}:"), records_table(at_beta))
    if records:
        results.add(folded(f"All {len(records)} answers", records_table(records)))
    _add_image(story, drawn, FIGURE, "Answers against the exact ones, and errors against β")
    strengths = _array(story, ANSWERS, "couplings")
    if strengths is not None and 2 <= len(strengths) <= _MOST_SPINS:
        names = [str(i) for i in range(len(strengths))]
        figure = plots.coupling_graph(np.abs(strengths), _circle(len(strengths)), names)
        couplings.add(pictures((figure, "Sizes |J_ij| of the couplings between the spins")))
    elif strengths is not None and len(strengths) > _MOST_SPINS:
        couplings.add(
            paragraph(f"{len(strengths)} spins: the graph of 2 to {_MOST_SPINS} is drawn.")
        )
    return [results, drawn, couplings]


def boltzmann_sections(story: Story) -> list[Section]:
    """The methods, what they completed and drew, and the parameters of the best machine."""
    results, drawn, couplings = Section("Results"), Section("Pictures"), Section("Couplings")
    if story.records:
        results.add(records_table(story.records))
    _add_image(story, drawn, COMPLETIONS, "Lower halves of held-out digits, by each method")
    if story.config.get("samples") != 0:
        _add_image(story, drawn, SAMPLES, "Digits drawn from the best machine")
    strengths, fields = (_array(story, PARAMETERS, name) for name in ("couplings", "fields"))
    if strengths is None or fields is None:
        return [results, drawn, couplings]
    side = round(len(KNOWN) ** 0.5)
    # Hidden units, which come last, have no place in the image.
    strengths, fields = np.abs(strengths[: side**2, : side**2]), fields[: side**2]
    field_map = fields.reshape(side, side)
    low, high = field_map.min(), field_map.max()
    places = np.indices((side, side)).reshape(2, -1).T[:, ::-1]
    couplings.add(
        paragraph(
            "The best machine on the validation images: the fields of the pixels, and the "
            "couplings between them over the fields, dark to bright."
        ),
        pictures(
            (plots.magnetization_maps(
                [field_map], ["fields"], label="field on a pixel (dimensionless)"),
             "Blue: rather black. Red: rather white"),
            (plots.couplings_over_image(
                strengths, (field_map - low) / ((high - low) or 1.0), places),
             "Sizes |J_ij| of the couplings between pixels"),
        ),
    )  # fmt: skip
    return [results, drawn, couplings]


def _add_image(story: Story, section: Section, name: str, description: str) -> None:
    path = story.run.folder / name
    if path.exists():
        section.add(image(path.read_bytes(), "png", description))
    else:
        story.missing.append(f"There is no {name}: the run is still being written, or was killed.")


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
