"""Floor 5: data, training loops and the folder a run leaves behind."""

from ._classify import (
    Measured,
    Schedule,
    augment,
    batch_spectral_radius,
    measure,
    train_classifier,
)
from ._data import ImageData, Split, digits, mnist
from ._extras import require
from ._progress import Progress
from ._run import Run, seed_everything
from ._text import TextData, Vocabulary, random_batch, shakespeare, text_data, windows

__all__ = [
    "ImageData",
    "Measured",
    "Progress",
    "Run",
    "Schedule",
    "Split",
    "TextData",
    "Vocabulary",
    "augment",
    "batch_spectral_radius",
    "digits",
    "measure",
    "mnist",
    "random_batch",
    "require",
    "seed_everything",
    "shakespeare",
    "text_data",
    "train_classifier",
    "windows",
]
