"""The one training loop of the house. It knows nothing of images or text."""

from __future__ import annotations

import inspect
import math
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from . import _state
from ._course import Course
from ._devices import Devices
from ._ema import MovingAverage
from ._plan import Plan
from ._progress import Progress
from ._random import derived_seed
from ._run import Run
from ._task import Task, worst_of
from ._watch import DivergenceWarning, Watch

_SOLVER = ("solver_steps", "failed")  # means of the solvers' work, not of the learning


class Trainer:
    """Train `model` on `task` as `plan` says, in the folder of `run`.

    A step: batch → rows of this process, in parts → loss and gradient of each → sum, clipped →
    optimizer at the plan's rate. An evaluation adds a line to the metrics and writes a checkpoint;
    the weights with the smallest `task.monitor` so far are the run's weights. The steps, the
    evaluations and the files do not depend on how often the training was killed and resumed: on
    one CPU configuration the weights are the same bit for bit.

    Seeds torch's own generators. Randomness from elsewhere (`random`, numpy) is not restored.

    Args:
        model: parameters on any device; wrapped, never replaced.
        optimizer: of its parameters; the learning rates in it are the largest ones.
        task: batches, loss, measurements.
        plan: length and all else.
        run: where metrics, weights and checkpoints go; started already.
        progress: what is told while training; without it, divergence is a `DivergenceWarning`.
        generator: of the batches; the same on every process. Else one is seeded by the plan.
        devices: made by the caller if it needs to know its process before; else made here.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        task: Task,
        plan: Plan,
        run: Run,
        progress: Progress | None = None,
        *,
        generator: torch.Generator | None = None,
        devices: Devices | None = None,
    ) -> None:
        if task.batches < 1:
            raise ValueError(f"the task must have at least one batch, got {task.batches}")
        _check_optimizer(optimizer, model)
        self.task, self.plan, self.run, self.progress = task, plan, run, progress
        self.devices = devices or Devices(plan, run.folder)
        self.plain_optimizer = optimizer
        self.model, self.optimizer = self.devices.prepare(model, optimizer)
        self.plain = self.devices.accelerator.unwrap_model(self.model)
        self.rates = [float(group["lr"]) for group in optimizer.param_groups]
        self.average = None if plan.ema is None else MovingAverage(self.plain, plan.ema)
        self.generator = generator or torch.Generator().manual_seed(derived_seed(plan.seed, 0))
        self.course, self.watch = Course(), Watch()
        self._started, self._trained = 0.0, False

    def train(self, *, resume: bool = False) -> str:
        """Train to the end and return it: "finished", "early" or "diverged"; once.

        With `resume`, go on from the newest checkpoint; where there is none, from the start.

        Raises:
            RuntimeError: called again, when weights and optimizer are no longer those of a start.
            FloatingPointError: the loss or a weight is not finite; metrics and checkpoints are as
                they were after the last evaluation.
            ValueError: a checkpoint that is damaged, or of another model; batches that cannot be
                cut into equal parts.
        """
        if self._trained:
            raise RuntimeError(
                "this Trainer has trained already: make another one, with a new model and "
                "optimizer, and let it train with resume=True to go on, or without to start anew"
            )
        self._trained = True
        try:
            self._prepare(resume)
            while not self.course.ending:
                self._step()
                evaluate = self.plan.evaluation_due(self.course.step) or self.course.ending
                if evaluate or self.plan.checkpoint_due(self.course.step):
                    self._check_weights()
                if evaluate:
                    self._evaluate()
                if self.plan.checkpoint_due(self.course.step) or self.course.ending:
                    self._save()
        finally:
            self.devices.stop_trackers()
            self.devices.release(self.model)
        return self.course.ending

    def _prepare(self, resume: bool) -> None:
        """Go to the start or back to the newest checkpoint, and say that it begins."""
        steps = self.run.checkpoints.steps() if resume else []
        if steps:
            self._restore(steps[-1])
        else:
            self._begin()
        self._started = time.perf_counter()
        if self.devices.is_main:
            self.devices.start_trackers(self.run.config(), self.course.step)
        if self.progress:
            rounds = math.ceil(self.plan.steps / self.plan.evaluate_every)
            self.progress.start(rounds, self.plan.evaluate_every, self.course.batches)

    def _step(self) -> None:
        """One step of the optimizer on one batch."""
        course, plan = self.course, self.plan
        epoch, index = divmod(course.step, self.task.batches)
        batch = self.task.batch(epoch, index, self.generator)
        for group, largest in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = largest * plan.rate(course.step)
        self.model.train()
        self.optimizer.zero_grad()
        self.model.zero_grad()  # of what the optimizer leaves alone, too: the clip counts it
        statistics = []
        for k, part in enumerate(self.devices.parts(batch, plan.accumulate), start=1):
            whole = k == plan.accumulate  # only then the processes exchange gradients
            with nullcontext() if whole else self.devices.accelerator.no_sync(self.model):
                outcome = self.task.loss(self.model, part)
                self.devices.accelerator.backward(outcome.loss / plan.accumulate)
            statistics.append(outcome.statistics())
        if plan.clip is not None:
            self.devices.accelerator.clip_grad_norm_(self.model.parameters(), plan.clip)
        self.optimizer.step()
        course.step += 1
        if self.average:
            self.average.update(course.step)
        self._note(self.devices.combine(statistics))

    def _note(self, found: dict[str, float]) -> None:
        """Add the statistics of a step to those since the last evaluation."""
        course = self.course
        residual = found.pop("residual", 0.0)
        course.residual = worst_of(course.residual, residual)
        course.add(found)
        if self.progress:
            self.progress.batch(self._round(), course.means(), course.residual)
        if not math.isfinite(found["loss"]):
            raise FloatingPointError(
                f"the training loss is not finite in step {course.step} ({self._where()}): "
                f"{self.task.advice}"
            )
        self._heed(self.watch.step(found["loss"], found.get("failed", 0.0), residual))

    def _check_weights(self) -> None:
        """Raise where a step has left what is no number though the loss was, before it is saved."""
        for name, parameter in self.plain.named_parameters():
            if not bool(torch.isfinite(parameter).all()):
                raise FloatingPointError(
                    f"{name} is not finite after step {self.course.step} ({self._where()}), though "
                    f"the loss was: its gradient was not, or too large; {self.task.advice}"
                )

    def _evaluate(self) -> None:
        """Measure the model, see whether it is the best so far or the last, log it."""
        course, plan, name = self.course, self.plan, self.task.monitor
        with self._aside():
            found = {k: float(v) for k, v in self.task.evaluate(self.plain).items()}
            measured = self.devices.agree(found)
            # From logits that are not finite nothing can be drawn.
            sound = math.isfinite(measured.get(name, math.nan))
            sample = self.task.sample(self.plain) if sound else None
        if name not in measured:
            known = ", ".join(measured)
            raise ValueError(f"the evaluation must give {name!r}, the monitor; it gave {known}")
        self._heed(self.watch.evaluation(measured.get("spectral_radius", 0.0)))
        if measured[name] < course.best:
            course.best, course.best_step, course.stale = measured[name], course.step, 0
            course.bests.append(course.step)
        else:
            course.stale += 1
        if course.step == plan.steps:
            course.ending = course.ending or "finished"
        elif plan.patience is not None and course.stale >= plan.patience:
            course.ending = course.ending or "early"
        self._log(measured, sample)
        course.start_anew()

    def _log(self, measured: dict[str, float], sample: str | None) -> None:
        """A line of metrics for the steps since the last evaluation and what was measured."""
        course = self.course
        self._clock()
        means = course.means()
        record: dict[str, Any] = {"epoch": self._epoch(), "step": course.step}
        record |= {k if k in _SOLVER else f"train_{k}": value for k, value in means.items()}
        record |= {"residual": course.residual, **measured, "seconds": round(course.seconds, 3)}
        if course.signs:
            record["signs_of_divergence"] = list(course.signs)
        if sample is not None:
            record["sample"] = sample
        if self.devices.is_main:
            self.run.log(**record)
            self.devices.track(record, course.step)
        if self.progress:
            self.progress.epoch(record)
            if sample is not None:
                self.progress.say(sample)

    def _heed(self, sign: str | None) -> None:
        """Say that the training starts to diverge, and end it if the plan says so."""
        if sign is None:
            return
        course = self.course
        course.signs.append(sign)
        message = f"step {course.step} ({self._where()}): {sign}; {self.task.advice}"
        if self.progress:
            self.progress.say(message)
        elif self.devices.is_main:
            warnings.warn(message, DivergenceWarning, stacklevel=4)
        if self.plan.on_divergence == "stop":
            course.ending = "diverged"

    def _save(self) -> None:
        """Write a checkpoint, then, if this step is the best so far, the run's weights.

        In this order, because the weights can be made from the checkpoint after a crash.
        """
        self._clock()
        parts, state = _state.pack(self)
        if not self.devices.is_main:
            return
        course = self.course
        self.run.checkpoints.write(course.step, parts, state)
        if course.best_step == course.step:
            self.run.save_weights(_state.weights(parts), self._epoch(), course.step)
        # With the best that the oldest kept one knows, one can go on from any of them.
        oldest = self.run.checkpoints.steps()[-self.plan.keep :][0]
        self.run.checkpoints.prune(self.plan.keep, course.best_until(oldest))

    def _begin(self) -> None:
        """Start from the first step, whatever an earlier training left."""
        if self.devices.is_main:
            self.run.checkpoints.clear()
            self.run.cut_metrics(0)
        torch.manual_seed(derived_seed(self.plan.seed, 1, self.devices.rank))

    def _restore(self, step: int) -> None:
        """Go back to the checkpoint of a step; metrics and the run's weights, too."""
        _state.unpack(self, self.run.checkpoints.read(step))
        if not self.devices.is_main:
            return
        self.run.cut_metrics(self.course.metrics_size)
        best = self.course.best_step
        if best is None:
            self.run.remove_weights()
        elif best != self.run.saved_step():  # the crash came in between
            kept = self.run.checkpoints.read(best)
            self.run.save_weights(_state.weights(kept.parts), self._epoch(best), best)

    @contextmanager
    def _aside(self) -> Iterator[None]:
        """Whole, averaged weights in eval mode, and random numbers that training does not miss."""
        average = self.average.in_model() if self.average else nullcontext()
        cuda = [self.devices.device] if self.devices.device.type == "cuda" else []
        with torch.random.fork_rng(cuda), average, self.devices.unsharded(self.plain):
            torch.manual_seed(derived_seed(self.plan.seed, 2, self.course.step))
            self.plain.eval()
            yield

    def _clock(self) -> None:
        """Add the time since the last call to the seconds of this round."""
        now = time.perf_counter()
        self.course.seconds += now - self._started
        self._started = now

    def _epoch(self, step: int | None = None) -> int:
        """The epoch, counted from 1, that `step` is the end or a part of."""
        return math.ceil((step or self.course.step) / self.task.batches)

    def _round(self) -> int:
        return math.ceil(self.course.step / self.plan.evaluate_every)

    def _where(self) -> str:
        epoch, index = divmod(self.course.step - 1, self.task.batches)
        return f"epoch {epoch + 1}, batch {index + 1}"


def _check_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Raise for parameters that no checkpoint would know, and steps that this loop cannot do."""
    own = {id(parameter) for parameter in model.parameters()}
    if any(id(p) not in own for group in optimizer.param_groups for p in group["params"]):
        raise ValueError(
            "the optimizer has parameters that are not the model's: make it from those of this "
            "model, and put what else is to be learned into the model"
        )
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ValueError(
            f"{type(optimizer).__name__} evaluates the loss several times a step, by a closure, "
            "which this loop does not have: take another optimizer"
        )
