"""Recipes that train a `SiteClassifier`: `digits` and `mnist`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import training
from ..models import SiteClassifier
from ..solvers import Solution
from ..training import ImageData, Measured, Run, Schedule


@dataclass(frozen=True)
class ImageRecipe:
    """What image recipes share; every field is a flag of the command line."""

    run_dir: Path
    """folder for metrics, checkpoint and pictures; an earlier run there is overwritten"""
    seed: int
    """random seed; the same seed gives the same run on the same CPU"""
    epochs: int
    """passes over the training images"""
    batch_size: int
    """images in a batch"""
    learning_rate: float
    """largest learning rate of AdamW, after warm-up"""
    coupling_rate: float
    """learning rate of the equilibrium layer, as a multiple of the other one"""
    weight_decay: float
    """decoupled weight decay of AdamW"""
    smoothing: float
    """label smoothing"""
    shift: float
    """augmentation: largest shift, in pixels"""
    rotation: float
    """augmentation: largest rotation, in degrees"""
    zoom: float
    """augmentation: largest zoom, as a fraction"""
    validation: float
    """part of the training images set aside to choose the best epoch"""
    dim: int
    """components of a spin"""
    widths: tuple[int, ...]
    """channels of the convolutions"""
    strides: tuple[int, ...]
    """their strides"""
    dropout: float
    """dropout before the linear head"""
    tol: float
    """relative residual at which a sample's equilibrium counts as found, forward and backward"""
    max_iter: int
    """solver steps at most, forward and backward"""
    threads: int
    """CPU threads (0 leaves it to PyTorch); a result depends on it in the last digits"""

    def load(self) -> ImageData:
        """The data of this recipe."""
        raise NotImplementedError

    def model(self, data: ImageData) -> SiteClassifier:
        """The untrained model."""
        return SiteClassifier(
            image_size=data.train.images.shape[-1],
            num_classes=10,
            widths=self.widths,
            strides=self.strides,
            dim=self.dim,
            dropout=self.dropout,
            on_failure="ignore",  # the training loop reports residuals itself
            solver_fwd_tol=self.tol,
            solver_fwd_max_iter=self.max_iter,
            solver_bwd_tol=self.tol,
            solver_bwd_max_iter=self.max_iter,
        )

    def schedule(self) -> Schedule:
        """The part of the settings that the training loop needs."""
        names = {field.name for field in dataclasses.fields(Schedule)}
        return Schedule(**{k: v for k, v in vars(self).items() if k in names})


@dataclass(frozen=True)
class Digits(ImageRecipe):
    """Train on the 1,797 digits of 8×8 pixels bundled with scikit-learn (no download).

    A fifth of the images is held out for the test; of the rest a part is set aside to choose the
    best epoch. Takes a minute on two cores.
    """

    run_dir: Path = Path("runs/digits")
    seed: int = 0
    epochs: int = 40
    batch_size: int = 32
    learning_rate: float = 3e-3
    coupling_rate: float = 0.1
    weight_decay: float = 0.01
    smoothing: float = 0.05
    shift: float = 0.7
    rotation: float = 10.0
    zoom: float = 0.1
    validation: float = 0.1
    dim: int = 10
    widths: tuple[int, ...] = (16, 32, 32)
    strides: tuple[int, ...] = (1, 1, 2)
    dropout: float = 0.0
    tol: float = 1e-3
    max_iter: int = 30
    threads: int = 1

    def load(self) -> ImageData:
        return training.digits(self.validation, self.seed)


@dataclass(frozen=True)
class Mnist(ImageRecipe):
    """Train on MNIST at the size and schedule of the 2021 project: 26,000 parameters at most, 20
    epochs.

    Of the 60,000 training images a part is set aside to choose the best epoch; the 10,000 test
    images are looked at once, at the end.
    """

    data_dir: Path | None = None
    """folder with the four idx files; without it DIA_DATA, else a download"""
    run_dir: Path = Path("runs/mnist")
    seed: int = 0
    epochs: int = 20
    batch_size: int = 60
    learning_rate: float = 3e-3
    coupling_rate: float = 0.1
    weight_decay: float = 0.01
    smoothing: float = 0.0
    shift: float = 1.5
    rotation: float = 8.0
    zoom: float = 0.1
    validation: float = 1 / 12
    dim: int = 10
    widths: tuple[int, ...] = (12, 24, 24, 32)
    strides: tuple[int, ...] = (1, 2, 2, 2)
    dropout: float = 0.0
    tol: float = 1e-3
    max_iter: int = 30
    threads: int = 1

    def load(self) -> ImageData:
        return training.mnist(self.data_dir, self.validation, self.seed)


def run_images(recipe: ImageRecipe) -> dict[str, Any]:
    """Train, test the best epoch once, draw the pictures; returns the last line of metrics.

    Ctrl-C ends the training early; what was learned so far is tested and drawn all the same.
    """
    if not 0 <= recipe.seed < 2**32:
        raise ValueError(f"seed must be from 0 to 2**32 - 1, got {recipe.seed}")
    if recipe.threads < 0:
        raise ValueError(f"threads must be at least 0, got {recipe.threads}")
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    training.seed_everything(recipe.seed)
    # Whatever is wrong with the settings comes to light before an earlier run is overwritten.
    schedule = recipe.schedule()
    data = recipe.load()
    schedule.batches(len(data.train))
    model = recipe.model(data)
    run = Run(recipe.run_dir)
    run.start({"recipe": type(recipe).__name__.lower(), **vars(recipe)})
    with training.Progress() as progress:
        progress.say(
            f"{len(data.train)} training, {len(data.validation)} validation and "
            f"{len(data.test)} test images; {model.count_params()} effective parameters; "
            f"{model.grid**2 + 1} sites of {model.dim} components"
        )
        interrupted = False
        try:
            training.train_classifier(model, data, schedule, run, progress)
        except KeyboardInterrupt:
            interrupted = True
        history = run.metrics()
        epoch = run.saved_epoch()
        if epoch is None:
            progress.say(f"no epoch was finished; {run.folder} holds the configuration only")
            raise SystemExit(130)
        if interrupted:
            progress.say("interrupted: testing the best epoch so far")
        run.load_weights(model)
        test = training.measure(model, data.test)
        best = next(record for record in history if record["epoch"] == epoch)
        result = {
            "best_epoch": epoch,
            "validation_accuracy": best["validation_accuracy"],
            "test_accuracy": test.accuracy,
            "test_loss": test.loss,
            "test_solver_steps": test.steps,
            "test_residual": test.residual,
            "parameters": model.count_params(),
            "training_seconds": round(sum(record["seconds"] for record in history), 1),
            "interrupted": interrupted,
        }
        run.log(**result)
        _draw(run, model, data, history, test, recipe.tol)
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
