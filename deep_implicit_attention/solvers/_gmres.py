"""GMRES: linear systems, one Krylov space for each sample."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from . import _arnoldi
from ._scale import BETWEEN_LOOKS, is_host, power_of_two
from ._solution import Solution, Status
from ._validate import check_arguments, check_same_shape, check_values


@torch.no_grad()
def gmres(
    matvec: Callable[[Tensor], Tensor],
    b: Tensor,
    *,
    tol: float = 1e-4,
    max_iter: int = 50,
    restart: int | None = None,
    preconditioner: Callable[[Tensor], Tensor] | None = None,
) -> Solution:
    """Solve A x = b from x = 0 by restarted GMRES, each sample by itself.

    Minimises ‖b − A x‖ over the Krylov space of A and b (Saad, Schultz 1986, SIAM J. Sci. Stat.
    Comput. 7, 856). Of all Krylov methods it needs the fewest products with A.

    Args:
        matvec: v ↦ A v, `(B, n) -> (B, n)`, linear, each row a function of the same row only.
        b: right-hand sides `(B, n)`, float32 or float64.
        tol: bound on ‖b − A x‖ / ‖b‖ of each sample.
        max_iter: Krylov vectors at most, over all restarts.
        restart: vectors after which the space is dropped and built anew; by default never.
        preconditioner: r ↦ P r, linear, an approximation of A⁻¹: the space is that of A P, and
            residuals stay those of A x = b (Saad 2003, *Iterative Methods*, section 9.3.2).

    Returns:
        `Solution`; a sample with b = 0 has x = 0, one that met NaN or infinity has x = NaN.
        `trace` holds the recurrence's residuals, `residual` the true one of the value, for which
        each cycle spends one more product, and another where rounding has outgrown it. Cost: one
        product and O(B k n) at vector k; memory B restart n.

    Raises:
        TypeError, ValueError: for arguments of the wrong kind, shape or range.
    """
    check_arguments(matvec, b, "b", tol, max_iter, preconditioner=preconditioner)
    check_values(restart=restart)
    batch, n = b.shape
    size = min(max_iter, n if restart is None else min(restart, n))
    # In float32 the squares of small numbers vanish; a power of two makes b of order one, exactly.
    unit = power_of_two(b)
    b = b / unit
    b_norm = torch.linalg.vector_norm(b, dim=1)
    scale = torch.where(b_norm > 0, b_norm, 1)

    def product(v: Tensor) -> Tensor:
        if preconditioner is None:
            return matvec(v)
        image = preconditioner(v)
        check_same_shape(image, v, "the preconditioner")
        return matvec(image)

    def after(correction: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x with a correction, its residual, and the norm of that."""
        trial = x + (correction if preconditioner is None else preconditioner(correction))
        residual = b - matvec(trial)
        return trial, residual, torch.linalg.vector_norm(residual, dim=1)

    x, r = torch.zeros_like(b), b
    norm = b_norm
    spare, spare_norm = None, torch.full_like(norm, torch.inf)
    finite = torch.isfinite(b_norm)
    converged = b_norm == 0
    stalled = singular = torch.zeros_like(converged)
    steps = torch.zeros(batch, dtype=torch.long, device=b.device)
    trace, vectors = b.new_zeros(1, batch), 0  # the last row takes what is nobody's
    while True:
        active = finite & ~converged & ~stalled & (steps < max_iter)
        if not active.any():
            break
        correction, used, stuck, broken, rows, shorter = _cycle(
            product, r, active, tol * scale, size, max_iter - steps
        )
        trial, trial_r, trial_norm = after(correction)
        claimed = rows[-1].maximum(tol * scale)
        missed = active & ~broken & ~(trial_norm <= 1.01 * claimed)
        least = trial_norm
        if missed.any():
            # Rounding has become larger than the residual. Where A is as good as singular it is
            # that of a long x. Should further cycles not take it away, a short x is the answer.
            short = shorter()
            length = torch.linalg.vector_norm(correction, dim=1)
            missed &= torch.linalg.vector_norm(short, dim=1) < 0.5 * length
            other, _, other_norm = after(short)
            missed &= ~(other_norm > trial_norm)
            least = torch.where(missed, other_norm, trial_norm)
            kept = missed & spare_norm.isinf()  # later ones would begin at the long x
            spare = torch.where(kept[:, None], other, x if spare is None else spare)
            spare_norm = torch.where(kept, other_norm, spare_norm)
        del shorter  # which holds the space: there is to be one at a time
        vectors += len(rows)
        if vectors >= len(trace):  # which is not made for `max_iter`: few solves come near it
            trace = torch.cat([trace, b.new_zeros(vectors, batch)])
        for j, row in enumerate(rows):
            place = torch.where(used > j, steps + j, len(trace) - 1)
            trace.scatter_(0, place[None], (row / scale)[None])
        steps += used
        finite = torch.where(active, torch.isfinite(least) & ~broken, finite)
        # A whole space that gained next to nothing has met rounding; a restarted one may be slow.
        gain = 0.9 if restart is None else 1.0
        singular = singular | stuck | missed
        stalled = stalled | stuck | (active & ~(trial_norm < gain * norm))
        better = active & (trial_norm < norm)
        x = torch.where(better[:, None], trial, x)
        r = torch.where(better[:, None], trial_r, r)
        norm = torch.where(better, trial_norm, norm)
        converged |= finite & (norm <= tol * scale)

    if spare is not None:
        # The residual of a long x can be small by chance; how large its rounding is shows in
        # another product that would be the same without.
        rounding = torch.linalg.vector_norm(b - matvec(0.7 * x) / 0.7 - r, dim=1)
        short = ~converged & spare_norm.isfinite()
        short &= ~(spare_norm > 1.1 * (norm + rounding))
        x = torch.where(short[:, None], spare, x)
        norm = torch.where(short, spare_norm, norm)
        trace = torch.where(short, trace.maximum(norm / scale), trace)
    converged |= finite & (norm <= tol * scale)
    codes = torch.full_like(steps, Status.MAX_ITER.code)
    codes = codes.masked_fill(singular & stalled, Status.SINGULAR.code)
    codes = codes.masked_fill(converged, Status.CONVERGED.code)
    codes = codes.masked_fill(~finite, Status.NONFINITE.code)
    residual = torch.where(finite, norm / scale, torch.inf)
    value = torch.where(finite[:, None], x * unit, torch.nan)
    rows = int(steps.max()) if batch else 0
    own_row = torch.arange(rows, device=b.device)[:, None].minimum((steps - 1).clamp_min(0))
    return Solution(
        value, residual, steps, converged, codes, trace.gather(0, own_row), norm * unit[:, 0]
    )


