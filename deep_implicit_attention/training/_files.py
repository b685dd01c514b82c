"""Files that appear whole or not at all, and those of data: their folder, and their bytes."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


def write_whole(path: Path, content: bytes) -> None:
    """Write beside `path`, then put it in its place: a crash leaves the old file or the new one."""
    beside = unfinished(path)
    found = beside.exists()  # that of a configuration marks the folder of a run, and stays
    try:
        with named(path), beside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except BaseException:  # a full disk, Ctrl-C
        if not found:
            beside.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def check_writable(path: Path) -> None:
    """Raise what `write_whole` would where its file cannot be begun; for before long work."""
    beside = unfinished(path)
    beside.open("wb").close()
    beside.unlink()


def check_readable(path: Path) -> None:
    """Raise the system's error for a file that cannot be read; safetensors tells another one."""
    path.open("rb").close()


@contextmanager
def named(path: Path) -> Iterator[None]:
    """Within, an error of the system that names no file, as that of a full disk, names `path`."""
    try:
        yield
    except OSError as error:
        if error.strerror and error.filename is None:
            error.filename = str(path)
        raise


def unfinished(path: Path) -> Path:
    """What `path` is called while it is written."""
    return path.with_name(path.name + ".part")


@contextmanager
def locked(folder: Path) -> Iterator[bool]:
    """Within, hold the folder's lock, which ends with the process; False if another has it.

    Systems and file systems without such locks say True.
    """
    if fcntl is None:
        yield True
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        got = True
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            got = False
        except OSError:
            pass
        yield got
    finally:
        os.close(descriptor)


def _sync_folder(folder: Path) -> None:
    """Make a rename survive a power failure, where the system can."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def data_folder(data_dir: str | Path | None) -> tuple[str, Path | None]:
    """Where data lies, if that is said, and what says it."""
    if data_dir is not None:
        return "data_dir", Path(data_dir)
    folder = os.environ.get("DIA_DATA")  # an empty one is how shells unset it
    return "the variable DIA_DATA", Path(folder) if folder else None


def check_sha256(path: Path, content: bytes, expected: str) -> None:
    """Raise `ValueError` unless the `content` of `path` has this sha256."""
    found = hashlib.sha256(content).hexdigest()
    if found != expected:
        raise ValueError(
            f"{path} is damaged or another file: sha256 {found}, expected {expected}; delete it "
            "and get it anew"
        )
