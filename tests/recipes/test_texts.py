"""The text of `dia train shakespeare`: what files are read as, and that a run keeps to its own."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from deep_implicit_attention import training
from deep_implicit_attention.recipes import Shakespeare
from deep_implicit_attention.recipes._shakespeare import load_vocabulary, save_vocabulary
from deep_implicit_attention.training import Run

from .conftest import BOTTLES, TEXT, Dia, Outcome, invoke


@pytest.mark.parametrize("content", [b"", b"a", b"\xff\xfe"])
def test_a_file_that_is_no_text(content: bytes, train: Dia, tmp_path: Path) -> None:
    (tmp_path / "other").write_bytes(content)
    assert str(tmp_path / "other") in train("--text", str(tmp_path / "other")).complaint()


def test_a_byte_order_mark_is_none_of_the_text(
    trained: Outcome, train: Dia, text: Path, tmp_path: Path
) -> None:
    """The same text to a run, trained with the mark or without; a mark in the middle stays."""
    own = tmp_path / "own.txt"
    own.write_bytes(b"\xef\xbb\xbf" + text.read_bytes())
    run = train("--text", str(own), "--seed", "3")
    assert run.status == 0, run.err
    names = ("vocabulary.json", "model.safetensors", "sample.txt")
    assert all((run.folder / n).read_bytes() == (trained.folder / n).read_bytes() for n in names)
    own.write_text("a\ufeffb" * 20, encoding="utf-8")
    assert Shakespeare(text=own).load().vocabulary.characters == "ab\ufeff"


def test_a_vocabulary_with_a_byte_order_mark_is_read(tmp_path: Path) -> None:
    """As in runs of texts with one, which was once a character of theirs."""
    run = Run(tmp_path)
    run.start({})
    save_vocabulary(run, training.text_data("\ufeff" + TEXT))
    assert load_vocabulary(run).characters == "".join(sorted({*TEXT, "\ufeff"}))


def test_a_text_without_its_vocabulary(trained: Outcome, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(trained.folder, tmp_path / "copy"))
    (folder / "vocabulary.json").unlink()
    line = invoke(folder, "generate", str(folder), "--prompt", "t").complaint()
    assert "no vocabulary.json: its training has not begun, or the file was lost" in line


def test_another_text_is_refused(train: Dia, tmp_path: Path) -> None:
    own = tmp_path / "own.txt"
    own.write_text(TEXT)
    assert train("--text", str(own), "--iterations", "3").status == 0
    run = Run(tmp_path / "run")
    own.write_text(TEXT.replace("green", "brown"))
    message = "the text is not the one"
    assert message in invoke(run.folder, "evaluate", str(run.folder)).complaint()
    flags = ["--text", str(own), "--iterations", "3", "--resume"]
    assert message in train(*flags).complaint()
    *lines, _ = (run.folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run.folder / "metrics.jsonl").write_text("".join(lines))  # not finished
    assert message in train(*flags).complaint()
    (tmp_path / "moved.txt").write_text(own.read_text())
    assert message in train(*flags, "--text", str(tmp_path / "moved.txt")).complaint()
    (tmp_path / "moved.txt").write_text(TEXT)
    assert train(*flags, "--text", str(tmp_path / "moved.txt")).status == 0
    # What was learned is still said, without the text.
    own.unlink()
    said = invoke(run.folder, "generate", str(run.folder), "--prompt", "t")
    assert said.status == 0, said.err
    # Where it is not known which text it was, one of another name may be another.
    (run.folder / "vocabulary.json").unlink()
    moved = train(*flags, "--text", str(tmp_path / "moved.txt"))
    assert f"was started with text {own} (now {tmp_path / 'moved.txt'})" in moved.complaint()


def test_a_relative_text_is_found_from_other_folders_and_with_a_project_that_moved(
    train: Dia, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own.txt").write_text(TEXT)
    monkeypatch.chdir(tmp_path)
    assert train("--text", "own.txt").status == 0
    (tmp_path / "other").mkdir()
    monkeypatch.chdir("other")
    assert "is finished" in train("--text", "../own.txt", "--resume").out
    (tmp_path / "moved").mkdir()
    for name in ("run", "own.txt"):
        (tmp_path / name).rename(tmp_path / "moved" / name)
    folder = tmp_path / "moved" / "run"
    assert invoke(folder, "evaluate", "../moved/run").status == 0
    assert invoke(folder, "report", "../moved/run").status == 0
    assert "The text cannot be read" not in (folder / "report.html").read_text()
    (tmp_path / "moved" / "own.txt").unlink()
    assert "own.txt" in invoke(folder, "evaluate", "../moved/run").complaint()


def test_without_a_text_it_is_tiny_shakespeare(
    train: Dia, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def tiny(folder: Path | None, *, download: bool) -> Any:
        asked.append(folder)
        return training.text_data("To be, or not to be: " * 20)

    monkeypatch.setattr(training, "shakespeare", tiny)
    flags = [*BOTTLES.split(), "--iterations", "3", "--data-dir", "x", "--run-dir", str(tmp_path)]
    run = invoke(tmp_path, "train", "shakespeare", *flags)
    assert run.status == 0, run.err
    assert "378 training and 42 validation characters" in run.out
    assert set(asked) == {Path("x")}
