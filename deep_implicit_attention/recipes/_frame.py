"""What all recipes that train have in common, from the seed to the last line of metrics."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from .. import training
from ..training import Devices, Plan, Progress, Run
from ..training._progress import Columns
from ._flags import TrainingFlags
from ._saved import column, finished, start

_SAID = {
    "interrupted": "interrupted: testing the best weights so far",
    "early": "no better {unit} for a while: the training ends early",
    "diverged": "the training diverges and is ended: testing the best weights so far",
}


@dataclass(frozen=True)
class Work:
    """What a recipe does.

    Attributes:
        plan: of the training.
        title: said at the start.
        train: trains to the end, or goes on, and says how it ended, as `Trainer.train` does.
        test: from the run and the metrics of its training: measures the best weights, draws, and
            returns the result.
        score: the score in a result, for a sentence.
        report: what is said about a result.
        columns: of the table.
        unit: what lies between two of its lines.
    """

    plan: Plan
    title: str
    train: Callable[[Run, Progress, Devices, bool], str]
    test: Callable[[Run, list[dict[str, Any]]], dict[str, Any]]
    score: Callable[[dict[str, Any]], str]
    report: Callable[[dict[str, Any]], list[str]]
    columns: Columns = Progress.COLUMNS
    unit: str = "epoch"


Recipe = TypeVar("Recipe", bound=TrainingFlags)


def run_recipe(recipe: Recipe, prepare: Callable[[Recipe], Work]) -> dict[str, Any]:
    """Train, test the best weights once, draw; returns the last line of metrics.

    Ctrl-C ends the training early; what was learned so far is tested and drawn all the same, and
    the run can be resumed. Under `accelerate launch` all processes train, and the first one tests.
    """
    recipe.check()
    if not recipe.resume:  # one that was started by an earlier version goes on as it is
        recipe.check_idle()
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    training.seed_everything(recipe.seed)
    # Whatever is wrong with the settings comes to light before an earlier run is overwritten.
    work = prepare(recipe)
    run = Run(recipe.run_dir)
    devices = Devices(work.plan, run.folder)
    devices.rows(recipe.batch_size, recipe.accumulate)
    with contextlib.ExitStack() as stack:
        if devices.is_main:
            stack.enter_context(run.alone())
        resume = start(run, recipe, devices)
        progress = Progress(quiet=not devices.is_main, columns=work.columns, unit=work.unit)
        stack.enter_context(progress)
        if resume and (result := finished(run)):
            progress.say(
                f"the run in {run.folder}/ is finished, with {work.score(result)}; without "
                "--resume it starts anew"
            )
            return result
        progress.say(work.title)
        ending = "interrupted"
        # Ctrl-C leaves the loop and nothing else.
        with contextlib.suppress(KeyboardInterrupt):
            ending = work.train(run, progress, devices, resume)
        if not devices.is_main:
            return {"interrupted": ending == "interrupted"}
        return _conclude(work, run, progress, ending)


def _conclude(work: Work, run: Run, progress: Progress, ending: str) -> dict[str, Any]:
    """Test the best weights, draw, and log the last line of metrics."""
    if run.saved_epoch() is None:
        if ending != "interrupted":
            told = "no evaluation had a finite loss, so there are no weights to test; metrics and "
            told += f"checkpoints are in {run.folder}"
        elif run.checkpoints.steps():
            told = f"no {work.unit} was finished; {run.folder} holds a checkpoint, from which "
            told += "--resume goes on"
        else:
            told = f"no {work.unit} was finished; {run.folder} holds the configuration only"
        progress.say(told)
        raise SystemExit(130 if ending == "interrupted" else 1)
    if ending in _SAID:
        progress.say(_SAID[ending].format(unit=work.unit))
    history = run.metrics()
    result = {
        **work.test(run, history),
        "training_seconds": round(sum(column(history, "seconds")), 1),
        "ending": ending,
        "interrupted": ending == "interrupted",
    }
    # Last, because a run with this line is finished.
    run.log(**result)
    for line in work.report(result):
        progress.say(line)
    progress.say(f"metrics, checkpoint and pictures are in {run.folder}/")
    return result
