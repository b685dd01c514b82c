"""What the recipes that learn from images do: train, test the best epoch once, draw."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from .. import training
from ..models import ImageClassifier
from ..solvers import Solution
from ..training import Devices, ImageData, Measured, Progress, Run
from ..training._run import METRICS
from ._frame import Work, run_recipe
from ._image_recipe import ImageRecipe, measured_on_test
from ._made import save_figure
from ._saved import column


def run_images(recipe: ImageRecipe) -> dict[str, Any]:
    """Train, test the best epoch once, draw the pictures; see `run_recipe`."""
    return run_recipe(recipe, _work)


def _work(recipe: ImageRecipe) -> Work:
    schedule = recipe.schedule()
    data = recipe.load()
    options = {"seed": recipe.seed, **recipe.plan_options()}
    plan = schedule.plan(len(data.train), **options)
    model = recipe.model(data)

    def train(run: Run, progress: Progress, devices: Devices, resume: bool) -> str:
        return training.train_classifier(
            model, data, schedule, run, progress, resume=resume, devices=devices, **options
        )

    return Work(
        plan=plan,
        title=(
            f"{len(data.train)} training, {len(data.validation)} validation and "
            f"{len(data.test)} test images; {model.count_params()} effective parameters; "
            f"{len(sites_of(model)[1])} sites of {model.dim} components"
        ),
        train=train,
        test=lambda run, history: _test(recipe, run, data, history),
        score=lambda result: f"test accuracy {result['test_accuracy']:.2%}",
        report=lambda result: _report(recipe, result, len(data.test)),
    )


def _test(
    recipe: ImageRecipe, run: Run, data: ImageData, history: list[dict[str, Any]]
) -> dict[str, Any]:
    epoch = run.saved_epoch()
    model = recipe.model(data)
    run.load_weights(model)
    test = training.measure(model, data.test)
    accuracies = dict(
        zip(column(history, "epoch"), column(history, "validation_accuracy"), strict=True)
    )
    if epoch not in accuracies:
        raise ValueError(f"{METRICS} is damaged: it has no line of epoch {epoch}, the best")
    _draw(run, model, data, history, test, recipe.tol)
    return {
        "best_epoch": epoch,
        "validation_accuracy": accuracies[epoch],
        **measured_on_test(test),
        "parameters": model.count_params(),
    }


def _report(recipe: ImageRecipe, result: dict[str, Any], images: int) -> list[str]:
    right = round(result["test_accuracy"] * images)
    lines = [
        f"test accuracy {result['test_accuracy']:.2%} ({right} of {images}), weights of epoch "
        f"{result['best_epoch']}, {result['training_seconds']:.0f} s of training; mean solver "
        f"steps {result['test_solver_steps']:.1f}, worst residual {result['test_residual']:.1e}"
    ]
    if not result["test_residual"] <= recipe.tol:  # NaN is no equilibrium
        lines.append(
            f"not every test image reached equilibrium (tolerance {recipe.tol:g}): raise "
            "--max-iter, or lower --coupling-rate"
        )
    return lines


def _draw(
    run: Run,
    model: ImageClassifier,
    data: ImageData,
    history: list[dict[str, Any]],
    test: Measured,
    tol: float,
) -> None:
    from .. import plots  # matplotlib takes a second to import

    names = [str(digit) for digit in range(10)]
    counts = np.zeros((10, 10), dtype=int)
    np.add.at(counts, (data.test.labels.numpy(), test.predictions.numpy()), 1)
    figures = {
        "learning_curves": plots.learning_curves(
            [record["epoch"] for record in history],
            column(history, "train_loss"),
            column(history, "validation_loss"),
            column(history, "train_accuracy"),
            column(history, "validation_accuracy"),
        ),
        "confusion_matrix": plots.confusion_matrix(
            counts, names, f"test images, accuracy {test.accuracy:.2%}"
        ),
    }
    some = data.test.images[:200]
    with torch.no_grad():
        _, solutions = model(some, return_solution=True)
        # Of every block, the mean over images and heads.
        couplings = model.couplings(some, solutions).mean(dim=(1, 2))
    for number, solution in enumerate(solutions):
        block = f"_{number + 1}" if len(solutions) > 1 else ""
        figures[f"convergence{block}"] = plots.convergence(
            until_solved(solution), tol, f"equilibria of {len(some)} test images"
        )
        if couplings.shape[-1] > 1:
            figures[f"couplings{block}"] = plots.coupling_graph(
                couplings[number].numpy(), *sites_of(model), "learned couplings"
            )
    for name, figure in figures.items():
        save_figure(run.folder / f"{name}.png", figure)


def until_solved(solution: Solution) -> np.ndarray:
    """The residuals of every sample up to its last step, and nothing after."""
    trace = solution.trace.clone()
    rows = torch.arange(len(trace))[:, None]
    return trace.masked_fill(rows >= solution.steps, torch.nan).numpy()


def sites_of(model: ImageClassifier) -> tuple[np.ndarray, list[str]]:
    """Places and names of the sites: the class token to the left of the grid of patches."""
    grid = model.grid
    rows, columns = np.divmod(np.arange(grid**2), grid)
    places = np.stack([columns, rows], axis=1)
    names = [f"{r},{c}" for r, c in zip(rows, columns, strict=True)]
    if model.token is None:
        return places, names
    return np.concatenate([[[-1.5, (grid - 1) / 2]], places]), ["class", *names]
