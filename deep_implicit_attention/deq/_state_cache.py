"""Equilibria of causal layers, one site after the other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..solvers import Solution
from ..solvers._validate import check_is_tensor
from ._failure import report
from ._layer import DEQFixedPoint
from ._map import without_autocast
from ._module import of_its_update
from ._settings import override, parse
from ._state import full_precision


@dataclass(frozen=True)
class StateCache:
    """The equilibrium of a causal layer's sites so far, to which sites are added one by one.

    No site's equilibrium depends on later ones, so the states so far are final: a new site costs
    a solve of its own equation, in which they are constants. Made by `start`; `append` returns
    the cache with one more site and leaves this one as it is. Without gradients.

    Attributes:
        solution: of the sites that were solved for last: all at the start, then the new one. In
            float32 where x is narrower.
    """

    layer: DEQFixedPoint
    context: Any
    solution: Solution

    @staticmethod
    @torch.no_grad()
    def start(layer: DEQFixedPoint, x: Tensor, *inputs: Any, **overrides: Any) -> StateCache:
        """Solve for the sites that `x` `(B, N, d)` drives; arguments as the layer takes them.

        Raises:
            TypeError: if the layer's module cannot append sites.
            ValueError: for a fixed number of steps. States after K steps are not final: a new site
                would need those of earlier steps as well.
        """
        if of_its_update(layer.fun, "append") is None:
            raise TypeError(
                f"{type(layer.fun).__name__} has no append: only causal mechanisms can add a site "
                "to a solved system, and a subclass that overrides update overrides append, too"
            )
        check_is_tensor("x", x)
        with without_autocast(x):
            fields = layer._fields(x, inputs)
            context = layer._prepare(fields, inputs)
        return _solved(layer, fields, context, overrides)

    @torch.no_grad()
    def append(self, x_new: Tensor, **overrides: Any) -> StateCache:
        """One more site, with source `x_new` `(B, 1, d)`.

        Raises:
            TypeError, ValueError: for sources of the wrong kind, shape or batch.
        """
        check_is_tensor("x_new", x_new)
        value = self.solution.value
        batch = len(value if isinstance(value, Tensor) else value[0])
        if x_new.shape[:1] != (batch,):
            raise ValueError(
                f"x_new must have the batch of the sites so far, {batch}, got shape "
                f"{tuple(x_new.shape)}"
            )
        field = full_precision(x_new)
        with without_autocast(field):
            context = self.layer.fun.append(self.context, value, field)
        return _solved(self.layer, field, context, overrides)


def _solved(layer: DEQFixedPoint, fields: Tensor, context: Any, overrides: Any) -> StateCache:
    settings = parse(layer.solver, override(layer._options, overrides))
    if settings.steps is not None:
        raise ValueError(
            f"states are cached at equilibrium, not after steps={settings.steps}: give steps=None"
        )
    with without_autocast(fields):
        solution = layer._solve(fields, context, None, settings, evidence=True)
    name = type(layer.fun).__name__
    where = {"stacklevel": 5, "in_a_layer": "solver_fwd_"}  # past `torch.no_grad` as well
    report(solution, settings.on_failure, name, settings.tol, **where)
    parts = solution.value
    value = parts[0] if len(parts) == 1 else tuple(parts)
    return StateCache(layer, context, solution.with_value(value))
