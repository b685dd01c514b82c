"""Settings that all recipes that train share: how a run is kept, resumed, and where it runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..training import Device, OnDivergence, Precision


@dataclass(frozen=True, kw_only=True)
class TrainingFlags:
    """Every field is a flag of the command line."""

    resume: bool = False
    """go on from the newest checkpoint in the folder of the run; where there is none, start"""
    checkpoint_every: int | None = None
    """steps between checkpoints, beside those after every evaluation"""
    keep_checkpoints: int = 2
    """newest checkpoints that are kept, beside the best one"""
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
    """autocast of all but the solves; None leaves it to accelerate launch, else it is off"""
    trackers: tuple[str, ...] = ()
    """where metrics go as well, such as tensorboard and wandb"""

    def plan_options(self) -> dict[str, Any]:
        """The part of the settings that is the same for every `Plan`."""
        names = ("checkpoint_every", "patience", "on_divergence", "accumulate", "clip", "ema")
        names += ("device", "precision", "trackers")
        return {"keep": self.keep_checkpoints, **{name: getattr(self, name) for name in names}}
