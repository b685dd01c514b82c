"""Digits against scikit-learn's own arrays, MNIST files built by hand, downloads from localhost."""

from __future__ import annotations

import errno
import functools
import gzip
import hashlib
import http.server
import os
import struct
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from deep_implicit_attention.training import ImageData, Split, _data, digits, mnist

NAMES = {
    "train-images-idx3-ubyte": "train_images",
    "train-labels-idx1-ubyte": "train_labels",
    "t10k-images-idx3-ubyte": "test_images",
    "t10k-labels-idx1-ubyte": "test_labels",
}


def rows(images: np.ndarray, labels: np.ndarray) -> Counter:
    """Images and labels as a multiset."""
    return Counter((i.tobytes(), int(k)) for i, k in zip(images, labels, strict=True))


def raw(split: Split, mean: float, std: float, scale: int) -> tuple[np.ndarray, np.ndarray]:
    """A split as it was before it was standardised."""
    images = np.rint((split.images[:, 0].double().numpy() * std + mean) * scale)
    return images.astype(np.uint8), split.labels.numpy()


# --- digits ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bundled() -> tuple[np.ndarray, np.ndarray]:
    data = load_digits()
    return data.images.astype(np.uint8), data.target


@pytest.fixture(scope="module")
def loaded() -> ImageData:
    return digits(0.1, 0)


def undo(data: ImageData, bundled: tuple[np.ndarray, np.ndarray]) -> list:
    """The three splits in the original grey values, from the scale of the images alone."""
    everything = torch.cat([s.images for s in (data.train, data.validation, data.test)])
    low, high = everything.min().item(), everything.max().item()
    std = 1 / (high - low)
    return [raw(s, -low * std, std, 16) for s in (data.train, data.validation, data.test)]


def test_digits_are_all_there_once(
    loaded: ImageData, bundled: tuple[np.ndarray, np.ndarray]
) -> None:
    splits = undo(loaded, bundled)
    assert sum((rows(*s) for s in splits), Counter()) == rows(*bundled)
    assert len(loaded.validation) == round(0.1 * (len(loaded.train) + len(loaded.validation)))
    for split in (loaded.train, loaded.validation, loaded.test):
        assert split.images.shape[1:] == (1, 8, 8)
        assert (split.images.dtype, split.labels.dtype) == (torch.float32, torch.int64)


def test_the_test_digits_are_a_stratified_fifth(
    loaded: ImageData, bundled: tuple[np.ndarray, np.ndarray]
) -> None:
    assert len(loaded.test) == 360
    share = np.bincount(loaded.test.labels.numpy()) - np.bincount(bundled[1]) / 5
    assert np.abs(share).max() < 1


def test_seed_and_part_move_the_validation_only(loaded: ImageData) -> None:
    again, other, more = digits(0.1, 0), digits(0.1, 1), digits(0.25, 1)
    for data in (again, other, more):
        assert torch.equal(data.test.images, loaded.test.images)
        assert torch.equal(data.test.labels, loaded.test.labels)
        assert data.background == loaded.background
    assert torch.equal(again.validation.images, loaded.validation.images)
    assert torch.equal(again.train.images, loaded.train.images)
    parts = [rows(d.validation.images.numpy(), d.validation.labels) for d in (loaded, other)]
    overlap = (parts[0] & parts[1]).total()
    assert overlap < 0.3 * parts[0].total()  # a tenth by chance
    assert len(more.validation) == round(0.25 * 1437)


def test_the_validation_has_nothing_to_do_with_the_global_seed(loaded: ImageData) -> None:
    torch.manual_seed(12345)
    assert torch.equal(digits(0.1, 0).validation.images, loaded.validation.images)


def test_digits_are_standardised_without_the_test(
    loaded: ImageData, bundled: tuple[np.ndarray, np.ndarray]
) -> None:
    seen = torch.cat([loaded.train.images, loaded.validation.images]).double()
    assert abs(seen.mean().item()) < 1e-5
    assert seen.std().item() == pytest.approx(1, abs=1e-5)
    everything = torch.cat([seen, loaded.test.images.double()])
    assert abs(everything.mean().item()) > 1e-4  # what the mean over all images would not give
    splits = undo(loaded, bundled)
    grey = np.concatenate([splits[0][0], splits[1][0]]) / 16
    assert loaded.background == pytest.approx(-grey.mean() / grey.std(), rel=1e-4)
    assert loaded.background == pytest.approx(loaded.train.images.min().item(), rel=1e-5)


