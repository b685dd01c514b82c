"""Spins with priors whose cavity variance depends on the sample: one adaptive TAP step of a layer.

A layer keeps its state (z, V) as users see it, `(B, N, d)` and `(B, N, d, d)`; the equations of
Potts spins are solved in the coordinates of `spins._frames`. Of Ising spins every component is one:
N·d scalar spins, and V diagonal.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..spins import AdaptiveTAP, IsingPrior, NaiveMeanField, PottsPrior, Response, SpinSystem
from ..spins._consistency import AdaptiveTAPStep, pull
from ..spins._frames import frame_of, local_of
from ..spins._prior import Prior

State = tuple[Tensor, Tensor]
Method = Callable[[SpinSystem, Tensor], Response]


class Matched(NamedTuple):
    """What a solve needs, as tensors: fields `(B, n, k)`, couplings `(n·k, n·k)`, Potts basis."""

    x: Tensor
    couplings: Tensor
    basis: Tensor | None


def spin_system(weight: Tensor, prior: Prior) -> SpinSystem:
    """The system behind couplings `(N, N, d, d)` that are known to be symmetric."""
    if isinstance(prior, IsingPrior):
        size = weight.shape[0] * weight.shape[2]
        weight = weight.permute(0, 2, 1, 3).reshape(size, size)
    return SpinSystem.unchecked(weight, prior)


def prepare(weight: Tensor, prior: Prior, x: Tensor) -> Matched:
    """The context of a solve for fields `x` `(B, N, d)`."""
    system = spin_system(weight, prior)
    if not isinstance(prior, PottsPrior):
        fields = x.flatten(1).unsqueeze(-1) if isinstance(prior, IsingPrior) else x
        return Matched(fields, system.matrix(), None)
    frame = frame_of(system, "DEQAdaTAPMeanFieldAttention")
    return Matched(frame.fields(x), frame.couplings, frame.basis)


def inference(response: bool) -> Method:
    """The inference method that solves the equations of `update`."""
    return AdaptiveTAP(tol=1e-5) if response else NaiveMeanField(tol=1e-5)


def log_partition(weight: Tensor, prior: Prior, x: Tensor, method: Method) -> Tensor:
    """log Z `(B,)` for fields `x` `(B, N, d)`, by `method`."""
    fields = x.flatten(1) if isinstance(prior, IsingPrior) else x
    return method(spin_system(weight, prior), fields).log_partition


def coordinates(x: Tensor, context: Matched) -> Tensor:
    """Fields `(B, N, d)` in the coordinates of `context.x`, but for its constant part."""
    if context.basis is not None:
        return x @ context.basis
    return x.reshape(len(x), *context.x.shape[1:])


def update(prior: Prior, state: State, context: Matched, response: bool) -> State:
    """One step; without `response` the naive mean field, V = 0."""
    z, V = state
    local = local_of(prior, context.basis)
    m, variance = _inwards(prior, z, V, context.basis)
    if response:
        m, variance = AdaptiveTAPStep(local)((m, variance), context.x, context.couplings)
    else:
        variance = torch.zeros_like(variance)
        m = local.mean(context.x + pull(context.couplings, m), variance)
    return _outwards(prior, m, variance, context.basis, z)


def _inwards(prior: Prior, z: Tensor, V: Tensor, basis: Tensor | None) -> State:
    if isinstance(prior, IsingPrior):
        diagonal = V.diagonal(dim1=-2, dim2=-1)
        return z.flatten(1).unsqueeze(-1), diagonal.flatten(1)[..., None, None]
    if basis is None:
        return z, V
    return z @ basis, basis.mT @ V @ basis


def _outwards(prior: Prior, m: Tensor, V: Tensor, basis: Tensor | None, like: Tensor) -> State:
    if isinstance(prior, IsingPrior):
        return m.view_as(like), torch.diag_embed(V.view_as(like))
    if basis is None:
        return m, V
    return 1 / like.shape[-1] + m @ basis.mT, basis @ V @ basis.mT
