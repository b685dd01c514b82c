"""Train a classifier of images, and measure it."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..deq import spectral_radius
from ..models import SiteClassifier
from ..solvers._validate import check_count, check_number
from ._data import ImageData, Split
from ._progress import Progress
from ._run import Run


@dataclass(frozen=True)
class Schedule:
    """How to train: AdamW, one warm-up and one cosine descent of the learning rate."""

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
        for name in ("learning_rate", "coupling_rate", "weight_decay", "shift", "rotation", "zoom"):
            check_number(name, getattr(self, name), minimum=0.0)

    def batches(self, images: int) -> int:
        """Batches in an epoch of so many images."""
        if images < self.batch_size:
            raise ValueError(
                f"{images} training images do not fill a batch of batch_size {self.batch_size}"
            )
        return images // self.batch_size


@dataclass(frozen=True)
class Measured:
    """What a model does on a set of images."""

    loss: float
    accuracy: float
    predictions: Tensor
    steps: float
    residual: float


def train_classifier(
    model: SiteClassifier, data: ImageData, schedule: Schedule, run: Run, progress: Progress
) -> None:
    """Train `model`, keeping in `run` the weights of the epoch with the lowest validation loss.

    The loss, because on a small validation set the accuracy of an early epoch may be high by
    luck. Every epoch adds a line to the metrics: loss and accuracy (training and validation), mean
    number of solver steps, worst residual, spectral radius of the update at the equilibrium of a
    validation batch, seconds.
    """
    batches = schedule.batches(len(data.train))
    optimizer = _optimizer(model, schedule)
    total = batches * schedule.epochs
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: _rate(step / total, schedule.warmup)
    )
    best = math.inf
    progress.start(schedule.epochs, batches)
    for epoch in range(1, schedule.epochs + 1):
        started = time.perf_counter()
        sums = dict.fromkeys(("loss", "correct", "steps"), 0.0)
        worst = 0.0
        model.train()
        for count, part in enumerate(_batches(data.train, schedule.batch_size), start=1):
            images = augment(part.images, schedule, data.background)
            scores, solution = model(images, return_solution=True)
            loss = model.loss(scores, part.labels, schedule.smoothing)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            scheduler.step()
            sums["loss"] += loss.item()
            sums["correct"] += (scores.argmax(dim=1) == part.labels).float().mean().item()
            sums["steps"] += solution.steps.float().mean().item()
            worst = max(worst, solution.residual.max().item())
            progress.batch(epoch, {name: value / count for name, value in sums.items()}, worst)
            if not math.isfinite(sums["loss"]):
                raise FloatingPointError(
                    f"the training loss is not finite in epoch {epoch}, batch {count}: lower "
                    "--learning-rate or --coupling-rate"
                )
        measured = measure(model, data.validation)
        record = {
            "epoch": epoch,
            "train_loss": sums["loss"] / batches,
            "train_accuracy": sums["correct"] / batches,
            "validation_loss": measured.loss,
            "validation_accuracy": measured.accuracy,
            "solver_steps": sums["steps"] / batches,
            "residual": worst,
            "spectral_radius": batch_spectral_radius(model, data.validation.images[:32]),
            "seconds": round(time.perf_counter() - started, 3),
        }
        run.log(**record)
        if measured.loss < best:
            best = measured.loss
            run.save_weights(model, epoch)
        progress.epoch(record)


@torch.no_grad()
def measure(model: SiteClassifier, split: Split, batch_size: int = 500) -> Measured:
    """Loss, accuracy, predictions and the solver's work on `split`."""
    model.eval()
    scores, steps, worst = [], 0.0, 0.0
    for start in range(0, len(split), batch_size):
        some, solution = model(split.images[start : start + batch_size], return_solution=True)
        scores.append(some)
        steps += solution.steps.sum().item()
        worst = max(worst, solution.residual.max().item())
    every = torch.cat(scores)
    predictions = every.argmax(dim=1)
    return Measured(
        loss=model.loss(every, split.labels).item(),
        accuracy=(predictions == split.labels).double().mean().item(),
        predictions=predictions,
        steps=steps / len(split),
        residual=worst,
    )


def batch_spectral_radius(model: SiteClassifier, images: Tensor) -> float:
    """Mean spectral radius of the layer's update at the equilibria of `images`."""
    model.eval()
    layer = model.attention
    with torch.no_grad():
        x = layer.fun.sources(model.sources(images))
        context = layer.fun.prepare(x)
        z = layer(x)
    radii = spectral_radius(lambda state: layer.fun.update(state, context), z)
    return radii.mean().item()


def augment(images: Tensor, schedule: Schedule, background: float) -> Tensor:
    """Shift (pixels), rotate (degrees) and zoom (fraction) every image at random."""
    if not (schedule.shift or schedule.rotation or schedule.zoom):
        return images
    batch, size = len(images), images.shape[-1]
    angle, zoom, dx, dy = (torch.rand(4, batch) * 2 - 1).unbind()
    angle = angle * math.radians(schedule.rotation)
    zoom = 1 + zoom * schedule.zoom
    shift = 2 * schedule.shift / size  # grid_sample counts from −1 to 1
    cos, sin = angle.cos() * zoom, angle.sin() * zoom
    rows = torch.stack([cos, -sin, dx * shift, sin, cos, dy * shift], dim=1)
    grid = F.affine_grid(rows.view(batch, 2, 3), list(images.shape), align_corners=False)
    moved = F.grid_sample(images - background, grid, align_corners=False)
    return moved + background


def _batches(split: Split, batch_size: int) -> Iterator[Split]:
    """Shuffled whole batches."""
    order = torch.randperm(len(split))
    for start in range(0, len(split) - batch_size + 1, batch_size):
        yield split[order[start : start + batch_size]]


def _optimizer(model: SiteClassifier, schedule: Schedule) -> torch.optim.Optimizer:
    inside = list(model.attention.parameters())
    known = {id(p) for p in inside}
    outside = [p for p in model.parameters() if id(p) not in known]
    rate = schedule.learning_rate
    groups = [
        {"params": outside, "lr": rate},
        {"params": inside, "lr": rate * schedule.coupling_rate},
    ]
    return torch.optim.AdamW(groups, lr=rate, weight_decay=schedule.weight_decay)


def _rate(done: float, warmup: float) -> float:
    """Linear to 1 over the fraction `warmup`, then a cosine to 0."""
    if done < warmup:
        return max(done / warmup, 0.01)
    return 0.5 * (1 + math.cos(math.pi * (done - warmup) / (1 - warmup)))
