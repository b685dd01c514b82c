"""Potts spins: one of q states, as one-hot vectors."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Generator, Size, Tensor

from ..solvers._validate import check_count
from ._prior import Prior


class PottsPrior(Prior):
    """S is a one-hot vector of q states, each with weight 1/q; V is `(..., q, q)`.

        log Z0 = log (1/q) Σ_a exp(h_a + ½ V_aa),   mean m = softmax(h + ½ diag V),
        covariance = diag(m) − m mᵀ

    The components of S sum to one, so the covariance is singular along (1, …, 1).

    Args:
        num_states: q ≥ 2.
    """

    def __init__(self, num_states: int) -> None:
        super().__init__()
        check_count("num_states", num_states)
        if num_states < 2:
            raise ValueError(f"num_states must be at least 2, got {num_states}")
        self.event_shape = Size((num_states,))

    def extra_repr(self) -> str:
        return f"num_states={self.event_shape[0]}"

    def log_partition(self, field: Tensor, V: Tensor | None = None) -> Tensor:
        return self._effective(field, V).logsumexp(dim=-1) - math.log(self.event_shape[0])

    def mean(self, field: Tensor, V: Tensor | None = None) -> Tensor:
        return self._effective(field, V).softmax(dim=-1)

    def covariance(self, field: Tensor, V: Tensor | None = None) -> Tensor:
        mean = self.mean(field, V)
        return torch.diag_embed(mean) - mean.unsqueeze(-1) * mean.unsqueeze(-2)

    def _effective(self, field: Tensor, V: Tensor | None) -> Tensor:
        self.check_field(field)
        return field if V is None else field + V.diagonal(dim1=-2, dim2=-1) / 2

    def sample(self, field: Tensor, generator: Generator | None = None) -> Tensor:
        # The first of q exponential clocks with rates exp(h_a) rings for a with probability
        # softmax(h)_a; times are compared by logarithm, so no exponential overflows.
        self.check_field(field)
        times = torch.empty_like(field).exponential_(generator=generator)
        first = (field - times.log()).argmax(dim=-1)
        return F.one_hot(first, self.event_shape[0]).to(field.dtype)

    def supports(self, spins: Tensor) -> Tensor:
        bits = ((spins == 0) | (spins == 1)).all(dim=-1)
        return bits & (spins.sum(dim=-1) == 1)
