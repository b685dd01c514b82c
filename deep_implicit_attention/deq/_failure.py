"""What happens when a solve fails: nothing, a warning, or an error, always with the evidence."""

from __future__ import annotations

import warnings
from typing import Any, Literal, get_args

from ..solvers import Solution, Status

OnFailure = Literal["ignore", "warn", "raise"]
_POLICIES = get_args(OnFailure)


class ConvergenceWarning(UserWarning):
    """A solve did not reach its tolerance for some samples."""


class ConvergenceError(RuntimeError):
    """A solve did not reach its tolerance for some samples; `solution` holds the evidence.

    That is a `Solution`, or what a method that solves no equation offers in its place.
    """

    def __init__(self, message: str, solution: Any) -> None:
        super().__init__(message)
        self.solution = solution

    def __reduce__(self) -> tuple[type, tuple]:
        return type(self), (str(self), self.solution)


def check_on_failure(value: str) -> None:
    """Raise `ValueError` unless `value` names a policy."""
    if value not in _POLICIES:
        raise ValueError(f"on_failure must be one of {_POLICIES}, got {value!r}")


def report(
    solution: Solution,
    on_failure: str,
    what: str,
    tol: float,
    advice: str = "",
    stacklevel: int = 3,
    in_a_layer: str = "",
) -> None:
    """Warn or raise, as `on_failure` says, if any sample of `solution` failed.

    `in_a_layer` is what the options of this solver begin with there.
    """
    if on_failure == "ignore" or solution.all_converged():
        return
    solution = solution.accepting(solution.codes == Status.FIXED_STEPS.code)
    if bool(solution.converged.all()):
        return
    failed = [status for status in solution.status if status is not Status.CONVERGED]
    kinds = [status for status in Status if status in failed]
    counts = ", ".join(f"{kind}: {failed.count(kind)}" for kind in kinds)
    worst = solution.residual[~solution.converged].max().item()
    sentences = [f"{kind}: {kind.sentence}" for kind in kinds]
    if in_a_layer and Status.MAX_ITER in kinds:
        names = f"{in_a_layer}max_iter, {in_a_layer}tol"
        sentences.append(f"Options of a layer are called {names} and so on.")
    message = " ".join(
        part
        for part in (
            f"{what}: {len(failed)} of {len(solution.converged)} samples did not converge "
            f"({counts}); worst residual {worst:.2e} after {int(solution.steps.max())} steps, "
            f"tolerance {tol:g}.",
            *sentences,
            solution.note,
            advice,
        )
        if part
    )
    say(message, solution, on_failure, stacklevel + 1)


def say(message: str, solution: Any, on_failure: str, stacklevel: int = 2) -> None:
    """Raise the message if `on_failure` says so, else warn."""
    if on_failure == "raise":
        raise ConvergenceError(message, solution)
    warnings.warn(message, ConvergenceWarning, stacklevel=stacklevel)
