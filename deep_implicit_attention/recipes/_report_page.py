"""What the report of a run holds, whatever the recipe: results, settings, what is missing."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from matplotlib.figure import Figure
from torch import Tensor

from .. import __version__, plots
from ..plots._page import Section, beside, folded, notice, page, paragraph, picture, table
from ..solvers import Solution
from ..training import Run
from ..training._files import check_writable, write_whole
from ..training._run import CONFIG, METRICS
from ._boltzmann import Boltzmann
from ._image_recipe import ImageRecipe
from ._images import until_solved
from ._ising import Ising
from ._saved import RECIPES, found
from ._settings import checked, usable
from ._shakespeare import Shakespeare

REPORT = "report.html"
# Runs of commands of their own, which train no network.
_OTHERS: dict[str, type[Any]] = {"ising": Ising, "boltzmann": Boltzmann}
# Not what is raised of a damaged run: Python's and PyTorch's own words, which do not say what they
# are about.
_UNEXPECTED = (
    LookupError, AttributeError, TypeError, AssertionError, NameError, RuntimeError,
)  # fmt: skip
_LOG = logging.getLogger(__name__)
T = TypeVar("T")
Drawn = tuple[Figure, str]  # and what it shows
Make = Callable[[], Drawn | None]


@dataclass
class Story:
    """What is known of a run, and what could not be had.

    Attributes:
        run: its folder.
        config: its settings.
        records: the lines of its metrics that could be read.
        missing: sentences, shown at the top.
        data: what the moving part shows, or None.
        owns_files: whether pictures may be written into the folder of the run.
        tell: called with the title of a section that is begun.
    """

    run: Run
    config: dict[str, Any]
    records: list[dict[str, Any]] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    data: dict[str, Any] | None = None
    owns_files: bool = True
    tell: Callable[[str], Any] | None = None

    @property
    def command(self) -> str | None:
        """The command of its own that made the run, or None."""
        name = self.config.get("recipe")
        return name if isinstance(name, str) and name in _OTHERS else None

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
        """The answer of `function`; where it fails, None, and a sentence.

        Whatever fails: a part that cannot be made from a damaged or a strange run, in any of the
        ways in which a model, a solver or a figure may fail, must not cost the others. Errors
        that a fault of this program may raise are named by their type, and the trace of each is
        logged at level DEBUG.
        """
        try:
            return function()
        except Exception as error:
            _LOG.debug("%s", what, exc_info=True)
            reason = str(error)
            if isinstance(error, _UNEXPECTED) or not reason:
                reason = f"{type(error).__name__}: {reason}".removesuffix(": ")
            if isinstance(error, OSError) and error.strerror and error.filename:
                reason = f"{error.filename}: {error.strerror}"
            self.missing.append(f"{what}: {reason}")
            return None

    def section(self, title: str, what: str, build: Callable[[Section], Any]) -> Section:
        """A section that `build` adds to; where it fails, what it added so far, and a sentence."""
        section = Section(title)
        if self.tell:
            self.tell(title)
        self.attempt(what, lambda: build(section))
        return section

    def add_pictures(self, section: Section, *drawn: tuple[str, Make]) -> None:
        """Add figures side by side. Each has a function of its own that makes it and describes it;
        for one that fails there is a sentence, which begins as is said beside it."""

        def made(make: Make) -> str | None:
            found = make()
            return None if found is None else picture(*found)

        shown = [self.attempt(what, lambda make=make: made(make)) for what, make in drawn]
        if any(shown):
            section.add(beside(*filter(None, shown)))


def write_report(
    folder: Path, out: Path | None = None, tell: Callable[[str], Any] | None = None
) -> Path:
    """See `report_run`."""
    path = folder / REPORT if out is None else out
    if out is not None and (out.is_dir() or not out.parent.is_dir()):
        why = "that is a folder" if out.is_dir() else f"there is no folder {out.parent}"
        raise ValueError(f"out must be a file in a folder that exists, got {out}: {why}")
    inside = folder.resolve() in path.resolve().parents
    if inside and path.suffix != ".html" and path.exists():
        raise ValueError(f"out must not replace a file of the run, got {path}")
    run = Run(folder)
    story = Story(run, {}, owns_files=out is None, tell=tell)
    _read_config(story)
    check_writable(path)
    story.records = story.attempt("The metrics cannot be read", lambda: _readable(story)) or []
    sections = _sections(story)
    name = f"{story.config.get('recipe', 'run')}: {folder.resolve().name}"
    headline = story.attempt("The result cannot be summed up", lambda: _headline(story))
    lead = [headline or "", *(notice(sentence) for sentence in story.missing)]
    html = page(f"{name} – report", lead, sections, story.data)
    write_whole(path, html.encode())
    return path


def _read_config(story: Story) -> None:
    if not story.run.is_started():
        story.run.config()  # which says that there is no run
    config = story.attempt(
        "The settings are lost, and with them the model", lambda: story.run.config()
    )
    if config is not None:
        story.config = config


def _sections(story: Story) -> list[Section]:
    name = story.command
    if name is not None:
        from ._report_spins import boltzmann_sections, ising_sections

        usable(story.config, _OTHERS[name], story.missing)
        known = {"ising": ising_sections, "boltzmann": boltzmann_sections}
        own = known[name](story)
        return [*own, _configuration(story), _making(story)]
    from ._report_curves import training_section

    recipe = _recipe(story)
    own: list[Section] = []
    if isinstance(recipe, ImageRecipe):
        from ._report_images import image_sections

        own = image_sections(story, recipe)
    elif isinstance(recipe, Shakespeare):
        from ._report_text import text_sections

        own = text_sections(story, recipe)
    else:
        own = [training_section(story)]
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
    if not records and not broken:
        story.missing.append(f"There are no metrics yet: {METRICS} is empty.")
    if broken:
        story.missing.append(
            f"{broken} line(s) of {METRICS} cannot be read: still being written, or damaged."
        )
    return records


def _recipe(story: Story) -> Any:
    """The recipe with the run's settings, or None; says which settings are not this version's."""
    if not story.config:
        return None
    name = story.config.get("recipe")
    kind = RECIPES.get(name) if isinstance(name, str) else None
    if kind is None:
        what = f"The recipe {name!r} is unknown to this version ({__version__})"
        if name is None:
            what = f"{CONFIG} names no recipe"
        story.missing.append(f"{what}, so there is no model to look into.")
        return None
    recipe = story.attempt(
        "The settings cannot be used",
        lambda: kind(**found(usable(story.config, kind, story.missing), story.run)),
    )
    if recipe is not None:
        story.attempt("Settings are out of range", lambda: checked(recipe))
        if recipe.threads > 0:
            torch.set_num_threads(recipe.threads)
    if story.result is None:
        story.missing.append(
            "The training has not ended: it is still running or was killed. What is shown is of "
            "the evaluations so far, and nothing was measured on the test data."
        )
    elif story.result.get("interrupted"):
        story.missing.append("The training was interrupted; its best weights so far were tested.")
    return recipe


def _headline(story: Story) -> str:
    if story.command:
        from ._report_spins import headline

        return paragraph(headline(story))
    result = story.result or {}
    if "test_accuracy" in result:
        return paragraph(
            f"Test accuracy {said(result['test_accuracy'], '.2%')}, loss "
            f"{said(result['test_loss'], '.4f')} nats; "
            f"{result['parameters']:,} effective parameters, weights of epoch "
            f"{result['best_epoch']}, {result['training_seconds']:.0f} s of training."
        )
    if "best_step" in result:
        return paragraph(
            f"Validation loss {said(result['validation_loss'], '.4f')} nats per character over all "
            "windows; "
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
    anew = "" if story.command else (
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


def add_convergence(
    story: Story,
    section: Section,
    solutions: Sequence[Solution],
    radii: Callable[[], Tensor],
    tol: float,
    what: str,
    horizon: Make,
) -> None:
    """How the solves of some samples, `what` they are, went in every block; the spectral radii
    `(blocks, samples)` at their ends, and another figure."""
    found = story.attempt("The spectral radius cannot be computed", radii)
    figures: list[tuple[str, Make]] = []
    for number, solution in enumerate(solutions):
        many, count = len(solutions) > 1, len(solution.residual)
        name = f"block {number + 1}: " if many else ""
        radius = ""
        if found is not None:
            radius = (
                "; spectral radius of the update at the solver's answers "
                f"{said(found[number].mean(), '.2f')} (largest {said(found[number].max(), '.2f')})"
            )
        section.add(
            paragraph(
                f"{name}{int(solution.converged.sum())} of {count} {what} reach the tolerance "
                f"{tol:g}, in {solution.steps.double().mean():.1f} steps on average; worst "
                f"residual {said(solution.residual.max(), '.1e')}{radius}."
            )
        )
        described = f"Residuals of {count} solves" + (f", block {number + 1}" if many else "")

        def residuals(solution: Solution = solution, described: str = described) -> Drawn:
            return plots.convergence(until_solved(solution), tol), described

        figures.append((f"{name}residuals cannot be drawn", residuals))
    figures.append(("The error as an explicit network cannot be drawn", horizon))
    story.add_pictures(section, *figures)


def said(number: Tensor | float | None, form: str) -> str:
    """A number in a sentence; null in the metrics is one that was not finite."""
    if number is None or not math.isfinite(number):
        return "not finite"
    return format(float(number), form)


def alone(figure: Figure, description: str) -> str:
    """One figure, as wide as it would be beside others."""
    return beside(picture(figure, description))
