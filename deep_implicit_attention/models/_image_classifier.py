"""What image classifiers have in common, and what their training relies on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..deq import DEQFixedPoint, spectral_radius
from ..deq._map import in_autocast
from ..deq._state import State
from ..solvers._validate import check_is_tensor
from ._count import count_params
from ._equilibrium import check_classes, check_solutions, penalty_of, value_of


class ImageClassifier(nn.Module):
    """Images → class scores, by equilibrium layers that act one after the other.

    A subclass sets the attributes below and has `block_fields` and ``forward(images, *,
    return_solution=False, **overrides)``, which returns the scores `(B, num_classes)`; with
    `return_solution` also the layers' `Solution`s, as a tuple.

    Attributes:
        image_size: height and width of the images.
        channels: their channels.
        grid: patches on a side.
        dim: components of a site.
        token: the class token, which is site 0, or None; the other sites are the patches.
    """

    image_size: int
    channels: int
    grid: int
    dim: int
    token: nn.Parameter | None

    def block_fields(self, images: Tensor, solutions: Sequence[Any]) -> list[Tensor]:
        """The fields x `(B, N, dim)` of each layer; `solutions` are those of a forward pass."""
        raise NotImplementedError

    def equilibria(self) -> list[DEQFixedPoint]:
        """The equilibrium layers, in their order."""
        return [module for module in self.modules() if isinstance(module, DEQFixedPoint)]

    def maps(
        self, images: Tensor, solutions: Sequence[Any]
    ) -> list[tuple[Callable[[State], State], State]]:
        """Each layer's update z ↦ F(z; x) and its equilibrium, for the diagnostics of `deq`.

        `solutions` are those that ``forward(images, return_solution=True)`` returned. Costs no
        solve, but for adaptive TAP, whose state is (z, V): there V is computed. Dropout is drawn
        anew.
        """
        return [
            (layer.map(x), _whole_state(layer, x, value_of(part)))
            for (layer, x), part in zip(self._driven(images, solutions), solutions, strict=True)
        ]

    def spectral_radius(self, images: Tensor, solutions: Sequence[Any]) -> Tensor:
        """Spectral radius of ∂F/∂z of each layer, `(depth, B)`: iteration contracts below 1."""
        return torch.stack([spectral_radius(f, z) for f, z in self.maps(images, solutions)])

    def jacobian_penalty(
        self,
        images: Tensor,
        solutions: Sequence[Any],
        *,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Mean over samples and layers of ‖∂F/∂z‖_F² per component: a term for the loss.

        Hutchinson's estimate with one vector (see `deq.jacobian_penalty`).
        """
        return penalty_of(self.maps(images, solutions), generator)

    def couplings(self, images: Tensor, solutions: Sequence[Any]) -> Tensor:
        """J_ij of every layer, `(depth, B, heads, N, N)`, for looking; site 0 is the class token.

        The softmax couplings of each head; ‖J_ij‖_F, as of one head, where they are matrices. For
        the mixer, whose couplings depend on the state, those at z = x. `solutions` are those that
        ``forward(images, return_solution=True)`` returned. Costs no solve.
        """
        driven = self._driven(images, solutions)
        return torch.stack([layer.fun.couplings(x) for layer, x in driven]).detach()

    def _driven(
        self, images: Tensor, solutions: Sequence[Any]
    ) -> list[tuple[DEQFixedPoint, Tensor]]:
        """Each layer and the fields that drive it."""
        layers = self.equilibria()
        fields = self.block_fields(images, check_solutions(solutions, len(layers)))
        return list(zip(layers, fields, strict=True))

    def loss(self, scores: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
        """Mean cross-entropy in nats.

        Args:
            scores: `(B, num_classes)`, what the model returns for images.
            labels: `(B,)`, or probabilities `(B, num_classes)`.
            smoothing: the share of a label that is spread over all classes.

        Raises:
            TypeError: for labels that are no tensor.
            ValueError: for scores and labels of other shapes, and labels that are no classes.
        """
        check_is_tensor("labels", labels)
        if scores.dim() != 2:
            raise ValueError(
                "scores must have shape (batch, classes), as the model returns them, got "
                f"{tuple(scores.shape)}"
            )
        expected = scores.shape if labels.is_floating_point() else scores.shape[:1]
        if labels.shape != expected:
            raise ValueError(
                f"labels must have shape {tuple(expected)} as the scores do, got "
                f"{tuple(labels.shape)}"
            )
        if not labels.is_floating_point():  # else they are probabilities
            check_classes("labels", labels, scores.shape[-1])
            labels = labels.long()  # torch takes no int32
        return F.cross_entropy(scores, labels, label_smoothing=smoothing)

    def count_params(self) -> int:
        """Effective number of parameters, with the symmetries of the couplings."""
        return count_params(self)

    def check_images(self, images: Tensor) -> None:
        """Raise `TypeError` or `ValueError` unless images are what this model takes."""
        if not isinstance(images, Tensor) or not images.is_floating_point():
            kind = images.dtype if isinstance(images, Tensor) else type(images).__name__
            raise TypeError(f"images must be a tensor of floating point numbers, got {kind}")
        expected = (self.channels, self.image_size, self.image_size)
        if images.dim() != 4 or images.shape[1:] != expected:
            raise ValueError(
                f"images must have shape (batch, {', '.join(map(str, expected))}), "
                f"got {tuple(images.shape)}"
            )
        like = next(self.parameters())
        if images.dtype != like.dtype and not in_autocast(images):
            raise TypeError(
                f"images have dtype {images.dtype}, the model has {like.dtype}: convert one of them"
            )
        if images.device != like.device:
            raise ValueError(f"images are on {images.device}, the model is on {like.device}")


def _whole_state(layer: DEQFixedPoint, x: Tensor, value: Tensor) -> State:
    """The state at the equilibrium of which `layer` returned `value`."""
    elements = layer.fun.initial_state(x)
    if isinstance(elements, Tensor):
        return value
    every = tuple(range(len(elements)))
    return DEQFixedPoint(layer.fun, output_elements=every, on_failure="ignore")(x)


def convolutions(
    channels: int, widths: Sequence[int], strides: Sequence[int], dim: int
) -> nn.Sequential:
    """3×3 convolutions with batch normalisation and GELU, then a 1×1 convolution to `dim`."""
    layers: list[nn.Module] = []
    for before, width, stride in zip((channels, *widths), widths, strides, strict=False):
        layers += [
            nn.Conv2d(before, width, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.GELU(),
        ]
    return nn.Sequential(*layers, nn.Conv2d(widths[-1], dim, 1))
