"""How far the averages of Markov chains can be trusted."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from ..deq._failure import ConvergenceError, ConvergenceWarning, OnFailure
from ..solvers._validate import check_is_tensor

# Components whose series are worked on at a time.
_CHUNK = 256


@dataclass(frozen=True)
class Sampling:
    """The evidence behind a sampled response.

    Attributes:
        r_hat: split R̂ of every component of the magnetization, `(*batch, N, *event)`; 1 if the
            chains agree (`split_r_hat`).
        effective_size: number of independent draws that would be as good for the magnetization,
            `(*batch, N, *event)` (`effective_sample_size`).
        standard_error: Monte Carlo standard error of the magnetization, `(*batch, N, *event)`.
        energy_r_hat, energy_effective_size, energy_standard_error: the same of the energy,
            `(*batch,)`.
        log_partition_standard_error: `(*batch,)`; NaN without a ladder.
        inverse_temperatures: the ladder, `(*batch, T)`, from 0 to 1; 1 alone without one.
        swap_acceptance: mean probability that neighbours of the ladder exchange their states,
            `(*batch, T − 1)`.
        draws: number of draws, all chains together.
    """

    r_hat: Tensor
    effective_size: Tensor
    standard_error: Tensor
    energy_r_hat: Tensor
    energy_effective_size: Tensor
    energy_standard_error: Tensor
    log_partition_standard_error: Tensor
    inverse_temperatures: Tensor
    swap_acceptance: Tensor
    draws: int

    @property
    def worst_r_hat(self) -> Tensor:
        """The largest R̂ of a system, `(*batch,)`, the energy's among them."""
        own = self.r_hat.flatten(self.energy_r_hat.dim()).amax(dim=-1)
        return torch.maximum(own, self.energy_r_hat)

    def __repr__(self) -> str:
        if self.energy_r_hat.numel() == 0:
            return "Sampling(empty batch)"
        smallest = min(self.effective_size.min().item(), self.energy_effective_size.min().item())
        parts = [
            f"worst R-hat {self.worst_r_hat.max().item():.3f}",
            f"smallest effective size {smallest:.0f} of {self.draws} draws",
            f"standard error of m up to {self.standard_error.max().item():.1e}",
        ]
        if self.swap_acceptance.numel():
            parts += [
                f"of log Z up to {self.log_partition_standard_error.max().item():.1e}",
                f"smallest swap acceptance {self.swap_acceptance.min().item():.2f}",
            ]
        else:
            parts.append("no ladder, so no log Z")
        return f"Sampling({', '.join(parts)})"


def report(sampling: Sampling, on_failure: OnFailure, max_r_hat: float, stacklevel: int) -> None:
    """Warn or raise, as `on_failure` says, if the chains of any system disagree."""
    worst = sampling.worst_r_hat.flatten()
    failed = ~(worst <= max_r_hat)
    if on_failure == "ignore" or not bool(failed.any()):
        return
    message = (
        f"GibbsSampler: the chains of {int(failed.sum())} of {len(worst)} systems do not agree: "
        f"{sampling!r}, but R-hat should be at most {max_r_hat:g}. Raise num_samples (or thin) "
        "and burn_in; where chains stick in different states, or the smallest swap acceptance is "
        "below 0.2, raise num_temperatures."
    )
    if on_failure == "raise":
        raise ConvergenceError(message, sampling)
    warnings.warn(message, ConvergenceWarning, stacklevel=stacklevel)


