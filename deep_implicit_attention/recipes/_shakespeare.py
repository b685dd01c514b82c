"""Settings of the recipe `shakespeare`, and what can be done with a run of it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from .. import training
from ..models import DeepImplicitAttentionTransformer
from ..solvers._validate import check_count, check_seed
from ..training import Device, Language, LanguagePlan, Run, TextData, Vocabulary
from ..training._files import write_whole
from ..training._text import check_parts
from ._flags import TrainingFlags, refuse

_VOCABULARY = "vocabulary.json"


@dataclass(frozen=True)
class Shakespeare(TrainingFlags):
    """Train a language model on the characters of Tiny Shakespeare, or of a text of your own.

    The last tenth of the text is for validation. A batch relaxes a few steps without a gradient, a
    number drawn anew for each, then takes a few with one. Evaluations are at equilibrium: of some
    windows of the validation text on the way, of all of them at the end.
    """

    text: Path | None = None
    """a text file in UTF-8 to learn from; without it Tiny Shakespeare"""
    data_dir: Path | None = None
    """folder with tinyshakespeare.txt; without it DIA_DATA, else a download"""
    run_dir: Path = Path("runs/shakespeare")
    seed: int = 0
    iterations: int = 2000
    """batches to learn from"""
    batch_size: int = 12
    """stretches of text in a batch"""
    length: int = 64
    """characters of a stretch, and of the window of text that the model sees"""
    learning_rate: float = 2e-3
    warmup: int = 100
    """iterations in which the learning rate rises; then it falls by a cosine to a tenth"""
    weight_decay: float = 0.1
    clip: float | None = 1.0
    relax: int = 2
    """steps towards equilibrium without a gradient, at most: each batch draws from 0 to this"""
    learn: int = 4
    """steps after them with a gradient; 0 is the equilibrium with its exact implicit gradient"""
    jacobian_penalty: float = 0.0
    """weight in the loss of |dF/dz|^2 per component, which makes equilibria easier to find"""
    dim: int = 128
    """components of a site"""
    depth: int = 4
    """blocks, each solved to equilibrium"""
    heads: int = 4
    """heads of the couplings"""
    attention: Literal["softmax", "softmax-plain", "vector-spin"] = "softmax"
    """softmax couplings of a normalised state, of a plain one, or spins on a sphere"""
    positions: Literal["learned", "sinusoidal", "rotary"] = "rotary"
    """how sites know where they are; rotary in the couplings only"""
    rotary_base: float = 100.0
    """of rotary positions: components turn by 1 to about 1 / this a site; low for short windows"""
    dropout: float = 0.0
    """dropout of fields and updates, drawn once for a batch"""
    weight_norm: bool = False
    """learn magnitude and direction of the weights apart"""
    solver: Literal["anderson", "broyden", "newton_krylov", "picard"] = "picard"
    """solver of the equilibria"""
    tol: float = 1e-3
    max_iter: int = 100
    evaluate_every: int = 250
    """iterations between evaluations; each prints a sample of text"""
    evaluate_windows: int = 100
    """windows of the validation text, evenly spaced, for evaluations on the way"""
    sample: int = 300
    """characters of the text that is written at the end"""
    threads: int = 1
    device: Device = "cpu"

    def check(self) -> None:
        super().check()
        check_count("iterations", self.iterations)
        if not 0 <= self.warmup < self.iterations:
            raise ValueError(
                f"warmup must be at least 0 and below iterations = {self.iterations}, got "
                f"{self.warmup}"
            )
        check_count("length", self.length)
        if self.text is not None and self.data_dir is not None:
            raise ValueError("--data-dir is where Tiny Shakespeare is; with --text it has no use")
        if self.learn < 0:
            raise ValueError(f"learn must be at least 0, got {self.learn}")
        if self.sample < 1:
            raise ValueError(f"sample must be at least 1, got {self.sample}")

    def check_idle(self) -> None:
        if self.positions != "rotary":
            refuse(self, f"positions {self.positions}", "rotary_base")

    def load(self, *, download: bool = True) -> TextData:
        """The text of this recipe; `download=False` takes only what is on this machine."""
        if self.text is not None:
            return read_text(self.text)
        return training.shakespeare(self.data_dir, download=download)

    def model(self, num_tokens: int) -> DeepImplicitAttentionTransformer:
        """The untrained model for so many characters."""
        rotary = {"rotary_base": self.rotary_base} if self.positions == "rotary" else {}
        return DeepImplicitAttentionTransformer(
            num_tokens=num_tokens,
            max_seq_len=self.length,
            dim=self.dim,
            depth=self.depth,
            heads=self.heads,
            attention=self.attention,
            positions=self.positions,
            **rotary,
            dropout=self.dropout,
            weight_norm=self.weight_norm,
            solver=self.solver,
            on_failure="ignore",  # the training loop reports residuals itself
            solver_fwd_tol=self.tol,
            solver_fwd_max_iter=self.max_iter,
            solver_bwd_tol=self.tol,
            solver_bwd_max_iter=self.max_iter,
        )

    def task(self, data: TextData) -> Language:
        """The task of this recipe."""
        try:
            check_parts(data, self.length)
        except ValueError as error:
            raise ValueError(f"{self.text or 'Tiny Shakespeare'}: {error}") from error
        return Language(
            data,
            self.length,
            self.batch_size,
            relax=self.relax,
            learn=self.learn or None,
            jacobian_penalty=self.jacobian_penalty,
            evaluate_windows=self.evaluate_windows,
        )

    def plan(self) -> LanguagePlan:
        """The plan of the training."""
        return LanguagePlan(
            steps=self.iterations,
            evaluate_every=self.evaluate_every,
            warmup=self.warmup / self.iterations,
            seed=self.seed,
            **self.plan_options(),
        )

    def evaluate(self, run: Run) -> dict[str, float]:
        """The metrics of the whole validation text, measured from a run's best weights."""
        data = self.load()
        check_text(run, data)
        model = self.model(len(data.vocabulary))
        run.load_weights(model)
        return training.measure_language(model, *training.windows(data.validation, self.length))

    def generate(
        self,
        run: Run,
        prompt: str,
        *,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        seed: int = 0,
    ) -> str:
        """`prompt` continued by a run's best weights; needs the run's folder only."""
        vocabulary = load_vocabulary(run)
        check_seed(seed)
        if not prompt:
            raise ValueError("prompt must hold at least one character")
        ids = vocabulary.encode(prompt)[None]
        model = self.model(len(vocabulary))
        run.load_weights(model)
        generator = torch.Generator().manual_seed(seed)
        said = model.generate(ids, max_new_tokens, temperature, top_k, generator=generator)
        return vocabulary.decode(said[0])


