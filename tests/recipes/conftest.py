"""Global settings put back, a few digits instead of all, and the command called in-process."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock
from matplotlib.figure import Figure
from PIL import Image

from deep_implicit_attention import training
from deep_implicit_attention.cli import main
from deep_implicit_attention.recipes import _compare, _made, report_run
from deep_implicit_attention.training import ImageData

TEXT = "".join(
    f"{number} green bottles, hanging on the wall; and if one should accidentally fall,\n"
    for number in ["ten", "nine", "eight", "seven", "six", "five", "four", "three"]
)
BOTTLES = (
    "--dim 8 --heads 2 --length 12 --batch-size 4 --iterations 6 --warmup 2 --evaluate-every 2 "
    "--depth 1 --relax 3 --learn 2 --tol 1e-5 --max-iter 200 --sample 14 --evaluate-windows 3 "
    "--jacobian-penalty 0 --positions learned --solver anderson"
)
TINY = "--epochs 2 --batch-size 32 --widths 4 --strides 2 --dim 3 --threads 1 --learning-rate 0.01"


@dataclass
class Outcome:
    """What a command returned and said."""

    status: int
    out: str
    err: str
    folder: Path

    def files(self) -> set[str]:
        return {path.name for path in self.folder.iterdir()}

    def complaint(self) -> str:
        """The one line that a failed command says."""
        assert self.status == 1
        lines = self.err.splitlines()
        assert len(lines) == 1, self.err
        assert lines[0].startswith("dia: ")
        return lines[0]


Dia = Callable[..., Outcome]


def call(folder: Path, recipe: str, *flags: str) -> Outcome:
    """`dia train RECIPE` with tiny settings; `flags` have the last word."""
    return invoke(folder, "train", recipe, *TINY.split(), "--run-dir", str(folder), *flags)


def invoke(folder: Path, *arguments: str) -> Outcome:
    """`dia`, whose run folder is `folder`."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = main(list(arguments))
        except SystemExit as stop:
            status = stop.code if isinstance(stop.code, int) else 1
    return Outcome(status, out.getvalue(), err.getvalue(), folder)


@pytest.fixture(scope="module", autouse=True)
def settings_restored() -> Iterator[None]:
    threads = torch.get_num_threads()
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """A whole run on all digits."""
    folder = tmp_path_factory.mktemp("runs") / "digits"
    return call(folder, "digits", "--batch-size", "128", "--seed", "3")


@pytest.fixture(scope="module")
def few_digits() -> Callable[[float, int], ImageData]:
    whole = training.digits(0.5, 0)
    first = torch.arange(120)
    few = ImageData(whole.train[first], whole.validation[first], whole.test[first], -0.8)
    return lambda validation, seed: few


@pytest.fixture
def dia(
    tmp_path: Path,
    few_digits: Callable[[float, int], ImageData],
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., Outcome]:
    """Call `dia train RECIPE *flags` on a few digits."""
    monkeypatch.setattr(training, "digits", few_digits)
    monkeypatch.delenv("DIA_DATA", raising=False)

    def run(recipe: str, *flags: str) -> Outcome:
        return call(tmp_path / "run", recipe, *flags)

    return run


@pytest.fixture
def ising(tmp_path: Path) -> Callable[..., Outcome]:
    """Call `dia ising *flags`."""
    folder = tmp_path / "run"
    return lambda *flags: invoke(folder, "ising", "--run-dir", str(folder), *flags)


@pytest.fixture
def saved(tmp_path: Path) -> Callable[[Any, Any], list[str]]:
    """Flags of a system in files."""

    def save(couplings: Any, fields: Any) -> list[str]:
        np.save(tmp_path / "J.npy", couplings)
        np.save(tmp_path / "x.npy", fields)
        return ["--couplings", str(tmp_path / "J.npy"), "--fields", str(tmp_path / "x.npy")]

    return save


