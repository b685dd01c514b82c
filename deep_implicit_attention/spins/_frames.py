"""Coordinates in which every spin is a vector with a covariance that can be inverted.

Ising spins are vectors of one component. Potts spins live in the q − 1 dimensions across
(1, …, 1): S = 1/q + U s with an orthonormal basis U of that space. Spherical spins have a unit of
their own, and their second moments are matched on the trace only.
"""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn

from ._ising import IsingPrior
from ._potts import PottsPrior
from ._prior import Prior
from ._spherical import SphericalPrior
from ._system import SpinSystem


class Local(nn.Module):
    """A prior as seen in a frame: fields `(B, N, k)`, V and covariances `(B, N, k, k)`."""

    rounding = 0.0  # of the mean, however small it is, in units of the dtype's

    def __init__(self, prior: Prior) -> None:
        super().__init__()
        self.prior = prior

    def log_partition(self, field: Tensor, V: Tensor) -> Tensor:
        return self.prior.log_partition(field, V)

    def mean(self, field: Tensor, V: Tensor) -> Tensor:
        return self.prior.mean(field, V)

    def covariance(self, field: Tensor, V: Tensor) -> Tensor:
        return self.match(self.prior.covariance(field, V))

    def match(self, covariance: Tensor) -> Tensor:
        """The part of a covariance that single spins and response must agree on."""
        return covariance


class _Ising(Local):
    def log_partition(self, field: Tensor, V: Tensor) -> Tensor:
        return self.prior.log_partition(field[..., 0], V[..., 0, 0])

    def mean(self, field: Tensor, V: Tensor) -> Tensor:
        return self.prior.mean(field, V[..., 0])

    def covariance(self, field: Tensor, V: Tensor) -> Tensor:
        return self.prior.covariance(field, V[..., 0]).unsqueeze(-1)


class _Sphere(Local):
    prior: SphericalPrior

    def log_partition(self, field: Tensor, V: Tensor) -> Tensor:
        # V is isotropic as it is made, and so are derivatives by it.
        v = V.diagonal(dim1=-2, dim2=-1).mean(dim=-1)
        return self.prior.log_partition(field) + 0.5 * self.prior.radius**2 * v

    def mean(self, field: Tensor, V: Tensor) -> Tensor:
        return self.prior.mean(field)

    def covariance(self, field: Tensor, V: Tensor) -> Tensor:
        return self.match(self.prior.covariance(field))

    def match(self, covariance: Tensor) -> Tensor:
        dim = covariance.shape[-1]
        trace = covariance.diagonal(dim1=-2, dim2=-1).mean(dim=-1)
        return trace[..., None, None] * torch.eye(dim, dtype=trace.dtype, device=trace.device)


class _Potts(Local):
    rounding = 2.0  # a small difference of probabilities of order 1/q, and the part of V in it

    def __init__(self, prior: Prior, basis: Tensor) -> None:
        super().__init__(prior)
        self.register_buffer("basis", basis, persistent=False)

    basis: Tensor

    def log_partition(self, field: Tensor, V: Tensor) -> Tensor:
        return self.prior.log_partition(field @ self.basis.mT, self._lift(V))

    def mean(self, field: Tensor, V: Tensor) -> Tensor:
        return self.prior.mean(field @ self.basis.mT, self._lift(V)) @ self.basis

    def covariance(self, field: Tensor, V: Tensor) -> Tensor:
        full = self.prior.covariance(field @ self.basis.mT, self._lift(V))
        return self.basis.mT @ full @ self.basis

    def _lift(self, V: Tensor) -> Tensor:
        return self.basis @ V @ self.basis.mT


class Frame:
    """A system in such coordinates: its couplings, and the way there and back."""

    def __init__(self, system: SpinSystem, local: Local, components: int) -> None:
        self.system, self.local, self.components = system, local, components
        self.basis: Tensor | None = None
        self._couplings: Tensor | None = None

    @property
    def couplings(self) -> Tensor:
        """`(N·k, N·k)`. Scalar couplings are J_ij · 1 in any frame and need not be so large."""
        # Not `cached_property`: before Python 3.12 it takes a lock, which compilers do not know.
        if self._couplings is None:
            self._couplings = self._matrix()
        return self._couplings

    @property
    def stretch(self) -> float:
        """Couplings in these coordinates over those of the system, where those are scalar."""
        return 1.0

    def stretched(self, couplings: Tensor) -> Tensor:
        """Scalar couplings of the system, or their eigenvalues, in these coordinates."""
        return couplings if self.stretch == 1 else couplings * self.stretch

    def _matrix(self) -> Tensor:
        return self.stretched(self.system.matrix())

    def fields(self, x: Tensor) -> Tensor:
        """`(*batch, N, *event)` -> `(B, N, k)`."""
        return x.reshape(-1, self.system.num_spins, self.components)

    def coordinates(self, m: Tensor) -> Tensor:
        """`(*batch, N, *event)` -> `(B, N, k)`, the inverse of `magnetization`."""
        return self.fields(m)

    def magnetization(self, m: Tensor, batch: torch.Size) -> Tensor:
        """`(B, N, k)` -> `(*batch, N, *event)`."""
        return m.reshape(*batch, self.system.num_spins, *self.system.event_shape)

    def variance(self, V: Tensor, batch: torch.Size) -> Tensor:
        """`(B, N, k, k)` -> `(*batch, N, *event, *event)`."""
        event = self.system.event_shape
        return V.reshape(*batch, self.system.num_spins, *event, *event)

    def pairs(self, chi: Tensor, batch: torch.Size) -> Tensor:
        """`(B, N·k, N·k)` -> `(*batch, N, *event, N, *event)`."""
        side = (self.system.num_spins, *self.system.event_shape)
        return chi.reshape(*batch, *side, *side)

    def constant(self, x: Tensor) -> Tensor:
        """What the change of coordinates adds to log Z, `(B,)`."""
        return x.new_zeros(self.fields(x).shape[0])


