"""Train a classifier of images, and measure it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..deq import spectral_radius
from ..deq._module import of_its_update
from ..models import ImageClassifier
from ..solvers._validate import check_count, check_number
from ._data import ImageData, Split
from ._devices import Devices
from ._plan import Plan
from ._progress import Progress
from ._run import Run
from ._task import Outcome, Task, worst_of
from ._trainer import Trainer


@dataclass(frozen=True)
class Schedule:
    """How to train: AdamW, one warm-up and one cosine descent of the learning rate.

    Attributes:
        epochs: passes through the training images.
        batch_size: images a batch; those that do not fill one are left out of the epoch.
        learning_rate: the largest.
        coupling_rate: that of the equilibrium layers, as a multiple of `learning_rate`.
        weight_decay: of AdamW.
        smoothing: of the labels, in [0, 1).
        shift: largest shift of an image, in pixels.
        rotation: largest rotation, in degrees.
        zoom: largest change of its size, as a fraction below 1.
        warmup: part of all steps in which the rate rises.

    Raises:
        TypeError, ValueError: for values of the wrong kind or out of range.
    """

    epochs: int
    batch_size: int
    learning_rate: float
    coupling_rate: float
    weight_decay: float
    smoothing: float
    shift: float
    rotation: float
    zoom: float
    warmup: float = 0.1

    def __post_init__(self) -> None:
        check_count("epochs", self.epochs)
        check_count("batch_size", self.batch_size)
        check_number("smoothing", self.smoothing, minimum=0.0, below=1.0)
        check_number("warmup", self.warmup, minimum=0.0, below=1.0)
        # The factor 1 ± zoom may not reach 0, beyond which images are turned upside down.
        check_number("zoom", self.zoom, minimum=0.0, below=1.0)
        for name in ("learning_rate", "coupling_rate", "weight_decay", "shift", "rotation"):
            check_number(name, getattr(self, name), minimum=0.0)

    def batches(self, images: int) -> int:
        """Batches in an epoch of so many images."""
        if images < self.batch_size:
            raise ValueError(
                f"{images} training images do not fill a batch of batch_size {self.batch_size}"
            )
        return images // self.batch_size

    def plan(self, images: int, **options: Any) -> Plan:
        """The plan for so many images, evaluated after every epoch; `options` are further ones."""
        batches = self.batches(images)
        return Plan(
            steps=self.epochs * batches, evaluate_every=batches, warmup=self.warmup, **options
        )


@dataclass(frozen=True)
class Measured:
    """What a model does on a set of images.

    Attributes:
        loss: mean cross-entropy, in nats.
        accuracy: part that is right, 0 to 1.
        predictions: the class of each image, `(n,)`.
        steps: mean number of solver steps of a solve.
        residual: the worst relative residual.
    """

    loss: float
    accuracy: float
    predictions: Tensor
    steps: float
    residual: float


class Classification(Task):
    """Learn to tell images apart: augmented batches, cross-entropy in nats.

    Args:
        data: images to learn from and to choose the best epoch by.
        schedule: size of the batches, augmentation and label smoothing.
    """

    advice = "lower --learning-rate or --coupling-rate"

    def __init__(self, data: ImageData, schedule: Schedule) -> None:
        self.data, self.schedule = data, schedule
        self.batches = schedule.batches(len(data.train))
        self._order = torch.empty(0, dtype=torch.long, device="cpu")

    def batch(self, epoch: int, index: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Images `(batch_size, 1, H, W)` and labels; what is left of an epoch is not used."""
        if index == 0:
            self._order = torch.randperm(len(self.data.train), generator=generator, device="cpu")
        size = self.schedule.batch_size
        part = self.data.train[self._order[index * size : (index + 1) * size]]
        images = augment(part.images, self.schedule, self.data.background, generator)
        return images, part.labels

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Outcome:
        """Cross-entropy with smoothed labels, and the accuracy."""
        images, labels = batch
        scores, solutions = model(images, return_solution=True)
        loss = F.cross_entropy(scores, labels, label_smoothing=self.schedule.smoothing)
        right = (scores.argmax(dim=1) == labels).float().mean()
        return Outcome(loss, {"accuracy": right}, solutions)

    def state(self) -> dict[str, Tensor]:
        """The order of the images in this epoch."""
        return {"order": self._order}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Go on in the middle of an epoch."""
        self._order = state["order"]

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Loss and accuracy on the validation images; spectral radius on the first 32 of them."""
        classifier = cast(ImageClassifier, model)
        measured = measure(classifier, self.data.validation)
        return {
            "validation_loss": measured.loss,
            "validation_accuracy": measured.accuracy,
            "spectral_radius": batch_spectral_radius(classifier, self.data.validation.images[:32]),
        }


