"""The mean of a spin on a sphere: ratios of modified Bessel functions, to full relative accuracy.

With ν = d/2 − 1 and κ the field times the radius, this file computes, as functions of x = κ²,

    g = A/κ,   A = I_{ν+1}(κ) / I_ν(κ),   A′ = dA/dκ,   dg/dx = (A′ − g)/(2x),
    L = log[ Γ(ν+1) (2/κ)^ν I_ν(κ) ]

The quotient of Bessel functions underflows for large ν, and A′ = 1 − A² − (d−1) A/κ cancels for
large κ. Instead, all are known accurately at a high order n = ν + M by the uniform (Debye)
expansion in 1/√(n² + κ²), which holds for every κ if n is large, and come down to ν by recurrences
without cancellation that shrink the error further. Everything is a smooth function of x, so
automatic differentiation works to any order, at x = 0 too. Computation is in float64 throughout.

Sources: Abramowitz, Stegun 1964, 9.6.26 (recurrence) and 9.7.7 (uniform expansion).
"""

from __future__ import annotations

import functools
import math
from fractions import Fraction
from typing import NamedTuple

import torch
from torch import Tensor

# The order at which the uniform expansion starts, and its number of terms: those left out of L are
# below 3e-17, of the derivatives below 1e-13 before the recurrences shrink them.
_HIGH_ORDER = 20
_TERMS = 14

Polynomial = dict[int, Fraction]  # power -> coefficient


class Bessel(NamedTuple):
    """The functions of x of this file, float64, each of the shape of x."""

    ratio: Tensor  # g
    slope: Tensor  # A′
    fall: Tensor  # dg/dx
    log: Tensor  # L


def bessel(x: Tensor, nu: float) -> Bessel:
    """g, A′, dg/dx and L at x = κ² ≥ 0 for the order ν = `nu` ≥ 0.

    Relative errors below 1e-14 for g and L, 1e-13 for dg/dx and 2e-12 for A′, tested for κ up to
    1e6 and ν up to 2047. Cost: about 400 elementwise operations for small ν, 100 for large.
    """
    x = x.double()
    down = max(0, math.ceil(_HIGH_ORDER - nu))
    ratio, slope, fall, log = _uniform(x, nu + down)
    for k in range(down - 1, -1, -1):
        # From order n + 1 to n: I_n = I_{n+2} + (2 (n + 1)/κ) I_{n+1}.
        twice = 2 * (nu + k + 1)
        product = x * ratio
        log = log + torch.log1p(product / twice)
        rise = torch.addcmul(ratio, x, fall)
        ratio = 1 / (twice + product)
        square = ratio.square()
        slope = square * (twice - x * slope)
        fall = -square * rise
    return Bessel(ratio, slope, fall, log)


def _uniform(x: Tensor, n: float) -> Bessel:
    """The same at a large order n, by the uniform expansion, p = n/s, s = √(n² + κ²)."""
    s = (x + n * n).sqrt()
    p = n / s
    ratio = 1 / (s + n) - 0.5 / s.square()
    slope = n / (s * (s + n)) + (0.5 - p.square()) / s.square()
    fall = 0.5 / s**4 - 0.5 / (s * (s + n).square())
    rise = x / (s + n)  # s − n
    log = rise - n * torch.log1p(rise / (2 * n)) - 0.5 * torch.log1p(rise / n)
    # Horner's rule for three polynomials in p at once.
    columns = torch.tensor(_coefficients(n), dtype=x.dtype, device=x.device)
    sums = torch.zeros_like(p)
    for column in columns.reshape(*columns.shape, *[1] * x.dim()).unbind():
        sums = torch.addcmul(column, sums, p)
    first, second, quotient = sums.unbind()
    first, second = (part * p.square() / n**2 for part in (first, second))
    ratio = ratio - first
    slope = slope + (1 - p.square()) * second - first
    fall = fall + 0.5 * second / s.square()
    log = log + torch.expm1(-0.5 * torch.log1p(x / n**2)) * quotient
    return Bessel(ratio, slope, fall, log)


def _coefficients(n: float) -> list[tuple[float, float, float]]:
    return _kept_coefficients(n)


# A compiler would trace what the cache is there to spare. `torch.compiler.assume_constant_result`
# sets just this, but imports the compiler, which takes as long as torch.
_coefficients._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.lru_cache(maxsize=64)
def _kept_coefficients(n: float) -> list[tuple[float, float, float]]:
    """For each power of p, the highest first, the coefficients of three polynomials.

    With D(p) = Σ_m a_m p^m = Σ_k D_k(p)/n^k: those of Σ_m m a_m p^m and Σ_m m (m + 2) a_m p^m, and
    of (D(p) − D(1))/(p − 1), in which D is known accurately where p is close to 1.
    """
    a = [0.0] * (3 * _TERMS + 1)
    for k, polynomial in reversed(list(enumerate(_log_polynomials(), start=1))):
        for power, coefficient in polynomial.items():
            a[power] += float(coefficient) / n**k
    found, above = [], 0.0
    for power in range(len(a) - 1, -1, -1):
        found.append((power * a[power], power * (power + 2) * a[power], above))
        above += a[power]
    return found


@functools.lru_cache(maxsize=1)
def _log_polynomials() -> tuple[Polynomial, ...]:
    """D_k(p), k = 1, 2, …: log Σ_k U_k(p)/n^k = Σ_k D_k(p)/n^k, exactly."""
    u: list[Polynomial] = [{0: Fraction(1)}]
    for _ in range(_TERMS):
        # U_{k+1} = ½ p² (1 − p²) U_k′ + ⅛ ∫₀^p (1 − 5 t²) U_k dt
        new: Polynomial = {}
        for power, c in u[-1].items():
            for shift, factor in (
                (1, Fraction(power, 2) + Fraction(1, 8 * (power + 1))),
                (3, -Fraction(power, 2) - Fraction(5, 8 * (power + 3))),
            ):
                new[power + shift] = new.get(power + shift, Fraction(0)) + factor * c
        u.append(new)
    logs: list[Polynomial] = []
    for k in range(1, _TERMS + 1):
        # k U_k = Σ_{j=1}^{k} j D_j U_{k−j}
        d = dict(u[k])
        for j in range(1, k):
            for power, c in logs[j - 1].items():
                for other, e in u[k - j].items():
                    d[power + other] = d.get(power + other, Fraction(0)) - Fraction(j, k) * c * e
        logs.append({power: c for power, c in sorted(d.items()) if c})
    return tuple(logs)
