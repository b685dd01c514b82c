"""Newton's method whose linear systems are solved by GMRES."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ._gmres import gmres
from ._iterate import Map, Norms, iterate
from ._scale import norm_column
from ._solution import Solution
from ._validate import check_same_shape, check_values


def newton_krylov(
    f: Map,
    z0: Tensor,
    *,
    tol: float = 1e-4,
    max_iter: int = 50,
    stop_mode: str = "rel",
    jvp: Callable[[Tensor, Tensor], Tensor] | None = None,
    inner_tol: float = 1e-2,
    inner_max_iter: int = 30,
    preconditioner: Map | None = None,
) -> Solution:
    """Solve z = f(z) by inexact Newton steps, each sample by itself.

    Each step solves (1 − ∂f/∂z) δ = f(z) − z by `gmres` to `inner_tol`, then z ← z + t δ with
    t = 1, halved for a sample whose residual norm did not fall. Few steps, each worth several
    evaluations: the choice where f is far from a contraction or the tolerance is tight.

    Args:
        f, z0, tol, stop_mode: as for `picard`.
        max_iter: Newton steps (and halvings) at most.
        jvp: (z, v) ↦ (∂f/∂z) v; by default a finite difference of f, good enough for
            `inner_tol`: its relative error is about 5e-3 in float32 and 6e-6 in float64.
        inner_tol: relative tolerance of the linear solves.
        inner_max_iter: Krylov vectors at most for each of them.
        preconditioner: r ↦ P r on `(B, n)`, an approximation of (1 − ∂f/∂z)⁻¹, for the linear
            solves.

    Returns:
        `Solution`; `steps` counts Newton steps. Cost of a step: one evaluation of f and as many
        of `jvp` (or f) as gmres needs vectors, plus one, seldom two; memory B inner_max_iter n.

    Raises:
        TypeError, ValueError: for arguments of the wrong kind, shape or range.
    """
    check_values(jvp=jvp, inner_tol=inner_tol, inner_max_iter=inner_max_iter)
    search: _LineSearch | None = None

    def newton_step(z: Tensor, fz: Tensor, g: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
        """δ, and whether it is a Newton step."""

        def matvec(v: Tensor) -> Tensor:
            if jvp is None:
                image = v - _difference(f, z, fz, v)
                # What rounding, divided by the length of the step, leaves of 0.
                noise = 10 * torch.finfo(v.dtype).eps ** (2 / 3) * norm_column(v)
                return torch.where(norm_column(image) < noise, 0, image)
            image = jvp(z, v)
            check_same_shape(image, v, "jvp")
            return v - image

        right = torch.where(wanted[:, None], g, 0)
        delta = gmres(
            matvec,
            right,
            tol=inner_tol,
            max_iter=inner_max_iter,
            preconditioner=preconditioner,
        ).value
        # Where the linear system made no sense, or was singular, a Picard step is still one.
        sound = torch.isfinite(delta).all(dim=1, keepdim=True) & (delta != 0).any(1, keepdim=True)
        return torch.where(sound, delta, g), sound

    def propose(k: int, z: Tensor, fz: Tensor, g: Tensor, norms: Norms) -> Tensor:
        nonlocal search
        if search is None:
            search = _LineSearch(z)
        return search.next(z, fz, g, newton_step)

    return iterate(f, z0, propose, tol=tol, max_iter=max_iter, stop_mode=stop_mode)


class _LineSearch:
    """Accepts a sample's step if its residual norm fell, else goes back half way.

    A plain step, in the place of one that there is not, is always accepted.
    """

    def __init__(self, z: Tensor) -> None:
        self.base = z
        self.delta = torch.zeros_like(z)
        self.length = torch.ones_like(z[:, :1])
        self.norm = torch.full_like(z[:, :1], torch.inf)
        self.newton = self.norm > 0

    def next(self, z: Tensor, fz: Tensor, g: Tensor, newton_step: Callable) -> Tensor:
        norm = norm_column(g)
        # A step of a thousandth that still does not help: take what there is and go on.
        fell = (norm < (1 - 1e-4 * self.length) * self.norm) | (self.length < 1e-3) | ~self.newton
        delta, newton = newton_step(z, fz, g, fell.squeeze(1))
        self.newton = torch.where(fell, newton, self.newton)
        self.base = torch.where(fell, z, self.base)
        self.delta = torch.where(fell, delta, self.delta)
        self.norm = torch.where(fell, norm, self.norm)
        self.length = torch.where(fell, 1.0, self.length / 2)
        return self.base + self.length * self.delta


def _difference(f: Map, z: Tensor, fz: Tensor, v: Tensor) -> Tensor:
    """(∂f/∂z) v by a forward difference.

    The step is longer than the one with the least error: an inexact Newton step forgives the
    curvature, while rounding, divided by the step, would make answers depend on how f was batched.
    """
    norm, size = norm_column(v), norm_column(torch.cat([z, fz], dim=1))
    size = torch.where(size > 0, size, 1)
    step = torch.finfo(z.dtype).eps ** (1 / 3) * size / torch.where(norm > 0, norm, 1)
    return (f(z + step * v) - fz) / step
