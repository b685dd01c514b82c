"""Maximum pseudolikelihood."""

from __future__ import annotations

import torch
from torch import Tensor

from ._data import Data
from ._newton import Point, minimise
from ._parameters import Learned, is_coupling, rows_with_one


def pseudolikelihood(data: Data, l2: float, start: Tensor, *, tol: float, max_iter: int) -> Learned:
    """The maximum of the joint log-pseudolikelihood of Besag (1975, The Statistician 24, 179),

        (1/W) Σ_rows w Σ_i log P(S_i | S_j, j ≠ i),   P(S_i | ·) = exp(S_i f_i) / 2 cosh f_i
        f_i = h_i + Σ_j J_ij S_j

    over symmetric J, all sites at once. Not the separate logistic regressions of each site whose
    two answers for a coupling are averaged (Ravikumar, Wainwright, Lafferty 2010, Ann. Stat. 38,
    1287), which on the same data differ a little. Consistent, never needs Z; a coupling is in two
    conditionals, so the penalty counts twice, l2 Σ_{i<j} J_ij².

    Rows must be complete. Newton's method from `start`; cost: O(M N²) for each product with the
    Hessian.
    """
    ones = rows_with_one(data.spins)
    scale = data.weights if data.weights is not None else torch.ones(len(data)).to(ones)
    weight = (scale / scale.sum())[:, None].expand_as(ones).clone()
    weight[:, 0] = 0  # the spin always up has no conditional
    penalty = 2 * l2 * is_coupling(ones.shape[1], ones)

    def symmetric(rows: Tensor) -> Tensor:
        """What a derivative by f is by Θ."""
        half = ones.mT @ rows
        out = half + half.mT
        out.diagonal().zero_()
        return out

    def evaluate(theta: Tensor) -> Point:
        f = ones @ theta
        t = torch.tanh(f)
        # log 2 cosh f = |f| + log(1 + exp(−2|f|)), which is finite for all f
        size = f.abs()
        loss = size + torch.log1p(torch.exp(-2 * size)) - ones * f
        value = (weight * loss).sum() + 0.25 * (penalty * theta * theta).sum()
        slope = weight * (1 - t * t)

        def product(direction: Tensor) -> Tensor:
            return symmetric(slope * (ones @ direction)) + penalty * direction

        gradient = symmetric(weight * (t - ones)) + penalty * theta
        own = slope.sum(dim=0)
        diagonal = (own + own[:, None]).clamp(min=1e-12) + penalty
        return Point(value.item(), gradient, product, diagonal)

    found = minimise(evaluate, start, tol=tol, max_iter=max_iter)
    return Learned(found.x, max(found.steps, 1), 0.0, found.residual, found.converged)
