"""The double loop of expectation consistency: downhill steps in a free energy."""

from __future__ import annotations

import torch
from torch import Tensor

from ._blocks import block_diagonal, diagonal_blocks
from ._consistency import apply, inverse, matched, response
from ._frames import Local
from ._site_terms import cavity, parallel, terms_of

# Newton's method on a convex function; more than these were never seen.
_NEWTON_STEPS = 50
_HALVINGS = 40
# Newton's step is at most this inverse times longer than that of the bound, in any direction.
_LEAST_CURVATURE = 1e-6
_SINGLE_STEPS = 10


class DoubleLoop:
    """Minimisation of the free energy of Opper and Winther (2005, JMLR 6, section 4),

        F(θ_s) = log Z_s(θ_s) − min over θ_r of { log Z_q(θ_s − θ_r) + log Z_r(θ_r) }

    with θ the natural parameters of fields and second moments: in q they drive single spins, in r
    the Gaussian of all sites with the couplings, in s independent Gaussians. log Z_q and log Z_r
    are convex, so the minimum is that of a convex function (Newton's method, inner loop), and it
    is concave in θ_s: replacing it by its tangent bounds F from above, and the minimum of the
    bound, s with the moments of r, cannot increase F (outer loop). That is slow where F is flat. So
    Newton's step on F, and then a few steps of the single loop, are tried before it, and taken if
    they go down.

    An instance is the `propose` of one solve for states (g, Λ) of site terms; `objective` grows by
    F after each outer step, which at a fixed point is −log Z.
    """

    def __init__(self, local: Local, couplings: Tensor, x: Tensor) -> None:
        self.local, self.couplings, self.x = local, couplings, x
        self.basis = _basis(local, x)
        self.objective: list[Tensor] = []
        self.theta: Tensor | None = None  # θ_s of the last step
        self.slack = x.new_zeros(len(x))  # rounding of the last step's F

    def __call__(self, g: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
        """The site terms after one outer step."""
        theta_r = self._pack(g, -total)
        mean, chi = self._gaussian(theta_r)
        bound = self._natural(mean, chi), theta_r
        if self.theta is None:
            return self._moved(bound[0], *self._inner(*bound)[:2])
        old = self.objective[-1]
        step = self._newton(self.theta, theta_r, *_statistics(mean, chi, self.basis))
        single = self._valid_or(bound, self._single_loop(g, total))
        newton = self._valid_or(single, (self.theta + step, theta_r))
        # Where rounding spoils even the bound: no step.
        theta, new_r, value = self.theta, theta_r, _independent(*self._unpack(self.theta)) - old
        waiting, slack = torch.ones_like(old, dtype=torch.bool), self.slack
        for candidate, start in (newton, single, bound):
            candidate_r, inner, solved = self._inner(candidate, start)
            slack = 100 * torch.finfo(old.dtype).eps * (1 + inner.abs())
            taken = waiting & solved & (self._free_energy(candidate, inner) <= old + slack)
            theta = torch.where(taken[:, None, None], candidate, theta)
            new_r = torch.where(taken[:, None, None], candidate_r, new_r)
            value = torch.where(taken, inner, value)
            waiting &= ~taken
            if not bool(waiting.any()):
                break
        self.slack = slack
        return self._moved(theta, new_r, value)

    def falls(self, steps: int) -> Tensor:
        """Of which samples F fell by more than rounding in the last `steps` steps; of none if
        fewer were made because nothing is finite any more."""
        if len(self.objective) < steps:
            return torch.zeros_like(self.slack, dtype=torch.bool)
        return self.objective[-steps] - self.objective[-1] > self.slack

    def conclude(self, g: Tensor, total: Tensor) -> None:
        """Append F at the moments of these terms; at a solution that is −log Z."""
        if self.theta is not None:
            theta_r = self._pack(g, -total)
            bound = self._natural(*self._gaussian(theta_r))
            self.objective.append(self._free_energy(bound, self._inner(bound, theta_r)[1]))

    def _moved(self, theta: Tensor, theta_r: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        self.theta = theta
        self.objective.append(self._free_energy(theta, value))
        g, negative = self._unpack(theta_r)
        return g, -negative

    def _free_energy(self, theta: Tensor, inner: Tensor) -> Tensor:
        return _independent(*self._unpack(theta)) - inner

    def _newton(
        self, theta: Tensor, theta_r: Tensor, moments: Tensor, covariance_r: Tensor
    ) -> Tensor:
        """Newton's step on F, with the absolute values of the curvatures, so that it goes down.

        F has the Hessian C_s − W with W = C_q (C_q + C_r)⁻¹ C_r, C the covariances of the
        statistics; curvatures are measured in units of C_s, in which that of the bound is 1.
        """
        size = theta[0].numel()
        _, _, covariance_q = self._spins(theta - theta_r)
        q = block_diagonal(covariance_q)
        W = q @ torch.linalg.solve_ex(q + covariance_r, covariance_r).result
        own_moments, own = self._own(theta)
        unit = block_diagonal(torch.linalg.inv_ex(torch.linalg.cholesky_ex(own).L).inverse)
        whitened = unit @ (0.5 * (W + W.mT)) @ unit.mT
        sound = torch.isfinite(whitened).flatten(1).all(dim=1)
        whitened = torch.where(sound[:, None, None], whitened, torch.zeros_like(whitened))
        values, vectors = torch.linalg.eigh(whitened)
        curvature = (1 - values).abs().clamp_min(_LEAST_CURVATURE)
        slope = vectors.mT @ unit @ (own_moments - moments).reshape(-1, size, 1)
        step = -unit.mT @ vectors @ (slope / curvature.unsqueeze(-1))
        return step.view_as(theta)

    def _single_loop(self, g: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
        """θ_s and θ_r after some steps of the single loop, which is fast where it is stable."""
        h, V, _ = cavity(self.local, self.x, self.couplings, g, total)
        for _ in range(_SINGLE_STEPS):
            h, V = parallel(self.local, self.x, self.couplings, h, V, damping=0.5)
        g, total = terms_of(self.local, h, V)
        theta_r = self._pack(g, -total)
        return self._natural(*self._gaussian(theta_r)), theta_r

    def _valid_or(
        self, other: tuple[Tensor, Tensor], given: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """(θ_s, θ_r) where they are distributions, else `other`."""
        precision = -self._unpack(given[0])[1]
        valid = (torch.linalg.cholesky_ex(precision).info == 0).all(dim=1)
        valid &= torch.isfinite(self._value(*given))
        rows = valid[:, None, None]
        return torch.where(rows, given[0], other[0]), torch.where(rows, given[1], other[1])

    def _inner(self, theta: Tensor, theta_r: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """θ_r that minimises log Z_q(θ_s − θ_r) + log Z_r(θ_r), the minimum; if it was found."""
        shape = theta.shape
        eps = torch.finfo(theta.dtype).eps
        value = self._value(theta, theta_r)
        going = torch.isfinite(value)
        before = torch.full_like(value, torch.inf)
        close = torch.zeros_like(going)
        for _ in range(_NEWTON_STEPS):
            moments_r, covariance_r = _statistics(*self._gaussian(theta_r), self.basis)
            _, moments_q, covariance_q = self._spins(theta - theta_r)
            slope = (moments_r - moments_q).flatten(1).unsqueeze(-1)
            hessian = covariance_r + block_diagonal(covariance_q)
            step = -torch.linalg.solve_ex(hessian, slope).result
            decrement = -(slope * step).sum(dim=(1, 2))
            # Here differences of values are rounding: full steps as long as the decrement falls.
            close = decrement <= eps * (1 + value.abs())
            going &= ~close | (decrement < 0.25 * before)
            if not bool(going.any()):
                break
            before = decrement
            length = torch.ones_like(value)
            for _ in range(_HALVINGS):
                trial = theta_r + length[:, None, None] * step.view(shape)
                new = self._value(theta, trial)
                enough = new <= value - 1e-4 * length * decrement
                enough |= close & torch.isfinite(new)
                if bool((enough | ~going).all()):
                    break
                length = torch.where(enough, length, 0.5 * length)
            going &= enough
            theta_r = torch.where(going[:, None, None], trial, theta_r)
            value = torch.where(going, new, value)
        return theta_r, value, close

    def _value(self, theta: Tensor, theta_r: Tensor) -> Tensor:
        q = self.local.log_partition(*self._unpack(theta - theta_r)).sum(dim=1)
        g, negative = self._unpack(theta_r)
        factor, failed = torch.linalg.cholesky_ex(-block_diagonal(negative) - self.couplings)
        b = (self.x + g).flatten(1).unsqueeze(-1)
        mean = torch.cholesky_solve(b, factor)
        log = 0.5 * (b * mean).sum(dim=(1, 2))
        log = log - factor.diagonal(dim1=-2, dim2=-1).log().sum(dim=-1)
        return torch.where(failed == 0, q + log, torch.inf)

    def _gaussian(self, theta_r: Tensor) -> tuple[Tensor, Tensor]:
        """Mean `(B, N, k)` and covariance `(B, N·k, N·k)` of the spins in r."""
        g, negative = self._unpack(theta_r)
        chi, sound = response(-negative, self.couplings)
        chi = torch.where(sound[:, None, None], chi, torch.nan)
        mean = (chi @ (self.x + g).flatten(1).unsqueeze(-1)).view_as(g)
        return mean, chi

    def _own(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """Moments `(B, N, s)` of the statistics in s and their covariances `(B, N, s, s)`."""
        field, negative = self._unpack(theta)
        chi = inverse(-negative)
        mean = apply(chi, field)
        k, s = field.shape[-1], theta.shape[-1]
        moments, covariance = _statistics(mean.reshape(-1, 1, k), chi.reshape(-1, k, k), self.basis)
        return moments.view_as(theta), covariance.view(*theta.shape, s)

    def _spins(self, theta_q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """log Z_q by site, moments `(B, N, s)` and covariances `(B, N, s, s)` of single spins."""
        with torch.enable_grad():
            theta = theta_q.detach().requires_grad_()
            log = self.local.log_partition(*self._unpack(theta))
            (moments,) = torch.autograd.grad(log.sum(), theta, create_graph=True)
            rows = [
                torch.autograd.grad(
                    moments[..., a].sum(), theta, retain_graph=True, materialize_grads=True
                )[0]
                for a in range(theta.shape[-1])
            ]
        return log.detach(), moments.detach(), torch.stack(rows, dim=-2)

    def _natural(self, mean: Tensor, chi: Tensor) -> Tensor:
        """θ_s of the independent Gaussians with the moments of r."""
        precision = inverse(matched(self.local, chi, mean.shape[1]))
        return self._pack(apply(precision, mean), -precision)

    def _pack(self, field: Tensor, quadratic: Tensor) -> Tensor:
        coefficients = torch.einsum("...ij,aij->...a", quadratic, self.basis)
        return torch.cat([field, coefficients], dim=-1)

    def _unpack(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        k = self.x.shape[-1]
        return theta[..., :k], torch.einsum("...a,aij->...ij", theta[..., k:], self.basis)


def _independent(field: Tensor, negative: Tensor) -> Tensor:
    """log Z_s of independent Gaussians, but for the factors of 2π that cancel against r's."""
    factor = torch.linalg.cholesky_ex(-negative).L
    b = field.unsqueeze(-1)
    quadratic = (b * torch.cholesky_solve(b, factor)).flatten(1).sum(dim=1)
    return 0.5 * quadratic - factor.diagonal(dim1=-2, dim2=-1).log().flatten(1).sum(dim=1)


def _statistics(mean: Tensor, chi: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """Moments and covariance of S_i and ½ S_iᵀE_aS_i under a Gaussian (Isserlis' theorem)."""
    batch, sites, k = mean.shape
    blocks = chi.view(batch, sites, k, sites, k)
    second = diagonal_blocks(chi, sites) + mean.unsqueeze(-1) * mean.unsqueeze(-2)
    moments = torch.cat([mean, 0.5 * torch.einsum("bnij,aij->bna", second, basis)], dim=-1)
    pushed = torch.einsum("aij,bnj->bnai", basis, mean)  # E_a m
    linear = torch.einsum("bnimj,bmaj->bnima", blocks, pushed)
    both = torch.einsum("bncj,bnjma->bncma", pushed, linear)
    turned = torch.einsum("cij,bnjmk,akl->bnicmla", basis, blocks, basis)
    both = both + 0.5 * torch.einsum("bnicmla,bniml->bncma", turned, blocks)
    top = torch.cat([blocks, linear], dim=-1)
    low = torch.cat([linear.permute(0, 3, 4, 1, 2), both], dim=-1)
    size = sites * (k + len(basis))
    return moments, torch.cat([top, low], dim=2).reshape(batch, size, size)


def _basis(local: Local, x: Tensor) -> Tensor:
    """Orthonormal symmetric matrices `(p, k, k)` that span what single spins and response match."""
    k = x.shape[-1]
    unit = []
    for i in range(k):
        for j in range(i, k):
            matrix = x.new_zeros(k, k)
            matrix[i, j] = matrix[j, i] = 1.0
            unit.append(matrix / matrix.norm())
    spanned = local.match(torch.stack(unit).unsqueeze(0)).squeeze(0).flatten(1)
    _, values, rows = torch.linalg.svd(spanned, full_matrices=False)
    return rows[values > 0.5 * values[0]].view(-1, k, k)
