"""Newton's method for a smooth convex function, its linear equations by conjugate gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

_MAX_INNER = 200
_MAX_HALVINGS = 30
_SHORT = 1e-2


@dataclass(frozen=True)
class Point:
    """A function at a point.

    Attributes:
        value: f.
        gradient: the same shape as the point, as are the next two.
        product: a direction to the Hessian times it.
        diagonal: of the Hessian, roughly; positive.
    """

    value: float
    gradient: Tensor
    product: Callable[[Tensor], Tensor]
    diagonal: Tensor


@dataclass(frozen=True)
class Minimum:
    """Where `minimise` ended: the place, the largest gradient there, and after how many steps."""

    x: Tensor
    residual: float
    steps: int
    converged: bool


def minimise(
    evaluate: Callable[[Tensor], Point], start: Tensor, *, tol: float, max_iter: int
) -> Minimum:
    """The minimum from `start`.

    Ends when the largest gradient is at most `tol`, after `max_iter` steps, or when no step lowers
    the function. A gradient that small where Newton's step is long is no minimum: the function
    falls for ever, as likelihoods do that have their maximum at infinity.
    Products are solved to a relative residual of √‖g‖, at most ½, so that the end is superlinear
    (Nocedal, Wright 2006, *Numerical Optimization*, section 7.1).
    """
    x, point = start, evaluate(start)
    for step in range(max_iter):
        worst = point.gradient.abs().max().item()
        move = _conjugate_gradients(point) if worst else x * 0
        if worst <= tol:
            return Minimum(x, worst, step, move.abs().max().item() <= _SHORT)
        slope = (move * point.gradient).sum().item()
        length = 1.0
        for _ in range(_MAX_HALVINGS):
            new = evaluate(x + length * move)
            # Near the minimum differences of f are rounding, and Newton's step is right.
            # (Inner products of symmetric matrices count pairs twice, Armijo's constant too.)
            slack = 1e-13 * (1 + abs(point.value))
            if new.value <= point.value + 1e-4 * length * slope + slack:
                break
            length /= 2
        else:
            return Minimum(x, worst, step, False)
        x, point = x + length * move, new
    worst = point.gradient.abs().max().item()
    return Minimum(x, worst, max_iter, worst <= tol)


def _conjugate_gradients(point: Point) -> Tensor:
    """−H⁻¹g, preconditioned by the diagonal of H."""
    residual = -point.gradient
    norm = residual.norm().item()
    target = min(0.5, norm**0.5) * norm
    x = residual * 0
    z = residual / point.diagonal
    direction, rho = z, (residual * z).sum()
    for _ in range(_MAX_INNER):
        image = point.product(direction)
        curvature = (direction * image).sum()
        if not curvature > 0:
            # The function is flat to rounding here: the steepest way if nothing better is known.
            return x if bool(x.any()) else z
        step = rho / curvature
        x = x + step * direction
        residual = residual - step * image
        if residual.norm().item() <= target:
            break
        z = residual / point.diagonal
        new = (residual * z).sum()
        direction, rho = z + (new / rho) * direction, new
    return x
