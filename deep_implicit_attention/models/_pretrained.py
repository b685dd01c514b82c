"""Saving, loading and sharing models: weights in safetensors beside a JSON config."""

from __future__ import annotations

import json
import numbers
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import PyTorchModelHubMixin, hf_hub_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_model
from torch import Tensor, nn

_WEIGHTS = "model.safetensors"
# What may be the name of a repository: with more slashes, or a dot in front, it is a path.
_REPOSITORY = re.compile(r"([\w-][\w.-]*/)?[\w-][\w.-]*")
# What `from_pretrained` hands on for downloads; the last two by older versions of the mixin.
_DOWNLOAD = (
    "revision", "cache_dir", "force_download", "local_files_only", "token",
    "proxies", "resume_download",
)  # fmt: skip


class Pretrained(
    PyTorchModelHubMixin, library_name="deep-implicit-attention", tags=["deep-equilibrium"]
):
    """Gives a model `save_pretrained`, `from_pretrained` and `push_to_hub`.

    The arguments of the constructor are the config, so they must be numbers, strings and booleans,
    or lists of them; numbers of other libraries are saved as Python's. Weights are read from
    safetensors only, never from a pickle, and must be those of this class and of this config, all
    of them. Layers that were made to share their weights come back as equal ones.
    """

    def __new__(cls, *args: Any, **options: Any) -> Any:
        # The mixin records what it is given here, and leaves out what JSON does not know.
        return super().__new__(cls, *args, **{k: _plain(v) for k, v in options.items()})

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike, **options: Any
    ) -> Any:
        """The model saved in a folder, or in a repository of the Hub.

        Args:
            pretrained_model_name_or_path: a folder, or ``owner/name`` of a repository.
            **options: `map_location`, what `huggingface_hub.hf_hub_download` takes (`revision`,
                `cache_dir`, `force_download`, `local_files_only`, `token`), and arguments of the
                constructor that are to differ from the config.

        Raises:
            FileNotFoundError: if there is no such folder, or config or weights are missing.
            TypeError, ValueError: for a config that makes no such model with the arguments given.
            ValueError: for a damaged config in a folder; if the weights are no whole safetensors
                file, or those of another model or config.
        """
        given = os.fspath(pretrained_model_name_or_path)
        if os.path.isdir(given):
            _check_config(Path(given) / "config.json")
            return super().from_pretrained(given, **options)
        if not _REPOSITORY.fullmatch(given):
            raise FileNotFoundError(f"there is no folder {given!r} with a saved {cls.__name__}")
        try:
            return super().from_pretrained(given, **options)
        except Exception as error:
            error.add_note(f"There is no folder {given} here, so it was looked for on the Hub.")
            raise

    def _save_pretrained(self, save_directory: Path) -> None:
        assert isinstance(self, nn.Module)
        save_model(self, str(save_directory / _WEIGHTS), {"model": type(self).__name__})

    @classmethod
    def _from_pretrained(
        cls, *, model_id: str, map_location: str | torch.device = "cpu", **rest: Any
    ) -> Any:
        """`from_pretrained` after the config was read into `rest`."""
        where = {name: rest.pop(name) for name in _DOWNLOAD if name in rest}
        where = {name: value for name, value in where.items() if value is not None}
        rest.pop("strict", None)  # always
        if os.path.isdir(model_id):
            path = os.path.join(model_id, _WEIGHTS)
            for needed in (path, os.path.join(model_id, "config.json")):
                if not os.path.isfile(needed):
                    raise FileNotFoundError(f"{needed} is missing: no saved {cls.__name__} there")
        else:
            path = hf_hub_download(model_id, _WEIGHTS, **where)
        weights = _read(path, cls.__name__)
        try:
            model = cls(**rest)
        except (TypeError, ValueError) as error:
            kind = TypeError if isinstance(error, TypeError) else ValueError
            raise kind(
                f"the config of {model_id}, with the arguments given beside it, makes no "
                f"{cls.__name__}: {error}"
            ) from error
        assert isinstance(model, nn.Module)
        _fill(model, weights, path)
        return model.to(map_location).eval()


def _plain(value: Any) -> Any:
    """A number as one of Python's own, also in a list or tuple; all else as it is."""
    if isinstance(value, list | tuple):
        return type(value)(map(_plain, value))
    if isinstance(value, bool | np.bool_):
        return bool(value)
    if isinstance(value, numbers.Integral):
        return int(value)
    return float(value) if isinstance(value, numbers.Real) else value


def _check_config(path: Path) -> None:
    """Raise if there is a config that is no JSON object."""
    if not path.is_file():
        return  # said with the weights
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(config).__name__}")


def _read(path: str, name: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file that says that it holds the weights of model `name`."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            written = metadata.get("model", "another model")
            if written != name:
                raise ValueError(f"{path} holds the weights of {written}, not of {name}")
            weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from error
    # Of tensors that shared memory one was written, and the names of the others beside it.
    return {**weights, **{key: weights[kept] for key, kept in metadata.items() if kept in weights}}


def _fill(model: nn.Module, weights: dict[str, Tensor], path: str) -> None:
    """Put `weights` into `model`, in the precision they were saved in."""
    own = model.state_dict()
    wrong = [
        f"{key} {tuple(own[key].shape) if key in own else 'unknown to the model'}"
        f" {tuple(weights[key].shape) if key in weights else 'not in the file'}"
        for key in sorted(own.keys() | weights.keys())
        if key not in own or key not in weights or own[key].shape != weights[key].shape
    ]
    wrong += [
        f"{key} {own[key].dtype} {weights[key].dtype}"
        for key in sorted(own.keys() & weights.keys())
        if own[key].is_floating_point() != weights[key].is_floating_point()
    ]
    if wrong:
        raise ValueError(
            f"{path} does not fit the config beside it; {len(wrong)} tensors differ (name, in the "
            f"model, in the file): {'; '.join(wrong[:5])}"
        )
    for key, tensor in model.state_dict(keep_vars=True).items():
        tensor.data = tensor.data.to(weights[key].dtype)
    # What is not saved, because it can be computed, has the precision of the first weight.
    dtype = next(tensor.dtype for tensor in weights.values() if tensor.is_floating_point())
    for name, buffer in model.named_buffers():
        if name not in weights and buffer.is_floating_point():
            buffer.data = buffer.data.to(dtype)
    model.load_state_dict(weights)
