"""Gibbs sampling in blocks of sites that do not see each other."""

from __future__ import annotations

import itertools

import numpy as np
import torch
from torch import Generator, Tensor

from ..solvers._validate import check_count, check_is_tensor
from ._prior import Prior
from ._system import SpinSystem, check_system


class BlockGibbs:
    """Heat-bath sweeps over many states of a system at once.

    A sweep draws every spin once from its conditional distribution,

        p(S_i | S_j, j ≠ i) ∝ ρ(S_i) exp( (x_i + Σ_j J_ij S_j)·S_i )

    (Geman, Geman 1984, IEEE Trans. PAMI 6, 721), one block after the other. Sites of a block have
    no couplings among themselves, so they are independent given the rest and drawn at once. Blocks
    are the colours of a colouring of the coupling graph by `colouring`: 2 on a bipartite graph such
    as an even lattice or a restricted Boltzmann machine, N with dense couplings.

    This is the piece for chains that persist (persistent contrastive divergence): states go in,
    states come out, the caller keeps them and the generator.

        sweeps = BlockGibbs(system)
        spins = sweeps(spins, fields, sweeps=5, generator=generator)

    Cost: O(N²) a sweep and state (d² as much with couplings `(N, N, d, d)`), in as many steps as
    there are blocks. The field on a block is summed afresh from the spins, which costs no more than
    keeping local fields up to date and cannot drift. No gradients.

    Args:
        system: couplings and prior.

    Attributes:
        blocks: the sites of each block, in the order of the sweep.

    Raises:
        TypeError: for a prior that has no `sample`, or overrides `log_partition` but not the
            `sample` of its base class.
    """

    def __init__(self, system: SpinSystem) -> None:
        check_system(system)
        self.prior = system.prior
        _check_sample(type(self.prior))
        self.sites = (system.num_spins, system.event_shape.numel())
        couplings = system.couplings.detach()
        coupled = couplings != 0 if couplings.dim() == 2 else (couplings != 0).any(3).any(2)
        colours = colouring(coupled | coupled.mT).to(couplings.device)
        # Sites sorted by colour, so that a block is a slice.
        self.order = colours.argsort(stable=True)
        self.back = self.order.argsort()
        self.blocks = tuple(self.order.split(colours.bincount().tolist()))
        ends = np.cumsum([0, *map(len, self.blocks)]).tolist()
        self._slices = [slice(*pair) for pair in itertools.pairwise(ends)]
        couplings = couplings[self.order][:, self.order]
        if couplings.dim() == 4:  # (N, k, N·k)
            couplings = couplings.movedim(1, 2).flatten(2)
        self._rows = [couplings[block].flatten(0, -2) for block in self._slices]
        self._matrix = couplings.flatten(0, -2)

    @torch.no_grad()
    def __call__(
        self, spins: Tensor, fields: Tensor, *, sweeps: int = 1, generator: Generator
    ) -> Tensor:
        """States `(..., N, *event)` after `sweeps` sweeps from `spins`, the same shape.

        Fields `(*batch, N, *event)` broadcast against the states. The draws come from `generator`,
        which must be on the device of the states.
        """
        check_count("sweeps", sweeps)
        self.check(spins, fields)
        packed, x = self.pack(spins), self.pack(fields.expand_as(spins))
        for _ in range(sweeps):
            self.sweep(packed, x, 1.0, generator)
        return self.unpack(packed, spins.shape)

    def check(self, spins: Tensor, fields: Tensor) -> None:
        """Raise unless `spins` are possible states that `fields` broadcast against."""
        check_is_tensor("spins", spins)
        check_is_tensor("fields", fields)
        event = (self.sites[0], *self.prior.event_shape)
        if spins.shape[spins.dim() - len(event) :] != event:
            shape = ", ".join(map(str, event))
            raise ValueError(f"spins must have shape (..., {shape}), got {tuple(spins.shape)}")
        for name, tensor in (("spins", spins), ("fields", fields)):
            if tensor.dtype != self._matrix.dtype or tensor.device != self._matrix.device:
                raise TypeError(
                    f"{name} are {tensor.dtype} on {tensor.device}, couplings "
                    f"{self._matrix.dtype} on {self._matrix.device}"
                )
        try:
            fields.expand_as(spins)
        except RuntimeError:
            raise ValueError(
                f"fields {tuple(fields.shape)} do not broadcast against spins {tuple(spins.shape)}"
            ) from None
        if not bool(torch.isfinite(fields).all()):
            raise ValueError("fields must be finite")
        if not bool(self.prior.supports(spins).all()):
            raise ValueError(f"spins must be values of {self.prior}")

    # Inside, states are (N, k, M): sites in the order of the blocks, components, and all states.

    def pack(self, spins: Tensor) -> Tensor:
        """`(..., N, *event)` -> `(N, k, M)`."""
        flat = spins.reshape(-1, *self.sites)
        return flat[:, self.order].permute(1, 2, 0).contiguous()

    def unpack(self, packed: Tensor, shape: torch.Size) -> Tensor:
        """The inverse of `pack`, to `shape`."""
        return packed.permute(2, 0, 1)[:, self.back].reshape(shape)

    def sweep(self, packed: Tensor, x: Tensor, beta: Tensor | float, generator: Generator) -> None:
        """One sweep in place, at the inverse temperatures `beta` `(M,)` of the states."""
        for block, rows in zip(self._slices, self._rows, strict=True):
            field = beta * (_pull(rows, packed).view_as(x[block]) + x[block])
            if self.prior.event_shape:
                drawn = self.prior.sample(field.movedim(1, -1), generator)
                packed[block] = drawn.movedim(-1, 1)
            else:
                packed[block] = self.prior.sample(field, generator)

    def log_weight(self, packed: Tensor, x: Tensor) -> Tensor:
        """½ Σ_ij S_iᵀ J_ij S_j + Σ_i x_i·S_i, `(M,)`."""
        return (packed * (0.5 * _pull(self._matrix, packed).view_as(x) + x)).sum(dim=(0, 1))


