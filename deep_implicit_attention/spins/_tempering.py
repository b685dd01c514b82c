"""Parallel tempering: a ladder of inverse temperatures from 0, the prior, to 1, the system.

Replicas at β in the ladder sample p_β(S) ∝ ∏ ρ(S_i) exp(β f(S)), f the log weight of the system.
Exchanges between neighbours carry states from the hot end, where every sweep draws all spins afresh
from the prior, to the cold one, so that chains do not stick; and since log Z = 0 at β = 0, the
ladder gives log Z. Shapes: T temperatures, C chains, B systems in a batch.
"""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from ._block_gibbs import BlockGibbs

# Newton steps of `bennett`, of which about eight are needed.
_MAX_STEPS = 60


class Replicas:
    """Chains at every temperature of the ladder, which are swept and exchange their states.

    Args:
        blocks: the sweeps.
        spins: states, `(T, C, B, N, *event)`.
        fields: the same shape.
        generator: source of randomness.

    Attributes:
        betas: the ladder of every system, `(T, B)`, evenly spaced at first.
        log_weight: f of every state after the last step, `(T, C, B)`.
    """

    def __init__(
        self, blocks: BlockGibbs, spins: Tensor, fields: Tensor, generator: Generator
    ) -> None:
        self.blocks, self.generator, self.shape = blocks, generator, spins.shape
        self.packed, self.x = blocks.pack(spins), blocks.pack(fields)
        temperatures = self.shape[0]
        self._grid = (temperatures, self.shape[1] * self.shape[2])
        even = torch.linspace(0, 1, temperatures) if temperatures > 1 else torch.ones(1)
        self.betas = even.to(spins)[:, None].repeat(1, self.shape[2])
        self.log_weight = spins.new_zeros(self.shape[:3])
        self.restart_count()

    def step(self) -> None:
        """A sweep of all replicas and an exchange; even and odd pairs take turns."""
        beta = self.betas.unsqueeze(1).expand(self.shape[:3]).flatten()
        self.blocks.sweep(self.packed, self.x, beta, self.generator)
        f = self.blocks.log_weight(self.packed, self.x).view(self.shape[:3])
        places, probability = exchange(f, self.betas, self.steps % 2, self.generator)
        self.log_weight = f.gather(0, places)
        states = self.packed.unflatten(2, self._grid)
        index = places.flatten(1).expand_as(states)
        self.packed = states.gather(2, index).flatten(2)
        self.accepted = self.accepted + probability.mean(dim=1)
        self.steps += 1

    def cold(self) -> Tensor:
        """The states at β = 1, `(C, B, N, *event)`."""
        cold = self.packed.unflatten(2, self._grid)[:, :, -1]
        return self.blocks.unpack(cold, self.shape[1:])

    def acceptance(self) -> Tensor:
        """Mean probability of an exchange between neighbours since the count began, `(T−1, B)`."""
        return self.accepted / max(self.steps, 1)

    def respace(self) -> None:
        """Space the ladder by the exchanges counted, if any, and begin a new count."""
        if self.steps and len(self.betas) > 2:
            self.betas = respace(self.betas, 1 - self.acceptance())
        self.restart_count()

    def restart_count(self) -> None:
        """Begin a new count of exchanges."""
        self.accepted = torch.zeros_like(self.betas[1:])
        self.steps = 0


def exchange(
    log_weight: Tensor, betas: Tensor, parity: int, generator: Generator
) -> tuple[Tensor, Tensor]:
    """Exchange states between neighbouring temperatures, pairs 0-1, 2-3, … or 1-2, 3-4, ….

    Metropolis steps, accepted with probability min(1, exp((β′ − β)(f − f′))) for the states f at β
    and f′ at β′. Even and odd pairs are meant to take turns, which is faster than random ones
    (Okabe et al. 2001; Syed et al. 2022, J. R. Stat. Soc. B 84, 321).

    Args:
        log_weight: f of every state, `(T, C, B)`.
        betas: `(T, B)`.
        parity: 0 for even pairs, 1 for odd ones.
        generator: source of randomness.

    Returns:
        the index along T of the state that each place gets, `(T, C, B)`, and the probability of
        acceptance of every pair, of this parity or not, `(T − 1, C, B)`.
    """
    log_ratio = betas.diff(dim=0).unsqueeze(1) * -log_weight.diff(dim=0)
    uniform = torch.rand(
        log_ratio.shape, generator=generator, dtype=log_ratio.dtype, device=log_ratio.device
    )
    accepted = uniform.log() < log_ratio
    accepted[1 - parity :: 2] = False
    places = torch.arange(len(betas), device=betas.device)[:, None, None].repeat(
        1, *log_weight.shape[1:]
    )
    places[:-1] += accepted.long()
    places[1:] -= accepted.long()
    return places, log_ratio.clamp(max=0).exp()


