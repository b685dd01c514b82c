"""Gradients that are right once, and raise instead of being wrong when differentiated again."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function


def reroute(value: Tensor, tape: Tensor, reason: str) -> Tensor:
    """`value` with the gradient of `tape`; second derivatives raise with `reason`."""
    return _Reroute.apply(value, tape, reason)


def refuse(tape: Tensor, reason: str) -> Tensor:
    """`tape`, which raises a `RuntimeError` with `reason` when it is differentiated."""
    return _Refuse.apply(tape, reason)


def link(value: Tensor, other: Tensor) -> Tensor:
    """`value`; whoever differentiates it reaches `other`, too."""
    return _Link.apply(value, other)


class _Reroute(Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, tape: Tensor, reason: str) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(tape)
        ctx.reason = reason
        return value.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple:  # type: ignore[override]
        if torch.is_grad_enabled():
            (tape,) = ctx.saved_tensors
            g = link(g, refuse(tape, ctx.reason))
        return None, g, None


class _Link(Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, other: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(other)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple:  # type: ignore[override]
        (other,) = ctx.saved_tensors
        return g, torch.zeros_like(other)


class _Refuse(Function):
    @staticmethod
    def forward(ctx: Any, tape: Tensor, reason: str) -> Tensor:  # type: ignore[override]
        ctx.reason = reason
        return tape.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple:  # type: ignore[override]
        raise RuntimeError(f"second derivatives would be wrong here: {ctx.reason}")
