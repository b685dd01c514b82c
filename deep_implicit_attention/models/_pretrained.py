"""Saving, loading and sharing models: weights in safetensors beside a JSON config."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import PyTorchModelHubMixin, hf_hub_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_model
from torch import Tensor, nn

_WEIGHTS = "model.safetensors"
# What `from_pretrained` hands on for downloads; the last two by older versions of the mixin.
_DOWNLOAD = (
    "revision", "cache_dir", "force_download", "local_files_only", "token",
    "proxies", "resume_download",
)  # fmt: skip


class Pretrained(
    PyTorchModelHubMixin, library_name="deep-implicit-attention", tags=["deep-equilibrium"]
):
    """Gives a model `save_pretrained`, `from_pretrained` and `push_to_hub`.

    The arguments of the constructor are the config, so they must be plain numbers, strings and
    booleans. Weights are read from safetensors only, never from a pickle, and must be those of
    this class and of this config, all of them.
    """

    def _save_pretrained(self, save_directory: Path) -> None:
        assert isinstance(self, nn.Module)
        save_model(self, str(save_directory / _WEIGHTS), {"model": type(self).__name__})

    @classmethod
    def _from_pretrained(
        cls, *, model_id: str, map_location: str | torch.device = "cpu", **rest: Any
    ) -> Any:
        """`from_pretrained` after the config was read into `rest`.

        Raises:
            FileNotFoundError: if config or weights are missing.
            ValueError: if the weights are no whole safetensors file, or those of another model.
        """
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
        model = cls(**rest)
        assert isinstance(model, nn.Module)
        _fill(model, weights, path)
        return model.to(map_location).eval()


def _read(path: str, name: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file that says that it holds the weights of model `name`."""
    try:
        with safe_open(path, framework="pt") as file:
            written = (file.metadata() or {}).get("model", "another model")
            if written != name:
                raise ValueError(f"{path} holds the weights of {written}, not of {name}")
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from error


def _fill(model: nn.Module, weights: dict[str, Tensor], path: str) -> None:
    """Put `weights` into `model`, in the precision they were saved in."""
    own = model.state_dict()
    wrong = [
        f"{key} {tuple(own[key].shape) if key in own else 'unknown to the model'}"
        f" {tuple(weights[key].shape) if key in weights else 'not in the file'}"
        for key in sorted(own.keys() | weights.keys())
        if key not in own or key not in weights or own[key].shape != weights[key].shape
    ]
    if wrong:
        raise ValueError(
            f"{path} does not fit the config beside it; {len(wrong)} tensors differ (name, in the "
            f"model, in the file): {'; '.join(wrong[:5])}"
        )
    for key, tensor in model.state_dict(keep_vars=True).items():
        tensor.data = tensor.data.to(weights[key].dtype)
    model.load_state_dict(weights)
