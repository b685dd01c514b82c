"""Maximum likelihood by enumeration."""

from __future__ import annotations

from torch import Tensor

from ._enumeration import Enumeration
from ._moments import Moments, symmetric
from ._newton import Point, minimise
from ._parameters import Learned, is_coupling, target

MAX_SPINS = 20


def exact(moments: Moments, l2: float, start: Tensor, *, tol: float, max_iter: int) -> Learned:
    """The maximum of the log-likelihood per row, over all 2^N states, minus (l2/2) Σ_{i<j} J_ij².

    Where l2 = 0 the model has the means and covariances of the data, to `tol`. Newton's method from
    `start`; cost: O(2^N N) for each product with the Hessian, N ≤ 20.
    """
    data = target(moments)
    states = Enumeration(len(moments.mean), data.device)
    penalty = l2 * is_coupling(len(data), data)

    def evaluate(theta: Tensor) -> Point:
        log, p = states.distribution(theta)
        model = symmetric(states.second_moments(p))
        value = log - 0.5 * (data * theta).sum() + 0.25 * (penalty * theta * theta).sum()

        def product(direction: Tensor) -> Tensor:
            image = states.curvature(p, model, direction) + penalty * direction
            image.diagonal().zero_()
            # The Hessian maps the antisymmetric part to zero, so near the minimum, where it is as
            # large as the gradient, conjugate gradients would diverge.
            return symmetric(image)

        gradient = model - data + penalty * theta
        gradient.diagonal().zero_()
        diagonal = (1 - model.square()).clamp(min=1e-12) + penalty
        diagonal.diagonal().fill_(1.0)
        return Point(value.item(), symmetric(gradient), product, diagonal)

    found = minimise(evaluate, start, tol=tol, max_iter=max_iter)
    return Learned(found.x, max(found.steps, 1), 0.0, found.residual, found.converged)
