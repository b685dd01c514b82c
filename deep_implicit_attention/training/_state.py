"""What a checkpoint of a `Trainer` holds: `pack` gathers it, `unpack` puts it back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ._checkpoint import (
    Checkpoint,
    load_like,
    load_model,
    load_optimizer,
    optimizer_tensors,
    whole_tensors,
)
from ._course import Course
from ._random import derived_seed, random_states, restore_random_states
from ._watch import Watch

if TYPE_CHECKING:
    from ._trainer import Trainer

Parts = dict[str, dict[str, Tensor]]

# A training that is resumed with others is another training.
_FIXED = (
    "steps", "evaluate_every", "seed", "warmup", "accumulate", "clip", "ema", "patience",
    "precision",
)  # fmt: skip
# Options of optimizers with which they keep another state.
_KEPT = ("amsgrad", "centered", "momentum")


def pack(trainer: Trainer) -> tuple[Parts, dict[str, Any]]:
    """Tensors by part and name, and all else as JSON. Every process has to ask."""
    devices, model = trainer.devices, trainer.plain
    parts = {
        "model": whole_tensors(model.state_dict()),
        "optimizer": optimizer_tensors(model, trainer.plain_optimizer),
        "random": devices.collect(random_states(devices.device)),
        "generator": {"state": trainer.generator.get_state()},
        "task": whole_tensors(trainer.task.state()),
    }
    if trainer.average:
        with trainer.average.in_model():
            parts["average"] = whole_tensors(model.state_dict())
        parts["wide average"] = whole_tensors(trainer.average.wide())
    trainer.course.metrics_size = trainer.run.metrics_size()
    scaler = devices.accelerator.scaler
    state = {
        "fixed": _fixed(trainer),
        "course": asdict(trainer.course),
        "watch": trainer.watch.state(),
        "scaler": scaler.state_dict() if scaler else None,
    }
    return parts, state


def unpack(trainer: Trainer, checkpoint: Checkpoint) -> None:
    """Put back what `pack` gathered; `ValueError` for other settings or another model, and for
    what is damaged or of another version."""
    try:
        _put_back(trainer, checkpoint)
    except (AttributeError, KeyError, TypeError) as error:
        raise _strange(checkpoint, error) from error


def _put_back(trainer: Trainer, checkpoint: Checkpoint) -> None:
    path, parts, state = checkpoint.path, checkpoint.parts, checkpoint.state
    course, watch = _whole(checkpoint)
    for name, value in _fixed(trainer).items():
        before = state["fixed"].get(name, value)  # earlier versions wrote fewer
        if before != value:
            raise ValueError(
                f"{path} was written with {name} {before}, now it is {value}: resume with the "
                "settings of the start"
            )
    model = trainer.plain
    if trainer.average:
        load_model(model, parts["average"], path)
        trainer.average.assign()
        load_like(trainer.average.wide(), parts.get("wide average", {}))
    load_model(model, parts["model"], path)
    load_optimizer(model, trainer.plain_optimizer, parts.get("optimizer", {}), path)
    trainer.course, trainer.watch = course, watch
    scaler = trainer.devices.accelerator.scaler
    if scaler and state["scaler"]:
        scaler.load_state_dict(state["scaler"])
    trainer.generator.set_state(parts["generator"]["state"])
    trainer.task.load_state(parts.get("task", {}))
    rank = trainer.devices.rank
    own = {
        name.removeprefix(f"{rank}/"): value
        for name, value in parts["random"].items()
        if name.startswith(f"{rank}/")
    }
    if own:
        restore_random_states(own, trainer.devices.device)
    else:  # there are more processes than there were
        torch.manual_seed(derived_seed(trainer.plan.seed, 1, rank, trainer.course.step))


def weights(parts: Mapping[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    """The weights to keep: averaged, where there is an average."""
    return parts.get("average", parts["model"])


def _whole(checkpoint: Checkpoint) -> tuple[Course, Watch]:
    """Course and watch of a checkpoint; `ValueError` if anything that it needs is missing."""
    state, parts = checkpoint.state, checkpoint.parts
    try:
        missing = {"model", "generator", "random"} - parts.keys()
        missing |= {"fixed", "course", "watch"} - state.keys()
        if missing:
            raise ValueError(f"it lacks {', '.join(sorted(missing))}")
        return Course(**state["course"]), Watch(**state["watch"])
    except ValueError as error:
        raise _strange(checkpoint, error) from error


def _strange(checkpoint: Checkpoint, error: Exception) -> ValueError:
    why = f"it lacks {error}" if isinstance(error, KeyError) else error
    return ValueError(
        f"{checkpoint.path} is damaged, or of another version: {why}; delete it to go on from the "
        "one before"
    )


def _fixed(trainer: Trainer) -> dict[str, Any]:
    fixed = {name: getattr(trainer.plan, name) for name in _FIXED}
    optimizer = trainer.plain_optimizer
    kind = type(optimizer).__name__
    if having := [name for name in _KEPT if optimizer.defaults.get(name)]:
        kind += f" with {', '.join(having)}"
    return {**fixed, "learning rates": trainer.rates, "optimizer": kind}
