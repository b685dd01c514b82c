"""Checkpoints: one file each with all that a training needs to go on, written whole or not at all.

A checkpoint is a safetensors file. Its metadata hold the step, the sums since the last evaluation
and other numbers as JSON, so nothing in a file from a stranger is ever executed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from ._files import check_readable, write_whole

_FORMAT = "deep-implicit-attention training 1"
_NAME = re.compile(r"step-(\d+)\.safetensors")


Parts = Mapping[str, Mapping[str, Tensor]]


@dataclass(frozen=True)
class Checkpoint:
    """The contents of one file: tensors by part and name, and what is no tensor."""

    path: Path
    parts: dict[str, dict[str, Tensor]]
    state: dict[str, Any]


class Checkpoints:
    """The checkpoints of a run, in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, step: int) -> Path:
        """Where the checkpoint of a step is."""
        return self.folder / f"step-{step:08d}.safetensors"

    def steps(self) -> list[int]:
        """The steps there are checkpoints of, in order."""
        if not self.folder.is_dir():
            return []
        found = (_NAME.fullmatch(path.name) for path in self.folder.iterdir())
        return sorted(int(match[1]) for match in found if match)

    def write(self, step: int, parts: Parts, state: Mapping[str, Any]) -> None:
        """Write the checkpoint of a step; a tensor is called `part/name` in the file."""
        self.folder.mkdir(parents=True, exist_ok=True)
        tensors = {f"{part}/{k}": v for part, some in parts.items() for k, v in some.items()}
        # One entry: safetensors writes several in an order of chance.
        content = json.dumps({"format": _FORMAT, "state": state})
        write_whole(self.path(step), save(tensors, {"training": content}))

    def prune(self, keep: int, best: int | None) -> None:
        """Delete all but the newest `keep` checkpoints and the one of step `best`."""
        for step in self.steps()[:-keep]:
            if step != best:
                self.path(step).unlink()

    def clear(self) -> None:
        """Delete all checkpoints, whole or half written, and the folder if it is empty then."""
        if not self.folder.is_dir():
            return
        for path in self.folder.iterdir():
            if _NAME.fullmatch(path.name.removesuffix(".part")):
                path.unlink()
        if not any(self.folder.iterdir()):
            self.folder.rmdir()

    def read(self, step: int) -> Checkpoint:
        """The checkpoint of a step; `ValueError` for a file that is damaged or something else."""
        path = self.path(step)
        check_readable(path)
        try:
            with safe_open(path, "pt") as file:
                content = json.loads((file.metadata() or {}).get("training", "{}"))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if not isinstance(content, dict):
                raise ValueError(f"its metadata must be an object, got {type(content).__name__}")
        except (SafetensorError, RuntimeError, ValueError) as error:
            raise ValueError(
                f"{path} is damaged, or no checkpoint: {error}; delete it to go on from the one "
                "before"
            ) from error
        if content.get("format") != _FORMAT:
            raise ValueError(
                f"{path} is not a checkpoint of a training: its format is "
                f"{content.get('format', 'not given')!r}, expected {_FORMAT!r}"
            )
        parts: dict[str, dict[str, Tensor]] = {}
        for long, tensor in tensors.items():
            part, name = long.split("/", 1)
            parts.setdefault(part, {})[name] = tensor
        return Checkpoint(path, parts, content.get("state", {}))


def whole_tensors(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Copies of the tensors of a state dict on the CPU, gathered from all processes if sharded.

    Copies, because safetensors refuses tensors that share memory, as tied weights do.
    """
    result = {}
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"the state {name!r} must be a tensor, got {type(value).__name__}")
        value = value.detach()
        full = value.full_tensor() if _sharded(value) else value  # type: ignore[operator]
        result[name] = full.to("cpu", copy=True).contiguous()
    return result


@torch.no_grad()
def load_model(model: nn.Module, tensors: Mapping[str, Tensor], source: Path) -> None:
    """Put whole tensors into `model`, sharded or not; `ValueError` if they are another model's."""
    own = model.state_dict()
    problems = [f"{name} is missing" for name in own if name not in tensors]
    problems += [f"{name} is unknown" for name in tensors if name not in own]
    problems += [
        f"{name} is {_describe(value)}, expected {_describe(own[name])}"
        for name, value in tensors.items()
        if name in own and (value.shape != own[name].shape or value.dtype != own[name].dtype)
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ValueError(f"{source} is of another model: {'; '.join(problems[:3])}{more}")
    load_like(own, tensors)


@torch.no_grad()
def load_like(targets: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Copy whole tensors to those of the same names that there are, sharded or not."""
    for name, target in targets.items():
        if name in tensors:
            target.copy_(_like(target, tensors[name]))


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The state of an optimizer by names of parameters, `weight/exp_avg`, whole and on the CPU."""
    found = {
        f"{name}/{key}": value if isinstance(value, Tensor) else torch.tensor(value, device="cpu")
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
        if value is not None
    }
    return whole_tensors(found)


def load_optimizer(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    tensors: Mapping[str, Tensor],
    source: Path,
) -> None:
    """Put such a state back; settings such as betas stay the optimizer's own."""
    parameters = dict(model.named_parameters())
    numbers = {
        id(p): number
        for number, p in enumerate(p for group in optimizer.param_groups for p in group["params"])
    }
    states: dict[int, dict[str, Tensor]] = {}
    for path, value in tensors.items():
        name, key = path.rsplit("/", 1)
        parameter = parameters.get(name)
        if parameter is None or id(parameter) not in numbers:
            raise ValueError(f"{source} is of another model: its optimizer has the unknown {name}")
        states.setdefault(numbers[id(parameter)], {})[key] = (
            _like(parameter, value) if key != "step" and value.shape == parameter.shape else value
        )
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": states, "param_groups": groups})


def _like(target: Tensor, value: Tensor) -> Tensor:
    """`value` on the device of `target`, sharded as it is."""
    value = value.to(target.device)
    if not _sharded(target):
        return value
    from torch.distributed.tensor import distribute_tensor

    # Every process has read the whole tensor, so each keeps its part and nothing is sent.
    mesh, placements = target.device_mesh, target.placements  # type: ignore[attr-defined]
    return distribute_tensor(value, mesh, placements, src_data_rank=None)


def _sharded(value: Tensor) -> bool:
    """Whether `value` is a DTensor, whose import takes long."""
    return hasattr(value, "full_tensor")


def _describe(value: Tensor) -> str:
    return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
