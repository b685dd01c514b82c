"""Images to learn from: scikit-learn's digits, and MNIST from idx files or by download."""

from __future__ import annotations

import gzip
import math
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ._extras import require
from ._files import check_sha256, data_folder

# sha256 of the uncompressed bytes.
_MNIST = {
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}
_MNIST_URL = "https://ossci-datasets.s3.amazonaws.com/mnist/"


@dataclass(frozen=True)
class Split:
    """Images `(n, 1, H, W)`, standardised, and their labels `(n,)`."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Tensor) -> Split:
        return Split(self.images[index], self.labels[index])


@dataclass(frozen=True)
class ImageData:
    """Training, validation and test images; `background` is the standardised value of black."""

    train: Split
    validation: Split
    test: Split
    background: float


def digits(validation: float, seed: int) -> ImageData:
    """The 1,797 digits of 8×8 pixels that come with scikit-learn.

    A fifth, stratified by class and the same for every `seed`, is the test set; `seed` draws the
    part `validation` of the rest.
    """
    datasets = require("sklearn.datasets", "train")
    selection = require("sklearn.model_selection", "train")
    raw = datasets.load_digits()
    images = torch.from_numpy(raw.images).float()[:, None] / 16
    labels = torch.from_numpy(raw.target).long()
    rest, test = selection.train_test_split(
        np.arange(len(labels)), test_size=0.2, random_state=0, stratify=raw.target
    )
    return _split(images, labels, torch.from_numpy(rest), torch.from_numpy(test), validation, seed)


def mnist(
    data_dir: str | Path | None, validation: float, seed: int, *, download: bool = True
) -> ImageData:
    """MNIST: 60,000 images of 28×28 pixels to learn from, 10,000 to test.

    Reads the four idx files, gzipped or not, from `data_dir` (or its folder ``mnist``), else from
    the folder that the variable ``DIA_DATA`` names, else from the cache, into which they are
    downloaded first; with `download=False` what is not there is a `FileNotFoundError`. Whatever the
    source, the bytes are checked by sha256. `seed` draws the part `validation` of the training
    images.
    """
    images, labels = {}, {}
    folder = _mnist_folder(data_dir, download)
    for part in ("train", "t10k"):
        images[part] = _idx(_read(folder, f"{part}-images-idx3-ubyte"))
        labels[part] = _idx(_read(folder, f"{part}-labels-idx1-ubyte"))
    n = len(labels["train"])
    every_image = np.concatenate([images["train"], images["t10k"]])
    every_label = np.concatenate([labels["train"], labels["t10k"]])
    return _split(
        torch.from_numpy(every_image)[:, None].float() / 255,
        torch.from_numpy(every_label).long(),
        torch.arange(n, device="cpu"),
        torch.arange(n, len(every_label), device="cpu"),
        validation,
        seed,
    )


def _split(
    images: Tensor, labels: Tensor, rest: Tensor, test: Tensor, validation: float, seed: int
) -> ImageData:
    """Standardise by the mean and deviation of all that is not test, and draw the validation."""
    mean, std = images[rest].mean(), images[rest].std()
    generator = torch.Generator().manual_seed(seed)
    order = rest[torch.randperm(len(rest), generator=generator, device="cpu")]
    cut = round(validation * len(rest)) if math.isfinite(validation) else 0
    if not 0 < cut < len(rest):
        raise ValueError(
            f"validation must leave something on both sides of the {len(rest)} training images, "
            f"got {validation}"
        )
    data = Split((images - mean) / std, labels)
    return ImageData(data[order[cut:]], data[order[:cut]], data[test], (-mean / std).item())


def _mnist_folder(data_dir: str | Path | None, download: bool) -> Path:
    source, given = data_folder(data_dir)
    if given is None:
        return _cached(download)
    for folder in (given, given / "mnist"):
        if all(_find(folder, name) for name in _MNIST):
            return folder
    raise FileNotFoundError(
        f"{given}, the folder that {source} names, does not hold the MNIST files "
        f"{', '.join(_MNIST)} (with or without .gz); without it they are downloaded"
    )


def _find(folder: Path, name: str) -> Path | None:
    return next((p for p in (folder / name, folder / f"{name}.gz") if p.is_file()), None)


def _cached(download: bool) -> Path:
    """The cache folder with the four files in it."""
    pooch = require("pooch", "train")
    folder = Path(pooch.os_cache("deep-implicit-attention")) / "mnist"
    lacking = [name for name in _MNIST if not _find(folder, name)]
    if lacking and not download:
        raise FileNotFoundError(
            f"{folder}, where downloads are kept, does not hold the MNIST files "
            f"{', '.join(lacking)}, and neither data_dir nor DIA_DATA names another folder"
        )
    for name in lacking:
        # The archive may be packed in many ways; what is in it is checked when it is read.
        pooch.retrieve(f"{_MNIST_URL}{name}.gz", None, f"{name}.gz", folder)
    return folder


def _read(folder: Path, name: str) -> bytes:
    path = _find(folder, name)
    assert path is not None
    content = path.read_bytes()
    try:
        content = gzip.decompress(content) if path.suffix == ".gz" else content
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(
            f"{path} is not a whole gzip file: {error}; delete it and get it anew"
        ) from error
    check_sha256(path, content, _MNIST[name])
    return content


def _idx(content: bytes) -> np.ndarray:
    """An array from the idx format: two zero bytes, type, rank, big-endian sizes, data."""
    rank = content[3]
    shape = np.frombuffer(content, ">u4", rank, offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * rank).reshape(shape).copy()
