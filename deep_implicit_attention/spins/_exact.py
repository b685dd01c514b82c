"""Exact answers: enumeration of discrete systems, the closed form of Gaussian ones."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..solvers._validate import check_count
from ._blocks import block_diagonal
from ._gaussian import GaussianPrior
from ._ising import IsingPrior
from ._potts import PottsPrior
from ._response import Response
from ._system import SpinSystem, check_system


class Exact:
    """The exact response, `method(system, fields) -> Response`.

    Ising and Potts systems are enumerated, 2^N or q^N states in chunks; a Gaussian one has

        m = χ (x + Pμ),   χ = (blockdiag P − J)⁻¹

    Covariance and susceptibility are the same. Cost: O(B states N d) time and, with gradients,
    recomputation of each chunk instead of its memory; Gaussian O(N³ d³).

    Args:
        max_states: states at most, 2^24 by default.
        chunk: states at a time.

    Raises:
        ValueError: for more states than that, and for a Gaussian system with P − J not positive
            definite.
        TypeError: for a prior that is neither discrete nor Gaussian.
    """

    def __init__(self, *, max_states: int = 2**24, chunk: int = 2**14) -> None:
        check_count("max_states", max_states)
        check_count("chunk", chunk)
        self.max_states, self.chunk = max_states, chunk

    def __call__(self, system: SpinSystem, fields: Tensor) -> Response:
        """The answer for fields `(*batch, N, *event)`."""
        check_system(system)
        system.check_fields(fields)
        event = (system.num_spins, *system.event_shape)
        batch = fields.shape[: fields.dim() - len(event)]
        x = fields.reshape(math.prod(batch), math.prod(event))
        if isinstance(system.prior, GaussianPrior):
            log, m, covariance = _gaussian(system, system.prior, x)
        elif isinstance(system.prior, IsingPrior | PottsPrior):
            log, m, covariance = self._enumerate(system, x)
        else:
            raise TypeError(f"Exact has no answer for {type(system.prior).__name__}")
        second = covariance + m.unsqueeze(2) * m.unsqueeze(1)
        energy = -0.5 * (system.matrix() * second).sum(dim=(1, 2)) - (x * m).sum(dim=1)
        covariance = covariance.reshape(*batch, *event, *event)
        return Response(
            magnetization=m.reshape(fields.shape),
            log_partition=log.reshape(batch),
            energy=energy.reshape(batch),
            cavity_variance=None,
            solution=None,
            method="Exact",
            _covariance=lambda: covariance,
            _susceptibility=lambda: covariance,
        )

    def _enumerate(self, system: SpinSystem, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """log Z, means and covariances by summation over all states."""
        n, matrix = system.num_spins, system.matrix()
        levels = _levels(system, x)
        count = len(levels) ** n
        if count > self.max_states:
            raise ValueError(
                f"{count:.3g} states are more than max_states = {self.max_states}: use "
                "GibbsSampler, a mean-field method such as AdaptiveTAP, or fewer spins"
            )
        prior = -n * math.log(len(levels))

        def weights(first: int, x: Tensor, matrix: Tensor) -> tuple[Tensor, Tensor]:
            states = _states(levels, n, first, min(self.chunk, count - first))
            own = 0.5 * ((states @ matrix) * states).sum(dim=1)
            return states, own + x @ states.mT + prior

        with torch.no_grad():
            log = x.new_full((x.shape[0],), -torch.inf)
            for first in range(0, count, self.chunk):
                log = torch.logaddexp(log, weights(first, x, matrix)[1].logsumexp(dim=1))

        def sums(first: int, x: Tensor, matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            states, exponent = weights(first, x, matrix)
            p = torch.exp(exponent - log[:, None])
            return p.sum(dim=1), p @ states, torch.einsum("bk,ki,kj->bij", p, states, states)

        total, mean, second = x.new_zeros(()), x.new_zeros(()), x.new_zeros(())
        for first in range(0, count, self.chunk):
            part = checkpoint(sums, first, x, matrix, use_reentrant=False)
            total, mean, second = total + part[0], mean + part[1], second + part[2]
        m = mean / total[:, None]
        covariance = second / total[:, None, None] - m.unsqueeze(2) * m.unsqueeze(1)
        return log + total.log(), m, covariance


def _levels(system: SpinSystem, like: Tensor) -> Tensor:
    """The values of a single spin, `(levels, k)`."""
    if isinstance(system.prior, IsingPrior):
        return like.new_tensor([[-1.0], [1.0]])
    return torch.eye(system.event_shape[0]).to(like)


def _states(levels: Tensor, n: int, first: int, size: int) -> Tensor:
    """States number `first` to `first + size`, `(size, n·k)`; the last spin varies fastest."""
    number = torch.arange(first, first + size, device=levels.device)
    digits = []
    for _ in range(n):
        digits.append(number % len(levels))
        number = number // len(levels)
    return levels[torch.stack(digits[::-1], dim=1)].flatten(1)


def _gaussian(system: SpinSystem, prior: GaussianPrior, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    n = system.num_spins
    precision = prior.precision().to(x)
    factor = factorise(system, precision)
    location = prior.location.to(x)
    b = x + (precision @ location).repeat(n)
    m = torch.cholesky_solve(b.mT, factor).mT
    covariance = torch.cholesky_inverse(factor).expand(len(x), -1, -1)
    log = (
        -n * prior.log_diagonal.to(x).sum()
        - factor.diagonal().log().sum()
        + 0.5 * (b * m).sum(dim=1)
        - 0.5 * n * location @ precision @ location
    )
    return log, m, covariance


def factorise(system: SpinSystem, precision: Tensor) -> Tensor:
    """The Cholesky factor of blockdiag P − J of a Gaussian system, or `ValueError`."""
    operator = block_diagonal(precision.expand(system.num_spins, -1, -1)) - system.matrix()
    factor, failed = torch.linalg.cholesky_ex(operator)
    if int(failed):
        smallest = torch.linalg.eigvalsh(operator.detach())[0].item()
        raise ValueError(
            f"P − J must be positive definite, or there is no distribution; its smallest "
            f"eigenvalue is {smallest:.4g}"
        )
    return factor