def summarise(draws: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """R̂, effective size and standard error of the mean of series `(samples, chains, K)`."""
    if draws.shape[-1] == 0:
        return draws.new_empty(0), draws.new_empty(0), draws.new_empty(0)
    parts = draws.split(_CHUNK, dim=-1)
    r_hat = torch.cat([split_r_hat(part) for part in parts], dim=-1)
    size = torch.cat([effective_sample_size(part) for part in parts], dim=-1)
    spread = torch.cat([part.flatten(0, 1).std(dim=0) for part in parts], dim=-1)
    return r_hat, size, spread / size.sqrt()


def split_r_hat(draws: Tensor) -> Tensor:
    """R̂ of `draws` `(samples, chains, ...)`, `(...)`: do the chains agree?

    With W the mean variance within chains of n draws and B/n the variance of their means,

        R̂ = √( [ (n − 1)/n W + B/n ] / W )

    of chains cut in halves, so that drift shows too, and of ranks transformed to normal scores, so
    that tails of any weight do; the larger of that for the draws and that for their distance from
    the median, which shows chains that agree in place and not in width (Vehtari, Gelman, Simpson,
    Carpenter, Bürkner 2021, Bayesian Anal. 16, 667). 1 where no draw differs from another, NaN
    where one is not finite. Cost: O(draws log draws).

    Raises:
        ValueError: for fewer than 4 samples, and without a chain.
        TypeError: for draws that are no tensor.
    """
    halves = _halves(draws)
    folded = (halves - halves.flatten(0, 1).median(dim=0).values).abs()
    value = torch.maximum(_r_hat(_scores(halves)), _r_hat(_scores(folded)))
    finite = torch.isfinite(draws).flatten(0, 1).all(dim=0)
    return torch.where(finite, value, torch.nan)  # ranks are finite whatever the draws


def effective_sample_size(draws: Tensor) -> Tensor:
    """Effective number of independent `draws` `(samples, chains, ...)`, `(...)`, for their mean.

        samples · chains / τ,   τ = −1 + 2 Σ_k (ρ_2k + ρ_2k+1)

    with autocorrelations ρ_t = 1 − (W − γ_t)/var⁺ of all chains, cut in halves, together, γ_t their
    mean autocovariance and var⁺ the numerator of R̂² (`split_r_hat`): chains that disagree count
    little. The sum ends before the first pair that is not positive, and pairs may not rise (Geyer
    1992, Stat. Sci. 7, 473, the initial monotone sequence; Vehtari et al. 2021). At most samples ·
    chains · log10(samples · chains). Where no draw differs from another all of them count; NaN
    where one is not finite. Cost: O(draws log draws).

    Raises:
        ValueError: for fewer than 4 samples, and without a chain.
        TypeError: for draws that are no tensor.
    """
    given = _halves(draws)
    halves = given.double()
    n, total = len(halves), halves.shape[0] * halves.shape[1]
    means = halves.mean(dim=0)
    # Circular correlations by the fast Fourier transform, padded so that the ends do not meet.
    spectrum = torch.fft.rfft(halves - means, n=2 * n, dim=0)
    power = spectrum.real.square() + spectrum.imag.square()
    covariances = torch.fft.irfft(power, n=2 * n, dim=0)[:n].mean(dim=1) / n
    within = covariances[0] * n / (n - 1)
    overall = covariances[0] + means.var(dim=0)
    correlations = 1 - (within - covariances) / overall
    correlations[0] = 1
    pairs = correlations[: n - n % 2].unflatten(0, (-1, 2)).sum(dim=1)
    alive = (pairs > 0).cumprod(dim=0)
    time = 2 * (pairs.cummin(dim=0).values * alive).sum(dim=0) - 1
    size = total / time.clamp(min=1 / math.log10(total))
    return torch.where(_constant(halves), total, size).to(given.dtype)


def _halves(draws: Tensor) -> Tensor:
    """Chains cut in halves, `(samples // 2, 2 chains, ...)`; an odd number loses its middle.

    Draws that are integers become float64.
    """
    check_is_tensor("draws", draws)
    if draws.dim() < 2 or len(draws) < 4 or not draws.shape[1]:
        raise ValueError(
            "draws must be (samples, chains, ...), at least 4 samples of a chain, got "
            f"{tuple(draws.shape)}"
        )
    if not draws.is_floating_point():
        draws = draws.double()
    half = len(draws) // 2
    return torch.cat([draws[:half], draws[-half:]], dim=1)


def _r_hat(draws: Tensor) -> Tensor:
    n = len(draws)
    within = draws.var(dim=0).mean(dim=0)
    between = draws.mean(dim=0).var(dim=0)
    value = ((n - 1) / n + between / within).sqrt()
    return torch.where(_constant(draws), 1.0, value)


def _scores(draws: Tensor) -> Tensor:
    """Normal scores Φ⁻¹((r − 3/8)/(S + 1/4)) of the ranks r among all S draws; ties share one."""
    flat = draws.flatten(0, 1).movedim(0, -1).contiguous()
    ordered = flat.sort(dim=-1).values
    before = torch.searchsorted(ordered, flat)
    up_to = torch.searchsorted(ordered, flat, right=True)
    ranks = (before + up_to + 1).double() / 2
    scores = torch.special.ndtri((ranks - 0.375) / (flat.shape[-1] + 0.25))
    return scores.movedim(-1, 0).unflatten(0, draws.shape[:2]).to(draws.dtype)


def _constant(draws: Tensor) -> Tensor:
    flat = draws.flatten(0, 1)
    return flat.amax(dim=0) == flat.amin(dim=0)
