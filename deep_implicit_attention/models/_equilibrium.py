"""What models with equilibrium blocks share: the block, its state, and checks of settings."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .. import solvers
from ..deq import DEQFixedPoint, DEQModule, jacobian_penalty
from ..deq._state import Layout, State
from ..solvers import Solution

_OPTIONS = ("steps", "on_failure")
_SOLVERS = ("anderson", "broyden", "newton_krylov", "picard")


def equilibrium(
    mechanism: DEQModule, solver: str, weight_norm: bool, options: dict[str, Any]
) -> DEQFixedPoint:
    """A block: `mechanism` solved from z = x by the named solver.

    With `weight_norm`, magnitude and direction of the weights of its linear layers are apart.
    """
    check_name("solver", solver, _SOLVERS)
    _check_options(options)
    if weight_norm:
        for layer in [m for m in mechanism.modules() if isinstance(m, nn.Linear)]:
            parametrize.register_parametrization(layer, "weight", _WeightNorm(), unsafe=True)
    return DEQFixedPoint(mechanism, getattr(solvers, solver), initial_state="input", **options)


class _WeightNorm(nn.Module):
    """Rows of a weight as magnitude times direction, g v / ‖v‖ (Salimans, Kingma 2016,
    arXiv:1602.07868), as `torch.nn.utils.parametrizations.weight_norm` keeps and names them.

    Second derivatives of torch's own are wrong (as of 2.14).
    """

    def forward(self, magnitude: Tensor, direction: Tensor) -> Tensor:
        return direction * (magnitude / torch.linalg.vector_norm(direction, dim=1, keepdim=True))

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        return torch.linalg.vector_norm(weight, dim=1, keepdim=True), weight


def value_of(part: Any) -> Any:
    """The state in a `Solution`, or the state itself."""
    return part.value if isinstance(part, Solution) else part


def starts_of(state: Sequence[Any] | None, blocks: nn.ModuleList) -> list[Any]:
    """Where the relaxation of each of the blocks starts: a state, a `Solution`, or None."""
    if not isinstance(state, tuple | list | None):  # a tensor or a `Solution` has parts, too
        raise TypeError(
            f"state must be a tuple or list of {len(blocks)}, a state or a Solution for each "
            f"block, got {type(state).__name__}"
        )
    starts = [None] * len(blocks) if state is None else list(state)
    if len(starts) != len(blocks):
        raise ValueError(f"state must have {len(blocks)} parts, got {len(starts)}")
    return starts


def penalty_of(
    maps: Iterable[tuple[Callable[[State], State], State]],
    generator: torch.Generator | None,
    share: Tensor | float = 1.0,
) -> Tensor:
    """Mean over samples and blocks of ‖∂F/∂z‖_F² per component, from pairs of map and state.

    `share` `(B,)` is the part of the components that counts.
    """
    parts = [
        jacobian_penalty(f, z, generator=generator) / (share * sum(Layout.of(z).sizes))
        for f, z in maps
    ]
    return torch.stack(parts).mean()


def check_solutions(solutions: Sequence[Any], depth: int) -> Sequence[Any]:
    """`solutions`; raises unless they are those of `depth` layers."""
    kinds = Solution | Tensor
    listed = isinstance(solutions, tuple | list)
    if not listed or len(solutions) != depth or not all(isinstance(s, kinds) for s in solutions):
        got = f"{len(solutions)} parts" if listed else type(solutions).__name__
        raise ValueError(
            f"solutions must be the {depth} that the model returns second with "
            f"return_solution=True, one of each layer; got {got}"
        )
    return solutions


def check_integers(what: str, value: Any) -> None:
    """Raise unless `value` is a tensor of integers."""
    if not isinstance(value, Tensor) or value.dtype not in (torch.int64, torch.int32):
        kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{what} must be a tensor of integers (int64 or int32), got {kind}")


def check_classes(what: str, labels: Tensor, classes: int) -> None:
    """Raise unless `labels` are numbers of classes, or −100 for none.

    On the host: an accelerator would have to be waited for, and says so by itself.
    """
    if torch.compiler.is_compiling() or not labels.is_cpu or not labels.numel():
        return
    wrong = (labels != -100) & ((labels < 0) | (labels >= classes))
    if bool(wrong.any()):
        found = labels[wrong][0].item()
        raise ValueError(f"{what} must be from 0 to {classes - 1}, got {found}")


def check_name(what: str, name: Any, known: Sequence[str]) -> None:
    """Raise unless `name` is one of `known`."""
    if name not in known:
        raise ValueError(f"{what} must be one of {', '.join(known)}, got {name!r}")


def _check_options(options: dict[str, Any]) -> None:
    """Raise for options of `DEQFixedPoint` that cannot be part of a saved config."""
    for name, value in options.items():
        if name in ("adjoint", "initial_state"):
            raise TypeError(f"{name} is no option of the model; give it to the call")
        if name not in _OPTIONS and not name.startswith(("solver_fwd_", "solver_bwd_")):
            raise TypeError(
                f"unknown option {name!r}; beside the model's own arguments there are "
                f"{', '.join(_OPTIONS)}, solver_fwd_NAME and solver_bwd_NAME"
            )
        if not isinstance(value, numbers.Real | str | None):
            raise TypeError(
                f"{name} must be a number or a string, to be saved with the config; got {value!r}"
            )
