"""Whether somebody is to see what is computed, so that the plain path has to be taken.

Operations that write into given memory, private operators and autograd Functions without rules for
transformations are faster or smaller on the way of ordinary tensors, and unknown to everybody else.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch._C._functorch import (  # pyright: ignore
    get_unwrapped,
    is_batchedtensor,
    is_functorch_wrapped_tensor,
    is_legacy_batchedtensor,
)
from torch.autograd import forward_ad

_ORDINARY = (Tensor, nn.Parameter)


def watched(*tensors: Tensor) -> bool:
    """Whether a compiler is at work, operations are intercepted, or tensors `transformed`.

    Operations are intercepted by modes of `torch.utils._python_dispatch`: counters, recorders.
    """
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0:
        return True
    return _transformed(tensors)


def transformed(*tensors: Tensor) -> bool:
    """Whether what is computed with `tensors` is transformed on the way.

    That is by `torch.jit.trace`, by `torch.func`, by gradients of whole batches
    (`is_grads_batched`), by forward-mode derivatives, and by tensors of other classes. Not by a
    compiler, to which all this is unknown.
    """
    return not torch.compiler.is_compiling() and _transformed(tensors)


def mapped(t: Tensor) -> bool:
    """Whether `t` stands for many tensors in `torch.func.vmap`, so that it has no one value."""
    while is_functorch_wrapped_tensor(t):
        if is_batchedtensor(t):
            return True
        t = get_unwrapped(t)
    return False


def _transformed(tensors: tuple[Tensor, ...]) -> bool:
    if (
        torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch._C._get_tracing_state() is not None
    ):
        return True
    # Not `any`: a generator costs as much as all the rest.
    for t in tensors:  # noqa: SIM110
        if type(t) not in _ORDINARY or is_legacy_batchedtensor(t):
            return True
    return False