def _cycle(
    matvec: Callable[[Tensor], Tensor],
    r: Tensor,
    active: Tensor,
    bound: Tensor,
    size: int,
    room: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor], Callable[[], Tensor]]:
    """One Krylov space of at most `size` vectors, and at most `room` for a sample, for A x = r.

    Returns the correction, the number of vectors each sample used, which samples found A singular
    on their space or not finite, which of them not finite, the residual norm of every sample after
    each vector, and how to get the correction with so few vectors that its residual, with the
    rounding of a product with it, is least.
    """
    batch, n = r.shape
    look_every = 1 if is_host(r) else BETWEEN_LOOKS
    norm = torch.linalg.vector_norm(r, dim=1)
    basis = r.new_empty(batch, size + 1, n)
    basis[:, 0] = torch.where(active[:, None], r / torch.where(norm > 0, norm, 1)[:, None], 0)
    given = torch.stack([t.to(r) for t in (norm, bound, active, room)]).cpu().numpy()
    problem = _LeastSquares(given, size)
    columns: list[Tensor] = []

    for k in range(size):
        image = matvec(basis[:, k])
        if k == 0:
            check_same_shape(image, r, "matvec")
        columns += _arnoldi.extend(basis, k, image)
        if (k + 1) % look_every == 0 or k + 1 == size:
            problem.enter(torch.cat(columns, dim=1).cpu().numpy())
            columns = []
            if problem.over:
                break

    def combined(weights: np.ndarray) -> Tensor:
        rows = torch.from_numpy(weights).to(r).unsqueeze(1)
        return (rows @ basis[:, : problem.k]).squeeze(1)

    def shorter() -> Tensor:
        return combined(problem.shorter())

    used, stuck, broken = (
        torch.from_numpy(found).to(r.device)
        for found in (problem.used, problem.stuck, problem.broken)
    )
    rows = list(torch.from_numpy(np.stack(problem.rows)).to(r))
    return combined(problem.weights()), used, stuck, broken, rows, shorter


