"""What the recipes `digits` and `mnist` do: train, test the best epoch once, draw."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import torch

from .. import training
from ..models import SiteClassifier
from ..solvers import Solution
from ..training import ImageData, Measured, Progress, Run
from ._image_recipe import ImageRecipe, measured_on_test
from ._saved import finished, start

_SAID = {
    "interrupted": "interrupted: testing the best epoch so far",
    "early": "no better epoch for a while: the training ends early",
    "diverged": "the training diverges and is ended: testing the best epoch so far",
}


def run_images(recipe: ImageRecipe) -> dict[str, Any]:
    """Train, test the best epoch once, draw the pictures; returns the last line of metrics.

    Ctrl-C ends the training early; what was learned so far is tested and drawn all the same, and
    the run can be resumed. Under `accelerate launch` all processes train, and the first one tests.
    """
    recipe.check()
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    training.seed_everything(recipe.seed)
    # Whatever is wrong with the settings comes to light before an earlier run is overwritten.
    schedule = recipe.schedule()
    data = recipe.load()
    options = {"seed": recipe.seed, **recipe.plan_options()}
    plan = schedule.plan(len(data.train), **options)
    model = recipe.model(data)
    run = Run(recipe.run_dir)
    devices = training.Devices(plan, run.folder)
    devices.rows(recipe.batch_size, recipe.accumulate)
    resume = start(run, recipe, devices)
    with training.Progress(quiet=not devices.is_main) as progress:
        if resume and (result := finished(run)):
            progress.say(
                f"the run in {run.folder}/ is finished, with test accuracy "
                f"{result['test_accuracy']:.2%}; without --resume it starts anew"
            )
            return result
        progress.say(
            f"{len(data.train)} training, {len(data.validation)} validation and "
            f"{len(data.test)} test images; {model.count_params()} effective parameters; "
            f"{model.grid**2 + 1} sites of {model.dim} components"
        )
        ending = "interrupted"
        # Ctrl-C leaves the loop and nothing else.
        with contextlib.suppress(KeyboardInterrupt):
            ending = training.train_classifier(
                model, data, schedule, run, progress, resume=resume, devices=devices, **options
            )
        if not devices.is_main:
            return {"interrupted": ending == "interrupted"}
        return _conclude(recipe, run, data, progress, ending)


def _conclude(
    recipe: ImageRecipe, run: Run, data: ImageData, progress: Progress, ending: str
) -> dict[str, Any]:
    """Test the best epoch, draw, and log the last line of metrics."""
    history = run.metrics()
    epoch = run.saved_epoch()
    if epoch is None:
        progress.say(f"no epoch was finished; {run.folder} holds the configuration only")
        raise SystemExit(130 if ending == "interrupted" else 1)
    if ending in _SAID:
        progress.say(_SAID[ending])
    model = recipe.model(data)
    run.load_weights(model)
    test = training.measure(model, data.test)
    best = next(record for record in history if record["epoch"] == epoch)
    result = {
        "best_epoch": epoch,
        "validation_accuracy": best["validation_accuracy"],
        **measured_on_test(test),
        "parameters": model.count_params(),
        "training_seconds": round(sum(record["seconds"] for record in history), 1),
        "ending": ending,
        "interrupted": ending == "interrupted",
    }
    _draw(run, model, data, history, test, recipe.tol)
    # Last, because a run with this line is finished.
    run.log(**result)
    right = round(test.accuracy * len(data.test))
    progress.say(
        f"test accuracy {test.accuracy:.2%} ({right} of {len(data.test)}), weights of epoch "
        f"{epoch}, {result['training_seconds']:.0f} s of training; mean solver steps "
        f"{test.steps:.1f}, worst residual {test.residual:.1e}"
    )
    if test.residual > recipe.tol:
        progress.say(
            f"not every test image reached equilibrium (tolerance {recipe.tol:g}): raise "
            "--max-iter, or lower --coupling-rate"
        )
    progress.say(f"metrics, checkpoint and pictures are in {run.folder}/")
    return result


def _draw(
    run: Run,
    model: SiteClassifier,
    data: ImageData,
    history: list[dict[str, Any]],
    test: Measured,
    tol: float,
) -> None:
    from .. import plots  # matplotlib takes a second to import

    def column(name: str) -> list[float]:
        return [record[name] for record in history]

    names = [str(digit) for digit in range(10)]
    counts = np.zeros((10, 10), dtype=int)
    np.add.at(counts, (data.test.labels.numpy(), test.predictions.numpy()), 1)
    with torch.no_grad():
        _, solution = model(data.test.images[:200], return_solution=True)
    figures = {
        "learning_curves": plots.learning_curves(
            [record["epoch"] for record in history],
            column("train_loss"),
            column("validation_loss"),
            column("train_accuracy"),
            column("validation_accuracy"),
        ),
        "confusion_matrix": plots.confusion_matrix(
            counts, names, f"test images, accuracy {test.accuracy:.2%}"
        ),
        "convergence": plots.convergence(
            _until_solved(solution), tol, "equilibria of 200 test images"
        ),
        "couplings": plots.coupling_graph(
            model.couplings().numpy(), *_sites(model.grid), "learned couplings"
        ),
    }
    for name, figure in figures.items():
        figure.savefig(run.folder / f"{name}.png", dpi=130)


def _until_solved(solution: Solution) -> np.ndarray:
    """The residuals of every sample up to its last step, and nothing after."""
    trace = solution.trace.clone()
    rows = torch.arange(len(trace))[:, None]
    return trace.masked_fill(rows >= solution.steps, torch.nan).numpy()


def _sites(grid: int) -> tuple[np.ndarray, list[str]]:
    """Places and names of the sites: the class token to the left of the grid of patches."""
    rows, columns = np.divmod(np.arange(grid**2), grid)
    patches = np.stack([columns, rows], axis=1)
    places = np.concatenate([[[-1.5, (grid - 1) / 2]], patches])
    return places, ["class", *(f"{r},{c}" for r, c in zip(rows, columns, strict=True))]
