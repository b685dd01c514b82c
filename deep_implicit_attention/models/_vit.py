"""A vision transformer whose blocks are equilibria of attention."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..attention import (
    DEQAdaTAPMeanFieldAttention,
    DEQMeanFieldAttention,
    DEQMLPMixerAttention,
    DEQVanillaSoftmaxAttention,
    DEQVectorSpinAttention,
)
from ..attention._normalize import LayerNorm
from ..deq import DEQModule
from ..solvers._validate import check_count, check_counts, check_number
from ._equilibrium import check_name, equilibrium, starts_of, value_of
from ._image_classifier import ImageClassifier, convolutions
from ._positions import Positioned, sinusoids
from ._pretrained import Pretrained

# Couplings between so many sites, each pair with its own; x_i of unit length on average.
_FREE: dict[str, Callable[[int, int], DEQModule]] = {
    "mean-field": lambda sites, dim: DEQMeanFieldAttention(
        sites, dim, weight_sym_internal=True, weight_sym_sites=True
    ),
    "mlp-mixer": DEQMLPMixerAttention,
    "adaptive-tap": DEQAdaTAPMeanFieldAttention,
}
# Couplings from queries and keys; components of x_i of order one.
_SOFTMAX: dict[str, Callable[..., DEQModule]] = {
    "softmax": lambda **sizes: DEQVanillaSoftmaxAttention(1, normalize=True, **sizes),
    "vector-spin": DEQVectorSpinAttention,
}
_ATTENTION = (*_FREE, *_SOFTMAX)
_POSITIONS = ("learned", "sinusoidal", "rotary", "none")
_HEADS = 4
_START = 0.02  # standard deviation of learned positions


class DeepImplicitAttentionViT(Pretrained, Positioned, ImageClassifier):
    """Images → class scores, by the response of a system of vector spins, one per patch.

    1. The stem maps the image to `dim` channels on a grid of patches; a class token is one more
       site, number 0. Positions are added.
    2. `depth` blocks of attention, each solved to equilibrium. What enters a block goes through a
       LayerNorm and is the field x_i on site i.
    3. A LayerNorm and a linear layer read the magnetization of the class token, or the mean over
       sites.

    With ``steps=K`` (here or in a call) the same weights are an explicit network, in which every
    block takes K steps from z = x; with ``attention="softmax"`` and ``steps=1`` it is a
    transformer's: attention (with the state in the place of the values) and feed-forward beside a
    residual.

    Images are `(B, channels, image_size, image_size)`, logits `(B, num_classes)`.

    Args:
        image_size: height and width of the images, a multiple of `patch_size`.
        patch_size: height and width of a patch.
        num_classes: number of classes.
        dim: components of a site.
        attention: ``"mean-field"`` (`DEQMeanFieldAttention` with both symmetries),
            ``"mlp-mixer"``, ``"adaptive-tap"``, all three with couplings for this number of sites;
            ``"softmax"`` (`DEQVanillaSoftmaxAttention` with ``normalize=True``) or
            ``"vector-spin"`` (`DEQVectorSpinAttention`, β = 1), with couplings from queries and
            keys.
        depth: number of blocks.
        heads: heads of the last two mechanisms, default 4; `dim` must be divisible by it.
        channels: channels of the images.
        stem: ``"patch"``, one linear map of each patch (Dosovitskiy et al. 2021,
            arXiv:2010.11929); ``"convolution"``, 3×3 convolutions with batch normalisation and
            GELU, of which the last ones halve the map until it is the grid of patches, then a 1×1
            convolution. It saves parameters; its grid is rounded up, so patches may overlap.
        widths: channels of these convolutions, default `dim` for one at full resolution and one
            for each halving.
        pooling: ``"token"`` or ``"mean"``.
        positions: ``"learned"`` or ``"sinusoidal"`` (half of the components for the row, half for
            the column; none for the class token), added to the sites; ``"rotary"``, in the
            softmax couplings only, by the number of the site row by row; ``"none"``, since free
            couplings know their sites.
        dropout: of the fields of every block and, for softmax couplings, of what the sum over
            couplings and f add (of vector spins, f only), while training; drawn once for a solve.
        weight_norm: separate magnitude and direction for the weights of every linear layer in the
            blocks (`torch.nn.utils.parametrizations.weight_norm`), put together once for each
            solve; ``"adaptive-tap"`` has none.
        solver: ``"anderson"``, ``"broyden"``, ``"newton_krylov"`` or ``"picard"``.
        **options: options of `DEQFixedPoint` but for `adjoint` and `initial_state`; `adjoint` is
            an option of a call.

    Cost of an update of one block with N sites: O(B N² dim²) for mean field, O(B N² dim + B N
    dim²) for softmax couplings and the mixer; see the mechanisms.
    """

    def __init__(
        self,
        *,
        image_size: int,
        patch_size: int,
        num_classes: int,
        dim: int,
        attention: str = "mean-field",
        depth: int = 1,
        heads: int | None = None,
        channels: int = 3,
        stem: str = "patch",
        widths: Sequence[int] | None = None,
        pooling: str = "token",
        positions: str = "learned",
        dropout: float = 0.0,
        weight_norm: bool = False,
        solver: str = "anderson",
        **options: Any,
    ) -> None:
        super().__init__()
        check_counts(
            image_size=image_size,
            patch_size=patch_size,
            num_classes=num_classes,
            dim=dim,
            depth=depth,
            channels=channels,
        )
        check_number("dropout", dropout, minimum=0.0, below=1.0)
        check_name("attention", attention, _ATTENTION)
        check_name("stem", stem, ("patch", "convolution"))
        check_name("pooling", pooling, ("token", "mean"))
        check_name("positions", positions, _POSITIONS)
        if image_size % patch_size:
            raise ValueError(
                f"image_size must be a multiple of patch_size, got {image_size} and {patch_size}"
            )
        _check_combination(attention, heads, stem, widths, positions, weight_norm)
        if attention in _SOFTMAX and heads is None and dim % _HEADS:
            raise ValueError(
                f"dim must be divisible by heads, which are {_HEADS} by default, got dim={dim}: "
                "choose another dim, or heads"
            )
        self.image_size, self.channels, self.dim = image_size, channels, dim
        self.grid = image_size // patch_size
        if stem == "patch":
            self.stem: nn.Module = nn.Conv2d(channels, dim, patch_size, patch_size)
        else:
            self.stem = _halving(channels, dim, image_size, self.grid, widths)
        like = next(self.stem.parameters())
        has_token = pooling == "token"
        sites = self.grid**2 + has_token
        self.token = nn.Parameter(torch.randn(1, 1, dim)) if has_token else None
        if positions == "learned":
            self.positions = nn.Parameter(torch.randn(sites, dim) * _START)
        elif positions == "sinusoidal":
            self.register_buffer("positions", self._sinusoids().to(like), False)
        else:
            self.positions = None
        # Fields of unit length keep the response of free couplings of order one.
        self.field_scale = 1 / math.sqrt(dim) if attention in _FREE else 1.0
        self.norms = nn.ModuleList(LayerNorm(dim) for _ in range(depth))
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList()
        for _ in range(depth):
            if attention in _FREE:
                mechanism = _FREE[attention](sites, dim)
            else:
                mechanism = _SOFTMAX[attention](
                    dim=dim,
                    heads=_HEADS if heads is None else heads,
                    rotary=positions == "rotary",
                    dropout=dropout,
                )
            self.blocks.append(equilibrium(mechanism, solver, weight_norm, options))
        self.head = nn.Sequential(LayerNorm(dim), nn.Linear(dim, num_classes))

    def forward(
        self,
        images: Tensor,
        *,
        state: Sequence[Any] | None = None,
        return_solution: bool = False,
        **overrides: Any,
    ) -> Any:
        """Logits `(B, num_classes)`.

        Args:
            images: `(B, channels, image_size, image_size)`, standardised.
            state: where each block's relaxation starts: a state, or an earlier call's `Solution`,
                for each block.
            return_solution: return also the blocks' `Solution`s, as a tuple.
            **overrides: options of the blocks for this call: ``steps``, ``adjoint``,
                ``solver_fwd_tol``, ``measure``, ...

        Raises:
            TypeError, ValueError: for images of the wrong kind or shape.
        """
        z = self.sites(images)
        solutions, starts = [], starts_of(state, self.blocks)
        for number, block in enumerate(self.blocks):
            options = {**overrides, "state": starts[number], "return_solution": return_solution}
            solutions.append(block(self.fields(z, number), **options))
            z = value_of(solutions[-1])
        logits = self.head(z.mean(dim=1) if self.token is None else z[:, 0])
        return (logits, tuple(solutions)) if return_solution else logits

    def sites(self, images: Tensor) -> Tensor:
        """Class token and patches with their positions, `(B, N, dim)`."""
        self.check_images(images)
        x = self.stem(images).flatten(2).mT
        if self.token is not None:
            x = torch.cat([self.token.expand(x.shape[0], -1, -1).to(x), x], dim=1)
        return x if self.positions is None else x + self.positions

    def fields(self, z: Tensor, block: int = 0) -> Tensor:
        """The fields x `(B, N, dim)` of a block that `z` enters: the sites, or what was before."""
        return self.dropout(self.norms[block](z) * self.field_scale)

    def block_fields(self, images: Tensor, solutions: Sequence[Any]) -> list[Tensor]:
        """The fields x `(B, N, dim)` of each block; `solutions` are those of a forward pass."""
        entering = [self.sites(images), *(value_of(part) for part in solutions[:-1])]
        return [self.fields(z, number) for number, z in enumerate(entering)]

    def _sinusoids(self) -> Tensor:
        above = int(self.token is not None)  # none for the class token
        return F.pad(_rows_and_columns(self.grid, self.dim), (0, 0, above, 0))


def _halving(
    channels: int, dim: int, size: int, grid: int, widths: Sequence[int] | None
) -> nn.Sequential:
    """Convolutions from maps of `size` to `dim` channels on a map of `grid`; the last ones halve.

    Raises:
        ValueError: if halving never gives `grid`, or there are fewer convolutions than halvings.
    """
    halvings, reached = 0, size
    while reached > grid:
        halvings, reached = halvings + 1, math.ceil(reached / 2)
    if reached != grid:
        raise ValueError(
            f"stem 'convolution' halves the map, rounding up: from image_size {size} it does not "
            f"get to the {grid} patches a side of this patch_size, but to {reached}"
        )
    widths = (dim,) * (halvings + 1) if widths is None else tuple(widths)
    for width in widths:
        check_count("widths", width)
    if len(widths) < max(halvings, 1):
        raise ValueError(
            f"widths must have at least {max(halvings, 1)} entries, one for each halving of the "
            f"map from image_size {size} to {grid} patches a side, got {widths}"
        )
    strides = (1,) * (len(widths) - halvings) + (2,) * halvings
    return convolutions(channels, widths, strides, dim)


def _rows_and_columns(grid: int, dim: int) -> Tensor:
    """Sinusoids of the row beside those of the column of each patch, `(grid², dim)`."""
    rows = sinusoids(grid, dim // 2).repeat_interleave(grid, dim=0)
    return torch.cat([rows, sinusoids(grid, dim - dim // 2).repeat(grid, 1)], dim=1)


def _check_combination(
    attention: str,
    heads: int | None,
    stem: str,
    widths: Sequence[int] | None,
    positions: str,
    weight_norm: bool,
) -> None:
    """Raise for settings that would do nothing together."""
    if attention in _FREE and heads is not None:
        raise ValueError(f"heads belong to {' and '.join(_SOFTMAX)}; {attention} has none")
    if heads is not None:
        check_count("heads", heads)
    if attention in _FREE and positions == "rotary":
        raise ValueError(
            f"positions 'rotary' turn queries and keys, which only {' and '.join(_SOFTMAX)} have; "
            f"{attention} takes learned, sinusoidal or none"
        )
    if not isinstance(widths, list | tuple | None):
        raise TypeError(f"widths must be a list or tuple of integers, got {widths!r}")
    if stem == "patch" and widths is not None:
        raise ValueError("widths are those of stem 'convolution'; stem 'patch' has none")
    if attention == "adaptive-tap" and weight_norm:
        raise ValueError("weight_norm is of linear layers; adaptive-tap has none")
