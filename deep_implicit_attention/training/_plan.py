"""How a model is trained, whatever it is: length, learning rate, and what happens on the way."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from ..solvers._validate import check_count, check_number, check_seed

Precision = Literal["no", "bf16", "fp16"]
"""Autocast of all but the solves: none, or the narrower type."""
Device = Literal["auto", "cpu"]
"""Where a training runs: on the accelerator there is, or on the CPU."""
OnDivergence = Literal["warn", "stop"]
"""What a training does when it starts to diverge: it says so, or it says so and ends."""


@dataclass(frozen=True)
class Plan:
    """The settings of a `Trainer`. Steps are steps of the optimizer.

    Attributes:
        steps: length of the training.
        evaluate_every: steps between two evaluations; the last step is always followed by one.
        seed: of the order of the data, the augmentation and the noise inside the model.
        warmup: part of the steps in which the learning rate rises linearly.
        accumulate: parts into which a batch is cut to save memory; the gradient is that of the
            whole batch (batch normalisation, though, sees the parts).
        clip: largest Euclidean norm of the gradient, of all parameters together.
        ema: largest decay of the moving average of the weights, see `MovingAverage`. It is what is
            evaluated and kept as the best weights.
        patience: evaluations without improvement after which the training ends.
        checkpoint_every: steps between checkpoints, beside those after each evaluation.
        keep: newest checkpoints that are kept, beside the best one before them.
        precision: autocast of the model; None takes what `accelerate launch` says, else "no".
        device: "auto" takes the accelerator there is.
        trackers: names such as "tensorboard" and "wandb".
        on_divergence: "stop" ends a training that starts to diverge, "warn" says so.
    """

    steps: int
    evaluate_every: int
    seed: int = 0
    warmup: float = 0.1
    accumulate: int = 1
    clip: float | None = None
    ema: float | None = None
    patience: int | None = None
    checkpoint_every: int | None = None
    keep: int = 2
    precision: Precision | None = None
    device: Device = "auto"
    trackers: tuple[str, ...] = ()
    on_divergence: OnDivergence = "warn"

    def __post_init__(self) -> None:
        for name in ("steps", "evaluate_every", "accumulate", "keep"):
            check_count(name, getattr(self, name))
        for name in ("patience", "checkpoint_every"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name))
        check_seed(self.seed)
        if isinstance(self.trackers, str):
            raise TypeError(f"trackers must be a tuple of names, got the string {self.trackers!r}")
        check_number("warmup", self.warmup, minimum=0.0, below=1.0)
        if self.clip is not None:
            check_number("clip", self.clip)
            if self.clip <= 0:
                raise ValueError(f"clip must be above 0, got {self.clip}")
        if self.ema is not None:
            check_number("ema", self.ema, minimum=0.0, below=1.0)
        for name, value, known in (
            ("precision", self.precision, (None, *get_args(Precision))),
            ("device", self.device, get_args(Device)),
            ("on_divergence", self.on_divergence, get_args(OnDivergence)),
        ):
            if value not in known:
                raise ValueError(f"{name} must be one of {known}, got {value!r}")

    def rate(self, step: int) -> float:
        """Learning rate of a step, counted from 0, as a fraction of the largest.

        With t = step / steps and w = warmup: max(t/w, 1/100) for t < w, then
        (1 + cos(π (t − w)/(1 − w)))/2 (Loshchilov and Hutter 2017, arXiv:1608.03983).
        """
        done = step / self.steps
        if done < self.warmup:
            return max(done / self.warmup, 0.01)
        return 0.5 * (1 + math.cos(math.pi * (done - self.warmup) / (1 - self.warmup)))

    def evaluation_due(self, step: int) -> bool:
        """Whether the model is evaluated after so many steps."""
        return step % self.evaluate_every == 0 or step == self.steps

    def checkpoint_due(self, step: int) -> bool:
        """Whether a checkpoint is written after so many steps."""
        every = self.checkpoint_every
        return self.evaluation_due(step) or (every is not None and step % every == 0)
