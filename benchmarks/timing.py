"""Times, memory and ratios, taken alike in all benchmarks of speed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from deep_implicit_attention.attention._memory import release

Respond = Callable[[Tensor], Tensor]
Run = Callable[[], Any]


def forward(respond: Respond, x: Tensor) -> Run:
    """The response without gradients."""

    def run() -> None:
        with torch.no_grad():
            respond(x)

    return run


def both(respond: Respond, x: Tensor, weights: list[nn.Parameter]) -> Run:
    """The response and its gradient by x and all weights."""

    def run() -> None:
        for weight in weights:
            weight.grad = None
        respond(x.detach().requires_grad_()).square().sum().backward()

    return run


def take_turns(
    runs: dict[str, Run], turns: int, clock: Callable[[], float] = time.process_time
) -> dict[str, float]:
    """Median seconds of each, all of them once before and then in turns.

    The clock counts CPU time: with one thread that is what a quiet machine would take, whatever
    else is running.
    """
    for run in runs.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(turns):
        for name, run in runs.items():
            started = clock()
            run()
            times[name].append(clock() - started)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def saved_bytes(run: Run) -> int:
    """Bytes of the distinct storages that autograd keeps for backward."""
    sizes: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        run()
    return sum(sizes.values())


def peak_bytes(run: Run) -> int | None:
    """How far resident memory grows while `run` runs; None where the system does not tell."""
    release()
    try:
        Path("/proc/self/clear_refs").write_text("5")
        before = _resident("VmRSS")
        run()
        return max(0, _resident("VmHWM") - before)
    except OSError:
        return None


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


class Largest(TorchDispatchMode):
    """Inside, `elements` is the size of the largest tensor that any operation has returned."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in pytree.tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.elements = max(self.elements, leaf.numel())
        return out
