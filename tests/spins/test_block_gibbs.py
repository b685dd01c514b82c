"""Block sweeps against the conditional distributions they draw from."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from deep_implicit_attention.spins import BlockGibbs, IsingPrior, SpinSystem, ferromagnet, lattice
from deep_implicit_attention.spins._prior import Prior


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=seeded(seed), dtype=torch.float64)


def test_every_spin_follows_its_conditional_distribution(system):
    """In a fixed state the first block is drawn from prior(x + J S), and so on with the new
    spins of the blocks before: residuals have mean zero, also times what they depend on."""
    n, k, copies = system.num_spins, system.event_shape.numel(), 10_000
    sweeps = BlockGibbs(system)
    x = 0.5 * randn(n, *system.event_shape, seed=1)
    old = system.prior.sample(3 * randn(n, *system.event_shape, seed=2), seeded())
    old = old.expand(copies, *old.shape).contiguous()
    new = sweeps(old, x, generator=seeded(5))
    seen = old.clone()
    for block in sweeps.blocks:
        field = x + system.pull(seen)
        mean = system.prior.mean(field)[:, block].reshape(copies, -1)
        residual = new[:, block].reshape(copies, -1) - mean
        context = torch.cat([torch.ones(copies, 1), seen.reshape(copies, -1)], dim=1)
        products = residual.unsqueeze(2) * context.unsqueeze(1)
        error = products.std(dim=0) / copies**0.5
        z = products.mean(dim=0) / error.clamp(min=1e-12)
        assert z.abs().max() < 4.5
        # Spins of a block are independent of each other, and of the right width.
        expected = system.prior.covariance(field)[:, block].reshape(copies, len(block), k, k)
        blocks = torch.einsum("ma,mb->mab", residual, residual)
        for i in range(len(block)):
            own = slice(i * k, (i + 1) * k)
            blocks[:, own, own] -= expected[:, i]
        z = blocks.mean(dim=0) / (blocks.std(dim=0) / copies**0.5).clamp(min=1e-12)
        assert z.abs().max() < 4.5
        seen[:, block] = new[:, block]


def test_blocks_cover_all_sites_without_couplings_inside(system):
    blocks = BlockGibbs(system).blocks
    assert sorted(torch.cat(blocks).tolist()) == list(range(system.num_spins))
    for block in blocks:
        assert not system.couplings[block][:, block].any()


def test_number_of_blocks():
    def blocks(couplings: Tensor) -> list[list[int]]:
        return [b.tolist() for b in BlockGibbs(SpinSystem(couplings, IsingPrior())).blocks]

    board = [{i for i in range(24) if (i // 6 + i) % 2 == parity} for parity in (0, 1)]
    for periodic in (True, False):
        found = blocks(lattice((4, 6), 0.3, periodic=periodic))
        assert [set(block) for block in found] in (board, board[::-1])
    assert len(blocks(lattice((4, 4, 4)))) == 2
    assert len(blocks(lattice((5,)))) == 3  # an odd ring
    assert len(blocks(torch.zeros(6, 6))) == 1
    assert len(blocks(ferromagnet(7))) == 7
    # A crown: i and j of either side are neighbours unless i = j. Greedy colouring in the order
    # of the sites takes one colour a pair.
    crown = torch.zeros(6, 2, 6, 2)
    crown[:, 0, :, 1] = crown[:, 1, :, 0] = 1 - torch.eye(6)
    assert len(blocks(crown.reshape(12, 12))) == 2


def test_sweeps_go_on_where_they_stopped(system):
    """Persistent chains: two calls are one with twice the sweeps."""
    sweeps = BlockGibbs(system)
    x = randn(3, system.num_spins, *system.event_shape, seed=1)
    start = system.prior.sample(torch.zeros(5, *x.shape, dtype=x.dtype), seeded())
    at_once = sweeps(start, x, sweeps=2, generator=seeded(1))
    generator = seeded(1)
    half = sweeps(start, x, generator=generator)
    assert torch.equal(sweeps(half, x, generator=generator), at_once)
    assert not torch.equal(half, at_once)
    assert at_once.shape == start.shape
    assert system.prior.supports(at_once).all()


def test_refusals():
    sweeps = BlockGibbs(SpinSystem(ferromagnet(3), IsingPrior()))
    x, up = torch.zeros(3).double(), torch.ones(4, 3).double()
    with pytest.raises(ValueError, match=r"spins must have shape \(\.\.\., 3\), got \(4, 2\)"):
        sweeps(up[:, :2], x, generator=seeded())
    with pytest.raises(ValueError, match="spins must be values of IsingPrior"):
        sweeps(0.5 * up, x, generator=seeded())
    with pytest.raises(TypeError, match=r"spins are torch\.float32"):
        sweeps(up.float(), x, generator=seeded())
    with pytest.raises(TypeError, match="spins must be a tensor, got ndarray"):
        sweeps(up.numpy(), x, generator=seeded())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="fields must be a tensor, got list"):
        sweeps(up, [0.0] * 3, generator=seeded())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="do not broadcast"):
        sweeps(up, torch.zeros(5, 3).double(), generator=seeded())
    with pytest.raises(ValueError, match="fields must be finite"):
        sweeps(up, x + torch.nan, generator=seeded())
    with pytest.raises(ValueError, match="sweeps must be at least 1"):
        sweeps(up, x, sweeps=0, generator=seeded())

    class Unsampled(Prior):
        event_shape = torch.Size(())

    with pytest.raises(TypeError, match="Unsampled has no sample"):
        BlockGibbs(SpinSystem(ferromagnet(3), Unsampled()))
