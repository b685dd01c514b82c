"""What solver, tolerance and adjoint cost and give, on a classifier of digits.

    OMP_NUM_THREADS=1 python -m benchmarks.choosing

writes the measured section of docs/choosing.md: the model of `dia train digits`, trained for 12
epochs by every adjoint, with seeds 0 to 2. Times are ratios within this process.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deep_implicit_attention import solvers
from deep_implicit_attention.deq import DEQFixedPoint, Implicit, OneStep, Phantom
from deep_implicit_attention.models import SiteClassifier
from deep_implicit_attention.recipes import Digits
from deep_implicit_attention.training import (
    ImageData,
    Progress,
    Run,
    measure,
    seed_everything,
    train_classifier,
)

from .page import parse_out, provenance, write_section

SEEDS = (0, 1, 2)
EPOCHS = 12
SOLVERS = ("picard", "anderson", "broyden", "newton_krylov")
TOLERANCES = (1e-1, 1e-2, 1e-3, 1e-5)
EXACT = 1e-7
ADJOINTS: dict[str, Any] = {
    "`Implicit(tol=1e-1)`": Implicit(tol=1e-1),
    "`Implicit(tol=1e-3)`": Implicit(tol=1e-3),
    "`OneStep()`": OneStep(),
    "`Phantom(3)`": Phantom(3),
    "`Phantom(8)`": Phantom(8),
}
_REFERENCE = "`Implicit(tol=1e-3)`"
REPEATS = 15


def classifier(recipe: Digits, adjoint: Any) -> SiteClassifier:
    """The recipe's model with another adjoint."""
    return SiteClassifier(
        image_size=8, num_classes=10, widths=recipe.widths, strides=recipe.strides, dim=recipe.dim,
        on_failure="ignore", solver_fwd_tol=recipe.tol, solver_fwd_max_iter=recipe.max_iter,
        adjoint=adjoint,
    )  # fmt: skip


def train(seed: int, adjoint: Any) -> tuple[SiteClassifier, ImageData]:
    """A classifier trained by an adjoint, at its best epoch, and the data."""
    recipe = Digits(seed=seed, epochs=EPOCHS)
    seed_everything(seed)
    data = recipe.load()
    model = classifier(recipe, adjoint)
    with tempfile.TemporaryDirectory() as folder:
        run = Run(Path(folder))
        run.start({})
        options = {"seed": seed, **recipe.plan_options()}
        train_classifier(model, data, recipe.schedule(), run, Progress(quiet=True), **options)
        run.load_weights(model)
    return model.eval(), data


class Counted(torch.nn.Module):
    """A mechanism whose updates are counted."""

    count = 0  # of the class: a solve may call a copy of the module

    def __init__(self, fun: Any) -> None:
        super().__init__()
        self.fun = fun

    def initial_state(self, x: Tensor) -> Any:
        return self.fun.initial_state(x)

    def prepare(self, x: Tensor) -> Any:
        return self.fun.prepare(x)

    def update(self, z: Any, context: Any) -> Any:
        Counted.count += 1
        return self.fun.update(z, context)


def seconds_of(work: Callable[[], Any]) -> float:
    """The median time of some repeats."""
    taken = []
    for _ in range(REPEATS):
        begin = time.perf_counter()
        work()
        taken.append(time.perf_counter() - begin)
    return statistics.median(taken)


@torch.no_grad()
def forward_rows(models: list[tuple[SiteClassifier, ImageData]]) -> list[str]:
    """Solver × tolerance on the test images: evaluations, errors, time."""
    rows, unit = [], None
    for name in SOLVERS:
        for tol in TOLERANCES:
            evaluations, gaps, changed, times, failed = [], [], [], [], []
            for model, data in models:
                x, head = model.sources(data.test.images), model.head
                truth = _solve(model, "anderson", EXACT)(x)
                layer = _solve(model, name, tol)
                Counted.count = 0
                z, solution = layer(x, return_solution=True)
                evaluations.append(Counted.count)
                failed.append(1 - solution.converged.double().mean().item())
                gap = (z - truth).flatten(1).norm(dim=1) / truth.flatten(1).norm(dim=1)
                gaps.append(gap.max().item())
                answers = [head(state[:, 0]).argmax(dim=1) for state in (z, truth)]
                changed.append((answers[0] != answers[1]).sum().item())
                times.append(seconds_of(lambda layer=layer, x=x: layer(x)))
            unit = statistics.mean(times) if (name, tol) == ("picard", TOLERANCES[0]) else unit
            assert unit is not None
            unsolved = f", {statistics.mean(failed):.0%} unsolved" if max(failed) else ""
            rows.append(
                f"| `{name}` | {tol:g} | {statistics.mean(evaluations):.1f}{unsolved} "
                f"| {max(gaps):.1e} | {sum(changed)} of {360 * len(models)} "
                f"| {statistics.mean(times) / unit:.1f} |"
            )
    return rows