def train_classifier(
    model: ImageClassifier,
    data: ImageData,
    schedule: Schedule,
    run: Run,
    progress: Progress,
    *,
    resume: bool = False,
    devices: Devices | None = None,
    **options: Any,
) -> str:
    """Train `model`, keeping in `run` the weights of the epoch with the lowest validation loss.

    The loss, because on a small validation set the accuracy of an early epoch may be high by
    luck. Every epoch adds a line to the metrics: loss and accuracy (training and validation), mean
    number of solver steps, share of failed solves, worst residual, spectral radius of the update at
    the equilibria of validation images, seconds.

    Args:
        model: the classifier; it is left with the last weights.
        data: what to learn from.
        schedule: how.
        run: the folder, started already.
        progress: what is told.
        resume: go on from the newest checkpoint of `run`.
        devices: see `Trainer`.
        **options: of the `Plan`.

    Returns:
        How the training ended, as `Trainer.train` says.
    """
    plan = schedule.plan(len(data.train), **options)
    # Order and augmentation go on in the stream of torch.manual_seed, after the model's weights.
    generator = torch.Generator()
    generator.set_state(torch.get_rng_state())
    trainer = Trainer(
        model,
        _optimizer(model, schedule),
        Classification(data, schedule),
        plan,
        run,
        progress,
        generator=generator,
        devices=devices,
    )
    return trainer.train(resume=resume)


@torch.no_grad()
def measure(model: ImageClassifier, split: Split, batch_size: int = 500) -> Measured:
    """Loss, accuracy and predictions on `split`; mean solver steps of a layer; the worst residual,
    which is NaN if that of any image is."""
    if not len(split):
        raise ValueError("split must hold at least one image, got none")
    model.eval()
    device = _device(model)
    scores, steps, worst = [], 0.0, 0.0
    for start in range(0, len(split), batch_size):
        images = split.images[start : start + batch_size].to(device)
        some, solutions = model(images, return_solution=True)
        scores.append(some.cpu())
        for solution in solutions:
            steps += solution.steps.sum().item() / len(solutions)
            worst = worst_of(worst, solution.residual.max().item())
    every = torch.cat(scores)
    predictions = every.argmax(dim=1)
    return Measured(
        loss=model.loss(every, split.labels).item(),
        accuracy=(predictions == split.labels).double().mean().item(),
        predictions=predictions,
        steps=steps / len(split),
        residual=worst,
    )


@torch.no_grad()
def batch_spectral_radius(model: ImageClassifier, images: Tensor) -> float:
    """Spectral radius of the update at the equilibria of `images`: the mean over them, of the
    layer in which it is largest. Layers that are solved in closed form iterate nothing: 0."""
    model.eval()
    images = images.to(_device(model))
    _, solutions = model(images, return_solution=True)
    pairs = zip(model.equilibria(), model.maps(images, solutions), strict=True)
    iterated = [at for layer, at in pairs if of_its_update(layer.fun, "solve") is None]
    radii = [spectral_radius(*at).mean() for at in iterated]
    return torch.stack(radii).max().item() if radii else 0.0


def augment(
    images: Tensor,
    schedule: Schedule,
    background: float,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Images `(B, C, H, W)`, each shifted, turned and zoomed at random as `schedule` allows.

    What comes in at the edges is `background`. Draws from `generator`, or torch's own.
    """
    if not (schedule.shift or schedule.rotation or schedule.zoom):
        return images
    batch, (height, width) = len(images), images.shape[-2:]
    angle, zoom, dx, dy = (torch.rand(4, batch, generator=generator, device="cpu") * 2 - 1).unbind()
    angle = angle * math.radians(schedule.rotation)
    zoom = 1 + zoom * schedule.zoom
    # grid_sample counts from −1 to 1 on either side, and a turn is one in pixels.
    right, down = dx * (2 * schedule.shift / width), dy * (2 * schedule.shift / height)
    cos, sin = angle.cos() * zoom, angle.sin() * zoom
    rows = torch.stack([cos, -sin * (height / width), right, sin * (width / height), cos, down], 1)
    rows = rows.view(batch, 2, 3).to(images)
    grid = F.affine_grid(rows, list(images.shape), align_corners=False)
    moved = F.grid_sample(images - background, grid, align_corners=False)
    return moved + background


def _optimizer(model: ImageClassifier, schedule: Schedule) -> torch.optim.Optimizer:
    inside = [p for layer in model.equilibria() for p in layer.parameters()]
    known = {id(p) for p in inside}
    outside = [p for p in model.parameters() if id(p) not in known]
    rate = schedule.learning_rate
    groups = [
        {"params": outside, "lr": rate},
        {"params": inside, "lr": rate * schedule.coupling_rate},
    ]
    return torch.optim.AdamW(groups, lr=rate, weight_decay=schedule.weight_decay)


def _device(model: ImageClassifier) -> torch.device:
    return next(model.parameters()).device
