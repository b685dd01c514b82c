"""Backward evaluates f again: what it looks at then, to say where a gradient would be wrong."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..solvers import Solution
from ..solvers._scale import norms
from ._failure import say
from ._map import ends_since


def check_again(
    z: Tensor,
    image: Tensor,
    begun: int,
    known: Sequence[Tensor] | None,
    found: Solution,
    on_failure: str,
) -> None:
    """Warn or raise where `image`, f(z) in backward, is not that of the solve that `found` z.

    Its graph begins with node `begun` and is to lead to no other tensor than `known`; None where
    forward has seen that it does, and has a tape of it.
    """
    if on_failure == "ignore":
        return
    messages = [_another_map(z, image, found)]
    if known is not None:
        messages.append(_unknown_tensor(image, begun, known))
    for message in filter(None, messages):
        say(message, found, on_failure, stacklevel=3)


@torch.no_grad()
def _another_map(z: Tensor, image: Tensor, found: Solution) -> str:
    """Says so if f is not the map of the solve that `found` z: `image` is f(z) in backward.

    It is not where ‖f(z) − z‖ has become over ten times what it was, beyond rounding. What f closes
    over cannot be told from outside, but its effect can.
    """
    change, size = (torch.as_tensor(norm) for norm in norms(image - z, image))
    before = found.residual_norm
    bound = 10 * before + torch.finfo(z.dtype).eps ** 0.5 * size
    other = ~(change <= bound) & torch.isfinite(before)
    if not bool(other.any()):
        return ""
    worst = int(torch.where(other, change - bound, -torch.inf).argmax())
    return (
        f"backward: for {int(other.sum())} of {len(other)} samples f is not the map that was "
        f"solved: ‖f(z) − z‖ at the solution is {change[worst]:.2e}, and was {before[worst]:.2e}. "
        "The gradient would be wrong. Backward evaluates f again: what f closes over, such as the "
        "variable of a loop, must still mean the same. Pass it in args, and draw random numbers "
        "before the solve."
    )


def _unknown_tensor(image: Tensor, begun: int, known: Sequence[Tensor]) -> str:
    """Says so if the graph of `image`, from node `begun` on, leads to another tensor than `known`.

    Forward has looked for such tensors, but f may branch.
    """
    leaves, older = ends_since(image, begun)
    names = {id(tensor) for tensor in known}
    if not older and all(id(leaf) in names for leaf in leaves):
        return ""
    return (
        "backward: at the solution f depends on a tensor that it closes over, and at the start it "
        "did not, so the gradient by that tensor is missing. Pass it in args, or make f a module "
        "that owns it."
    )
