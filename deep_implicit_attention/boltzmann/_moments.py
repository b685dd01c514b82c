"""First and second moments of the data, accumulated over batches, and their regularisation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ._data import Data
from ._warnings import FitWarning, warn

# Spins up to which a pseudocount stands for a row of every state.
_ALL_STATES = 10
# Part of its variance that a spin which follows from others may have left by rounding.
_ROUNDING = 1e-10


@dataclass(frozen=True)
class Sums:
    """Weighted sums over rows, which add up over batches.

    Attributes:
        total: Σ w.
        rows: rows of positive weight.
        first: Σ w S_i, `(N,)`.
        second: Σ w S_i S_j, `(N, N)`.
    """

    total: float
    rows: int
    first: Tensor
    second: Tensor

    @classmethod
    def of(cls, data: Data) -> Sums:
        """The sums over complete rows. Cost: O(M N²)."""
        weighted = data.weighed(data.spins)
        # The sum over rows as a product, which is faster than `sum(dim=0)`.
        first = weighted.mT @ torch.ones_like(weighted[:, 0])
        return cls(data.total(), data.counted(), first, data.spins.mT @ weighted)

    def __add__(self, other: Sums) -> Sums:
        return Sums(
            self.total + other.total,
            self.rows + other.rows,
            self.first + other.first,
            self.second + other.second,
        )

    def columns(self, kept: Tensor) -> Sums:
        """The columns where `kept` `(N,)` is True."""
        return Sums(self.total, self.rows, self.first[kept], self.second[kept][:, kept])

    def moments(self, pseudocount: float) -> Moments:
        """Means, as if `pseudocount` further rows had been seen in which all states are equal."""
        count = self.total + pseudocount
        m = self.first / count
        second = self.second / count
        second.diagonal().fill_(1.0)
        return Moments(m, second, max(self.total, float(self.rows)) + pseudocount)


@dataclass(frozen=True)
class Moments:
    """What a machine learns from.

    Attributes:
        mean: m_i = ⟨S_i⟩, `(N,)`.
        second: ⟨S_i S_j⟩, `(N, N)`, diagonal 1.
        count: how many observations they are means of.
        rounding: part of a variance that counts as none.
    """

    mean: Tensor
    second: Tensor
    count: float
    rounding: float = _ROUNDING

    @property
    def covariance(self) -> Tensor:
        """C_ij, `(N, N)`, with C_ii = 1 − m_i²."""
        return self.second - torch.outer(self.mean, self.mean)


def pseudo_rows(n: int, pseudocount: float) -> Data:
    """Rows of total weight `pseudocount` whose means vanish and whose covariance is 1, for methods
    that learn from rows.

    All 2^N states up to 10 spins. Beyond, columns of a Hadamard matrix (Sylvester's), all but its
    first: they have the same first and second moments with as few rows as possible, but not the
    higher ones, which permutations and reversals of spins change.
    """
    if n <= _ALL_STATES:
        bits = torch.arange(2**n)[:, None] >> torch.arange(n) & 1
        rows = (1 - 2 * bits).double()
    else:
        hadamard = torch.ones(1, 1, dtype=torch.float64)
        while len(hadamard) <= n:
            hadamard = torch.cat([hadamard.repeat(1, 2), torch.cat([hadamard, -hadamard], 1)])
        rows = hadamard[:, 1 : n + 1].contiguous()
    weights = torch.full((len(rows),), pseudocount / len(rows), dtype=torch.float64)
    return Data(rows, None, weights)


def join(data: Data, more: Data) -> Data:
    """The rows of `data`, then those of `more`, which are complete."""
    weights = data.weights if data.weights is not None else torch.ones(len(data)).to(data.spins)
    observed = None
    if data.observed is not None:
        observed = torch.cat([data.observed, torch.ones_like(more.spins, dtype=torch.bool)])
    assert more.weights is not None
    return Data(
        torch.cat([data.spins, more.spins.to(data.spins)]),
        observed,
        torch.cat([weights, more.weights.to(weights)]),
    )


def report_constant(constant: Tensor, names: Sequence[str], m: Tensor) -> None:
    """Warn of columns that never change, by name."""
    where = constant.nonzero().flatten().tolist()
    if not where:
        return
    shown = ", ".join(f"{names[i]} (always {'up' if m[i] > 0 else 'down'})" for i in where)
    warn(
        f"columns that never change: {shown}. Their field would be infinite; they get no "
        "couplings, and the field of one more observation, half up and half down. Set "
        "pseudocount to regularise all columns alike.",
        FitWarning,
    )


def inverse_covariance(
    moments: Moments, l2: float, shrinkage: float | None
) -> tuple[Tensor, float]:
    """Λ in the place of C⁻¹, `(N, N)`, and the shrinkage ρ that was needed.

    With l2 > 0 the maximum of the Gaussian log-likelihood per row with a penalty,

        ½ log det Λ − ½ tr ΛC − (l2/4) ‖Λ − T‖²,   T = diag 1/(1 − m_i²)

    of the couplings J_ij = −Λ_ij and of V_i = Λ_ii − T_ii: Λ⁻¹ − l2 Λ = C − l2 T, which is solved
    in the eigenbasis of the right-hand side, C singular or not (ridge precision estimator of type
    I with a target: van Wieringen, Peeters 2016, Comput. Stat. Data Anal. 103, 284). Otherwise C⁻¹,
    of (1 − ρ) C + ρ diag C: ρ = `shrinkage`, or, if that is None, 0 where C has an inverse and else
    `optimal_shrinkage`, with a `FitWarning`. Cost: O(N³).
    """
    covariance = moments.covariance
    variance = covariance.diagonal()
    rho = shrinkage or 0.0
    if rho:
        covariance = (1 - rho) * covariance + rho * variance.diag()
    if l2:
        target = (1 / variance).diag()
        d, basis = torch.linalg.eigh(covariance - l2 * target)
        root = (d * d + 4 * l2).sqrt()
        # Both are the positive root of l2 λ² + d λ = 1; each loses digits where the other does not.
        eigenvalues = torch.where(d > 0, 2 / (d + root), (root - d) / (2 * l2))
        precision = (basis * eigenvalues) @ basis.mT
        return symmetric(precision), rho
    factor, failed = torch.linalg.cholesky_ex(covariance)
    # The pivots are variances of a spin given those before it: none is small beside its own.
    # Shrinking leaves no variance on its way to zero.
    least = _ROUNDING if rho else moments.rounding
    singular = bool(failed) or bool((factor.diagonal().square() < least * variance).any())
    if singular and shrinkage is None:
        rho = optimal_shrinkage(moments)
        warn(
            f"the covariance of {moments.count:g} observations of {len(variance)} spins is "
            f"singular; it is shrunk by {rho:.3g} towards its diagonal (Schäfer, Strimmer 2005). "
            "Set l2, pseudocount or shrinkage to choose otherwise.",
            FitWarning,
        )
        return inverse_covariance(moments, 0.0, rho)
    if singular:
        raise ValueError(
            f"the covariance of the data is singular with shrinkage={rho:g}: raise it, set l2 or "
            "pseudocount, or leave shrinkage at None"
        )
    return torch.cholesky_inverse(factor), rho


def optimal_shrinkage(moments: Moments) -> float:
    """The ρ of least expected squared error of the correlations r_ij, shrunk towards 0,

        ρ = Σ_{i≠j} Var r_ij / Σ_{i≠j} r_ij²

    (Schäfer, Strimmer 2005, Stat. Appl. Genet. Mol. Biol. 4, 32). With spins of ±1 the variances
    follow from the second moments: ⟨δ_i² δ_j²⟩ = (1 − m_i²)(1 − m_j²) + 4 m_i m_j C_ij.
    """
    covariance, m = moments.covariance, moments.mean
    variance = covariance.diagonal()
    scale = torch.outer(variance, variance)
    fourth = scale + 4 * torch.outer(m, m) * covariance
    spread = (fourth - covariance.square()) / scale / max(moments.count - 1, 1.0)
    squares = covariance.square() / scale
    apart = ~torch.eye(len(m), dtype=torch.bool, device=m.device)
    rho = (spread[apart].sum() / squares[apart].sum().clamp(min=1e-300)).item()
    return min(max(rho, 1e-6), 1.0)


def symmetric(matrix: Tensor) -> Tensor:
    """Without the antisymmetric rounding of matrix products, which differs between processors."""
    return 0.5 * (matrix + matrix.mT)
