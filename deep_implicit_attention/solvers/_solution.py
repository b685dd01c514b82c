"""What a solver gives back: the value, the evidence for it, and a status in words."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from enum import StrEnum
from functools import partial
from typing import Any

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
    SINGULAR = (
        "singular",
        "The linear system is singular, or as good as singular, for its right side, and more steps "
        "do not help; that of a gradient is at a critical point, so make the couplings weaker.",
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
            ‖b − A x‖ / ‖b‖. Infinite where the map was never finite, NaN where it was not measured
            after a fixed number of steps.
        steps: `(B,)`, iterates at which the map was evaluated until the sample was done (for
            `gmres`: Krylov vectors).
        converged: `(B,)`, boolean. A state whose residual is small only beside its own length, far
            out where f(z) − z is bounded, does not count.
        codes: `(B,)`, the integer codes behind `status`.
        trace: `(steps, B)`, residual at each step; a finished sample repeats its last entry.
            Infinite for a sample that a layer left out because it is not finite.
        residual_norm: `(B,)`, the absolute ‖f(z) − z‖ (‖b − A x‖), whatever the stop mode.
        note: further text on a failure, for the warning.
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
        """What `unread` has left to be made when it is asked for."""
        known = self.__dict__
        if name not in _NUMBERS or _LATER not in known:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        made = known[_MADE]  # `with_value` shares it
        if name not in made:
            with torch.inference_mode(False):
                made[name] = known[_LATER](name)
        known[name] = made[name]
        return made[name]

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def all_converged(self) -> bool:
        """Whether every sample has."""
        known = self.__dict__.get(_ALL_CONVERGED)  # does not ask an accelerator
        return bool(self.converged.all()) if known is None else known

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
        numbers = self.residual, self.trace, self.residual_norm
        if status is Status.NONFINITE:
            numbers = tuple(evidence.masked_fill(where, torch.inf) for evidence in numbers)
        residual, trace, residual_norm = numbers
        return replace(
            self,
            residual=residual,
            trace=trace,
            residual_norm=residual_norm,
            converged=self.converged & ~where,
            codes=self.codes.masked_fill(where, status.code),
        )


def unread(value: Any, all_converged: bool, later: Callable[[str], Tensor]) -> Solution:
    """A solution with evidence that `later` makes of a field's name when it is asked for.

    Few are looked at, and on an accelerator numbers would have to be brought there.
    """
    solution = object.__new__(Solution)
    known = {"value": value, "note": "", _ALL_CONVERGED: all_converged, _LATER: later, _MADE: {}}
    solution.__dict__.update(known)
    return solution


def sound(value: Any, residual_norm: Any, rows: list[Any], device: torch.device) -> Solution:
    """Of samples that all converged at the same step, the last of the trace's `rows`."""
    return unread(value, True, partial(_of_sound, residual_norm, rows, device))


_NUMBERS = {field.name for field in fields(Solution)} - {"value", "note"}
_LATER, _MADE, _ALL_CONVERGED = "_later", "_made", "_all_converged"


def _of_sound(residual_norm: Any, rows: list[Any], device: torch.device, name: str) -> Tensor:
    if name == "trace":
        return torch.stack([numbers(row, device) for row in rows])
    if name in ("residual", "residual_norm"):
        return numbers(rows[-1] if name == "residual" else residual_norm, device)
    value = {"steps": len(rows), "converged": True, "codes": _CONVERGED}[name]
    return torch.full((len(rows[-1]),), value, device=device)


def numbers(row: Any, device: torch.device) -> Tensor:
    """A copy of an array or a tensor, as a tensor."""
    if isinstance(row, Tensor):
        return row.clone()
    return torch.from_numpy(row.copy()).to(device, non_blocking=True)


def _each(call: Callable[..., Tensor], *values: Any) -> Any:
    """`call` for tensors, or for each part of states."""
    if isinstance(values[0], Tensor):
        return call(*values)
    return tuple(map(call, *values))
