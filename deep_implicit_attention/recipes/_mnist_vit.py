"""Settings of the recipe `mnist-vit`, which trains a `DeepImplicitAttentionViT`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from .. import training
from ..models import DeepImplicitAttentionViT
from ..training import Device, ImageData
from ._flags import refuse
from ._image_recipe import ImageRecipe


@dataclass(frozen=True)
class MnistViT(ImageRecipe):
    """Train a vision transformer of equilibrium attention on MNIST, by any of the mechanisms; by
    default with 24,000 parameters, in 20 epochs.

    Of the 60,000 training images a part is set aside to choose the best epoch; the 10,000 test
    images are looked at once, at the end.
    """

    data_dir: Path | None = None
    """folder with the four idx files; without it DIA_DATA, else a download"""
    run_dir: Path = Path("runs/mnist-vit")
    seed: int = 0
    epochs: int = 20
    batch_size: int = 60
    learning_rate: float = 3e-3
    coupling_rate: float = 0.1
    weight_decay: float = 0.01
    smoothing: float = 0.0
    shift: float = 1.5
    rotation: float = 8.0
    zoom: float = 0.1
    ema: float | None = 0.999
    validation: float = 1 / 12
    attention: Literal["mean-field", "mlp-mixer", "adaptive-tap", "softmax", "vector-spin"] = (
        "mean-field"
    )
    """mechanism: the first three are for this number of sites only, the others for any"""
    patch_size: int = 7
    """height and width of a patch, a divisor of 28"""
    dim: int = 10
    """components of a site"""
    depth: int = 1
    """blocks, each solved to equilibrium"""
    heads: int | None = None
    """heads of the last two mechanisms, 4 if not given"""
    widths: tuple[int, ...] = (12, 24, 24, 32)
    """channels of the convolutions before the sites; --widths alone: a linear map of each patch"""
    pooling: Literal["token", "mean"] = "token"
    """what is read: a class token, or the mean over sites"""
    positions: Literal["learned", "sinusoidal", "rotary", "none"] = "learned"
    """how sites know where they are; rotary in the couplings only, for the last two mechanisms"""
    dropout: float = 0.0
    """dropout of fields and updates, drawn once for a batch"""
    weight_norm: bool = False
    """learn magnitude and direction of the weights in the blocks apart"""
    solver: Literal["anderson", "broyden", "newton_krylov", "picard"] = "anderson"
    """solver of the equilibria"""
    tol: float = 1e-3
    max_iter: int = 30
    threads: int = 1
    device: Device = "cpu"

    def check_idle(self) -> None:
        if self.attention == "adaptive-tap":
            refuse(self, "adaptive-tap, which is solved in closed form", "solver", "max_iter")

    def load(self, *, download: bool = True) -> ImageData:
        return training.mnist(self.data_dir, self.validation, self.seed, download=download)

    def model(self, data: ImageData) -> DeepImplicitAttentionViT:
        return DeepImplicitAttentionViT(
            image_size=data.train.images.shape[-1],
            patch_size=self.patch_size,
            num_classes=10,
            dim=self.dim,
            attention=self.attention,
            depth=self.depth,
            heads=self.heads,
            channels=1,
            stem="convolution" if self.widths else "patch",
            widths=self.widths or None,
            pooling=self.pooling,
            positions=self.positions,
            dropout=self.dropout,
            weight_norm=self.weight_norm,
            solver=self.solver,
            **self.solver_options(),
        )
