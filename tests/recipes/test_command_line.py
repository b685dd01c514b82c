"""The command line itself: its help, what it does not understand, and pipes that end."""

from __future__ import annotations

import dataclasses
import io
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from deep_implicit_attention import recipes, training
from deep_implicit_attention.cli import main
from deep_implicit_attention.recipes import Digits, ImageRecipe, Mnist, MnistViT


@pytest.mark.parametrize(
    ("name", "recipe"), [("digits", Digits), ("mnist", Mnist), ("mnist-vit", MnistViT)]
)
def test_help_names_every_setting(
    name: str,
    recipe: type[ImageRecipe],
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as stop:
        main(["train", name, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for field in dataclasses.fields(recipe):
        flag = re.escape("--" + field.name.replace("_", "-"))
        # The flag, what it takes or its negation, and then words on it.
        assert re.search(rf"{flag}\b[^\n]*\n?[^\n]*[a-z]{{2,}} [a-z]{{2,}}", text), field.name
    first = (recipe.__doc__ or "").splitlines()[0]
    assert text.count(first[:60]) == 1
    assert "MNIST" in text or "scikit-learn" in text


def test_help_names_the_recipes(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["train", "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "digits" in text
    assert "mnist" in text


@pytest.mark.parametrize("command", ["train", "report", "ising", "boltzmann"])
def test_help_breaks_no_line_before_a_bracket(
    command: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    # tyro takes a line that begins with no letter for a new paragraph.
    monkeypatch.setenv("COLUMNS", "400")
    with pytest.raises(SystemExit):
        main([command, "--help"])
    lines = [line.strip("│ ") for line in capsys.readouterr().out.splitlines()]
    assert [line for line in lines if line.startswith("(") and line != "(required)"] == []


@pytest.mark.parametrize(
    "command", ["train digits", "train mnist-vit", "train shakespeare", "ising", "boltzmann"]
)
def test_what_is_said_of_a_flag_is_one_paragraph(
    command: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """tyro takes an indented line for a new one: a description stands on a single line."""
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit):
        main([*command.split(), "--help"])
    lines = [line.strip("│ ") for line in capsys.readouterr().out.splitlines()]
    ends = [number for number, line in enumerate(lines) if "(default" in line]
    assert len(ends) > 5
    for number in ends:  # beside the flag, or below one that is too long
        above = lines[number - 1]
        beside = lines[number].startswith("--")
        assert beside or (above.startswith("--") and "  " not in above), lines[number]


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "digits", "--no-such-flag", "1"],
        ["train", "digits", "--epochs", "many"],
        ["train", "digits", "--data-dir", "x"],
        ["train", "no-such-recipe"],
        ["train"],
        ["no-such-command"],
    ],
)
def test_what_is_not_understood(
    arguments: list[str], capsys: pytest.CaptureFixture, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_what_the_memory_cannot_hold(
    capsys: pytest.CaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    large = "boltzmann --methods pcd --num-hidden 100000000 --num-updates 1 --l2 0.1"
    assert main(large.split()) == 1
    assert re.fullmatch(
        "dia: too large for the memory here: .* allocate .*\n", capsys.readouterr().err
    )

    def fail(_: object) -> None:
        raise error

    monkeypatch.setattr(recipes, "run_ising", fail)
    error: Exception = MemoryError("Unable to allocate 1 PiB")
    assert main(["ising"]) == 1
    assert capsys.readouterr().err == f"dia: too large for the memory here: {error}\n"
    error = RuntimeError("a mistake of the program")
    with pytest.raises(RuntimeError, match="mistake"):
        main(["ising"])
    error = TypeError("a mistake of the program")
    with pytest.raises(TypeError, match="mistake"):
        main(["ising"])


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ("train digits --dim 4611686018427387904", "too large for the memory here"),
        ("train digits --dim 99999999999999999999", "a number is too large to compute with"),
        ("train digits --learning-rate 1e300", "a number is too large to compute with"),
        ("ising --num-spins 2 --max-iter 99999999999999999999", "a number is too large"),
    ],
)
def test_numbers_beyond_what_can_be_computed_with(
    flags: str,
    told: str,
    capsys: pytest.CaptureFixture,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(flags.split()) == 1
    assert re.fullmatch(f"dia: {told}.*: .*\n", capsys.readouterr().err)


def test_interrupted_before_anything_is_begun(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pressed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "require", pressed)
    assert main(["--help"]) == 130
    assert capsys.readouterr().err == "dia: interrupted\n"
    # To import torch takes seconds, in which nobody would catch it before `main` is called.
    program = "import sys, deep_implicit_attention.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], env=_environment()).returncode == 0


def _environment() -> dict[str, str]:
    """That of a process which imports the project from here."""
    path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path}


@pytest.mark.quick("1")
@pytest.mark.parametrize("unbuffered", ["", "1"])  # so output fails at the exit, or at once
def test_a_reader_that_has_read_enough_ends_a_command_without_a_word(unbuffered: str) -> None:
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "deep_implicit_attention.cli", "--help"]
    environment = {**_environment(), "PYTHONUNBUFFERED": unbuffered}
    done = subprocess.run(
        command, stdout=write, stderr=subprocess.PIPE, env=environment, check=False
    )
    os.close(write)
    assert done.stderr == b""
    assert done.returncode == 1


def test_what_the_output_cannot_show_ends_no_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "text.txt").write_text("日本語" * 60, encoding="utf-8")
    flags = "--iterations 2 --evaluate-every 1 --warmup 1 --length 4 --dim 8 --depth 1 --heads 2"
    flags = f"train shakespeare {flags} --sample 4 --text text.txt --run-dir run"
    screen = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(screen, encoding="ascii"))
    monkeypatch.chdir(tmp_path)
    assert main(flags.split()) == 0
    sys.stdout.flush()
    assert rb"\u" in screen.getvalue()
    assert set((tmp_path / "run" / "sample.txt").read_text(encoding="utf-8")) <= set("日本語\n")
