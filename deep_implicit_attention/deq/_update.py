"""What a solve asks of a mechanism: its update as a map, and what makes it faster."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ._linear_map import LinearMap, nearer
from ._module import of_its_update
from ._state import Layout, State


class Update(nn.Module):
    """`fun.update` as the forward of a module, so that its parameters can be substituted."""

    def __init__(self, fun: nn.Module) -> None:
        # There is one for each solve, and `nn.Module` takes its time to make tables.
        vars(self).update(_BARE, _modules={})
        self.fun = fun

    def forward(self, z: State, context: Any) -> State:
        fun: Any = self._modules.get("fun")  # `nn.Module` looks in three tables before it
        return (self.fun if fun is None else fun).update(z, context)  # type: ignore[operator]

    # It has no hooks that `nn.Module` would have to look for.
    __call__ = forward

    @property
    def vjp(self) -> Any:
        """That of `fun`, or None."""
        return of_its_update(self.fun, "vjp")

    @property
    def select_samples(self) -> Any:
        """(index, context) ↦ the arguments of some samples, by that of `fun`, or None."""
        select = of_its_update(self.fun, "select_samples", "prepare")
        return select and (lambda index, context: (select(index, context),))

    def rough(self, context: Any) -> tuple[Any] | None:
        """The arguments of the approximate update, if there is one here and now."""
        context = self.fun.rough(context)  # type: ignore[operator]
        return None if context is None else (context,)


_BARE = vars(nn.Module())


def solver_option(fun: Any, name: str, context: Any, given: dict[str, Any]) -> Any:
    """`fun.name(context)`, a `preconditioner` or a `rough` map of its own, or None.

    None, too, where the caller has `given` the solver such an option.
    """
    if name in given:
        return None
    method = of_its_update(fun, name)
    return None if method is None else method(context)


def start_near(fun: Any, context: Any, preconditioner: Any) -> State | None:
    """A state as near to the solution as can be had without an update, if `fun` knows any."""
    first_step = of_its_update(fun, "first_step", "initial_state")
    if first_step is None:
        return None
    start = first_step(context)
    if preconditioner is None:
        return start
    start = preconditioner(start)
    if isinstance(preconditioner, LinearMap) and preconditioner.remainder is not None:
        after, layout = preconditioner(preconditioner.remainder(start)), Layout.of(start)
        start = layout.unpack(nearer(layout.pack(start), layout.pack(after)))
    return start


def count(state: State) -> int:
    """Number of elements of a state."""
    return 1 if isinstance(state, Tensor) else len(state)