# --- a text of a few hundred characters -------------------------------------------------------


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "bottles.txt"
    path.write_text(TEXT)
    return path


def call_on_text(folder: Path, text: Path, *flags: str) -> Outcome:
    """`dia train shakespeare` with tiny settings; `flags` have the last word."""
    own = ["--text", str(text), "--run-dir", str(folder)]
    return invoke(folder, "train", "shakespeare", *BOTTLES.split(), *own, *flags)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Outcome:
    """A run on it to the end."""
    return call_on_text(tmp_path_factory.mktemp("runs") / "text", text, "--seed", "3")


@pytest.fixture
def train(tmp_path: Path, text: Path) -> Dia:
    return lambda *flags: call_on_text(tmp_path / "run", text, *flags)


# --- runs that are reported on, made once -----------------------------------------------------

PHRASE = "the quick brown fox jumps over the lazy dog.\n"


def made_once(
    name: str, make: Callable[[Path], None], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The folder that `make` fills: for all processes of the tests, by the first that asks."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent
    folder = root / "runs" / name
    folder.parent.mkdir(exist_ok=True)
    made = folder.with_suffix(".made")
    with FileLock(folder.with_suffix(".lock")):
        if not made.exists():
            shutil.rmtree(folder, ignore_errors=True)
            make(folder)
            made.touch()
    return folder


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run on the digits, with four checkpoints, and its report."""

    def make(folder: Path) -> None:
        flags = ("--epochs", "4", "--keep-checkpoints", "4", "--seed", "1", "--batch-size", "64")
        assert call(folder, "digits", *flags).status == 0
        assert invoke(folder, "report", str(folder)).status == 0

    return made_once("digits", make, tmp_path_factory)


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    """A run that may be damaged."""
    return Path(shutil.copytree(run, tmp_path / "copy"))


@pytest.fixture(scope="session")
def said(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run on a text, with three checkpoints, and its report."""
    flags = (
        "--dim 8 --heads 2 --length 12 --batch-size 4 --iterations 6 --warmup 2 --evaluate-every 2 "
        "--sample 14 --evaluate-windows 3 --max-iter 200 --jacobian-penalty 0 --depth 2 "
        "--keep-checkpoints 3"
    )

    def make(folder: Path) -> None:
        text = folder.with_name("text.txt")
        text.write_text(20 * PHRASE)
        own = ["--text", str(text), "--run-dir", str(folder)]
        outcome = invoke(folder, "train", "shakespeare", *flags.split(), *own)
        assert outcome.status == 0, outcome.err
        report_run(folder)

    return made_once("shakespeare", make, tmp_path_factory)


@pytest.fixture(scope="session")
def machines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run of machines on digits."""

    def make(folder: Path) -> None:
        flags = ["--methods", "tap", "pseudolikelihood", "--l2", "0.01", "0.1", "--samples", "3"]
        assert invoke(folder, "boltzmann", "--run-dir", str(folder), *flags).status == 0

    return made_once("boltzmann", make, tmp_path_factory)


# --- pictures ---------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def undrawn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are made, but what is saved is a blank: drawing is most of the time of a short run.

    Frames of films are drawn, and everything in tests with the marker `drawn`.
    """
    if request.node.get_closest_marker("drawn"):
        return
    savefig = Figure.savefig
    blank = io.BytesIO()
    Image.new("RGB", (1, 1)).save(blank, format="png")

    def save(self: Figure, file: Any, *, format: str | None = None, **options: Any) -> None:
        if format == "svg":
            file.write('<svg viewBox="0 0 1 1"></svg>')
        else:
            savefig(self, file, format=format, **options)

    monkeypatch.setattr(Figure, "savefig", save)
    monkeypatch.setattr(_made, "_drawn", lambda figure: blank.getvalue())


@pytest.fixture
def no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    """`dia ising` without its picture."""
    monkeypatch.setattr(_compare, "_draw", lambda *_, **__: None)
