"""The contract between a mechanism and the layer that solves it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ._state import State

_NONE: Any = object()  # a context may be None


class DEQModule(nn.Module):
    """A map z ↦ update(z, context) whose fixed point `DEQFixedPoint` finds.

    Write `update`; override the others where the mechanism has more to say. `DEQFixedPoint` asks
    for these methods by name, so a plain `nn.Module` that has `initial_state` and `update`
    serves as well.

    A mechanism may also have ``solve(context, wanted) -> state``: the fixed point in closed form,
    differentiable; only the state elements whose indices are in `wanted` need to be computed,
    others are `None`. With it may go ``residual(context, state) -> (relative, absolute)``, each
    `(B,)`, of what `solve` returned (without it, all elements are computed and an update is spent),
    and ``judge(context) -> str``, what is wrong with a system whose equations have a solution but
    no distribution behind it (empty if nothing is).

    These are optional, too; they make solves faster and change no answer:

    - ``preconditioner(context) -> r ↦ P r``, on states, linear, for every sample by itself: an
      approximation of (1 − ∂F/∂z)⁻¹ for solvers that take one, or None. As a `LinearMap` it knows
      its transpose, which backward needs and autograd finds otherwise. It may have a `remainder`,
      by which solves from zeros begin a step nearer, as backward ones do by that of the `Pullback`
      (see `vjp`). It is computed without gradients. Residuals stay those of the plain map, and if
      the first preconditioned step leaves more than 0.8 of a sample's residual, the sample goes on
      without it.
    - ``rough(context) -> context``: a context whose update is cheap and close to the update, for
      the first steps of solvers that take a `rough` map, forward and, where there is a `vjp`,
      backward; or None. The last steps, and the residuals of what is returned, are those of the
      update itself. On an accelerator it is asked for inside autocast only. Modules with parameters
      narrower than float32 do without.
    - ``first_step(context) -> state``: update(0, context), where that is cheaper than an update.
      The solve from zeros starts there.
    - ``select_samples(index, context) -> context``: that of the samples `index` `(b,)`. Once half
      of a batch are done, and again half of the rest, the solve goes on with the others alone,
      forward and backward, on the host and without a preconditioner. Not used where a subclass has
      overridden `prepare` since.
    - ``vjp(z, context) -> v ↦ (∂F/∂z)ᵀ v``: for the backward solve, in place of autograd's.
      Derivatives of second and higher order take the plain path. The map it returns may use tensors
      of the context and of `vjp` itself, but not read parameters of the module. As a `Pullback` it
      knows the derivatives by the context as well, so that backward needs no evaluation with a
      graph; `update` must then depend on nothing but z and the context.

    Where a subclass or an instance replaces `update`, none of these (nor `append`) is used that was
    written for the old one.

    A causal mechanism may have ``append(context, state, x_new) -> context``: given the equilibrium
    `state` of the sites that `context` solves for, the context of the one site that `x_new` drives.
    `StateCache` calls it, with the elements of the state that the layer returns
    (`output_elements`).

    Calls must store nothing on the module: all that is constant during a solve goes into the
    context, which `prepare` returns. Neither `update` nor `prepare` may change its arguments.
    `prepare` runs twice for a batch with samples that are not finite.
    """

    def initial_state(self, x: Tensor) -> State:
        """Where relaxation starts: zeros like `x`."""
        return torch.zeros_like(x)

    def sources(self, x: Tensor, *inputs: Any) -> Tensor:
        """The fields that act on the sites: `x`, checked, without what a mask hides."""
        return x

    def prepare(self, x: Tensor, *inputs: Any) -> Any:
        """Everything that does not depend on z, computed once for each solve.

        Tensors, also inside tuples and dicts, are differentiable to any order. Parametrised
        weights belong here, where they are evaluated once and with gradients.
        """
        return x

    def update(self, z: Any, context: Any) -> Any:
        """One step of the mean-field equations."""
        raise NotImplementedError(f"{type(self).__name__} must implement update(z, context)")

    def forward(self, z: Any, context: Any = _NONE) -> Any:
        """The same as `update`.

        Raises:
            TypeError: for fields alone, which are what `DEQFixedPoint` takes.
        """
        if context is _NONE:
            name = type(self).__name__
            raise TypeError(
                f"{name} is a map of a state and a context: its fixed point in fields x is "
                f"DEQFixedPoint({name}(...))(x)"
            )
        return self.update(z, context)


def of_its_update(fun: Any, name: str, *others: str) -> Any:
    """`fun.name`, a method that says something of `fun.update`, or None.

    None, too, where `update` (or one of the methods `others`) has been overridden since `name` was
    defined, which then speaks of another update. A class that left `update` open, like a template
    or a mixin, speaks of any.
    """
    method = getattr(fun, name, None)
    own = vars(fun)
    if method is None or name in own:
        return method
    kinds = type(fun).__mro__
    definer = 0
    while name not in vars(kinds[definer]):
        definer += 1
        if definer == len(kinds):
            return method
    for other in ("update", *others):
        actual = own.get(other)
        if actual is None and definer == 0:
            continue  # nothing can have been overridden since
        spoken_of = _defined(other, kinds[definer:])
        if actual is None:
            actual = _defined(other, kinds)
        if spoken_of is not actual and spoken_of not in (None, *_OPEN):
            return None
    return method


def _defined(name: str, kinds: tuple[type, ...]) -> Any:
    for kind in kinds:
        if name in vars(kind):
            return vars(kind)[name]
    return None


# What stands for an update, or a map, that is yet to be written.
_OPEN = (DEQModule.update, nn.Module.forward)
