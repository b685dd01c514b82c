"""Random numbers that a run can take up again where it was killed."""

from __future__ import annotations

import os

import numpy as np
import torch
from torch import Tensor


def seed_everything(seed: int) -> None:
    """The same seed gives the same run on one CPU configuration, bit for bit."""
    torch.manual_seed(seed)
    # Without a workspace of fixed size cuBLAS is not deterministic, and torch refuses to use it.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)


def derived_seed(*numbers: int) -> int:
    """A seed that is a function of several whole numbers from 0, unlike for unlike ones."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


def random_states(device: torch.device) -> dict[str, Tensor]:
    """The states of torch's own generators: the CPU's and that of `device`."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    elif device.type == "mps":
        states["mps"] = torch.mps.get_rng_state()
    return states


def restore_random_states(states: dict[str, Tensor], device: torch.device) -> None:
    """Put them back; the state of a device that is not in use here is left out."""
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
    elif device.type == "mps" and "mps" in states:
        torch.mps.set_rng_state(states["mps"])
