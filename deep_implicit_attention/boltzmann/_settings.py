"""The parameters of a machine that its learning needs, checked."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

import torch
from torch import Generator

from ..solvers._validate import check_count, check_number
from ._ascent import Schedule

Method = Literal["exact", "independent", "naive", "tap", "adaptive_tap", "pseudolikelihood", "pcd"]


@dataclass(frozen=True)
class Settings:
    """What of a machine's parameters the learning needs; see `BoltzmannMachine`."""

    method: Method
    num_hidden: int
    l2: float
    pseudocount: float
    shrinkage: float | None
    tol: float
    max_iter: int
    num_updates: int
    learning_rate: float
    num_chains: int
    batch_size: int | None
    seed: int

    @classmethod
    def of(cls, machine: Any, seed: int) -> Settings:
        """Those of a machine, or `ValueError` or `TypeError` for one out of range."""
        given = {field.name: getattr(machine, field.name) for field in fields(cls)[:-1]}
        settings = cls(seed=seed, **given)
        settings.check()
        return settings

    def check(self) -> None:
        """Raise `ValueError` or `TypeError` for a parameter out of range."""
        if self.method not in get_args(Method):
            raise ValueError(f"method must be one of {get_args(Method)}, got {self.method!r}")
        for name in ("num_hidden", "max_iter", "num_updates", "num_chains", "batch_size"):
            value = getattr(self, name)
            if name != "batch_size" or value is not None:
                check_count(name, value, minimum=0 if name == "num_hidden" else 1)
        for name in ("l2", "pseudocount", "tol", "learning_rate"):
            check_number(name, getattr(self, name), minimum=0.0)
        if self.shrinkage is not None:
            check_number("shrinkage", self.shrinkage, minimum=0.0)
            if self.shrinkage > 1:
                raise ValueError(f"shrinkage must be at most 1, got {self.shrinkage}")
        if self.num_hidden and self.method in ("independent", "pseudolikelihood"):
            raise ValueError(
                f"num_hidden must be 0 with method={self.method!r}, got {self.num_hidden}"
            )

    @property
    def needs_rows(self) -> bool:
        """Whether moments of the data are not enough."""
        return self.method == "pseudolikelihood" or self.num_hidden > 0

    def generator(self, device: torch.device) -> Generator:
        """A fresh one; the same for the same seed."""
        return Generator(device).manual_seed(self.seed)

    def schedule(self) -> Schedule:
        """Of gradient ascent."""
        return Schedule(self.num_updates, self.learning_rate, self.l2, self.batch_size)
