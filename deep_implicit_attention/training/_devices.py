"""Where a training runs: devices, processes and precision, all by way of accelerate."""

from __future__ import annotations

import importlib.util
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ._extras import require
from ._files import write_whole
from ._plan import Plan

_WANDB_ID = "wandb-id.txt"


class Devices:
    """The process's device and its part in the work; a thin layer over `accelerate.Accelerator`.

    Run by `accelerate launch`, a training takes the number of processes, DDP or FSDP (version 2)
    and the precision from there.

    Args:
        plan: device, precision and trackers.
        folder: of the run; trackers write their files in it.
    """

    def __init__(self, plan: Plan, folder: Path) -> None:
        self.folder, self.trackers = folder, plan.trackers
        accelerate = require("accelerate", "train")
        known = require("accelerate.tracking", "train").LOGGER_TYPE_TO_CLASS
        for name in plan.trackers:
            if name not in known:
                raise ValueError(f"unknown tracker {name!r}; there are {', '.join(known)}")
            if importlib.util.find_spec(name) is None:
                raise ModuleNotFoundError(
                    f"the tracker {name!r} is not installed; pip install {name}", name=name
                )
        _forget_settings(accelerate)
        self.accelerator = accelerate.Accelerator(
            cpu=plan.device == "cpu",
            mixed_precision=plan.precision,
            log_with=list(plan.trackers) or None,
            project_dir=folder / "trackers",
        )
        self._refuse_what_does_not_work()

    @property
    def device(self) -> torch.device:
        """This process's device."""
        return self.accelerator.device

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.accelerator.is_main_process

    @property
    def rank(self) -> int:
        """This process's number."""
        return self.accelerator.process_index

    def _refuse_what_does_not_work(self) -> None:
        accelerator = self.accelerator
        if accelerator.distributed_type == "FSDP" and not accelerator.is_fsdp2:
            raise ValueError(
                "FSDP of version 1 is not supported: use accelerate launch --fsdp_version 2"
            )
        if accelerator.gradient_accumulation_steps != 1:
            raise ValueError(
                "accelerate launch --gradient_accumulation_steps is not supported: use accumulate"
            )
        if accelerator.mixed_precision == "fp16" and self.device.type == "cpu":
            raise ValueError(
                "precision fp16 needs an accelerator, the device is the cpu: use bf16 or no"
            )

    def prepare(
        self, model: nn.Module, optimizer: torch.optim.Optimizer
    ) -> tuple[nn.Module, torch.optim.Optimizer]:
        """Model and optimizer, moved and wrapped for device, processes and precision.

        A model that is sharded already (`torch.distributed.fsdp.fully_shard`) stays as it is.
        """
        if any(hasattr(p, "full_tensor") for p in model.parameters()):
            return model, self.accelerator.prepare_optimizer(optimizer, device_placement=False)
        self.release(model)  # from a trainer that was made, but has not trained
        return self.accelerator.prepare(model, optimizer)

    def release(self, model: nn.Module) -> None:
        """Take autocast out of `model` again."""
        plain = self.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
        vars(plain).pop("_is_accelerate_prepared", None)

    def rows(self, count: int, accumulate: int) -> int:
        """Rows in one of the parts of a batch of `count`; `ValueError` if they cannot be equal."""
        processes = self.accelerator.num_processes
        if count % (processes * accumulate) or not count:
            raise ValueError(
                f"a batch of {count} rows cannot be cut into equal parts for {processes} "
                f"process{'es' if processes > 1 else ''} and accumulate {accumulate}"
            )
        return count // (processes * accumulate)

    def parts(self, batch: Any, accumulate: int) -> Iterator[Any]:
        """This process's rows of `batch` in `accumulate` parts, each moved to its device."""
        leaves, structure = pytree.tree_flatten(batch)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        if any(tensor.dim() == 0 for tensor in tensors):
            raise ValueError(
                "the tensors of a batch must have rows, got one without dimensions: give a number "
                "as such, or repeated for every row"
            )
        rows = {len(tensor) for tensor in tensors}
        if len(rows) != 1:
            raise ValueError(f"the tensors of a batch must have the same rows, got {sorted(rows)}")
        size = self.rows(rows.pop(), accumulate)
        for k in range(accumulate):
            start = (self.rank * accumulate + k) * size
            some = [
                leaf[start : start + size].to(self.device) if isinstance(leaf, Tensor) else leaf
                for leaf in leaves
            ]
            yield pytree.tree_unflatten(some, structure)

    def combine(self, statistics: list[dict[str, float]]) -> dict[str, float]:
        """Means over the parts of a batch, on all processes; of "residual" the largest."""
        names = list(statistics[0])
        if any(part.keys() != statistics[0].keys() for part in statistics):
            known = "; ".join(", ".join(part) for part in statistics)
            raise ValueError(f"all parts of a batch must give means of the same names, got {known}")
        dtype = torch.float32 if self.device.type == "mps" else torch.float64
        table = torch.tensor(
            [[part[name] for name in names] for part in statistics],
            dtype=dtype,
            device=self.device,
        )
        table = self.accelerator.gather(table).cpu()
        return {
            name: (column.max() if name == "residual" else column.mean()).item()
            for name, column in zip(names, table.T, strict=True)
        }

    def collect(self, states: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors of every process, with names `0/…`, `1/…` by its number."""
        gather = require("accelerate.utils", "train").gather_object
        every = gather([dict(states)])
        return {f"{rank}/{k}": v for rank, part in enumerate(every) for k, v in part.items()}

    def agree(self, thing: Any) -> Any:
        """The main process's `thing`, on every process."""
        if self.accelerator.num_processes == 1:
            return thing
        return require("accelerate.utils", "train").broadcast_object_list([thing])[0]

    @contextmanager
    def unsharded(self, model: nn.Module) -> Iterator[None]:
        """All parameters whole on every process, so that parts of the model can be called."""
        shards = [module for module in model.modules() if hasattr(module, "unshard")]
        for module in shards:
            module.unshard()  # type: ignore[operator]
        try:
            yield
        finally:
            for module in shards:
                module.reshard()  # type: ignore[operator]

    def start_trackers(self, config: Mapping[str, Any], step: int) -> None:
        """Begin to track, or go on after `step`.

        Steps after it that were tracked before a crash come again, the same. TensorBoard replaces
        them; Weights & Biases keeps the first ones, in the run whose id is kept in the folder.
        """
        plain = {
            k: v if isinstance(v, (bool, int, float, str)) else str(v) for k, v in config.items()
        }
        options: dict[str, Any] = {"tensorboard": {"purge_step": step + 1}}
        if "wandb" in self.trackers:
            own = {"id": self._wandb_id(new=step == 0), "resume": "allow"}
            options["wandb"] = {"dir": str(self.folder), "name": self.folder.name, **own}
        self.accelerator.init_trackers("deep-implicit-attention", plain, options)

    def _wandb_id(self, new: bool) -> str:
        """The id kept in the folder, for a training that goes on; else a new one."""
        path = self.folder / _WANDB_ID
        if new or not path.exists():
            write_whole(path, f"{uuid.uuid4().hex}\n".encode())
        return path.read_text().strip()

    def track(self, record: Mapping[str, Any], step: int) -> None:
        """Send numbers and texts to the trackers."""
        self.accelerator.log(dict(record), step=step)

    def stop_trackers(self) -> None:
        """Let the trackers finish what they write."""
        for tracker in self.accelerator.trackers:
            tracker.finish()


def _forget_settings(accelerate: Any) -> None:
    """Let a second training of this process choose device and precision for itself.

    accelerate keeps both for the life of a process and refuses others. With several processes they
    were chosen by `accelerate launch` and hold.
    """
    state = accelerate.state.AcceleratorState
    if state._shared_state and state().num_processes == 1:
        state._reset_state(reset_partial_state=True)
