"""Potts spins: one of q states, as one-hot vectors."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Generator, Size, Tensor

from ..solvers._validate import check_count
from ._prior import Prior, with_derivatives


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
        field = self._effective(field, V)
        likeliest, others = _apart(field)
        largest = field.gather(-1, likeliest).squeeze(-1)
        return largest + torch.log1p(others.sum(dim=-1)) - math.log(self.event_shape[0])

    def mean(self, field: Tensor, V: Tensor | None = None) -> Tensor:
        field = self._effective(field, V)

        def differing() -> Tensor:
            likeliest, others = _apart(field)
            sum_of_others = others.sum(dim=-1, keepdim=True)
            return others.scatter(-1, likeliest, -sum_of_others) / (1 + sum_of_others)

        # torch's derivative of softmax has m (1 − m), which is lost where m is almost 1.
        return with_derivatives(field.softmax(dim=-1), differing, field)

    def covariance(self, field: Tensor, V: Tensor | None = None) -> Tensor:
        mean = self.mean(field, V)
        apart = 1 - torch.eye(mean.shape[-1], dtype=mean.dtype, device=mean.device)
        pairs = mean.unsqueeze(-1) * mean.unsqueeze(-2) * apart
        # The variance m_a Σ_b≠a m_b: the difference m − m² is lost where m is almost 1.
        return torch.diag_embed(pairs.sum(dim=-1)) - pairs

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


def _apart(field: Tensor) -> tuple[Tensor, Tensor]:
    """Which state is the likeliest, `(..., 1)`, and exp(h_a − h) over its h: 0 in its place."""
    likeliest = field.detach().argmax(dim=-1, keepdim=True)
    ratios = torch.exp(field - field.gather(-1, likeliest))
    return likeliest, ratios.scatter(-1, likeliest, 0.0)
