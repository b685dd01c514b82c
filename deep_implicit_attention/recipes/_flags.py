"""Settings that all recipes that train share: how a run is learned, kept and resumed, and where."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..solvers._validate import check_count, check_number, check_seed
from ..training import Device, OnDivergence, Precision


@dataclass(frozen=True, kw_only=True)
class TrainingFlags:
    """Every field is a flag of the command line."""

    run_dir: Path
    """folder of the run's files: new, empty, or an earlier run's to overwrite or resume"""
    seed: int
    """random seed; the same seed gives the same run on the same CPU"""
    batch_size: int
    """rows in a batch"""
    learning_rate: float
    """largest learning rate of AdamW, after warm-up"""
    weight_decay: float
    """decoupled weight decay of AdamW"""
    tol: float
    """relative residual of a solved sample, forward and backward; float32 reaches about 1e-6"""
    max_iter: int
    """solver steps at most, forward and backward"""
    threads: int
    """CPU threads (0 leaves it to PyTorch); a result depends on it in the last digits"""
    resume: bool = False
    """go on from the newest checkpoint in the folder of the run; where there is none, start"""
    checkpoint_every: int | None = None
    """steps between checkpoints, beside those after every evaluation"""
    keep_checkpoints: int = 2
    """newest checkpoints that are kept, beside the best one before them"""
    patience: int | None = None
    """evaluations without a lower validation loss after which the training ends"""
    on_divergence: OnDivergence = "warn"
    """what to do when solves begin to fail, the loss rises or the spectral radius nears 1"""
    accumulate: int = 1
    """parts into which a batch is cut to save memory"""
    clip: float | None = None
    """largest Euclidean norm of the gradient"""
    ema: float | None = None
    """decay of a moving average of the weights, which is then what is evaluated and kept"""
    device: Device = "auto"
    """auto takes the accelerator there is (CUDA, MPS)"""
    precision: Precision | None = None
    """autocast of all but the solves; None: what accelerate launch says, otherwise no autocast"""
    trackers: tuple[str, ...] = ()
    """where metrics go as well, such as tensorboard and wandb"""

    def check(self) -> None:
        """Raise `ValueError` for settings out of range that nothing else looks at."""
        check_seed(self.seed)
        check_threads(self.threads)
        # Under the names of the flags: the plan and the solvers have others.
        check_count("keep_checkpoints", self.keep_checkpoints)
        check_number("tol", self.tol)
        if self.tol <= 0:
            raise ValueError(f"tol must be above 0, got {self.tol}")
        check_count("max_iter", self.max_iter)

    def check_idle(self) -> None:
        """Raise `ValueError` for settings that would do nothing in a new run."""

    def plan_options(self) -> dict[str, Any]:
        """The part of the settings that is the same for every `Plan`."""
        names = ("checkpoint_every", "patience", "on_divergence", "accumulate", "clip", "ema")
        names += ("device", "precision", "trackers")
        return {"keep": self.keep_checkpoints, **{name: getattr(self, name) for name in names}}


def refuse(settings: Any, what: str, *names: str) -> None:
    """Raise for settings, a dataclass, that are not at their defaults but would do nothing."""
    defaults = {field.name: field.default for field in dataclasses.fields(settings)}
    for name in names:
        if getattr(settings, name) != defaults[name]:
            raise ValueError(f"--{name.replace('_', '-')} has no meaning for {what}")


def check_threads(threads: int) -> None:
    """Raise unless there are so many cores; 0 leaves it to PyTorch."""
    cores = os.cpu_count() or 1
    if not 0 <= threads <= cores:
        raise ValueError(f"threads must be from 0 to {cores}, the CPU cores here, got {threads}")
