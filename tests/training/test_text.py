"""Characters, batches and windows against the text itself."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest
import torch

from deep_implicit_attention.training import (
    Language,
    Vocabulary,
    _text,
    random_batch,
    shakespeare,
    text_data,
    windows,
)

TEXT = "to be, or not to be:\nthat is the question ⟨é⟩"


def test_encoding_and_back() -> None:
    vocabulary = Vocabulary.of(TEXT)
    assert vocabulary.characters == "".join(sorted(set(TEXT)))
    ids = vocabulary.encode(TEXT)
    assert ids.dtype == torch.long
    assert int(ids.min()) == 0
    assert int(ids.max()) == len(vocabulary) - 1 == len(set(TEXT)) - 1
    assert vocabulary.decode(ids) == TEXT
    assert vocabulary.decode(ids.tolist()[:5]) == TEXT[:5]
    assert vocabulary.encode("").shape == (0,)


def test_unknown_characters_are_named() -> None:
    with pytest.raises(ValueError, match="unknown characters 'Zé': the vocabulary is ' abet'"):
        Vocabulary(" abet").encode("Za beté Z")


@pytest.mark.parametrize("validation", [0.1, 0.25])
def test_split(validation: float) -> None:
    data = text_data(TEXT, validation)
    cut = int(len(TEXT) * (1 - validation))
    assert data.vocabulary.decode(data.train) == TEXT[:cut]
    assert data.vocabulary.decode(data.validation) == TEXT[cut:]


@pytest.mark.parametrize(("size", "validation", "learnt"), [(10, 0.9, 1), (1000, 0.8, 200)])
def test_split_in_whole_characters(size: int, validation: float, learnt: int) -> None:
    assert len(text_data("a" * size, validation).train) == learnt


@pytest.mark.parametrize("validation", [0.0, 0.99])
def test_split_that_leaves_nothing(validation: float) -> None:
    with pytest.raises(ValueError, match="both sides"):
        text_data(TEXT, validation)
    with pytest.raises(ValueError, match="validation"):
        text_data(TEXT, 1.0)
    for text in ("", "a"):  # whatever the split
        with pytest.raises(ValueError, match=f"text must have at least 2 .*, got {len(text)}$"):
            text_data(text)


def test_batches_are_stretches_of_the_text_and_what_follows() -> None:
    ids = torch.arange(50)
    inputs, targets = random_batch(ids, 7, 4000, torch.Generator().manual_seed(0))
    assert inputs.shape == targets.shape == (4000, 7)
    assert torch.equal(inputs - inputs[:, :1], torch.arange(7).expand(4000, 7))
    assert torch.equal(targets, inputs + 1)
    # Every start that leaves room for the last target occurs, about equally often.
    counts = torch.bincount(inputs[:, 0], minlength=43)
    assert len(counts) == 43
    expected = 4000 / 43
    assert (counts - expected).abs().max() < 5 * expected**0.5


def test_batches_follow_from_the_generator() -> None:
    ids = torch.arange(1000)
    draw = lambda seed: random_batch(ids, 8, 4, torch.Generator().manual_seed(seed))[0]  # noqa: E731
    assert torch.equal(draw(0), draw(0))
    assert not torch.equal(draw(0), draw(1))


@pytest.mark.parametrize(("size", "count"), [(9, 2), (10, 2), (12, 2), (13, 3), (5, 1)])
def test_windows_cover_the_text_once(size: int, count: int) -> None:
    inputs, targets = windows(torch.arange(size), 4)
    assert inputs.shape == (count, 4)
    assert torch.equal(inputs.flatten(), torch.arange(4 * count))
    assert torch.equal(targets, inputs + 1)


@pytest.mark.parametrize("length", [10, 11])
def test_texts_that_are_too_short(length: int) -> None:
    ids = torch.arange(10)
    with pytest.raises(ValueError, match=f"10 characters is too short for length {length}"):
        windows(ids, length)
    with pytest.raises(ValueError, match="too short"):
        random_batch(ids, length, 2, torch.Generator())
    with pytest.raises(ValueError, match="length"):
        windows(ids, 0)
    with pytest.raises(ValueError, match="batch_size"):
        random_batch(ids, 3, 0, torch.Generator())


def test_the_part_of_a_text_that_is_too_short_is_named() -> None:
    data = text_data(TEXT * 3)
    for length, part in ((len(data.validation), "validation"), (len(data.train), "training")):
        ids = getattr(data, part.removesuffix("ing"))
        with pytest.raises(ValueError, match=f"a {part} part of {len(ids)} characters"):
            Language(data, length, 2)


@pytest.fixture
def play(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small text in the place of the real one."""
    content = TEXT.encode() * 3
    monkeypatch.setattr(_text, "_SHAKESPEARE_SHA256", hashlib.sha256(content).hexdigest())
    monkeypatch.delenv("DIA_DATA", raising=False)
    path = tmp_path / "text" / "tinyshakespeare.txt"
    path.parent.mkdir()
    path.write_bytes(content)
    return path


def test_shakespeare_from_a_folder(play: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in (play.parent, play.parent.parent):
        data = shakespeare(folder)
        both = torch.cat([data.train, data.validation])
        assert data.vocabulary.decode(both) == TEXT * 3
    monkeypatch.setenv("DIA_DATA", str(play.parent.parent))
    assert torch.equal(shakespeare().train, data.train)


def test_shakespeare_that_is_missing_or_damaged(play: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"does not hold tinyshakespeare\.txt"):
        shakespeare(tmp_path / "elsewhere")
    play.write_bytes(play.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"tinyshakespeare\.txt is damaged.*expected"):
        shakespeare(tmp_path)


def test_shakespeare_by_download(play: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pooch = pytest.importorskip("pooch")
    asked: list[tuple] = []

    def retrieve(*arguments: object) -> str:
        asked.append(arguments)
        return str(play)

    monkeypatch.setattr(pooch, "retrieve", retrieve)
    assert len(shakespeare().train) == int(0.9 * 3 * len(TEXT))
    ((url, _, name, _),) = asked
    assert str(url).startswith("https://")
    assert name == "tinyshakespeare.txt"


def test_the_real_text() -> None:
    folder = os.environ.get("DIA_DATA")
    if not folder or not list(Path(folder).glob("**/tinyshakespeare.txt")):
        pytest.skip("DIA_DATA does not name a folder with tinyshakespeare.txt")
    data = shakespeare()
    assert len(data.vocabulary) == 65
    assert len(data.train) == 1_003_854
    assert len(data.validation) == 111_540


@pytest.mark.parametrize("wrong", [-1, 99])
def test_ids_that_are_no_characters(wrong: int) -> None:
    vocabulary = text_data(TEXT).vocabulary
    with pytest.raises(ValueError, match=f"ids must be from 0 to .*, got {wrong}"):
        vocabulary.decode([0, wrong])