def _solve(model: SiteClassifier, name: str, tol: float) -> DEQFixedPoint:
    return DEQFixedPoint(
        Counted(model.attention.fun), getattr(solvers, name), on_failure="ignore",
        solver_fwd_tol=tol, solver_fwd_max_iter=100,
    )  # fmt: skip


def gradient(model: SiteClassifier, data: ImageData, adjoint: Any, tol: float) -> Tensor:
    """That of the loss of 128 training images with respect to the couplings."""
    part = data.train[torch.arange(128)]
    scores = model(part.images, adjoint=adjoint, solver_fwd_tol=tol, solver_fwd_max_iter=100)
    couplings = model.attention.fun._weight
    (slope,) = torch.autograd.grad(model.loss(scores, part.labels), couplings)
    return slope.flatten()


def gradient_times(model: SiteClassifier, data: ImageData) -> dict[str, float]:
    """Median seconds of a gradient by every adjoint, in turns, so that none has the quiet hours."""
    taken: dict[str, list[float]] = {name: [] for name in ADJOINTS}
    for _ in range(REPEATS):
        for name, adjoint in ADJOINTS.items():
            begin = time.perf_counter()
            gradient(model, data, adjoint, 1e-3)
            taken[name].append(time.perf_counter() - begin)
    return {name: statistics.median(some) for name, some in taken.items()}


def tables() -> list[str]:
    """Both tables; the gradients of adjoints are those at the weights of exact training."""
    trained = {name: [train(seed, adjoint) for seed in SEEDS] for name, adjoint in ADJOINTS.items()}
    exact_models = trained[_REFERENCE]
    times = gradient_times(*exact_models[0])
    backward = []
    for name, adjoint in ADJOINTS.items():
        cosines, lengths = [], []
        for model, data in exact_models:
            exact = gradient(model, data, Implicit(tol=EXACT), EXACT)
            ours = gradient(model, data, adjoint, 1e-3)
            cosines.append(torch.cosine_similarity(exact, ours, dim=0).item())
            lengths.append((ours.norm() / exact.norm()).item())
        accuracies = [100 * measure(model, data.test).accuracy for model, data in trained[name]]
        backward.append(
            f"| {name} | {statistics.mean(cosines):.4f} | {statistics.mean(lengths):.3f} "
            f"| {statistics.mean(accuracies):.2f} ± {statistics.stdev(accuracies):.2f} "
            f"| {times[name] / times[_REFERENCE]:.2f} |"
        )
    forward = forward_rows(exact_models)
    return [*_FORWARD, *forward, "", *_BACKWARD, *backward]


_FORWARD = [
    "**Solver and tolerance.** One solve of all 360 test images by the solvers alone (the layer's "
    "own solves are preconditioned and take fewer): evaluations of F; the largest "
    "distance of a sample from the equilibrium at tolerance 1e-7, relative to its length; how many "
    "predictions differ from those there; time, as a multiple of the first line's.",
    "",
    "| solver | tolerance | evaluations | largest error of z | predictions changed | time |",
    "|---|---|---|---|---|---|",
]
_BACKWARD = [
    "**Adjoint.** The gradient of the loss of 128 images with respect to the couplings, beside the "
    "exact one: cosine and length (a mean over seeds); the test accuracy after training by it "
    "(mean ± standard deviation over seeds); the time of a forward and backward pass of the whole "
    "model, as a multiple of the second line's.",
    "",
    "| adjoint | cosine | length | test accuracy (%) | time |",
    "|---|---|---|---|---|",
]


def main() -> None:
    out = parse_out(__doc__)
    if out == Path("docs/benchmarks.md"):
        out = Path("docs/choosing.md")
    torch.set_num_threads(1)
    intro = (
        f"The classifier of `dia train digits`, {EPOCHS} epochs, seeds {SEEDS[0]} to {SEEDS[-1]}, "
        f"one thread, by `OMP_NUM_THREADS=1 python -m benchmarks.choosing` "
        f"({provenance().removeprefix('`make bench`; ')})."
    )
    write_section(out, "Measured", "\n".join([intro, "", *tables()]))


if __name__ == "__main__":
    main()
