"""A small image classifier: convolutions make the fields, spins respond, one site is read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..attention import DEQMeanFieldAttention
from ..attention._normalize import LayerNorm
from ..deq import DEQFixedPoint
from ..solvers import anderson
from ..solvers._validate import check_count, check_counts, check_number
from ._equilibrium import value_of
from ._image_classifier import ImageClassifier, convolutions


class SiteClassifier(ImageClassifier):
    """Image → class scores by the mean-field response of a small spin system.

    1. Convolutions with normalisation and GELU; each of `strides` that is 2 halves the map. A
       1×1 convolution leaves `dim` channels on a grid of sites.
    2. Every site's channels, normalised to unit length on average, are the field x_i there; a
       learned class token is one more site, number 0.
    3. `DEQMeanFieldAttention` on all sites, with free symmetric couplings, solved to equilibrium.
    4. A linear head reads the magnetization of site 0.

    Images are `(B, channels, image_size, image_size)`, scores `(B, num_classes)`.

    Args:
        image_size: height and width of the images.
        num_classes: number of classes.
        channels: channels of the images.
        widths: output channels of the convolutions.
        strides: their strides, 1 or 2.
        dim: components of a spin.
        dropout: dropout on the magnetization that is read, while training.
        symmetric: J_ij = J_ji, so that the spins are a Boltzmann system but for f.
        **options: options of `DEQFixedPoint`.
    """

    token: nn.Parameter

    def __init__(
        self,
        *,
        image_size: int,
        num_classes: int,
        channels: int = 1,
        widths: Sequence[int] = (16, 32),
        strides: Sequence[int] = (1, 2),
        dim: int = 10,
        dropout: float = 0.0,
        symmetric: bool = True,
        **options: Any,
    ) -> None:
        super().__init__()
        check_counts(image_size=image_size, num_classes=num_classes, channels=channels, dim=dim)
        check_number("dropout", dropout, minimum=0.0, below=1.0)
        for name, sizes in (("widths", widths), ("strides", strides)):
            if not isinstance(sizes, Sequence):
                raise TypeError(f"{name} must be a list or tuple of integers, got {sizes!r}")
            for size in sizes:
                check_count(name, size)
        if len(widths) != len(strides) or not widths:
            raise ValueError(
                "widths and strides must be as many of one as of the other, and at least one, got "
                f"{widths} and {strides}: give both"
            )
        if any(stride not in (1, 2) for stride in strides):
            raise ValueError(f"strides must be 1 or 2, got {strides}")
        self.stem = convolutions(channels, widths, strides, dim)
        self.image_size, self.channels, self.dim = image_size, channels, dim
        self.grid = image_size
        for stride in strides:
            self.grid = math.ceil(self.grid / stride)
        self.token = nn.Parameter(torch.randn(1, 1, dim))
        self.norm = LayerNorm(dim)
        couplings = DEQMeanFieldAttention(
            self.grid**2 + 1, dim, weight_sym_internal=True, weight_sym_sites=symmetric
        )
        self.attention = DEQFixedPoint(couplings, **{"solver": anderson, **options})
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Sequential(LayerNorm(dim), nn.Linear(dim, num_classes))

    def sources(self, images: Tensor) -> Tensor:
        """The fields `(B, sites, dim)` that an image applies."""
        self.check_images(images)
        patches = self.stem(images).flatten(2).mT
        x = torch.cat([self.token.expand(patches.shape[0], -1, -1), patches], dim=1)
        return self.norm(x) / math.sqrt(self.dim)

    def forward(self, images: Tensor, *, return_solution: bool = False, **overrides: Any) -> Any:
        """Scores; with `return_solution` also the layer's `Solution`, as a tuple of one."""
        solution = self.attention(
            self.sources(images), return_solution=return_solution, **overrides
        )
        scores = self.head(self.dropout(value_of(solution)[:, 0]))
        return (scores, (solution,)) if return_solution else scores

    def block_fields(self, images: Tensor, solutions: Sequence[Any]) -> list[Tensor]:
        """`sources`, of the one layer there is."""
        return [self.sources(images)]
