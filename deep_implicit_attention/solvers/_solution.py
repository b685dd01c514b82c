"""What a solver gives back: the value, the evidence for it, and a status in words."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from enum import StrEnum
from typing import Any

import numpy as np
import torch
from torch import Tensor


class Status(StrEnum):
    """How a solve ended for one sample; `status.sentence` explains it."""

    sentence: str

    def __new__(cls, value: str, sentence: str) -> Status:
        member = str.__new__(cls, value)
        member._value_ = value
        member.sentence = sentence
        return member

    CONVERGED = ("converged", "The residual is within the tolerance.")
    MAX_ITER = (
        "max_iter",
        "The step limit was reached before the tolerance: raise max_iter, loosen tol (float32 "
        "rarely gets below 1e-6), or try another solver. Where the residual does not fall at all "
        "no fixed point may be in reach: make the couplings weaker.",
    )
    DIVERGED = (
        "diverged",
        "The iterates grew instead of settling: make the couplings weaker (smaller "
        "initialisation, weight normalisation, a Jacobian penalty in the loss), scale the sources "
        "down, add damping, or try broyden or newton_krylov. The best iterate is returned.",
    )
    NONFINITE = (
        "nonfinite",
        "NaN or infinity came up: look at the input and the parameters of this sample's map.",
    )
    INDEFINITE = (
        "indefinite",
        "No distribution stands behind this fixed point: make the couplings weaker or the prior "
        "narrower.",
    )
    FIXED_STEPS = (
        "fixed_steps",
        "A fixed number of steps was asked for; the residual, if measured, says how far "
        "equilibrium is.",
    )

    @property
    def code(self) -> int:
        """The status as an integer, for tensors."""
        return _CODES[self]


_MEMBERS = list(Status)
_CODES = {status: code for code, status in enumerate(_MEMBERS)}
_CONVERGED = Status.CONVERGED.code


@dataclass(frozen=True)
class Solution:
    """The result of a batched solve, with the evidence for every sample.

    Unpacks as ``value, solution = ...``, so that a call can take both at once.

    Attributes:
        value: the solution; `(B, n)` from a solver, the structure of `z0` from `fixed_point`.
        residual: `(B,)`, of exactly this `value` on the plain (undamped) map:
            ‖f(z) − z‖ / ‖f(z)‖ with ``stop_mode="rel"``, ‖f(z) − z‖ with ``"abs"``; for `gmres`
            ‖b − A x‖ / ‖b‖. Infinite where the map was never finite, NaN where that of a fixed
            number of steps was not measured.
        steps: `(B,)`, iterates at which the map was evaluated until the sample was done (for
            `gmres`: Krylov vectors).
        converged: `(B,)`, boolean. A state whose residual is small only beside its own length, far
            out where f(z) − z is bounded, does not count.
        codes: `(B,)`, the integer codes behind `status`.
        trace: `(steps, B)`, residual at each step; a finished sample repeats its last entry.
        residual_norm: `(B,)`, the absolute ‖f(z) − z‖ (‖b − A x‖), whatever the stop mode.
        note: what else there is to say about a failure, for the warning.
    """

    value: Any
    residual: Tensor
    steps: Tensor
    converged: Tensor
    codes: Tensor
    trace: Tensor
    residual_norm: Tensor
    note: str = ""

    @property
    def status(self) -> tuple[Status, ...]:
        """One `Status` per sample."""
        return tuple(_MEMBERS[code] for code in self.codes.tolist())

    def __getattr__(self, name: str) -> Any:
        """What `sound` has left to be made when it is asked for."""
        known = self.__dict__
        if name not in _LATER or _ROWS not in known:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        with torch.inference_mode(False):
            made = known[name] = _LATER[name](known[_ROWS])
        return made

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def all_converged(self) -> bool:
        """Whether every sample has."""
        unasked = _ROWS in self.__dict__ and "converged" not in self.__dict__
        return unasked or bool(self.converged.all())

    def __iter__(self) -> Iterator[Any]:
        yield self.value
        yield self

    def __repr__(self) -> str:
        size = self.residual.numel()
        if size == 0:
            return "Solution(empty batch)"
        counts = ", ".join(
            f"{name}: {self.status.count(name)}" for name in Status if name in self.status
        )
        return (
            f"Solution({counts}; worst residual {self.residual.max().item():.2e}, "
            f"{int(self.steps.max())} steps, batch of {size})"
        )

    def with_value(self, value: Any) -> Solution:
        """The same evidence for `value`, another arrangement of the same numbers."""
        if torch.compiler.is_compiling():
            return replace(self, value=value)
        other = object.__new__(Solution)  # in a third of the time
        other.__dict__.update(self.__dict__, value=value)
        return other

    def rows(self, rows: Tensor) -> Solution:
        """The evidence for the samples in the boolean `rows` `(B,)`."""
        return replace(
            self,
            value=_each(lambda part: part[rows], self.value),
            residual=self.residual[rows],
            steps=self.steps[rows],
            converged=self.converged[rows],
            codes=self.codes[rows],
            trace=self.trace[:, rows],
            residual_norm=self.residual_norm[rows],
        )

    def followed_by(self, second: Solution, rows: Tensor) -> Solution:
        """The evidence of a solve whose samples `rows` were given to a `second` one."""

        def put(old: Tensor, new: Tensor) -> Tensor:
            return old.index_put((rows,), new)

        rest = self.trace[-1].expand(len(second.trace), -1).clone()
        rest[:, rows] = second.trace
        return replace(
            self,
            value=_each(put, self.value, second.value),
            residual=put(self.residual, second.residual),
            steps=put(self.steps, self.steps[rows] + second.steps),
            converged=put(self.converged, second.converged),
            codes=put(self.codes, second.codes),
            trace=torch.cat([self.trace, rest]),
            residual_norm=put(self.residual_norm, second.residual_norm),
        )

    def unless_better(self, other: Solution) -> Solution:
        """The same steps, with the answer of `other` where its residual is smaller."""
        better = other.residual < self.residual

        def put(mine: Tensor, its: Tensor) -> Tensor:
            return torch.where(better.view(-1, *[1] * (mine.dim() - 1)), its, mine)

        return replace(
            self,
            value=_each(put, self.value, other.value),
            residual=put(self.residual, other.residual),
            converged=put(self.converged, other.converged),
            codes=put(self.codes, other.codes),
            residual_norm=put(self.residual_norm, other.residual_norm),
        )

    def accepting(self, where: Tensor) -> Solution:
        """The samples in the boolean `where` `(B,)` counted as converged."""
        return replace(
            self,
            converged=self.converged | where,
            codes=self.codes.masked_fill(where, Status.CONVERGED.code),
        )

    def with_status(self, where: Tensor, status: Status) -> Solution:
        """The samples in the boolean `where` `(B,)` marked as failed with `status`."""
        residual = self.residual
        if status is Status.NONFINITE:
            residual = residual.masked_fill(where, torch.inf)
        return replace(
            self,
            residual=residual,
            converged=self.converged & ~where,
            codes=self.codes.masked_fill(where, status.code),
        )


def sound(value: Any, residual_norm: Tensor, rows: list[Any]) -> Solution:
    """Of samples on the host that all converged at the same step, the last of the trace's `rows`.

    Most solves are such, and few are looked at: the rest of the evidence is made when it is.
    """
    solution = object.__new__(Solution)
    known = {"value": value, "residual_norm": residual_norm, "note": "", _ROWS: rows}
    solution.__dict__.update(known)
    return solution


_ROWS = "_rows"


def _tensor(row: Any) -> Tensor:
    return row.clone() if isinstance(row, Tensor) else torch.from_numpy(row.copy())


def _of_each(value: int | bool) -> Callable[[list[Any]], Tensor]:
    return lambda rows: torch.from_numpy(np.full(len(rows[-1]), value))


_LATER: dict[str, Callable[[list[Any]], Tensor]] = {
    "residual": lambda rows: _tensor(rows[-1]),
    "steps": lambda rows: torch.from_numpy(np.full(len(rows[-1]), len(rows))),
    "converged": _of_each(True),
    "codes": _of_each(_CONVERGED),
    "trace": lambda rows: torch.stack([_tensor(row) for row in rows]),
}


def _each(call: Callable[..., Tensor], *values: Any) -> Any:
    """`call` for tensors, or for each part of states."""
    if isinstance(values[0], Tensor):
        return call(*values)
    return tuple(map(call, *values))
