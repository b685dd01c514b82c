"""Text to learn from: characters as ids, batches and windows of them, Tiny Shakespeare."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..solvers._validate import check_count, check_number
from ._extras import require
from ._files import check_sha256, data_folder

_SHAKESPEARE = "tinyshakespeare.txt"
_SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
_SHAKESPEARE_URL = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
)


@dataclass(frozen=True)
class Vocabulary:
    """Characters and their ids, in sorted order."""

    characters: str

    @staticmethod
    def of(text: str) -> Vocabulary:
        """That of all characters in `text`."""
        return Vocabulary("".join(sorted(set(text))))

    def __len__(self) -> int:
        return len(self.characters)

    def encode(self, text: str) -> Tensor:
        """The ids of `text`, `(len(text),)`.

        Raises:
            ValueError: naming the characters that are not in the vocabulary.
        """
        ids = {character: number for number, character in enumerate(self.characters)}
        unknown = sorted(set(text) - ids.keys())
        if unknown:
            raise ValueError(
                f"unknown characters {''.join(unknown)!r}: the vocabulary is {self.characters!r}"
            )
        return torch.tensor([ids[character] for character in text], dtype=torch.long, device="cpu")

    def decode(self, ids: Tensor | Sequence[int]) -> str:
        """The text of `ids` `(n,)`."""
        numbers = torch.as_tensor(ids, device="cpu").flatten().tolist()
        for number in numbers:
            if not 0 <= number < len(self.characters):
                raise ValueError(f"ids must be from 0 to {len(self.characters) - 1}, got {number}")
        return "".join(self.characters[number] for number in numbers)


@dataclass(frozen=True)
class TextData:
    """A text split into a training part and the validation part that follows it."""

    vocabulary: Vocabulary
    train: Tensor
    validation: Tensor


def text_data(text: str, validation: float = 0.1) -> TextData:
    """`text` as ids, the last part `validation` of it kept for validation."""
    check_number("validation", validation, minimum=0.0, below=1.0)
    if len(text) < 2:
        raise ValueError(
            "text must have at least 2 characters, one to learn from and one for validation, got "
            f"{len(text)}"
        )
    # Rounded, for 1 − 0.9 is a little less than 0.1.
    cut = int(round(len(text) * (1 - validation), 6))
    if not 0 < cut < len(text):
        raise ValueError(
            f"text must leave characters on both sides of the split; got {len(text)} characters "
            f"and validation={validation}"
        )
    vocabulary = Vocabulary.of(text)
    ids = vocabulary.encode(text)
    return TextData(vocabulary, ids[:cut], ids[cut:])


def random_batch(
    ids: Tensor, length: int, batch_size: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """`batch_size` random stretches of `ids` and what follows each id, both `(B, length)`."""
    _check_length(ids, length)
    check_count("batch_size", batch_size)
    # On the CPU, where a seed means the same everywhere.
    starts = torch.randint(len(ids) - length, (batch_size,), generator=generator, device="cpu")
    stretches = ids[starts[:, None] + torch.arange(length + 1, device="cpu")]
    return stretches[:, :-1], stretches[:, 1:]


def windows(ids: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """All of `ids` in windows that do not overlap, and what follows each id, `(n, length)`.

    The rest that fills no window is left out.
    """
    _check_length(ids, length)
    count = (len(ids) - 1) // length
    inputs, targets = ids[: count * length], ids[1 : count * length + 1]
    return inputs.view(count, length), targets.view(count, length)


def _check_length(ids: Tensor, length: int, what: str = "a text") -> None:
    check_count("length", length)
    if len(ids) <= length:
        raise ValueError(
            f"{what} of {len(ids)} characters is too short for length {length}: take a longer text "
            "or a smaller length"
        )


def check_parts(data: TextData, length: int) -> None:
    """Raise `ValueError` unless both parts of a text are longer than `length`."""
    _check_length(data.train, length, "a training part")
    _check_length(data.validation, length, "a validation part")


def shakespeare(data_dir: str | Path | None = None, *, download: bool = True) -> TextData:
    """Tiny Shakespeare: 1,115,394 characters, the last tenth for validation.

    Reads ``tinyshakespeare.txt`` from `data_dir` (or its folder ``text``), else from the folder
    that the variable ``DIA_DATA`` names, else from the cache, into which it is downloaded first;
    with `download=False` a file that is not there is a `FileNotFoundError`. Whatever the source,
    the bytes are checked by sha256.
    """
    path = _shakespeare_file(data_dir, download)
    content = path.read_bytes()
    check_sha256(path, content, _SHAKESPEARE_SHA256)
    return text_data(content.decode())


def _shakespeare_file(data_dir: str | Path | None, download: bool) -> Path:
    source, given = data_folder(data_dir)
    if given is None:
        pooch = require("pooch", "train")
        folder = Path(pooch.os_cache("deep-implicit-attention")) / "text"
        if not download and not (folder / _SHAKESPEARE).is_file():
            raise FileNotFoundError(
                f"{folder}, where downloads are kept, does not hold {_SHAKESPEARE}, and neither "
                "data_dir nor DIA_DATA names another folder"
            )
        if not download:
            return folder / _SHAKESPEARE
        return Path(pooch.retrieve(_SHAKESPEARE_URL, None, _SHAKESPEARE, folder))
    for folder in (given, given / "text"):
        if (folder / _SHAKESPEARE).is_file():
            return folder / _SHAKESPEARE
    raise FileNotFoundError(
        f"{given}, the folder that {source} names, does not hold {_SHAKESPEARE}; without it the "
        "file is downloaded"
    )
