"""The real MNIST, where it is at hand, against published facts about it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from deep_implicit_attention.training import ImageData, mnist

TRAIN_COUNTS = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
TEST_COUNTS = [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
MEAN, DEVIATION = 0.1307, 0.3081  # of the training images, between 0 and 1


@pytest.fixture(scope="module")
def data() -> ImageData:
    beside = Path(__file__).resolve().parents[3] / "shared" / "data"
    folder = Path(os.environ.get("DIA_DATA", beside))
    places = (folder, folder / "mnist")
    if not any(list(place.glob("t10k-labels-idx1-ubyte*")) for place in places):
        pytest.skip("no MNIST: neither DIA_DATA nor ../shared/data holds it")
    return mnist(folder, 1 / 12, 0)


def test_sizes(data: ImageData) -> None:
    assert (len(data.train), len(data.validation), len(data.test)) == (55000, 5000, 10000)
    for split in (data.train, data.validation, data.test):
        assert split.images.shape == (len(split), 1, 28, 28)


def test_label_counts(data: ImageData) -> None:
    counts = torch.bincount(data.train.labels) + torch.bincount(data.validation.labels)
    assert counts.tolist() == TRAIN_COUNTS
    assert torch.bincount(data.test.labels).tolist() == TEST_COUNTS


def test_the_test_images_are_in_their_order(data: ImageData) -> None:
    assert data.test.labels[:10].tolist() == [7, 2, 1, 0, 4, 1, 4, 9, 5, 9]


def test_standardisation(data: ImageData) -> None:
    assert data.background == pytest.approx(-MEAN / DEVIATION, abs=1e-3)
    assert data.test.images.min().item() == pytest.approx(data.background, abs=1e-5)
    assert data.test.images.max().item() == pytest.approx((1 - MEAN) / DEVIATION, abs=1e-3)
    assert abs(data.train.images.mean().item()) < 2e-3
    assert data.train.images.std().item() == pytest.approx(1, abs=2e-3)
