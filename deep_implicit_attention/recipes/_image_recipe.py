"""Settings of the recipes that learn from images: `digits`, `mnist` and `mnist-vit`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import training
from ..models import ImageClassifier, SiteClassifier
from ..training import Device, ImageData, Measured, Run, Schedule
from ._flags import TrainingFlags


@dataclass(frozen=True)
class ImageRecipe(TrainingFlags):
    """What image recipes share; every field is a flag of the command line."""

    epochs: int
    """passes over the training images"""
    batch_size: int
    """images in a batch"""
    coupling_rate: float
    """learning rate of the equilibrium layer, as a multiple of --learning-rate"""
    smoothing: float
    """label smoothing"""
    shift: float
    """augmentation: largest shift, in pixels"""
    rotation: float
    """augmentation: largest rotation, in degrees"""
    zoom: float
    """augmentation: largest zoom, as a fraction below 1"""
    validation: float
    """part of the training images set aside to choose the best epoch"""

    def load(self, *, download: bool = True) -> ImageData:
        """The data of this recipe; `download=False` takes only what is on this machine."""
        raise NotImplementedError

    def model(self, data: ImageData) -> ImageClassifier:
        """The untrained model."""
        raise NotImplementedError

    def solver_options(self) -> dict[str, Any]:
        """The options of the equilibrium layers."""
        return {
            "on_failure": "ignore",  # the training loop reports residuals itself
            "solver_fwd_tol": self.tol,
            "solver_fwd_max_iter": self.max_iter,
            "solver_bwd_tol": self.tol,
            "solver_bwd_max_iter": self.max_iter,
        }

    def schedule(self) -> Schedule:
        """The part of the settings that the training loop needs."""
        names = {field.name for field in dataclasses.fields(Schedule)}
        return Schedule(**{k: v for k, v in vars(self).items() if k in names})

    def evaluate(self, run: Run) -> dict[str, float]:
        """The test metrics of a finished run, measured again from its weights."""
        data = self.load()
        model = self.model(data)
        run.load_weights(model)
        return measured_on_test(training.measure(model, data.test))


@dataclass(frozen=True)
class SiteRecipe(ImageRecipe):
    """What recipes that train a `SiteClassifier` share."""

    dim: int
    """components of a spin"""
    widths: tuple[int, ...]
    """channels of the convolutions"""
    strides: tuple[int, ...]
    """their strides"""
    dropout: float
    """dropout before the linear head"""

    def model(self, data: ImageData) -> SiteClassifier:
        return SiteClassifier(
            image_size=data.train.images.shape[-1],
            num_classes=10,
            widths=self.widths,
            strides=self.strides,
            dim=self.dim,
            dropout=self.dropout,
            **self.solver_options(),
        )


@dataclass(frozen=True)
class Digits(SiteRecipe):
    """Train on the 1,797 digits of 8×8 pixels bundled with scikit-learn (no download).

    A fifth of the images is held out for the test; of the rest a part is set aside to choose the
    best epoch. Takes a minute on one core.
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
    device: Device = "cpu"

    def load(self, *, download: bool = True) -> ImageData:
        return training.digits(self.validation, self.seed)


@dataclass(frozen=True)
class Mnist(SiteRecipe):
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
    device: Device = "cpu"

    def load(self, *, download: bool = True) -> ImageData:
        return training.mnist(self.data_dir, self.validation, self.seed, download=download)


def measured_on_test(measured: Measured) -> dict[str, float]:
    """What the metrics file says of the test images."""
    return {
        "test_accuracy": measured.accuracy,
        "test_loss": measured.loss,
        "test_solver_steps": measured.steps,
        "test_residual": measured.residual,
    }
