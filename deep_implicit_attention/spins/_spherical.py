"""Spins on a sphere."""

from __future__ import annotations

import torch
from torch import Generator, Size, Tensor

from ..solvers._validate import check_count, check_number
from ._bessel import Bessel, bessel
from ._prior import Prior
from ._von_mises_fisher import von_mises_fisher


class SphericalPrior(Prior):
    """S is uniform on the sphere ‖S‖ = R in d dimensions. With κ = R‖h‖ and ν = d/2 − 1,

        log Z0 = log[ Γ(ν+1) (2/κ)^ν I_ν(κ) ] + R² v/2,   mean = R A(κ) ĥ,
        covariance = R² [ (A/κ)(1 − ĥĥᵀ) + A′ ĥĥᵀ ],   A = I_{ν+1}(κ)/I_ν(κ)

    Only an isotropic V = v·1 has a closed form; it may be given as v `(...)` or as the matrix
    `(..., d, d)`, and has no effect on the moments. What ends in `(d, d)` is a matrix: numbers v of
    such a shape must be given as matrices v·1. Computed in float64 whatever the dtype of the
    fields, with relative accuracy for every κ ≥ 0 and differentiable to any order (`_bessel.py`).

    For large d the response is elementary (Bal 2023, *Spin-Model Transformers*, with R² = ν):
    `large_dim_mean` and its inverse `large_dim_field`.

    Args:
        dim: d ≥ 2.
        radius: R > 0, by default √(d/2 − 1), or 1 for d = 2.
    """

    def __init__(self, dim: int, radius: float | None = None) -> None:
        super().__init__()
        check_count("dim", dim)
        if dim < 2:
            raise ValueError(f"dim must be at least 2, got {dim}")
        self.event_shape = Size((dim,))
        self.order = dim / 2 - 1
        default = self.order**0.5 if dim > 2 else 1.0
        if radius is not None:
            check_number("radius", radius)
        self.radius = default if radius is None else float(radius)
        if not self.radius > 0:
            raise ValueError(f"radius must be positive, got {radius}")

    def extra_repr(self) -> str:
        return f"dim={self.event_shape[0]}, radius={self.radius:g}"

    def log_partition(self, field: Tensor, V: Tensor | None = None) -> Tensor:
        value = self._bessel(field).log
        if V is not None:
            value = value + 0.5 * self.radius**2 * self._isotropic(V)
        return value.to(field.dtype)

    def mean(self, field: Tensor, V: Tensor | None = None) -> Tensor:
        field = self._broadcast(field, V)
        ratio = self._bessel(field).ratio
        return (self.radius**2 * ratio.unsqueeze(-1) * field).to(field.dtype)

    def covariance(self, field: Tensor, V: Tensor | None = None) -> Tensor:
        field = self._broadcast(field, V)
        # ĥ has no limit at h = 0, but (A′ − A/κ) ĥĥᵀ = 2 R² dg/dx hhᵀ has.
        values, wide = self._bessel(field), field.double()
        outer = wide.unsqueeze(-1) * wide.unsqueeze(-2)
        identity = torch.eye(self.event_shape[0], dtype=wide.dtype, device=wide.device)
        along = 2 * self.radius**2 * values.fall[..., None, None] * outer
        matrix = values.ratio[..., None, None] * identity + along
        return (self.radius**2 * matrix).to(field.dtype)

    def sample(self, field: Tensor, generator: Generator | None = None) -> Tensor:
        self.check_field(field)
        return self.radius * von_mises_fisher(self.radius * field, generator)

    def supports(self, spins: Tensor) -> Tensor:
        allowed = 1e-5 if spins.dtype == torch.float32 else 1e-10
        return (spins.norm(dim=-1) - self.radius).abs() <= allowed * self.radius

    def variances(self, field: Tensor) -> tuple[Tensor, Tensor]:
        """Variance along the field and across it, `(...)` each: R² A′ and R² A/κ.

        The eigenvalues of `covariance`, with relative accuracy also where a matrix in the dtype of
        the field cannot hold both (strong fields).
        """
        values = self._bessel(field)
        along, across = values.slope, values.ratio
        return (self.radius**2 * along).to(field.dtype), (self.radius**2 * across).to(field.dtype)

    def large_dim_mean(self, field: Tensor) -> Tensor:
        """The mean for large d, R² h / (ν + √(ν² + R²‖h‖²)); with R² = ν,
        h / (1 + √(1 + ‖h‖²/R²))."""
        self._check_large_dim(field)
        stretch = (self.order**2 + self._squared(field)).sqrt()
        return self.radius**2 * field / (self.order + stretch).unsqueeze(-1)

    def large_dim_field(self, mean: Tensor) -> Tensor:
        """The inverse of `large_dim_mean`, for ‖m‖ < R: 2ν m / (R² − ‖m‖²)."""
        self._check_large_dim(mean)
        gap = self.radius**2 - mean.square().sum(dim=-1, keepdim=True)
        if bool((gap <= 0).any()):
            raise ValueError(f"mean must lie inside the sphere of radius {self.radius:g}")
        return 2 * self.order * mean / gap

    def _check_large_dim(self, vector: Tensor) -> None:
        self.check_field(vector)
        if self.order == 0:
            raise ValueError("the large-dimension form needs dim of at least 3")

    def _squared(self, field: Tensor) -> Tensor:
        """κ² = R²‖h‖²."""
        return self.radius**2 * field.square().sum(dim=-1)

    def _bessel(self, field: Tensor) -> Bessel:
        self.check_field(field)
        return bessel(self._squared(field.double()), self.order)

    def _broadcast(self, field: Tensor, V: Tensor | None) -> Tensor:
        """The field for every V, which the moments do not depend on."""
        if V is None:
            return field
        batch = V.shape[:-2] if self._is_matrix(V) else V.shape
        if batch == field.shape[:-1]:
            return field
        return field.expand(*torch.broadcast_shapes(batch, field.shape[:-1]), field.shape[-1])

    def _is_matrix(self, V: Tensor) -> bool:
        return V.shape[-2:] == 2 * self.event_shape

    def _isotropic(self, V: Tensor) -> Tensor:
        """v from V = v·1, given as either."""
        if not self._is_matrix(V):
            return V
        v = V.diagonal(dim1=-2, dim2=-1).mean(dim=-1)
        identity = torch.eye(self.event_shape[0], dtype=V.dtype, device=V.device)
        gap = (V - v[..., None, None] * identity).abs()
        allowed = 1e-5 if V.dtype == torch.float32 else 1e-10
        if not bool((gap <= allowed * v.abs()[..., None, None]).all()):
            raise ValueError("on the sphere only an isotropic V = v·1 has a closed form")
        return v
