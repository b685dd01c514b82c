"""Checks of arguments at the door: those that all solvers share, and numbers, for every floor."""

from __future__ import annotations

import functools
import inspect
import math
import numbers
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

STOP_MODES = ("rel", "abs")


def check_arguments(
    function: Callable,
    start: Tensor,
    name: str,
    tol: float,
    max_iter: int,
    stop_mode: str = "rel",
    preconditioner: Callable | None = None,
    rough: Callable | None = None,
) -> None:
    """Raise `TypeError` or `ValueError`, naming the argument, for anything a solver cannot use."""
    if not callable(function):
        raise TypeError(f"the map must be callable, got {type(function).__name__}")
    check_tensor(name, start)
    if start.dim() != 2:
        raise ValueError(f"{name} must have shape (batch, n), got {tuple(start.shape)}")
    check_values(
        tol=tol, max_iter=max_iter, stop_mode=stop_mode, preconditioner=preconditioner, rough=rough
    )


def check_number(
    name: str, value: float, minimum: float = -math.inf, below: float = math.inf
) -> None:
    """Raise unless `value` is finite and `minimum <= value < below`."""
    # Of plain numbers that is known; asking the abstract class takes long.
    plain = type(value) is float or type(value) is int
    if not plain and (isinstance(value, bool) or not isinstance(value, numbers.Real)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")
    if not minimum <= value < below:
        upper = "" if below == math.inf else f" and below {below:g}"
        raise ValueError(f"{name} must be at least {minimum:g}{upper}, got {value}")


def check_is_tensor(name: str, value: Any) -> None:
    """Raise unless `value` is a tensor, of whatever dtype."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")


def check_tensor(name: str, value: Any) -> None:
    """Raise unless `value` is a dense tensor in float32 or float64."""
    check_is_tensor(name, value)
    if value.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got {value.layout}")
    if value.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{name} must be float32 or float64, got {value.dtype}")


def check_integer(name: str, value: int) -> None:
    """Raise unless `value` is an integer."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}")


def check_count(name: str, value: int, minimum: int = 1) -> None:
    """Raise unless `value` is an integer of at least `minimum`."""
    check_integer(name, value)
    if value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}")


def check_counts(**values: int) -> None:
    """Raise unless every value is a positive integer."""
    for name, value in values.items():
        check_count(name, value)


def check_seed(seed: int) -> None:
    """Raise unless `seed` is what all generators take."""
    check_integer("seed", seed)
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed must be from 0 to 2**32 - 1, got {seed}")


def _check_stop_mode(name: str, value: Any) -> None:
    if value not in STOP_MODES:
        raise ValueError(f"{name} must be one of {STOP_MODES}, got {value!r}")


def _check_function(name: str, value: Any) -> None:
    if value is not None and not callable(value):
        raise TypeError(f"{name} must be callable or None, got {type(value).__name__}")


def _check_restart(name: str, value: Any) -> None:
    if value is not None:
        check_count(name, value)


# What the options of the solvers here may be, whichever solver has them.
_VALUES: dict[str, Callable[[str, Any], None]] = {
    "tol": functools.partial(check_number, minimum=0.0),
    "ridge": functools.partial(check_number, minimum=0.0),
    **dict.fromkeys(("damping", "inner_tol"), functools.partial(check_number, minimum=0, below=1)),
    **dict.fromkeys(("max_iter", "m", "period", "memory", "inner_max_iter"), check_count),
    **dict.fromkeys(("preconditioner", "rough", "jvp"), _check_function),
    "restart": _check_restart,
    "stop_mode": _check_stop_mode,
}


def check_values(prefix: str = "", **options: Any) -> None:
    """Raise for options of the solvers here that are of the wrong kind or out of range."""
    for name, value in options.items():
        _VALUES[name](prefix + name, value)


def check_same_shape(out: Any, like: Tensor, what: str) -> None:
    """Raise unless the map returned a tensor of the shape and dtype it was given."""
    if not isinstance(out, Tensor):
        raise TypeError(f"{what} must return a tensor, got {type(out).__name__}")
    if out.shape != like.shape or out.dtype != like.dtype:
        raise ValueError(
            f"{what} must keep shape and dtype {tuple(like.shape)} {like.dtype}, "
            f"returned {tuple(out.shape)} {out.dtype}"
        )


def version(z: Tensor) -> int:
    """How often `z` was written to, as far as torch counts: of inference tensors it does not."""
    return 0 if z.is_inference() else z._version


def check_unchanged(z: Tensor, before: int) -> None:
    """Raise if the map that was given `z` wrote to it, or to a tensor that `z` is a view of."""
    if version(z) != before:
        raise RuntimeError(
            "f must not change its state in place, nor write to a tensor that an earlier result "
            "is, or is a part of: return a new tensor"
        )


def takes(solver: Callable, option: str) -> bool:
    """Whether `solver` has the keyword `option`."""
    known = _keywords(solver)
    return known is None or option in known


@functools.lru_cache(maxsize=64)
def _keywords(solver: Callable) -> frozenset[str] | None:
    parameters = inspect.signature(solver).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return None  # takes anything: it checks by itself
    named = [p.name for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return frozenset(named[2:])  # the first two are the map and the start


def check_options(
    solver: Callable, options: Mapping[str, Any], prefix: str = "", owner: str = ""
) -> None:
    """Raise `TypeError` for an option that `solver` does not have, listing those it has.

    What a solver of this package has is checked for its value, too; others check by themselves.
    `prefix` is what the user writes before the solver's own name of the option
    (`solver_fwd_`), `owner` who takes it, for the message.
    """
    known = _keywords(solver)
    if known is None:
        return
    for name in options:
        if name not in known:
            has = ", ".join(prefix + option for option in sorted(known))
            solver_name = getattr(solver, "__name__", repr(solver))
            raise TypeError(
                f"{owner or solver_name}: unknown option {prefix + name!r}; {solver_name} has {has}"
            )
    while isinstance(solver, functools.partial):
        solver = solver.func
    home = getattr(solver, "__module__", None) or ""
    # What wraps a solver by functools.wraps has its module and name, but may take more.
    ours = home.startswith("deep_implicit_attention.solvers.")
    if ours and getattr(sys.modules[home], solver.__name__, None) is solver:
        check_values(prefix, **options)
