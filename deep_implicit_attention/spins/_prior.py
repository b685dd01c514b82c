"""What a prior of a single spin offers to the inference methods."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Generator, Size, Tensor, nn

from ..deq._watched import transformed
from ..solvers._validate import check_is_tensor


class Prior(nn.Module):
    """The measure ρ of a single spin, through its partition function

        log Z0(h, V) = log ∫ ρ(S) exp(h·S + ½ Sᵀ V S)

    with ρ a probability measure, mean = ∂/∂h and covariance = ∂²/∂h². `field` is
    `(..., *event_shape)`, results broadcast over the dimensions before the event; `V` may be left
    out, which is V = 0. `None` for its shape below means that the prior says what V looks like.
    """

    event_shape: Size

    def log_partition(self, field: Tensor, V: Tensor | None = None) -> Tensor:
        """log Z0(h, V), `(...)`."""
        raise NotImplementedError

    def mean(self, field: Tensor, V: Tensor | None = None) -> Tensor:
        """⟨S⟩, `(..., *event_shape)`."""
        raise NotImplementedError

    def covariance(self, field: Tensor, V: Tensor | None = None) -> Tensor:
        """⟨S Sᵀ⟩ − ⟨S⟩⟨S⟩ᵀ, `(..., *event_shape, *event_shape)`."""
        raise NotImplementedError

    def sample(self, field: Tensor, generator: Generator | None = None) -> Tensor:
        """An exact draw of S ~ ρ(S) exp(h·S) / Z0(h) for every field, the shape of `field`."""
        raise NotImplementedError

    def supports(self, spins: Tensor) -> Tensor:
        """Whether `spins` `(..., *event_shape)` are possible values, boolean `(...)`."""
        raise NotImplementedError

    def admissible(self, V: Tensor) -> Tensor:
        """`V`, with NaN in place of every V_i with which log Z0 is infinite."""
        return V

    def check_field(self, field: Tensor) -> None:
        """Raise `ValueError` unless the last dimensions of `field` are the event.

        `TypeError` unless it is a tensor of floating-point numbers: results are in its dtype.
        """
        check_is_tensor("field", field)
        if not field.is_floating_point():
            raise TypeError(f"field must be of a floating-point dtype, got {field.dtype}")
        rank = len(self.event_shape)
        if rank and field.shape[-rank:] != self.event_shape:
            raise ValueError(
                f"field must have shape (..., {', '.join(map(str, self.event_shape))}), "
                f"got {tuple(field.shape)}"
            )


def with_derivatives(value: Tensor, differing: Callable[[], Tensor], field: Tensor) -> Tensor:
    """`value`, a function of `field`, with the derivatives of `differing()`.

    That is the same function but for a constant and rounding, and is asked for if there are
    derivatives. Without them and with them the value has the same bits.
    """
    wanted = field.requires_grad and torch.is_grad_enabled()
    if not (wanted or transformed(field)):
        return value
    same = differing()
    return value.detach() + (same - same.detach())