class _SphereFrame(Frame):
    """Spins in the unit that brings their radius next to the default, a power of two.

    There variances are of order one, and V are in spin glasses, so that neither hides
    magnetizations, or is hidden by them, in a state of both. A power of two changes no digit.
    """

    def __init__(self, system: SpinSystem, prior: SphericalPrior) -> None:
        (dim,) = prior.event_shape
        self.unit = 2.0 ** round(math.log2(prior.radius / SphericalPrior(dim).radius))
        measured = copy.copy(prior)
        measured.radius = prior.radius / self.unit
        super().__init__(system, local_of(measured), dim)

    @property
    def stretch(self) -> float:
        return self.unit**2

    def fields(self, x: Tensor) -> Tensor:
        return super().fields(x) * self.unit

    def coordinates(self, m: Tensor) -> Tensor:
        return super().fields(m) / self.unit

    def magnetization(self, m: Tensor, batch: torch.Size) -> Tensor:
        return super().magnetization(m * self.unit, batch)

    def variance(self, V: Tensor, batch: torch.Size) -> Tensor:
        return super().variance(V / self.stretch, batch)

    def pairs(self, chi: Tensor, batch: torch.Size) -> Tensor:
        return super().pairs(chi * self.stretch, batch)


class _PottsFrame(Frame):
    def __init__(self, system: SpinSystem) -> None:
        q = system.event_shape[0]
        like = system.couplings.detach()
        ones = torch.ones(q, 1, dtype=like.dtype, device=like.device)
        identity = torch.eye(q, q - 1, dtype=like.dtype, device=like.device)
        basis = torch.linalg.qr(torch.cat([ones, identity], dim=1)).Q[:, 1:]
        super().__init__(system, local_of(system.prior, basis), q - 1)
        self.basis: Tensor = basis
        centre = like.new_full((system.num_spins, q), 1 / q)
        self.push = system.pull(centre)  # Σ_j J_ij 1/q
        if system.couplings.dim() == 4:
            # From both halves of J, so that derivatives by J have its symmetry, as elsewhere.
            self.push = 0.5 * (self.push + system.couplings.sum(dim=(0, 2)) / q)
        self.centre_energy = 0.5 * (centre * self.push).sum()

    def _matrix(self) -> Tensor:
        given, k = self.system.couplings, self.components
        if given.dim() == 4:
            blocks = self.basis.mT @ given @ self.basis
        else:
            blocks = given[:, :, None, None] * torch.eye(k).to(given)
        return blocks.permute(0, 2, 1, 3).reshape(len(given) * k, len(given) * k)

    def fields(self, x: Tensor) -> Tensor:
        return (x.reshape(-1, *self.push.shape) + self.push) @ self.basis

    def coordinates(self, m: Tensor) -> Tensor:
        return m.reshape(-1, *self.push.shape) @ self.basis

    def magnetization(self, m: Tensor, batch: torch.Size) -> Tensor:
        return super().magnetization(1 / (self.components + 1) + m @ self.basis.mT, batch)

    def variance(self, V: Tensor, batch: torch.Size) -> Tensor:
        return super().variance(self.basis @ V @ self.basis.mT, batch)

    def pairs(self, chi: Tensor, batch: torch.Size) -> Tensor:
        sites = self.system.num_spins
        split = chi.reshape(-1, sites, self.components, sites, self.components)
        full = torch.einsum("bixjy,ax,cy->biajc", split, self.basis, self.basis)
        return super().pairs(full, batch)

    def constant(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, *self.push.shape)
        return self.centre_energy + flat.sum(dim=(1, 2)) / (self.components + 1)


def frame_of(system: SpinSystem, method: str) -> Frame:
    """The frame for the prior of `system`; raises `TypeError` for one without equations."""
    prior = system.prior
    if isinstance(prior, PottsPrior):
        return _PottsFrame(system)
    if isinstance(prior, SphericalPrior):
        return _SphereFrame(system, prior)
    if isinstance(prior, IsingPrior):
        return Frame(system, local_of(prior), 1)
    raise TypeError(f"{method} has no equations for {type(prior).__name__}")


def local_of(prior: Prior, basis: Tensor | None = None) -> Local:
    """A prior as its frame sees it; Potts spins need the `basis` of the frame."""
    if isinstance(prior, IsingPrior):
        return _Ising(prior)
    if isinstance(prior, SphericalPrior):
        return _Sphere(prior)
    assert basis is not None
    return _Potts(prior, basis)
