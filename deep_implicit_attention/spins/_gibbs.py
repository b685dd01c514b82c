"""Sampled answers, for systems too large to enumerate: Gibbs sampling with parallel tempering."""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from torch import Generator, Size, Tensor

from ..deq._failure import OnFailure, check_on_failure
from ..deq._refusal import reroute
from ..solvers._validate import check_count, check_integer, check_is_tensor, check_number
from ._block_gibbs import BlockGibbs
from ._blocks import diagonal_blocks
from ._exact import factorise
from ._gaussian import GaussianPrior
from ._mcmc import Sampling, report, summarise
from ._response import Later, Response
from ._system import SpinSystem, check_system
from ._tempering import Replicas, bennett


class GibbsSampler:
    """The sampled response, `method(system, fields) -> Response`: right up to standard errors.

    `num_chains` independent chains for every system of the batch, each a ladder of
    `num_temperatures` replicas with inverse temperatures from 0 to 1 on both J and x (parallel
    tempering, Hukushima, Nemoto 1996, J. Phys. Soc. Jpn. 65, 1604). In turn, every replica makes a
    block sweep (`BlockGibbs`) and neighbours exchange states. At β = 0 a sweep is a fresh draw from
    the prior, so the cold chains do not stick in one of several states. Within the burn-in the
    ladder is spaced so that all exchanges are about as likely, then it stays as it is.

    `magnetization`, `covariance`, `susceptibility` (the same) and `energy` are averages over the
    draws of all chains, without a graph. `log_partition` is estimated along the ladder by Bennett's
    acceptance ratio, from log Z = 0 at β = 0. Its first derivatives are the sampled moments, which
    is the gradient of Boltzmann learning; second ones raise:

        ∂ log Z/∂x_i = ⟨S_i⟩,   ∂ log Z/∂J_ij = ½ ⟨S_i S_jᵀ⟩ (so ⟨S_i S_jᵀ⟩ for the pair ij, ji),
        ∂ log Z/∂θ = Σ_i ⟨∂ log ρ(S_i; θ)/∂θ⟩   for the parameters of a Gaussian prior

    `num_temperatures=1` turns tempering off. Then there is no estimate of log Z: `log_partition` is
    NaN, with gradients as above, and so is `entropy`.

    `Response.sampling` says how far to trust the answer: R̂, effective sample sizes, standard
    errors, swap acceptance (`Sampling`). If the worst R̂ of a system is above `max_r_hat`, its
    chains do not agree, which is reported as `on_failure` says.

    Cost: O(N²) a sweep and replica (d² as much for couplings `(N, N, d, d)`), in as many steps as
    the coupling graph has colours: N if all sites are coupled. `num_temperatures · num_chains · B`
    replicas are swept at once; draws take `num_samples · num_chains · B · N · d` numbers of memory.
    Equal seeds give equal numbers on one machine; all systems of a batch share the stream, so a
    system's draws depend on its batch mates.

    Args:
        num_samples: draws a chain, at least 4.
        burn_in: sweeps before the first draw; may be 0.
        num_chains: independent chains for every system, at least 2.
        num_temperatures: replicas of each chain; more where swap acceptance is low, which goes
            with √N.
        thin: sweeps a draw.
        seed: of all randomness; every call starts from it.
        max_r_hat: R̂ at which the chains count as agreed.
        on_failure: ``"warn"``, ``"raise"`` or ``"ignore"``.

    Raises:
        ValueError: for options out of range, a Gaussian system with P − J not positive definite,
            and starts that are no states.
        TypeError: for a prior that has no `sample`, or one of other weights (`BlockGibbs`).
        ConvergenceError: with ``on_failure="raise"``; its `solution` is the `Sampling`.
    """

    def __init__(
        self,
        *,
        num_samples: int = 1000,
        burn_in: int = 500,
        num_chains: int = 16,
        num_temperatures: int = 10,
        thin: int = 1,
        seed: int = 0,
        max_r_hat: float = 1.01,
        on_failure: OnFailure = "warn",
    ) -> None:
        check_count("num_samples", num_samples)
        check_count("burn_in", burn_in, minimum=0)
        check_count("num_chains", num_chains)
        check_count("num_temperatures", num_temperatures)
        check_count("thin", thin)
        check_number("max_r_hat", max_r_hat, minimum=1.0)
        check_on_failure(on_failure)
        check_integer("seed", seed)
        self.seed = operator.index(seed)
        if not -(2**63) <= self.seed < 2**64:
            raise ValueError(f"seed must be from -2**63 to 2**64 - 1, got {seed}")
        if num_samples < 4 or num_chains < 2:
            raise ValueError(
                "num_samples must be at least 4 and num_chains at least 2, so that chains can be "
                f"compared, got {num_samples} and {num_chains}"
            )
        self.num_samples, self.burn_in, self.thin = num_samples, burn_in, thin
        self.num_chains, self.num_temperatures = num_chains, num_temperatures
        self.max_r_hat = max_r_hat
        self.on_failure: OnFailure = on_failure

    def sample(self, system: SpinSystem, fields: Tensor, *, start: Tensor | None = None) -> Tensor:
        """Draws `(num_samples, num_chains, *batch, N, *event)` for fields `(*batch, N, *event)`.

        Without a graph and without a judgement: `split_r_hat` and `effective_sample_size` take
        draws as they are. Chains start from the prior, or all replicas of a chain from its state in
        `start` `(num_chains, *batch, N, *event)`; the burn-in comes after that in any case.
        """
        run = self._run(system, fields, start)
        return run.draws.reshape(*run.draws.shape[:2], *fields.shape)

    def __call__(self, system: SpinSystem, fields: Tensor) -> Response:
        """Sample for fields `(*batch, N, *event)`."""
        run = self._run(system, fields, None)
        event = (system.num_spins, *system.event_shape)
        batch = fields.shape[: fields.dim() - len(event)]
        with torch.no_grad():
            m, covariance = _moments(run.draws)
            sampling, log = _evidence(run, batch, event)
        x = fields.reshape(m.shape)
        tape = _log_weight(system, x, m, covariance)
        log = reroute(log.to(tape), tape, _SAMPLED) if tape.requires_grad else log.to(tape)
        report(sampling, self.on_failure, self.max_r_hat, stacklevel=3)
        covariance = covariance.reshape(*batch, *event, *event)
        known = Later(lambda: covariance)
        return Response(
            magnetization=m.reshape(fields.shape),
            log_partition=log.reshape(batch),
            energy=-run.log_weight[:, -1].mean(dim=(0, 1)).to(m).reshape(batch),
            cavity_variance=None,
            solution=None,
            method="GibbsSampler",
            _covariance=known,
            _susceptibility=known,
            sampling=sampling,
        )

    @torch.no_grad()
    def _run(self, system: SpinSystem, fields: Tensor, start: Tensor | None) -> _Run:
        check_system(system)
        system.check_fields(fields)
        if isinstance(system.prior, GaussianPrior):
            factorise(system, system.prior.precision().to(fields))
        replicas = self._start(system, fields, start)
        quarters = {self.burn_in * k // 4 for k in (1, 2, 3)}
        for step in range(self.burn_in):
            if step in quarters:
                replicas.respace()
            replicas.step()
        replicas.restart_count()
        draws = fields.new_empty(self.num_samples, *replicas.shape[1:])
        log_weights = fields.new_empty(self.num_samples, *replicas.shape[:3], dtype=torch.float64)
        for draw in range(self.num_samples):
            for _ in range(self.thin):
                replicas.step()
            draws[draw] = replicas.cold()
            log_weights[draw] = replicas.log_weight
        return _Run(draws, log_weights, replicas.betas, replicas.acceptance())

    def _start(self, system: SpinSystem, fields: Tensor, start: Tensor | None) -> Replicas:
        """Replicas before the first sweep."""
        blocks = BlockGibbs(system)
        generator = Generator(fields.device).manual_seed(self.seed)
        event = (system.num_spins, *system.event_shape)
        x = fields.detach().reshape(-1, *event)
        shape = Size((self.num_temperatures, self.num_chains, *x.shape))
        if start is None:
            spins = system.prior.sample(x.new_zeros(shape), generator)
        else:
            check_is_tensor("start", start)
            expected = (self.num_chains, *fields.shape)
            if start.shape != expected:
                raise ValueError(f"start must have shape {expected}, got {tuple(start.shape)}")
            blocks.check(start, fields)
            spins = start.detach().reshape(shape[1:]).expand(shape)
        return Replicas(blocks, spins, x.expand(shape), generator)


_SAMPLED = (
    "the gradient of a sampled log_partition is made of sampled moments, which know nothing of "
    "what they depend on. The second derivative by the fields is `covariance`."
)


@dataclass(frozen=True)
class _Run:
    """What the chains leave: T temperatures, C chains, B systems."""

    draws: Tensor  # (num_samples, C, B, N, *event), at β = 1
    log_weight: Tensor  # (num_samples, T, C, B)
    betas: Tensor  # (T, B)
    acceptance: Tensor  # (T − 1, B)


def _moments(draws: Tensor) -> tuple[Tensor, Tensor]:
    """Means `(B, n)` and covariances `(B, n, n)`."""
    flat = draws.flatten(3).permute(2, 0, 1, 3).flatten(1, 2)
    m = flat.mean(dim=1)
    centred = flat - m.unsqueeze(1)
    return m, centred.mT @ centred / flat.shape[1]


def _evidence(run: _Run, batch: Size, event: tuple[int, ...]) -> tuple[Sampling, Tensor]:
    """The diagnostics of a run, and log Z `(B,)`."""
    spins = [value.reshape(*batch, *event) for value in summarise(run.draws.flatten(2))]
    energy = [value.reshape(batch) for value in summarise(run.log_weight[:, -1])]
    if len(run.betas) > 1:
        log, error = bennett(run.log_weight, run.betas.double())
    else:
        log = error = run.log_weight.new_full(run.betas.shape[1:], torch.nan)
    sampling = Sampling(
        *spins,
        *energy,
        log_partition_standard_error=error.reshape(batch),
        inverse_temperatures=run.betas.mT.reshape(*batch, len(run.betas)),
        swap_acceptance=run.acceptance.mT.reshape(*batch, len(run.acceptance)),
        draws=run.draws.shape[0] * run.draws.shape[1],
    )
    return sampling, log


def _log_weight(system: SpinSystem, x: Tensor, m: Tensor, covariance: Tensor) -> Tensor:
    """⟨½ SᵀJS + x·S + Σ_i log ρ(S_i; θ)⟩ `(B,)` up to constants, a function of J, x and θ."""
    second = covariance + m.unsqueeze(2) * m.unsqueeze(1)
    value = 0.5 * (system.matrix() * second).sum(dim=(1, 2)) + (x * m).sum(dim=1)
    prior = system.prior
    if isinstance(prior, GaussianPrior):
        # Σ_i ⟨(S_i − μ)(S_i − μ)ᵀ⟩
        n, location = system.num_spins, prior.location.to(m)
        shifted = m.view(len(m), n, len(location)) - location
        square = diagonal_blocks(covariance, n) + shifted.unsqueeze(3) * shifted.unsqueeze(2)
        spread = (prior.precision().to(m) * square).sum(dim=(1, 2, 3))
        value = value - 0.5 * spread - n * prior.log_diagonal.sum()
    return value