def read_text(path: Path) -> TextData:
    """The text in a file, its last tenth for validation."""
    try:
        # A byte order mark, as some editors write it first, is none of the text.
        return training.text_data(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8: {error}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def save_vocabulary(run: Run, data: TextData) -> None:
    """Write the characters that a run's ids stand for, and of which text they are."""
    content = {"characters": data.vocabulary.characters, "text_sha256": _sha256(data)}
    write_whole(run.folder / _VOCABULARY, (json.dumps(content, indent=2) + "\n").encode())


def has_vocabulary(run: Run) -> bool:
    """Whether it was written."""
    return (run.folder / _VOCABULARY).exists()


def load_vocabulary(run: Run) -> Vocabulary:
    """The characters of a run."""
    return Vocabulary(_saved(run)["characters"])


def check_text(run: Run, data: TextData) -> None:
    """Raise unless `data` is the text that the run has learned from."""
    if _saved(run)["text_sha256"] != _sha256(data):
        raise ValueError(f"the text is not the one that the run in {run.folder} has learned from")


def _saved(run: Run) -> dict[str, Any]:
    path = run.folder / _VOCABULARY
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise ValueError(
            f"{run.folder} has no {_VOCABULARY}: its training has not begun, or the file was lost"
        ) from error
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    names = ("characters", "text_sha256")
    if not isinstance(content, dict) or not all(isinstance(content.get(n), str) for n in names):
        raise ValueError(f"{path} must hold an object with the strings {' and '.join(names)}")
    return content


def _sha256(data: TextData) -> str:
    text = data.vocabulary.decode(torch.cat([data.train, data.validation]))
    return hashlib.sha256(text.encode()).hexdigest()