@pytest.mark.parametrize("part", [0.0, 1.0, -0.1, 1.5, float("nan"), 1e-5, 1 - 1e-5])
def test_a_validation_that_leaves_a_split_empty(part: float) -> None:
    with pytest.raises(ValueError, match="validation"):
        digits(part, 0)


# --- MNIST files ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def arrays() -> dict[str, np.ndarray]:
    """Fifteen training and six test images of 4×3 pixels."""
    random = np.random.default_rng(0)
    return {
        "train_images": random.integers(0, 256, (15, 4, 3)),
        "train_labels": random.integers(0, 10, 15),
        "test_images": random.integers(0, 200, (6, 4, 3)),
        "test_labels": random.integers(0, 10, 6),
    }


@pytest.fixture
def contents(arrays: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """The arrays as idx files, whose checksums the reader now expects."""
    made = {}
    for name, key in NAMES.items():
        array = arrays[key]
        head = struct.pack(">BBBB", 0, 0, 0x08, array.ndim)
        sizes = b"".join(struct.pack(">I", n) for n in array.shape)
        made[name] = head + sizes + bytes(array.flatten().tolist())
    sums = {name: hashlib.sha256(content).hexdigest() for name, content in made.items()}
    monkeypatch.setattr(_data, "_MNIST", sums)
    monkeypatch.delenv("DIA_DATA", raising=False)
    return made


def write(folder: Path, contents: dict[str, bytes], zipped: Callable[[str], bool]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        if zipped(name):
            (folder / f"{name}.gz").write_bytes(gzip.compress(content))
        else:
            (folder / name).write_bytes(content)
    return folder


def check(data: ImageData, arrays: dict[str, np.ndarray]) -> None:
    """`data` holds the images of `arrays`, standardised by those for training."""
    grey = arrays["train_images"] / 255
    mean, std = grey.mean(), grey.std(ddof=1)
    np.testing.assert_allclose(
        data.test.images[:, 0], (arrays["test_images"] / 255 - mean) / std, atol=1e-5
    )
    np.testing.assert_array_equal(data.test.labels, arrays["test_labels"])
    assert data.background == pytest.approx(-mean / std, rel=1e-5)
    parts = [rows(*raw(s, mean, std, 255)) for s in (data.train, data.validation)]
    assert parts[0] + parts[1] == rows(
        arrays["train_images"].astype(np.uint8), arrays["train_labels"]
    )
    assert parts[1].total() == 5


@pytest.mark.parametrize("packing", ["raw", "gz", "mixed"])
@pytest.mark.parametrize("place", ["", "mnist"])
def test_idx_files(
    packing: str,
    place: str,
    tmp_path: Path,
    contents: dict[str, bytes],
    arrays: dict[str, np.ndarray],
) -> None:
    zipped = {"raw": lambda _: False, "gz": lambda _: True, "mixed": lambda n: "labels" in n}
    write(tmp_path / place, contents, zipped[packing])
    check(mnist(tmp_path, 1 / 3, 0), arrays)


def test_the_folder_given_goes_before_the_variable(
    tmp_path: Path,
    contents: dict[str, bytes],
    arrays: dict[str, np.ndarray],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    full = write(tmp_path / "full", contents, lambda _: True)
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("DIA_DATA", str(full))
    check(mnist(None, 1 / 3, 0), arrays)
    with pytest.raises(FileNotFoundError, match="empty"):
        mnist(tmp_path / "empty", 1 / 3, 0)
    monkeypatch.setenv("DIA_DATA", str(tmp_path / "empty"))
    check(mnist(full, 1 / 3, 0), arrays)
    with pytest.raises(FileNotFoundError, match="empty"):
        mnist(None, 1 / 3, 0)
    monkeypatch.setenv("DIA_DATA", "")  # names none, not the folder in which one is
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(full)
    with pytest.raises(FileNotFoundError, match="cache"):
        mnist(None, 1 / 3, 0, download=False)


@pytest.mark.parametrize("missing", NAMES)
def test_a_folder_without_one_of_the_files(
    missing: str, tmp_path: Path, contents: dict[str, bytes]
) -> None:
    del contents[missing]
    write(tmp_path, contents, lambda _: True)
    with pytest.raises(FileNotFoundError) as caught:
        mnist(tmp_path, 1 / 3, 0)
    assert str(tmp_path) in str(caught.value)
    assert missing in str(caught.value)


def test_a_folder_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        mnist(tmp_path / "nowhere", 1 / 3, 0)


def damage(content: bytes, how: str) -> tuple[str, bytes]:
    """Suffix and bytes of a damaged file."""
    whole = gzip.compress(content)
    flipped = content[:-1] + bytes([content[-1] ^ 1])
    middle = len(whole) // 2
    return {
        "one bit": ("", flipped),
        "one bit, packed": (".gz", gzip.compress(flipped)),
        "cut": ("", content[:-1]),
        "cut, packed": (".gz", whole[:-12]),
        "cut in the head": (".gz", whole[:5]),
        "deflate stream": (".gz", whole[:12] + b"\xff" * middle + whole[12 + middle :]),
        "check value": (".gz", whole[:-8] + bytes(4) + whole[-4:]),
        "not gzip": (".gz", b"<html>moved</html>"),
        "nothing": (".gz", b""),
    }[how]


@pytest.mark.parametrize(
    "how",
    [
        "one bit",
        "one bit, packed",
        "cut",
        "cut, packed",
        "cut in the head",
        "deflate stream",
        "check value",
        "not gzip",
        "nothing",
    ],
)
def test_damaged_files_are_named(how: str, tmp_path: Path, contents: dict[str, bytes]) -> None:
    name = "t10k-images-idx3-ubyte"
    suffix, content = damage(contents.pop(name), how)
    write(tmp_path, contents, lambda _: False)
    (tmp_path / f"{name}{suffix}").write_bytes(content)
    with pytest.raises(ValueError, match=f"{name}{suffix}") as caught:
        mnist(tmp_path, 1 / 3, 0)
    assert str(tmp_path) in str(caught.value)
    assert "delete it" in str(caught.value)


def test_a_file_that_may_not_be_read_is_not_called_damaged(
    tmp_path: Path, contents: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, content in contents.items():
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(content))

    def refuse(path: Path) -> bytes:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(PermissionError):
        mnist(tmp_path, 0.5, 0)


def test_the_right_bytes_under_the_wrong_name(tmp_path: Path, contents: dict[str, bytes]) -> None:
    test, train = "t10k-labels-idx1-ubyte", "train-labels-idx1-ubyte"
    contents[test], contents[train] = contents[train], contents[test]
    write(tmp_path, contents, lambda _: True)
    with pytest.raises(ValueError, match=r"labels-idx1-ubyte\.gz.*sha256"):
        mnist(tmp_path, 1 / 3, 0)


# --- downloads ------------------------------------------------------------------------------


class Server:
    """Serves a folder on localhost, as the archive of MNIST, and counts what is asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.asked: list[str] = []
        asked = self.asked

        class Handler(http.server.SimpleHTTPRequestHandler):
            def do_GET(self) -> None:
                asked.append(self.path)
                super().do_GET()

            def log_message(self, format: str, *args: object) -> None:
                pass

        handler = functools.partial(Handler, directory=str(folder))
        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/"
        self.thread = threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True)
        self.thread.start()

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()
        self.thread.join()


@pytest.fixture
def server(
    tmp_path: Path, contents: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Server]:
    import pooch

    server = Server(write(tmp_path / "served", contents, lambda _: True))
    monkeypatch.setattr(_data, "_MNIST_URL", server.url)
    monkeypatch.setattr(pooch, "os_cache", lambda project: tmp_path / "cache" / project)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    yield server
    server.close()


def test_download_once(server: Server, arrays: dict[str, np.ndarray]) -> None:
    check(mnist(None, 1 / 3, 0), arrays)
    assert sorted(server.asked) == sorted(f"/{name}.gz" for name in NAMES)
    check(mnist(None, 1 / 3, 0), arrays)
    assert len(server.asked) == 4


def test_an_interrupted_download_is_completed(
    server: Server, arrays: dict[str, np.ndarray], contents: dict[str, bytes]
) -> None:
    name = "train-labels-idx1-ubyte"
    (server.folder / f"{name}.gz").rename(server.folder / "hidden")
    with pytest.raises(OSError, match="404"):
        mnist(None, 1 / 3, 0)
    (server.folder / "hidden").rename(server.folder / f"{name}.gz")
    check(mnist(None, 1 / 3, 0), arrays)
    assert server.asked.count("/train-images-idx3-ubyte.gz") == 1


@pytest.mark.parametrize(
    "wrong",
    [gzip.compress(b"\0\0\x08\x01\0\0\0\x01\x07", mtime=0), b"<html></html>"],
    ids=["another file", "a page"],  # the bytes would be the name, and differ between workers
)
def test_a_wrong_file_from_the_server_is_refused(server: Server, wrong: bytes) -> None:
    name = "t10k-labels-idx1-ubyte.gz"
    (server.folder / name).write_bytes(wrong)
    for _ in range(2):  # in the cache it is no better
        with pytest.raises(ValueError, match=name):
            mnist(None, 1 / 3, 0)
