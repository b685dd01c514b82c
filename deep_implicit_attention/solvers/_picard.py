"""Picard iteration: apply the map again and again."""

from __future__ import annotations

from torch import Tensor

from ._iterate import Map, Norms, iterate
from ._solution import Solution
from ._validate import check_values


def picard(
    f: Map,
    z0: Tensor,
    *,
    tol: float = 1e-4,
    max_iter: int = 50,
    stop_mode: str = "rel",
    damping: float = 0.0,
    preconditioner: Map | None = None,
    rough: Map | None = None,
) -> Solution:
    """Solve z = f(z) by z ← z + (1 − damping) (f(z) − z), each sample by itself.

    Converges where f contracts; `damping` in [0, 1) widens the set of maps on which it does (real
    eigenvalues of ∂f/∂z far below −1) and slows the others down. The residual that decides is
    that of the undamped map, so damping cannot make a slow iteration look converged.

    Args:
        f: `(B, n) -> (B, n)`, each row a function of the same row only. It may have
            ``f.of_samples``, index ↦ the map of these samples alone: on the host, without a
            preconditioner, it is used once half of all samples are done, and again once half of the
            rest are.
        z0: initial state `(B, n)`, float32 or float64.
        tol: bound on the residual of each sample.
        max_iter: evaluations of f at most.
        stop_mode: ``"rel"``, ‖f(z) − z‖ / ‖f(z)‖, or ``"abs"``, ‖f(z) − z‖.
        damping: part of the old state kept at each step.
        preconditioner: r ↦ P r on `(B, n)`, an approximation of (1 − ∂f/∂z)⁻¹: f(z) − z is
            replaced by P (f(z) − z), which has the same zeros. Residuals stay those of f. If the
            first step leaves more than 0.8 of a sample's residual, the sample goes on without P.
        rough: z ↦ a cheap approximation of f(z), in narrower numbers for instance. It takes the
            place of f as long as a sample's residual falls and is above 1e-2 and 5 `tol` (with
            "rel"; on an accelerator up to three steps longer). `trace` then holds residuals of
            `rough`.

    Returns:
        `Solution`. Cost: one evaluation and O(B n) a step; memory O(B n).

    Raises:
        TypeError, ValueError: for arguments of the wrong kind, shape or range.
    """
    check_values(damping=damping)

    def propose(k: int, z: Tensor, fz: Tensor, g: Tensor, norms: Norms) -> Tensor:
        return fz if damping == 0 else z + (1 - damping) * g

    return iterate(
        f,
        z0,
        propose,
        tol=tol,
        max_iter=max_iter,
        stop_mode=stop_mode,
        preconditioner=preconditioner,
        rough=rough,
        keep=lambda stay: None,  # nothing is remembered of any sample
    )
