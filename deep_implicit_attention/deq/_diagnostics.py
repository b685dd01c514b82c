"""Numbers that say how well a map contracts at a state, for each sample.

In the precision of the state, as solves are: autocast has no effect.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..solvers import Solution, _arnoldi
from ..solvers._scale import power_of_two
from ..solvers._validate import check_count, check_number
from ._linear_map import vjp
from ._map import without_autocast
from ._state import Layout, State, widen


def spectral_radius(
    f: Callable[[State], State], z: State, *, max_iter: int = 30, seed: int = 0
) -> Tensor:
    """Spectral radius of ∂f/∂z at `z`, `(B,)`: plain iteration contracts near z if it is < 1.

    The largest modulus of the Ritz values of an Arnoldi process on (∂f/∂z)ᵀ from a random vector:
    exact if `max_iter` reaches the number of components, from below and usually to three digits
    otherwise. Costs one evaluation, `max_iter` vector–Jacobian products, and memory for
    `max_iter` states. `seed` is that of the vector. Raises `RuntimeError` in inference mode.
    """
    flat, product = _linearise(f, z)
    with without_autocast(flat):
        ritz = _ritz_values(product, flat, max_iter, seed)
    return ritz.abs().amax(dim=1)


def jacobian_norm(
    f: Callable[[State], State], z: State, *, max_iter: int = 20, seed: int = 0
) -> Tensor:
    """Spectral norm of ∂f/∂z at `z`, `(B,)`: the local Lipschitz constant of f.

    Lanczos on (∂f/∂z)ᵀ(∂f/∂z) from a random vector (of `seed`), an estimate from below. Costs
    `max_iter` products with the Jacobian and as many with its transpose. Raises `RuntimeError` in
    inference mode.
    """
    flat, product = _linearise(f, z)
    with torch.enable_grad(), without_autocast(flat):
        dummy = torch.zeros_like(flat, requires_grad=True)
        image = product(dummy, create_graph=True)

    unit: Tensor | None = None

    def both(v: Tensor) -> Tensor:
        nonlocal unit
        forward = vjp(image, dummy, v)
        if unit is None:
            unit = power_of_two(forward)
        return product(forward / unit)

    with without_autocast(flat):
        ritz = _ritz_values(both, flat, max_iter, seed)
    norm = ritz.real.amax(dim=1).clamp_min(0).sqrt()
    return norm if unit is None else norm * unit[:, 0].sqrt()


def jacobian_penalty(
    f: Callable[[State], State],
    z: State,
    *,
    samples: int = 1,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Estimate of ‖∂f/∂z‖_F² at `z`, `(B,)`, differentiable: a term for the loss.

    Hutchinson's estimator, the mean of ‖(∂f/∂z)ᵀ v‖² over `samples` Gaussian vectors v (Bai,
    Koltun, Kolter 2021, arXiv:2106.14342). It is differentiable with respect to what f depends
    on and, where z carries a graph, with respect to z. Costs one evaluation and `samples`
    products, each with a graph. Divide by the number of components for a scale-free penalty.
    The vectors are drawn by `generator`, or by torch's own. Raises `RuntimeError` in inference
    mode.
    """
    check_count("samples", samples)
    _need_gradients()
    z = widen(z)
    layout = Layout.of(z)
    with torch.enable_grad():
        flat = layout.pack(z)
        flat = flat.view_as(flat) if flat.requires_grad else flat.detach().requires_grad_()
    with torch.enable_grad(), without_autocast(flat):
        image = layout.pack(f(layout.unpack(flat)))
        total = flat.new_zeros(flat.shape[0])
        for _ in range(samples):
            v = torch.randn(flat.shape, dtype=flat.dtype, device=flat.device, generator=generator)
            total = total + vjp(image, flat, v, create_graph=True).square().sum(dim=1)
    return total / samples


def error_bound(solution: Solution, contraction: float | Tensor) -> Tensor:
    """Bound on ‖z − z*‖, `(B,)`, for a map that contracts with factor L = `contraction`.

    ‖z − z*‖ ≤ ‖f(z) − z‖ / (1 − L); infinite where L ≥ 1. L must bound ‖∂f/∂z‖ between z and
    z*, as the vector-spin mechanism's β/2 does everywhere (in its own norm); `jacobian_norm` is
    its value at one point.

    Raises:
        ValueError: for L < 0, and a tensor that is neither one number nor one a sample, `(B,)`.
    """
    norm = solution.residual_norm
    if not isinstance(contraction, Tensor):
        check_number("contraction", contraction, minimum=0.0)
        contraction = norm.new_tensor(float(contraction))
    elif contraction.dim() and contraction.shape != norm.shape:
        raise ValueError(
            f"contraction must be a number or of shape {tuple(norm.shape)}, got "
            f"{tuple(contraction.shape)}"
        )
    elif bool((contraction < 0).any()):
        raise ValueError(f"contraction must be at least 0, got {contraction.min().item():g}")
    contraction = contraction.to(norm)
    return torch.where(contraction < 1, norm / (1 - contraction), math.inf)


def _need_gradients() -> None:
    if torch.is_inference_mode_enabled():
        raise RuntimeError("diagnostics differentiate f: call them outside torch.inference_mode()")


def _linearise(f: Callable[[State], State], z: State) -> tuple[Tensor, Callable[..., Tensor]]:
    """The flat state and v ↦ (∂f/∂z)ᵀ v at it."""
    _need_gradients()
    z = widen(z)
    layout = Layout.of(z)
    flat = layout.pack(z).detach()
    with torch.enable_grad(), without_autocast(flat):
        flat = flat.requires_grad_()
        image = layout.pack(f(layout.unpack(flat)))

    def product(v: Tensor, create_graph: bool = False) -> Tensor:
        return vjp(image, flat, v, create_graph)

    return flat.detach(), product


@torch.no_grad()
def _ritz_values(
    product: Callable[[Tensor], Tensor], like: Tensor, max_iter: int, seed: int
) -> Tensor:
    """Eigenvalues of the projection of a linear map on a Krylov space, `(B, k)`, complex.

    The space is that of the map in a unit of its own: squares of small or large images would be
    lost, and the space end with its first vector.
    """
    check_count("max_iter", max_iter)
    batch, n = like.shape
    size = min(max_iter, n)
    if batch == 0 or n == 0:
        return like.new_zeros(batch, 1, dtype=like.dtype.to_complex())
    generator = torch.Generator().manual_seed(seed)
    # One start for all samples: what a sample gets does not depend on its batch mates.
    start = torch.randn(n, dtype=like.dtype, generator=generator, device="cpu").to(like.device)
    basis = like.new_zeros(batch, size + 1, n)
    basis[:, 0] = start / torch.linalg.vector_norm(start)
    hessenberg = like.new_zeros(batch, size + 1, size)
    unit = torch.ones_like(like[:, :1])
    for k in range(size):
        image = product(basis[:, k])
        if k == 0:
            unit = power_of_two(image)
        hessenberg[:, : k + 2, k], _ = _arnoldi.extend(basis, k, image / unit)
    square = hessenberg[:, :size]
    finite = torch.isfinite(square).flatten(1).all(dim=1)
    values = torch.linalg.eigvals(torch.where(finite[:, None, None], square, 0))
    return torch.where(finite[:, None], values * unit, torch.nan)
