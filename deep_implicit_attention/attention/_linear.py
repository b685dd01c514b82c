"""Linear systems that share a factorisation, differentiable to any order."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..deq._map import without_autocast
from ..deq._watched import transformed, watched
from ._memory import empty
from ._products import linear_of_few


class Factor(NamedTuple):
    """A factorisation of a matrix: Cholesky, or with `pivots` LU; and its inverse, if made."""

    matrix: Tensor  # may end in rows and columns of the identity
    pivots: Tensor | None
    inverse: Tensor | None = None

    def solve(self, b: Tensor, transposed: bool) -> Tensor:
        """A⁻¹ b for `b` `(n, r)`, or A⁻ᵀ b."""
        if self.inverse is not None:
            rows, symmetric = b.mT.contiguous(), self.pivots is None
            if transposed and not symmetric:
                return (rows @ self.inverse).mT
            return linear_of_few(rows, self.inverse, symmetric).mT
        if self.pivots is None:
            return _cholesky_solve(b, self.matrix)
        return torch.linalg.lu_solve(self.matrix, self.pivots, b, adjoint=transposed)

    def inverted(self, operator: Tensor) -> Factor:
        """With the inverse of `operator`, which a solve reads once; factors it reads twice."""
        return self._replace(inverse=inverse(operator, self).contiguous())

    def log_determinant(self) -> Tensor:
        """log |det A|."""
        scale = 2.0 if self.pivots is None else 1.0
        return scale * self.matrix.diagonal().abs().log().sum()


def factorise(operator: Tensor, symmetric: bool) -> Factor:
    """Cholesky for a symmetric positive definite `operator` `(n, n)`, else LU; without a graph."""
    operator = operator.detach()
    if symmetric:
        factor, failed = _cholesky(operator)
        if int(failed) == 0:
            return Factor(factor, None)
    return Factor(*torch.linalg.lu_factor_ex(operator)[:2])


def _cholesky(operator: Tensor) -> tuple[Tensor, Tensor]:
    """The Cholesky factor of a symmetric matrix, and whether there is none.

    On the host of a copy in place: otherwise LAPACK is given the half of the matrix that it asks
    for entry by entry, in columns from rows, which at n = 256 takes a fifth of the time.

    At multiples of a large power of two the entries of a column compete for the same lines of the
    cache (measured: at n = 1024 it takes 1.4 times as long as at 1032, at 128 twice as long as at
    136). There the copy has a few rows and columns more, of the identity.
    """
    if not operator.is_cpu or watched(operator):
        return torch.linalg.cholesky_ex(operator)
    size = len(operator)
    more = 0 if size % 128 else 8
    copy = empty(size + more, size + more, like=operator)
    copy[:size, :size].copy_(operator)
    if more:
        copy[:, size:].copy_(_last_columns(size, copy.dtype))
    columns = copy.mT  # as LAPACK reads it; symmetric, but for what it does not read
    failed = torch.empty((), dtype=torch.int32, device=copy.device)
    torch.linalg.cholesky_ex(columns, out=(columns, failed))
    return columns, failed


def _cholesky_solve(b: Tensor, factor: Tensor) -> Tensor:
    """A⁻¹ b `(n, r)` from what `_cholesky` made of A.

    On the host by two triangular solves, which read the factor where it is; `torch.cholesky_solve`
    copies it first, and its columns into ones without gaps (measured at n = 1024: 2.6 times as
    long in float32, 2.3 in float64).
    """
    size = len(b)
    if not b.is_cpu or watched(b, factor):
        return torch.cholesky_solve(b, factor[:size, :size])
    columns = _columns(b, len(factor))
    torch.linalg.solve_triangular(factor, columns, upper=False, out=columns)
    torch.linalg.solve_triangular(factor.mT, columns, upper=True, out=columns)
    return columns if len(factor) == size else _columns(columns[:size], size)


def _columns(b: Tensor, length: int) -> Tensor:
    """A copy of `b` `(n, r)` with columns one after the other, filled up with zeros."""
    columns = b.new_empty_strided((length, b.shape[1]), (1, length))
    columns[: len(b)].copy_(b)
    columns[len(b) :].zero_()
    return columns


@functools.lru_cache(maxsize=8)
def _last_columns(size: int, dtype: torch.dtype) -> Tensor:
    return torch.eye(size + 8, dtype=dtype, device="cpu")[:, size:].clone()


def log_determinant(operator: Tensor, factor: Factor) -> Tensor:
    """log |det A|, from the factorisation where no gradient is asked for."""
    if transformed(operator) or (operator.requires_grad and torch.is_grad_enabled()):
        return torch.linalg.slogdet(operator).logabsdet
    return factor.log_determinant()


def solve(operator: Tensor, b: Tensor, factor: Factor, transposed: bool = False) -> Tensor:
    """A⁻¹ b `(n, r)`, or A⁻ᵀ b, where `factor` is that of `operator`.

    Cost: O(n² r) forward and backward; the factorisation is never differentiated.
    """
    if transformed(operator, b):
        return torch.linalg.solve(operator.mT if transposed else operator, b)
    if not (torch.is_grad_enabled() and (operator.requires_grad or b.requires_grad)):
        return factor.solve(b, transposed)
    return _Solve.apply(operator, b, *factor, transposed)


def inverse(operator: Tensor, factor: Factor) -> Tensor:
    """A⁻¹ `(n, n)`."""
    if factor.inverse is not None:
        return factor.inverse
    identity = torch.eye(len(operator), dtype=operator.dtype, device=operator.device)
    return solve(operator, identity, factor)


class _Solve(torch.autograd.Function):
    """x = A⁻¹ b: with u = A⁻ᵀ ∂L/∂x, ∂L/∂b = u and ∂L/∂A = −u xᵀ."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        operator: Tensor,
        b: Tensor,
        matrix: Tensor,
        pivots: Tensor | None,
        inverse: Tensor | None,
        transposed: bool,
    ) -> Tensor:
        x = Factor(matrix, pivots, inverse).solve(b, transposed)
        ctx.save_for_backward(operator, x, matrix, pivots, inverse)
        ctx.transposed = transposed
        return x

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple:  # type: ignore[override]
        operator, x, *factor = ctx.saved_tensors
        by_operator = None
        with without_autocast(x):
            u = solve(operator, g, Factor(*factor), not ctx.transposed)
            if ctx.needs_input_grad[0]:
                by_operator = -x @ u.mT if ctx.transposed else -u @ x.mT
        return by_operator, u, None, None, None, None