def respace(betas: Tensor, rejection: Tensor) -> Tensor:
    """A ladder `(T, B)` on which all neighbours reject about as many exchanges.

    The rejections `(T − 1, B)` between neighbours of `betas` add up to a barrier Λ(β) that depends
    little on the spacing; the new ladder divides it evenly, by linear interpolation (Syed et al.
    2022, section 5.2).
    """
    steps = rejection.clamp(min=1e-3)  # increasing where nothing is rejected, too
    barrier = torch.cat([torch.zeros_like(steps[:1]), steps.cumsum(dim=0)]).mT.contiguous()
    wanted = barrier[:, -1:] * torch.linspace(0, 1, len(betas)).to(barrier)
    right = torch.searchsorted(barrier, wanted).clamp(1, len(betas) - 1)
    old = betas.mT
    low, high = barrier.gather(1, right - 1), barrier.gather(1, right)
    below, above = old.gather(1, right - 1), old.gather(1, right)
    new = below + (above - below) * (wanted - low) / (high - low)
    new[:, 0], new[:, -1] = 0, 1
    return new.mT


def bennett(log_weight: Tensor, betas: Tensor) -> tuple[Tensor, Tensor]:
    """log Z(β = 1) and its standard error, `(B,)` each, from the log weights of all draws.

    Between neighbours β < β′ the acceptance ratio of Bennett (1976, J. Comput. Phys. 22, 245),
    c = log Z(β′)/Z(β) with

        ⟨σ((β′ − β) f − c)⟩_β = ⟨σ(c − (β′ − β) f)⟩_β′,   σ the logistic function,

    summed along the ladder. The error is that of the linearised equations between chains, which are
    independent, so it includes all correlations within a chain and between its temperatures.

    Args:
        log_weight: f, `(draws, T, C, B)`.
        betas: `(T, B)`.
    """
    step = betas.diff(dim=0).unsqueeze(1)
    lower, upper = step * log_weight[:, :-1], step * log_weight[:, 1:]
    low = torch.minimum(lower, upper).amin(dim=(0, 2))
    high = torch.maximum(lower, upper).amax(dim=(0, 2))
    c = (low + high) / 2
    # The difference of the two sides falls with c: Newton's method within a shrinking bracket.
    for _ in range(_MAX_STEPS):
        gap, slope = _sides(lower, upper, c)
        gap = gap.mean(dim=1)
        low, high = torch.where(gap >= 0, c, low), torch.where(gap <= 0, c, high)
        newton = c + gap / slope
        new = torch.where((newton >= low) & (newton <= high), newton, (low + high) / 2)
        done = (new - c).abs() <= 1e-12 * (1 + c.abs())
        c = new
        if bool(done.all()):
            break
    gap, slope = _sides(lower, upper, c)
    shifts = (gap / slope.unsqueeze(1)).sum(dim=0)  # (C, B), of log Z by each chain; their sum is 0
    chains = len(shifts)
    return c.sum(dim=0), (shifts.square().sum(dim=0) / (chains * (chains - 1))).sqrt()


def _sides(lower: Tensor, upper: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """Left minus right side for every chain `(T − 1, C, B)`, and minus its slope `(T − 1, B)`."""
    left = torch.sigmoid(lower - c.unsqueeze(1))
    right = torch.sigmoid(c.unsqueeze(1) - upper)
    slope = (left * (1 - left) + right * (1 - right)).mean(dim=(0, 2))
    return (left - right).mean(dim=0), slope
