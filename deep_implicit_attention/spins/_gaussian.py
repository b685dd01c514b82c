"""Gaussian spins, with a trainable mean and covariance."""

from __future__ import annotations

import torch
from torch import Generator, Size, Tensor, nn

from ..deq._state import full_precision
from ..solvers._validate import check_tensor
from ._blocks import cholesky_inverse
from ._prior import Prior


class GaussianPrior(Prior):
    """S ~ N(μ, Σ) in d dimensions, both trainable; V is `(..., d, d)`.

    With the precision P = Σ⁻¹ and b = h + P μ,

        log Z0 = ½ log det P − ½ log det(P − V) + ½ bᵀ(P − V)⁻¹b − ½ μᵀPμ
        mean = (P − V)⁻¹ b,   covariance = (P − V)⁻¹

    Σ is parametrised by its Cholesky factor with the logarithm of the diagonal, so it stays
    positive definite under any update.

    Args:
        mean: μ, `(d,)`.
        covariance: Σ, `(d, d)`, symmetric and positive definite.

    Raises:
        TypeError: for a mean or covariance that is no tensor in float32 or float64, or if they
            differ in dtype or device.
        ValueError: for numbers that are not finite, shapes that do not fit, a Σ that is not
            positive definite, and P − V that is not; a V that is NaN gives NaN.
    """

    def __init__(self, mean: Tensor, covariance: Tensor) -> None:
        super().__init__()
        for name, value in (("mean", mean), ("covariance", covariance)):
            check_tensor(name, value)
        if mean.dtype != covariance.dtype or mean.device != covariance.device:
            raise TypeError(
                f"mean is {mean.dtype} on {mean.device}, covariance {covariance.dtype} on "
                f"{covariance.device}"
            )
        if mean.dim() != 1 or covariance.shape != (len(mean), len(mean)):
            raise ValueError(
                f"mean must be (d,) and covariance (d, d), got {tuple(mean.shape)} and "
                f"{tuple(covariance.shape)}"
            )
        if not len(mean):
            raise ValueError("mean must have at least one component, got shape (0,)")
        if not mean.is_meta:  # whose numbers are given later
            _check_moments(mean.detach(), covariance.detach())
        factor = torch.linalg.cholesky_ex(covariance.detach()).L
        self.event_shape = Size(mean.shape)
        self.location = nn.Parameter(mean.detach().clone())
        self.log_diagonal = nn.Parameter(factor.diagonal().log())
        self.below_diagonal = nn.Parameter(factor.tril(-1))

    def extra_repr(self) -> str:
        return f"dim={self.event_shape[0]}"

    def scale_tril(self) -> Tensor:
        """The Cholesky factor of Σ, `(d, d)`, in float32 at least."""
        below, log_diagonal = map(full_precision, (self.below_diagonal, self.log_diagonal))
        return below.tril(-1) + torch.diag(log_diagonal.exp())

    def precision(self) -> Tensor:
        """P = Σ⁻¹, `(d, d)`, in float32 at least."""
        return cholesky_inverse(self.scale_tril())

    def log_partition(self, field: Tensor, V: Tensor | None = None) -> Tensor:
        factor, b = self._solve(field, V)
        pulled = torch.linalg.solve_triangular(factor, b.unsqueeze(-1), upper=False).squeeze(-1)
        whitened = torch.linalg.solve_triangular(
            self.scale_tril().to(b), self.location.to(b).unsqueeze(-1), upper=False
        )
        value = (
            -self.log_diagonal.to(b).sum()
            - factor.diagonal(dim1=-2, dim2=-1).log().sum(dim=-1)
            + 0.5 * pulled.square().sum(dim=-1)
            - 0.5 * whitened.square().sum()
        )
        return value.to(field.dtype)

    def mean(self, field: Tensor, V: Tensor | None = None) -> Tensor:
        factor, b = self._solve(field, V)
        return torch.cholesky_solve(b.unsqueeze(-1), factor).squeeze(-1).to(field.dtype)

    def covariance(self, field: Tensor, V: Tensor | None = None) -> Tensor:
        factor, b = self._solve(field, V)
        covariance = cholesky_inverse(factor).expand(*b.shape, b.shape[-1])
        return covariance.to(field.dtype)

    def sample(self, field: Tensor, generator: Generator | None = None) -> Tensor:
        # μ + Σ h + L ε with Σ = L Lᵀ.
        self.check_field(field)
        factor = self.scale_tril().to(field)
        noise = torch.randn(
            field.shape, generator=generator, dtype=field.dtype, device=field.device
        )
        return self.location.to(field) + (field @ factor + noise) @ factor.mT

    def supports(self, spins: Tensor) -> Tensor:
        return torch.isfinite(spins).all(dim=-1)

    def admissible(self, V: Tensor) -> Tensor:
        _, failed = torch.linalg.cholesky_ex(self.precision().to(V) - V)
        return torch.where((failed == 0)[..., None, None], V, torch.nan)

    def _solve(self, field: Tensor, V: Tensor | None) -> tuple[Tensor, Tensor]:
        """The Cholesky factor of P − V, and b."""
        self.check_field(field)
        wide = full_precision(field)
        precision = self.precision().to(wide)
        total = precision if V is None else precision - V.to(wide)
        factor, failed = torch.linalg.cholesky_ex(total)
        # NaN in, NaN out: the error is for numbers with which there is no distribution.
        unbounded = (failed != 0) & torch.isfinite(total).flatten(-2).all(dim=-1)
        if bool(unbounded.any()):
            smallest = torch.linalg.eigvalsh(total.detach()[unbounded]).min().item()
            raise ValueError(
                f"P − V must be positive definite, its smallest eigenvalue is {smallest:.4g}"
            )
        factor = torch.where((failed == 0)[..., None, None], factor, torch.nan)
        shape = torch.broadcast_shapes(factor.shape[:-1], field.shape)
        b = wide + precision @ self.location.to(wide)
        return factor.expand(*shape, shape[-1]), b.expand(shape)


def _check_moments(mean: Tensor, covariance: Tensor) -> None:
    for name, value in (("mean", mean), ("covariance", covariance)):
        if not bool(torch.isfinite(value).all()):
            raise ValueError(f"{name} must be finite")
    if not torch.allclose(covariance, covariance.mT):
        raise ValueError("covariance must be symmetric")
    if int(torch.linalg.cholesky_ex(covariance).info):
        smallest = torch.linalg.eigvalsh(covariance)[0].item()
        raise ValueError(
            f"covariance must be positive definite, its smallest eigenvalue is {smallest:.4g}"
        )