class _LeastSquares:
    """Weights of the Krylov vectors whose residual is least, of every sample.

    The Hessenberg matrix is triangularised by rotations as it grows; for a sample that is done,
    further columns are those of the identity. All on the host, where these are a few numbers of
    numpy's, in the precision of the vectors.
    """

    def __init__(self, given: np.ndarray, size: int) -> None:
        norm, bound, active, room = given
        self.dtype, self.eps = given.dtype, np.finfo(given.dtype).eps
        self.k, self.bound, self.room = 0, bound, room
        self.active = active > 0
        batch = len(norm)
        self.rhs = np.zeros((batch, size + 1), self.dtype)
        self.rhs[:, 0] = np.where(self.active, norm, 0)
        self.triangle = np.tile(np.eye(size, dtype=self.dtype), (batch, 1, 1))
        self.cosines, self.sines = np.ones_like(self.rhs), np.zeros_like(self.rhs)
        self.used = np.zeros(batch, np.int64)
        self.stuck = self.broken = np.zeros(batch, bool)
        self.largest = np.zeros_like(norm)  # norm of a product with a vector
        self.now = norm
        self.rows: list[np.ndarray] = []

    @property
    def over(self) -> bool:
        """Whether no sample needs another vector."""
        return not np.count_nonzero(self.active)

    def enter(self, columns: np.ndarray) -> None:
        """Take in further columns, each with the norm of its product behind it."""
        while columns.shape[1] and not self.over:
            column, norm, columns = np.split(columns, [self.k + 2, self.k + 3], axis=1)
            with np.errstate(all="ignore"):
                self._enter(column.copy(), norm[:, 0])

    def _enter(self, column: np.ndarray, norm: np.ndarray) -> None:
        k = self.k
        for i in range(k):
            upper, lower = column[:, i].copy(), column[:, i + 1]
            cosine, sine = self.cosines[:, i], self.sines[:, i]
            column[:, i] = cosine * upper + sine * lower
            column[:, i + 1] = cosine * lower - sine * upper
        length = np.hypot(column[:, k], column[:, k + 1])
        finite = np.isfinite(length)
        # A pivot that is rounding noise (or not finite): A is singular on this space.
        self.largest = np.maximum(self.largest, norm)
        sound = self.active & (length > 10 * self.eps * self.largest) & finite
        self.used += self.active
        safe = np.where(sound, length, 1)
        cosine = np.where(sound, column[:, k] / safe, 1)
        sine = np.where(sound, column[:, k + 1] / safe, 0)
        self.cosines[:, k], self.sines[:, k] = cosine, sine
        column[:, k] = length
        self.triangle[sound, : k + 1, k] = column[sound, : k + 1]
        self.rhs[:, k + 1] = np.where(sound, -sine * self.rhs[:, k], 0)
        self.rhs[:, k] = np.where(sound, cosine * self.rhs[:, k], 0)
        self.now = np.where(sound, abs(self.rhs[:, k + 1]), self.now)
        self.rows.append(self.now)
        self.stuck = self.stuck | (self.active & ~sound)
        self.broken = self.broken | (self.active & ~finite)
        self.active = sound & (self.now > self.bound) & (self.used < self.room)
        self.k += 1

    def _solved(self, rhs: np.ndarray) -> np.ndarray:
        triangle = torch.from_numpy(self.triangle[:, : self.k, : self.k])
        return torch.linalg.solve_triangular(triangle, torch.from_numpy(rhs), upper=True).numpy()

    def weights(self) -> np.ndarray:
        """Of the vectors, `(B, k)`."""
        return self._solved(self.rhs[:, : self.k, None])[:, :, 0]

    def shorter(self) -> np.ndarray:
        """Of so few vectors that the residual with the rounding of a product with them is least."""
        # Column j has the weights of j + 1 vectors.
        each = self.rhs[:, None, : self.k] * np.eye(self.k, dtype=self.dtype)
        weights = self._solved(each).cumsum(axis=2)
        length = np.linalg.norm(weights, axis=1)
        rounding = self.eps * self.largest[:, None] * length
        sums = np.nan_to_num(np.hypot(np.stack(self.rows, 1), rounding), nan=np.inf)
        least = sums.argmin(axis=1)
        return np.take_along_axis(weights, least[:, None, None], axis=2)[:, :, 0]