def _check_sample(prior: type[Prior]) -> None:
    """Raise `TypeError` unless `sample` can be meant to draw from what `log_partition` sums."""
    if prior.sample is Prior.sample:
        raise TypeError(f"{prior.__name__} has no sample(field, generator)")
    owner = next(kind for kind in prior.__mro__ if "sample" in vars(kind))
    if getattr(owner, "log_partition", prior.log_partition) is not prior.log_partition:
        raise TypeError(
            f"{prior.__name__} has a log_partition of its own, but the sample(field, generator) of "
            f"{owner.__name__}, which draws with other weights"
        )


def _pull(rows: Tensor, packed: Tensor) -> Tensor:
    """Σ_j J_ij S_j for the sites i of `rows`, all its numbers in the order (sites, k, M)."""
    return rows @ packed.reshape(rows.shape[1], packed.numel() // rows.shape[1])


def colouring(adjacent: Tensor) -> Tensor:
    """Colours 0, 1, … `(N,)` of the sites of a graph `(N, N)`; neighbours differ.

    The greedy method DSATUR (Brélaz 1979, Commun. ACM 22, 251): next comes the site whose
    neighbours have the most colours, among equals the one with most neighbours. Uses 2 colours on
    every bipartite graph, N on a complete one. Cost: O(N²), on the CPU.
    """
    graph = adjacent.cpu().numpy().astype(bool)
    n = len(graph)
    degree = graph.sum(axis=1)
    taken = np.zeros((n, n), dtype=bool)  # taken[i, c]: a neighbour of i has colour c
    variety = np.zeros(n, dtype=np.int64)  # colours among the neighbours
    colours = np.full(n, -1)
    for _ in range(n):
        site = int(np.where(colours < 0, variety * n + degree, -1).argmax())
        colour = int(taken[site].argmin())
        colours[site] = colour
        learns = graph[site] & ~taken[:, colour]
        taken[learns, colour] = True
        variety += learns
    return torch.from_numpy(colours)
