"""A spin system: couplings between sites, and the prior of a single spin."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..solvers._validate import check_is_tensor, check_tensor
from ._prior import Prior

# Rows checked at a time, so that what is checked is never copied whole.
_ROWS = 256


class SpinSystem:
    """The Boltzmann distribution of N spins in fields x,

        p(S | x) = (1/Z) ∏_i ρ(S_i) · exp( ½ Σ_ij S_iᵀ J_ij S_j + Σ_i x_i · S_i )

    with J_ij = J_jiᵀ, J_ii = 0 and ρ the prior, a probability measure: so log Z of Ising spins is
    N log 2 below the sum over states. Inverse temperature is part of J and x. Fields are
    `(*batch, N, *event_shape)`.

    Args:
        couplings: `(N, N)`, for vector spins meaning J_ij · 1, or `(N, N, d, d)`. May carry a
            graph: inference methods are differentiable with respect to it.
        prior: the prior of every spin.

    Raises:
        TypeError: for couplings that are no tensor in float32 or float64, and a prior that is no
            instance of one.
        ValueError: for couplings of the wrong shape, not symmetric, not finite, or with a
            self-coupling; the message names the index.
    """

    def __init__(self, couplings: Tensor, prior: Prior) -> None:
        check_tensor("couplings", couplings)
        if not isinstance(prior, Prior):
            got = f"the class {prior.__name__}" if isinstance(prior, type) else type(prior).__name__
            raise TypeError(f"prior must be a prior such as IsingPrior(), got {got}")
        rank = len(prior.event_shape)
        shape = tuple(couplings.shape)
        full = (*shape[:1], *shape[:1], *prior.event_shape, *prior.event_shape)
        scalar = couplings.dim() == 2 and shape[0] == shape[1]
        if not scalar and not (rank == 1 and shape == full):
            expected = "(N, N)" if rank == 0 else f"(N, N) or (N, N, {full[-1]}, {full[-1]})"
            raise ValueError(f"couplings must have shape {expected}, got {shape}")
        if not couplings.numel():
            raise ValueError(f"couplings must be those of at least one spin, got shape {shape}")
        _check(couplings.detach())
        self.couplings = couplings
        self.prior = prior
        self._spectrum: tuple[Tensor, int, Tensor] | None = None

    @property
    def num_spins(self) -> int:
        """N."""
        return self.couplings.shape[0]

    @property
    def event_shape(self) -> torch.Size:
        """Shape of a single spin."""
        return self.prior.event_shape

    def __repr__(self) -> str:
        kind = "full" if self.couplings.dim() == 4 else "scalar"
        return f"SpinSystem({self.num_spins} spins, {self.prior}, {kind} couplings)"

    def check_fields(self, fields: Tensor) -> None:
        """Raise unless `fields` is `(*batch, N, *event_shape)`, of the couplings' dtype, finite."""
        check_is_tensor("fields", fields)
        expected = (self.num_spins, *self.event_shape)
        if fields.shape[fields.dim() - len(expected) :] != expected:
            shape = ", ".join(map(str, expected))
            raise ValueError(f"fields must have shape (*batch, {shape}), got {tuple(fields.shape)}")
        if fields.dtype != self.couplings.dtype or fields.device != self.couplings.device:
            raise TypeError(
                f"fields are {fields.dtype} on {fields.device}, couplings "
                f"{self.couplings.dtype} on {self.couplings.device}"
            )
        if not bool(torch.isfinite(fields).all()):
            raise ValueError("fields must be finite")

    @classmethod
    def unchecked(cls, couplings: Tensor, prior: Prior) -> SpinSystem:
        """A system of couplings that were checked before, for use inside a solve."""
        system = object.__new__(cls)
        system.couplings, system.prior, system._spectrum = couplings, prior, None
        return system

    def pull(self, m: Tensor) -> Tensor:
        """Σ_j J_ij m_j, the shape of `m` `(B, N, *event_shape)`."""
        if self.couplings.dim() == 4:
            return torch.einsum("ijab,...jb->...ia", self.couplings, m)
        if self.event_shape:
            return torch.einsum("ij,...ja->...ia", self.couplings, m)
        return m @ self.couplings.mT

    def reaction(self, covariance: Tensor) -> Tensor:
        """V_i = Σ_j J_ij C_j J_ijᵀ for single-spin covariances `(B, N, *event, *event)`."""
        if self.couplings.dim() == 4:
            return torch.einsum(
                "ijab,...jbc,ijdc->...iad", self.couplings, covariance, self.couplings
            )
        if self.event_shape:
            return torch.einsum("ij,...jab->...iab", self.couplings.square(), covariance)
        return covariance @ self.couplings.square().mT

    def spectrum(self) -> Tensor:
        """Eigenvalues of couplings `(N, N)`, ascending, `(N,)`, without a graph. Cost: O(N³), once.

        They are kept until the couplings change, as autograd counts changes (it misses those
        through `.data` or an array that shares the memory).
        """
        couplings = self.couplings
        if couplings.is_inference():  # changes of inference tensors are not counted
            return torch.linalg.eigvalsh(couplings)
        kept = self._spectrum
        if kept is None or kept[0] is not couplings or kept[1] != couplings._version:
            # An ordinary tensor even in inference mode: a later call may need a graph.
            with torch.inference_mode(False), torch.no_grad():
                values = torch.linalg.eigvalsh(couplings.detach())
            kept = self._spectrum = couplings, couplings._version, values
        return kept[2]

    def matrix(self) -> Tensor:
        """The couplings as a matrix `(N·k, N·k)` on flattened spins of k components."""
        n, k = self.num_spins, self.event_shape.numel()
        if not self.event_shape:
            return self.couplings
        if self.couplings.dim() == 4:
            return self.couplings.permute(0, 2, 1, 3).reshape(n * k, n * k)
        # `torch.kron` refuses a matrix that lies in memory by columns.
        return torch.kron(self.couplings.contiguous(), torch.eye(k).to(self.couplings))


def check_system(system: Any) -> None:
    """Raise `TypeError` unless `system` is a `SpinSystem`."""
    if not isinstance(system, SpinSystem):
        raise TypeError(f"system must be a SpinSystem, got {type(system).__name__}")


def _check(couplings: Tensor) -> None:
    low, high = couplings.aminmax()
    largest = torch.maximum(-low, high)
    if not bool(torch.isfinite(largest)):
        raise ValueError(f"couplings must be finite, {_first(~torch.isfinite(couplings))} is not")
    transposed = couplings.transpose(0, 1)
    if couplings.dim() == 4:
        transposed = transposed.transpose(2, 3)
    allowed = (1e-5 if couplings.dtype == torch.float32 else 1e-10) * largest
    for first in range(0, len(couplings), _ROWS):
        rows = slice(first, first + _ROWS)
        gap = (couplings[rows] - transposed[rows]).abs()
        if bool((gap > allowed).any()):
            raise ValueError(
                "couplings must be symmetric, J_ij = J_jiᵀ: "
                f"{_first(gap == gap.max(), first)} differs from its partner by "
                f"{gap.max().item():.3g}"
            )
    own = couplings.diagonal(dim1=0, dim2=1)
    if bool(own.any()):
        index = int(own.abs().reshape(-1, own.shape[-1]).sum(dim=0).argmax())
        raise ValueError(f"couplings must have no self-coupling: J_ii is not zero at i = {index}")


def _first(where: Tensor, row: int = 0) -> str:
    """The first index in `where`, the rows of which are counted from `row`."""
    i, *rest = where.nonzero()[0].tolist()
    index = ", ".join(map(str, (row + i, *rest)))
    return f"J[{index}]"
