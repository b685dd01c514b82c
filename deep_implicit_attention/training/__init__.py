"""Floor 5: data, the training loop and the folder a run leaves behind."""

from ._checkpoint import Checkpoint, Checkpoints
from ._classify import (
    Classification,
    Measured,
    Schedule,
    augment,
    batch_spectral_radius,
    measure,
    train_classifier,
)
from ._data import ImageData, Split, digits, mnist
from ._devices import Devices
from ._ema import MovingAverage
from ._extras import require
from ._language import Language, LanguagePlan, language_optimizer, measure_language
from ._plan import Device, OnDivergence, Plan, Precision
from ._progress import Progress
from ._random import derived_seed, seed_everything
from ._run import Run
from ._task import Outcome, Task
from ._text import TextData, Vocabulary, random_batch, shakespeare, text_data, windows
from ._trainer import Trainer
from ._watch import DivergenceWarning, Watch

__all__ = [
    "Checkpoint",
    "Checkpoints",
    "Classification",
    "Device",
    "Devices",
    "DivergenceWarning",
    "ImageData",
    "Language",
    "LanguagePlan",
    "Measured",
    "MovingAverage",
    "OnDivergence",
    "Outcome",
    "Plan",
    "Precision",
    "Progress",
    "Run",
    "Schedule",
    "Split",
    "Task",
    "TextData",
    "Trainer",
    "Vocabulary",
    "Watch",
    "augment",
    "batch_spectral_radius",
    "derived_seed",
    "digits",
    "language_optimizer",
    "measure",
    "measure_language",
    "mnist",
    "random_batch",
    "require",
    "seed_everything",
    "shakespeare",
    "text_data",
    "train_classifier",
    "windows",
]
