"""What the report of a run holds, whatever the recipe: results, settings, what is missing."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

from .. import __version__
from ..plots._page import Section, beside, folded, notice, page, paragraph, picture, table
from ..training import Run
from ..training._files import write_whole
from ..training._run import CONFIG, METRICS
from ._image_recipe import ImageRecipe
from ._saved import RECIPES, load_recipe
from ._shakespeare import Shakespeare

REPORT = "report.html"
CURVES = "The metrics cannot be drawn"  # and why
# Runs of commands of their own, which train no network.
_OTHERS = ("ising", "boltzmann")
T = TypeVar("T")


@dataclass
class Story:
    """What is known of a run, and what could not be had.

    Attributes:
        run: its folder.
        config: its settings.
        records: the lines of its metrics that could be read.
        missing: sentences, shown at the top.
        data: what the moving part shows, or None.
    """

    run: Run
    config: dict[str, Any]
    records: list[dict[str, Any]] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    data: dict[str, Any] | None = None

    @property
    def result(self) -> dict[str, Any] | None:
        """The line of a training that has ended, or None."""
        last = self.records[-1] if self.records else {}
        return last if "ending" in last else None

    @property
    def history(self) -> list[dict[str, Any]]:
        """The lines of evaluations."""
        return [record for record in self.records if "step" in record and "ending" not in record]

    def attempt(self, what: str, function: Callable[[], T]) -> T | None:
        """The answer of `function`; where it fails as bad files do, None, and a sentence."""
        try:
            return function()
        except (OSError, ValueError, TypeError, KeyError) as error:
            self.missing.append(f"{what}: {str(error) or type(error).__name__}")
            return None


def write_report(folder: Path, out: Path | None = None) -> Path:
    """See `report_run`."""
    run = Run(folder)
    config = run.config()
    if not isinstance(config, dict):
        raise ValueError(f"{folder / CONFIG} must hold an object, got {type(config).__name__}")
    story = Story(run, config)
    story.records = _readable(story)
    sections = _sections(story)
    name = f"{story.config.get('recipe', 'run')}: {folder.resolve().name}"
    headline = story.attempt("The result cannot be summed up", lambda: _headline(story))
    lead = [headline or "", *(notice(sentence) for sentence in story.missing)]
    path = folder / REPORT if out is None else out
    html = page(f"{name} – report", lead, sections, story.data)
    write_whole(path, html.encode())
    return path


def _sections(story: Story) -> list[Section]:
    if story.config.get("recipe") in _OTHERS:
        from ._report_spins import boltzmann_sections, ising_sections

        known = {"ising": ising_sections, "boltzmann": boltzmann_sections}
        own = known[story.config["recipe"]](story)
        return [*own, _configuration(story), _making(story)]
    recipe = _recipe(story)
    if recipe is not None and recipe.threads:
        torch.set_num_threads(recipe.threads)
    own: list[Section] = []
    if isinstance(recipe, ImageRecipe):
        from ._report_images import image_sections

        own = image_sections(story, recipe)
    elif isinstance(recipe, Shakespeare):
        from ._report_text import text_sections

        own = text_sections(story, recipe)
    return [_results(story), *own, _configuration(story), _making(story)]


def _readable(story: Story) -> list[dict[str, Any]]:
    """The lines of metrics that are whole; a run that is being written may end in half a line."""
    path = story.run.folder / METRICS
    if not path.exists():
        story.missing.append(f"There are no metrics yet ({METRICS}).")
        return []
    records, broken = [], 0
    for line in path.read_text(errors="replace").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            broken += 1
            continue
        if isinstance(record, dict):
            records.append(record)
        else:
            broken += 1
    if broken:
        story.missing.append(
            f"{broken} line(s) of {METRICS} cannot be read: still being written, or damaged."
        )
    return records


def _recipe(story: Story) -> Any:
    """The recipe with the run's settings, or None; says which settings are not this version's."""
    name = story.config.get("recipe")
    kind = RECIPES.get(str(name))
    if kind is None:
        story.missing.append(
            f"The recipe {name!r} is unknown to this version ({__version__}), so there is no "
            "model to look into."
        )
        return None
    known = {entry.name for entry in dataclasses.fields(kind)}
    strange = sorted(story.config.keys() - known - {"recipe"})
    lacking = sorted(known - story.config.keys())
    for settings, fate in ((strange, "left out"), (lacking, "taken at this version's defaults")):
        if settings:
            story.missing.append(
                f"The run is of another version: the settings {', '.join(settings)} are "
                f"{'not known here' if settings is strange else 'not in it'} and {fate}."
            )
    recipe = story.attempt("The settings cannot be used", lambda: load_recipe(story.run))
    if story.result is None:
        story.missing.append(
            "The training has not ended: it is still running or was killed. What is shown is of "
            "the evaluations so far, and nothing was measured on the test data."
        )
    elif story.result.get("interrupted"):
        story.missing.append("The training was interrupted; its best weights so far were tested.")
    return recipe


def _headline(story: Story) -> str:
    if story.config.get("recipe") in _OTHERS:
        from ._report_spins import headline

        return paragraph(headline(story))
    result = story.result or {}
    if "test_accuracy" in result:
        return paragraph(
            f"Test accuracy {result['test_accuracy']:.2%}, loss {result['test_loss']:.4f} nats; "
            f"{result['parameters']:,} effective parameters, weights of epoch "
            f"{result['best_epoch']}, {result['training_seconds']:.0f} s of training."
        )
    if "best_step" in result:
        return paragraph(
            f"Validation loss {result['validation_loss']:.4f} nats per character over all windows; "
            f"{result['parameters']:,} parameters, weights of step {result['best_step']}, "
            f"{result['training_seconds']:.0f} s of training."
        )
    if story.history:
        return paragraph(f"{len(story.history)} evaluations so far.")
    return paragraph(f"{len(story.records)} lines of metrics.")


def _results(story: Story) -> Section:
    section = Section("Results")
    if story.result is not None:
        section.add(table(list(story.result.items()), ("metric", "value"), key="metric"))
    elif story.history:
        last = story.history[-1]
        section.add(
            table(list(last.items()), ("metric", "value"), "the last evaluation", key="metric")
        )
    elif story.records:
        section.add(records_table(story.records))
    if story.history:
        section.add(folded(f"All {len(story.history)} evaluations", records_table(story.history)))
    return section


def records_table(records: list[dict[str, Any]]) -> str:
    """Lines of metrics as rows, every name that occurs as a column."""
    names = list(dict.fromkeys(name for record in records for name in record))
    rows = [[record.get(name) for name in names] for record in records]
    return table(rows, names)


def _configuration(story: Story) -> Section:
    section = Section("Configuration")
    section.add(table(list(story.config.items()), ("setting", "value"), key="setting"))
    return section


def _making(story: Story) -> Section:
    section = Section("How this was made")
    anew = "" if story.config.get("recipe") in _OTHERS else (
        "; everything else was computed anew from the best weights"
    )  # fmt: skip
    section.add(
        paragraph(
            f"By dia report, deep-implicit-attention {__version__}, PyTorch {torch.__version__}, "
            "from the files in the run's folder. Results and evaluations are those of "
            f"{METRICS}{anew}."
        )
    )
    return section


def pictures(*drawn: tuple[Any, str]) -> str:
    """Figures and their descriptions, side by side."""
    return beside(*(picture(figure, description) for figure, description in drawn))
