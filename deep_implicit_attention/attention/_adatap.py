"""Adaptive TAP attention: the response of vector spins with a prior of one's choice."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..deq._map import without_autocast
from ..deq._state import full_precision
from ..deq._watched import transformed, watched
from ..solvers._scale import is_host, relative
from ..solvers._validate import check_is_tensor
from ..spins import GaussianPrior, IsingPrior, PottsPrior, SphericalPrior
from ..spins._blocks import block_diagonal, diagonal_blocks
from ..spins._prior import Prior
from . import _matched
from ._linear import Factor, factorise, inverse, log_determinant, solve
from ._matched import Matched, Method, State
from ._memory import same_bits
from ._products import linear_of_few
from ._site_couplings import SiteCouplings, respond

_entering = threading.Lock()  # to `frozen`, or leaving it


class _Gaussian(NamedTuple):
    """What a solve with a Gaussian prior needs."""

    x: Tensor  # (B, N, d), the fields, x + Pμ
    precision: Tensor  # (N, d, d), P_i
    operator: Tensor  # (N·d, N·d), blockdiag P − J
    factor: Factor | None  # of the operator; None where numbers cannot be looked at


class _Frozen(NamedTuple):
    """What `frozen` keeps: the context without fields, and what it was made from."""

    settings: tuple
    weights: list[Tensor]  # copies
    context: _Gaussian | Matched
    holders: int = 0  # how many `with` blocks, of any thread, are inside


class DEQAdaTAPMeanFieldAttention(SiteCouplings):
    """The adaptive TAP equations of spins with a prior ρ (Opper, Winther 2001, Phys. Rev. E 64,
    056131),

        z_i = mean(h_i, V_i),   h_i = x_i + Σ_j J_ij z_j − V_i z_i,   C_i = covariance(h_i, V_i)
        V_i = Λ_i − (χ_ii)⁻¹,   Λ_i = V_i + C_i⁻¹,   χ = (blockdiag Λ − J)⁻¹

    V_i is the variance of the cavity field, the self-correction that the other mechanisms learn.

    With a Gaussian prior, N(0, P_i⁻¹) or `GaussianPrior`, Λ = P and the equations have the closed
    form that `DEQFixedPoint` returns,

        z = (P − J)⁻¹ (x + Pμ),   V_i = P_i − ([(P − J)⁻¹]_ii)⁻¹,

    which is the exact mean of the Gaussian system; V never changes z, and is computed only if it
    is among the output elements. `update` iterates the equations themselves and is the reference
    for it. There is a distribution behind the fixed point only if the couplings have both
    symmetries and P − J is positive definite; where they are not, the layer still returns the
    solution of the equations and reports it as `on_failure` says.

    With any other prior V depends on the sample and the equations are iterated: `IsingPrior()`
    makes every component a spin (N·d scalar spins, V diagonal), `PottsPrior(d)` and
    `SphericalPrior(d, R)` are for the whole vector, the latter with V = v·1 and only the traces of
    C_i and χ_ii matched. These priors need both symmetries.

    Wrap it in `DEQFixedPoint`; x is `(B, N, d)`, the state is (z `(B, N, d)`, V `(B, N, d, d)`).

    Args:
        num_spins: number of sites N.
        dim: components d of a spin.
        weight_init_std: standard deviation of the raw couplings at the start, default 1/√(N d²);
            each symmetry divides that of the couplings by about √2.
        weight_training: False makes the couplings a buffer.
        weight_sym_internal: symmetrise each J_ij.
        weight_sym_sites: symmetrise J_ij = J_ji. With both symmetries only one half of P − J is
            read, so a subclass whose own `weight()` lacks one has to say so here.
        lin_response: False is naive mean field, V = 0 (for a Gaussian prior the same z).
        prior: prior of a spin, shared by all sites; its parameters are trained with the module. By
            default N(0, 1), kept as the buffer `spin_prior_inv_var` `(N, d, d)` of the P_i.

    Raises:
        TypeError, ValueError: for a prior of another dimension, or without the symmetries it needs.

    Cost: Gaussian, O(N³ d³ + B N² d²) once, no iteration; otherwise O(B N³ d³) an update.
    """

    spin_prior_inv_var: Tensor

    def __init__(
        self,
        num_spins: int,
        dim: int,
        weight_init_std: float | None = None,
        weight_training: bool = True,
        weight_sym_internal: bool = True,
        weight_sym_sites: bool = True,
        lin_response: bool = True,
        *,
        prior: Prior | None = None,
    ) -> None:
        super().__init__(
            num_spins, dim, weight_init_std, weight_training, weight_sym_internal, weight_sym_sites
        )
        _check_prior(prior, dim, self.symmetric)
        self.lin_response = lin_response
        self.prior = prior
        if prior is None:
            self.register_buffer("spin_prior_inv_var", torch.eye(dim).repeat(num_spins, 1, 1))
        self._frozen: _Frozen | None = None

    @property
    def symmetric(self) -> bool:
        """Whether the couplings are those of a Boltzmann distribution, J_ij = J_jiᵀ."""
        return self.weight_sym_internal and self.weight_sym_sites

    def initial_state(self, x: Tensor) -> State:
        # No preferred direction: 0, for Potts spins equal probabilities.
        centre = 1 / self.dim if isinstance(self.prior, PottsPrior) else 0.0
        return torch.full_like(x, centre), x.new_zeros(*x.shape, x.shape[-1])

    def prepare(self, x: Tensor) -> _Gaussian | Matched:
        frozen = self._frozen  # read once: another thread may be leaving the context
        if frozen is not None:
            return self._thawed(frozen, x)
        if self.prior is None:
            precision = self.spin_prior_inv_var.to(x)
        elif isinstance(self.prior, GaussianPrior):
            precision = self.prior.precision().to(x)
            x = x + precision @ self.prior.location.to(x)
            precision = precision.expand(self.num_spins, -1, -1)
        else:
            return _matched.prepare(self.weight(), self.prior, x)
        operator = self.coupling_operator(precision)
        factor = None  # for `update`, which is all that is traced, there is no need of it
        if not (torch.compiler.is_compiling() or transformed(operator)):
            factor = factorise(operator, self.symmetric)
        return _Gaussian(x, precision, operator, factor)

    def update(self, z: State, context: _Gaussian | Matched) -> State:
        if isinstance(context, Matched):
            assert self.prior is not None
            return _matched.update(self.prior, z, context, self.lin_response)
        mean, cavity = z
        narrow = context.precision - cavity  # C_i⁻¹, (B, N, d, d)
        # h_i = x_i + Σ_j J_ij z_j − V_i z_i, with J = blockdiag P − A for the operator A.
        field = (context.x.flatten(1) - mean.flatten(1) @ context.operator.mT).view_as(mean)
        field = field + (narrow @ mean.unsqueeze(-1)).squeeze(-1)
        new_mean = torch.linalg.solve_ex(narrow, field.unsqueeze(-1)).result.squeeze(-1)
        if not self.lin_response:
            return new_mean, torch.zeros_like(cavity)
        total = cavity + narrow  # Λ_i
        operator = context.operator + block_diagonal(total - context.precision)
        response = torch.linalg.inv_ex(operator).inverse
        blocks = diagonal_blocks(response, self.num_spins)
        return new_mean, total - torch.linalg.inv_ex(blocks).inverse

    def select_samples(self, index: Tensor, context: _Gaussian | Matched) -> _Gaussian | Matched:
        """The context of some samples."""
        return context._replace(x=context.x[index])

    @property
    def solve(self) -> Any:
        """The closed form, `solve(context, wanted)`; priors without one have no such attribute."""
        if not _is_gaussian(self.prior):
            raise AttributeError(f"{type(self.prior).__name__} has no closed form")
        return self._solve

    def _solve(self, context: _Gaussian, wanted: tuple[int, ...]) -> tuple[Tensor, Tensor | None]:
        """z; V only if element 1 is wanted."""
        x, operator, factor = context.x, context.operator, self._factor(context)
        z = respond(operator, x.flatten(1).mT, factor).mT.reshape_as(x)
        if 1 not in wanted:
            return z, None
        if not self.lin_response:
            return z, self.initial_state(x)[1]
        blocks = diagonal_blocks(inverse(operator, factor), self.num_spins)
        cavity_variance = context.precision - torch.linalg.inv_ex(blocks).inverse
        return z, cavity_variance.repeat(x.shape[0], 1, 1, 1)

    def _factor(self, context: _Gaussian) -> Factor:
        return context.factor or factorise(context.operator, self.symmetric)

    def residual(self, context: _Gaussian, state: State) -> tuple[Tensor, Tensor]:
        """‖f(z) − z‖, relative to ‖f(z)‖ and absolute, of f(z) = P⁻¹ (x + Pμ + J z).

        That is the update at V = 0; V has no influence on the fixed point. f(z) − z is
        P⁻¹ (x + Pμ − (P − J) z).
        """
        z, x, operator, precision = state[0], context.x, context.operator, context.precision
        on_host = is_host(z)
        if not on_host:
            # Accelerators may round the factors of a product: P, which is large, stays out of it.
            operator = operator - block_diagonal(precision)
        flat = z.flatten(1)
        change = x.flatten(1) - linear_of_few(flat, operator, self.symmetric)
        asked = on_host and not watched(change, precision)
        if not (asked and torch.equal(precision, _ones(*precision.shape[:2], precision.dtype))):
            change = torch.linalg.solve_ex(precision, change.view_as(z).permute(1, 2, 0)).result
            change = change.permute(2, 0, 1).flatten(1)
            change = change if on_host else change - flat
        return relative(change, flat + change, asked)

    def judge(self, context: _Gaussian) -> str:
        """Names the smallest eigenvalue of P − J if the matrix is not positive definite."""
        if not self.symmetric or self._factor(context).pivots is None:
            return ""
        operator = context.operator.detach()
        if not bool(torch.isfinite(operator).all()):
            sound = bool(torch.isfinite(context.precision).all())
            return "The couplings are not finite." if sound else "P is not finite."
        smallest = torch.linalg.eigvalsh(operator)[0].item()
        return f"The smallest eigenvalue of P − J is {smallest:.4g}."

    def free_energy(self, x: Tensor, method: Method | None = None) -> Tensor:
        """−log Z of the spins in fields `x` `(B, N, d)`, `(B,)`, to be a term of a loss.

        Exact for a Gaussian prior, which takes no `method`. For the others by `method`, an
        inference method of `spins`: by default that of the layer, `AdaptiveTAP(tol=1e-5)`, or
        `NaiveMeanField(tol=1e-5)` without `lin_response`. Its derivative with respect to x is −z,
        with respect to the couplings −(z_i z_jᵀ + χ_ij), by naive mean field −z_i z_jᵀ, where J_ij
        and J_ji change together: autograd has half of it at each. The prior is a probability
        measure, so −log Z is 0 without couplings and fields. Autocast has no effect.

        Raises:
            TypeError: if the couplings do not have both symmetries: there is no distribution; for a
                `method` that is not one.
            ValueError: if P − J is not positive definite, naming the smallest eigenvalue; if a
                sample of x is not finite; for a `method` where −log Z is exact.
        """
        if not self.symmetric:
            raise TypeError(
                "free_energy needs weight_sym_internal and weight_sym_sites: without them there is "
                "no Boltzmann distribution"
            )
        _check_method(method, self.prior)
        check_is_tensor("x", x)
        with without_autocast(x):
            x = self.sources(full_precision(x))
            _check_finite(x)
            context = self.prepare(x)
            if isinstance(context, _Gaussian):
                return -self._gaussian_log_partition(context)
            assert self.prior is not None
            weight = self.weight() if self._frozen is None else self.weight().detach()
            method = method or _matched.inference(self.lin_response)
            return -_matched.log_partition(weight, self.prior, x, method)

    def _gaussian_log_partition(self, context: _Gaussian) -> Tensor:
        if message := self.judge(context):
            raise ValueError(f"P − J must be positive definite. {message}")
        b, factor = context.x.flatten(1), self._factor(context)
        z = solve(context.operator, b.mT, factor).mT
        log = 0.5 * (b * z).sum(dim=1) - 0.5 * log_determinant(context.operator, factor)
        log = log + 0.5 * torch.linalg.slogdet(context.precision).logabsdet.sum()
        if isinstance(self.prior, GaussianPrior):
            location, precision = self.prior.location.to(b), self.prior.precision().to(b)
            if self._frozen is not None:
                location, precision = location.detach(), precision.detach()
            log = log - 0.5 * self.num_spins * location @ precision @ location
        return log

    @contextmanager
    def frozen(self) -> Iterator[DEQAdaTAPMeanFieldAttention]:
        """Within this context the weights are constants: couplings and factorisation are made once.

            with module.frozen():
                for x in batches:
                    z = layer(x)

        Gradients reach x and not the weights. Changing a weight, the prior or an option inside, by
        whatever means, makes the next call raise `RuntimeError`: every call compares the weights
        with a copy. Contexts may be nested and may overlap in threads: they share what is frozen
        until the last is left. Copies of the module have none of it.
        """
        with _entering:
            frozen = self._freeze() if self._frozen is None else self._unchanged(self._frozen)
            self._frozen = frozen._replace(holders=frozen.holders + 1)
        try:
            yield self
        finally:
            with _entering:
                assert self._frozen is not None
                left = self._frozen.holders - 1
                self._frozen = self._frozen._replace(holders=left) if left else None

    def _freeze(self) -> _Frozen:
        # A call with gradients may be another holder: nothing may be a tensor of inference mode.
        off = torch.inference_mode(False)
        with off, torch.no_grad(), without_autocast(self._weight):
            nothing = full_precision(self._weight).new_zeros(1, self.num_spins, self.dim)
            # Not a subclass's: what that adds to the fields, every call adds anew.
            context = DEQAdaTAPMeanFieldAttention.prepare(self, nothing)
            if isinstance(context, _Gaussian):
                factor = self._factor(context).inverted(context.operator)
                context = context._replace(factor=factor)
            copies = [weight.clone() for weight in self._weights()]
        return _Frozen(self._settings(), copies, context)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_frozen": None}

    def _settings(self) -> tuple:
        """What a context depends on beside the weights."""
        radius = getattr(self.prior, "radius", None)
        symmetries = self.weight_sym_internal, self.weight_sym_sites
        return self.prior, radius, self.lin_response, *symmetries

    def _weights(self) -> list[Tensor]:
        return [weight.detach() for weight in (*self.parameters(), *self.buffers())]

    def _unchanged(self, frozen: _Frozen) -> _Frozen:
        """`frozen`; raises if the module is no longer what it was made from."""
        if self._settings() != frozen.settings:
            raise RuntimeError(
                "the prior or an option changed inside `frozen()`: leave the context before "
                "changing them, and enter it anew"
            )
        weights = self._weights()
        if len(weights) != len(frozen.weights) or not all(map(same_bits, weights, frozen.weights)):
            raise RuntimeError(
                "the weights changed inside `frozen()`: leave the context before changing them, "
                "and enter it anew"
            )
        return frozen

    def _thawed(self, frozen: _Frozen, x: Tensor) -> _Gaussian | Matched:
        """The frozen context with the fields `x`, of which it depends affinely."""
        context = self._unchanged(frozen).context
        if isinstance(context, Matched):
            x = _matched.coordinates(x, context)
        return context._replace(x=x + context.x)


@functools.lru_cache(maxsize=8)
def _ones(sites: int, dim: int, dtype: torch.dtype) -> Tensor:
    """P_i as they are by default, on the host."""
    return torch.eye(dim, dtype=dtype, device="cpu").repeat(sites, 1, 1)


def _is_gaussian(prior: Prior | None) -> bool:
    """Whether the equations have a closed form; N(0, 1) is the prior where none is given."""
    return prior is None or isinstance(prior, GaussianPrior)


def _check_method(method: Any, prior: Prior | None) -> None:
    if method is None:
        return
    if isinstance(method, type) or not callable(method):
        got = f"the class {method.__name__}" if isinstance(method, type) else type(method).__name__
        raise TypeError(f"method must be an inference method such as AdaptiveTAP(), got {got}")
    if _is_gaussian(prior):
        raise ValueError(
            "method must be None for a Gaussian prior, whose free energy has an exact closed form; "
            f"got {type(method).__name__}"
        )


def _check_finite(x: Tensor) -> None:
    broken = ~torch.isfinite(x.detach()).flatten(1).all(dim=1)
    if bool(broken.any()):
        raise ValueError(f"x must be finite, sample {int(broken.nonzero()[0])} is not")


def _check_prior(prior: Prior | None, dim: int, symmetric: bool) -> None:
    if prior is None:
        return
    if not isinstance(prior, GaussianPrior | IsingPrior | PottsPrior | SphericalPrior):
        raise TypeError(
            "prior must be a GaussianPrior, IsingPrior, PottsPrior or SphericalPrior, got "
            f"{type(prior).__name__}"
        )
    name = type(prior).__name__
    if prior.event_shape and prior.event_shape != (dim,):
        raise ValueError(
            f"prior must have {dim} components like the spins, {name} has {prior.event_shape[0]}"
        )
    if not (_is_gaussian(prior) or symmetric):
        raise ValueError(
            f"{name} needs weight_sym_internal and weight_sym_sites: without them there is no spin "
            "system whose response could be matched"
        )
