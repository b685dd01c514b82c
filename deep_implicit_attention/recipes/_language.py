"""What the recipe `shakespeare` does: train, measure the whole validation text, draw, write."""

from __future__ import annotations

from typing import Any

import torch

from .. import training
from ..training import Devices, Progress, Run, TextData, Trainer
from ..training._files import write_whole
from ..training._progress import Columns
from ._frame import Work, run_recipe
from ._made import save_figure
from ._saved import column
from ._shakespeare import Shakespeare, check_text, has_vocabulary, save_vocabulary

_SAMPLE = "sample.txt"
_COLUMNS: Columns = (
    ("step", "{:>6d}", "step"),
    ("train_loss", "{:>10.4f}", "loss"),
    ("validation_loss", "{:>10.4f}", "validation"),
    ("validation_solver_steps", "{:>12.1f}", "solver steps"),
    ("validation_residual", "{:>8.1e}", "residual"),
    ("spectral_radius", "{:>15.2f}", "spectral radius"),
    ("seconds", "{:>7.1f}", "seconds"),
)


def run_shakespeare(recipe: Shakespeare) -> dict[str, Any]:
    """Train, measure the best weights on the whole validation text; see `run_recipe`.

    The same batches, rates and gradients as the loop in `examples/shakespeare.py`.
    """
    return run_recipe(recipe, _work)


def _work(recipe: Shakespeare) -> Work:
    data = recipe.load()
    before = Run(recipe.run_dir)
    # Here, since a run that is finished does not come to be trained.
    if recipe.resume and before.is_started() and has_vocabulary(before):
        check_text(before, data)
    model = recipe.model(len(data.vocabulary))
    task, plan = recipe.task(data), recipe.plan()
    optimizer = training.language_optimizer(model, recipe.learning_rate, recipe.weight_decay)

    def train(run: Run, progress: Progress, devices: Devices, resume: bool) -> str:
        if devices.is_main and not has_vocabulary(run):  # a new run has none
            save_vocabulary(run, data)
        generator = torch.Generator().manual_seed(recipe.seed)
        trainer = Trainer(
            model, optimizer, task, plan, run, progress, generator=generator, devices=devices
        )
        return trainer.train(resume=resume)

    return Work(
        plan=plan,
        title=(
            f"{len(data.train)} training and {len(data.validation)} validation characters, "
            f"{len(data.vocabulary)} different ones; {model.count_params()} parameters"
        ),
        train=train,
        test=lambda run, history: _test(recipe, run, data, history),
        score=_score,
        report=lambda result: _report(recipe, result),
        columns=_COLUMNS,
        unit="evaluation",
    )


def _test(
    recipe: Shakespeare, run: Run, data: TextData, history: list[dict[str, Any]]
) -> dict[str, Any]:
    measured = recipe.evaluate(run)
    _draw(run, history)
    options = {"max_new_tokens": recipe.sample, "seed": recipe.seed}
    text = recipe.generate(run, data.vocabulary.decode(data.validation[:1]), **options)
    write_whole(run.folder / _SAMPLE, (text + "\n").encode())
    parameters = recipe.model(len(data.vocabulary)).count_params()
    return {"best_step": run.saved_step(), **measured, "parameters": parameters}


def _score(result: dict[str, Any]) -> str:
    return f"validation loss {result['validation_loss']:.4f} nats per character"


def _report(recipe: Shakespeare, result: dict[str, Any]) -> list[str]:
    lines = [
        f"{_score(result)} over all {result['validation_windows']} windows, weights of step "
        f"{result['best_step']}, {result['training_seconds']:.0f} s of training; mean solver "
        f"steps {result['validation_solver_steps']:.1f}, mean residual "
        f"{result['validation_residual']:.1e}, worst {result['validation_worst_residual']:.1e}"
    ]
    if not result["validation_worst_residual"] <= recipe.tol:  # NaN is no equilibrium
        lines.append(
            f"not every window reached equilibrium (tolerance {recipe.tol:g}): raise --max-iter, "
            "or add --jacobian-penalty"
        )
    return [*lines, f"a sample of {recipe.sample} characters is in {_SAMPLE}"]


def _draw(run: Run, history: list[dict[str, Any]]) -> None:
    from .. import plots  # matplotlib takes a second to import

    def against_steps(name: str) -> tuple[list[float], list[float]]:
        return column(history, "step"), column(history, name)

    learned = "train_cross_entropy" if "train_cross_entropy" in history[0] else "train_loss"
    figure = plots.curves(
        plots.Panel(
            "step",
            "cross-entropy (nats per character)",
            {"training": against_steps(learned), "validation": against_steps("validation_loss")},
        ),
        plots.Panel(
            "step",
            "mean relative residual",
            {"validation": against_steps("validation_residual")},
            yscale="log",
        ),
    )
    save_figure(run.folder / "learning_curves.png", figure)
