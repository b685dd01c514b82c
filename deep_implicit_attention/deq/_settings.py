"""The options of `DEQFixedPoint`, sorted and checked."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..solvers import Solution, anderson
from ..solvers._validate import check_count, check_number, check_options
from ._adjoints import Adjoint, Implicit
from ._failure import OnFailure, check_on_failure

_FORWARD, _BACKWARD = "solver_fwd_", "solver_bwd_"
_OWN = ("adjoint", "steps", "on_failure", "initial_state")
_BACKWARD_DEFAULTS = {"tol": 1e-4, "max_iter": 30}
# An update of a layer costs hardly more than a mixture of its states, and most do without.
_IN_A_LAYER = {"period": 3}


@dataclass(frozen=True)
class Settings:
    """The options of one call."""

    adjoint: Adjoint
    steps: int | None
    on_failure: OnFailure
    initial_state: Any
    tol: float
    max_iter: int
    solver_options: dict[str, Any]


def override(options: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`options` with `changes`; an adjoint given now replaces the backward options from before."""
    kept = dict(options)
    if changes.get("adjoint") is not None:
        kept = {name: value for name, value in kept.items() if not name.startswith(_BACKWARD)}
    return {**kept, **changes}


def parse(solver: Callable[..., Solution], options: Mapping[str, Any]) -> Settings:
    """Sort `options` into what they are for; raises for what is unknown or out of range."""
    forward: dict[str, Any] = {}
    backward: dict[str, Any] = {}
    for name, value in options.items():
        if name.startswith(_FORWARD):
            forward[name.removeprefix(_FORWARD)] = value
        elif name.startswith(_BACKWARD):
            name = name.removeprefix(_BACKWARD)
            # Those that the constructor names are None where they are not given.
            if value is not None or name not in _BACKWARD_DEFAULTS:
                backward[name] = value
        elif name not in _OWN:
            raise TypeError(
                f"DEQFixedPoint: unknown option {name!r}; options are {', '.join(_OWN)}, "
                f"{_FORWARD}NAME and {_BACKWARD}NAME, and further inputs of the module (a mask) "
                "are positional"
            )
    check_options(solver, forward, _FORWARD, "DEQFixedPoint")
    check_options(solver, backward, _BACKWARD, "DEQFixedPoint")
    tol, max_iter = forward.pop("tol"), forward.pop("max_iter")
    check_number("solver_fwd_tol", tol, minimum=0.0)
    check_count("solver_fwd_max_iter", max_iter)
    if "tol" in backward:
        check_number("solver_bwd_tol", backward["tol"], minimum=0.0)
    if "max_iter" in backward:
        check_count("solver_bwd_max_iter", backward["max_iter"])
    in_a_layer = _IN_A_LAYER if solver is anderson else {}
    forward = {**in_a_layer, **forward}
    adjoint = options["adjoint"]
    if adjoint is None:
        adjoint = Implicit(solver, **{**_BACKWARD_DEFAULTS, **in_a_layer, **backward})
    elif not isinstance(adjoint, Adjoint):
        raise TypeError(f"adjoint must be Implicit, OneStep or Phantom, got {adjoint!r}")
    elif backward:
        names = ", ".join(_BACKWARD + name for name in backward)
        raise TypeError(f"give either adjoint or {names}: the adjoint has its own settings")
    if options["steps"] is not None:
        check_count("steps", options["steps"])
    check_on_failure(options["on_failure"])
    initial = options["initial_state"]
    # An array compares with a string entry by entry.
    named = isinstance(initial, str) and initial in ("zeros", "input")
    if not named and not callable(initial):
        got = repr(initial) if isinstance(initial, str) else type(initial).__name__
        raise ValueError(
            f"initial_state must be 'zeros', 'input' or a callable, got {got}; a state to start a "
            "call from is its argument `state`"
        )
    return Settings(
        adjoint, options["steps"], options["on_failure"], initial, tol, max_iter, forward
    )


def check_elements(elements: Sequence[int]) -> tuple[int, ...]:
    """`output_elements` as a tuple: increasing, so that what is returned can be handed back."""
    if not isinstance(elements, tuple | list) or not elements:
        raise TypeError(f"output_elements must be a sequence of indices, got {elements!r}")
    previous = -1
    for element in elements:
        whole = isinstance(element, numbers.Integral) and not isinstance(element, bool)
        if not whole or element <= previous:
            raise ValueError(
                f"output_elements must be increasing indices from 0, got {tuple(elements)}"
            )
        previous = element
    return tuple(map(int, elements))


def check_reach(fun: Any, elements: Sequence[int], count: int) -> None:
    """Raise if `output_elements` asks for more than the `count` elements of the state of `fun`."""
    if elements[-1] >= count:
        raise ValueError(
            f"output_elements must be below {count}, the number of elements of "
            f"{type(fun).__name__}'s state, got {elements}"
        )
