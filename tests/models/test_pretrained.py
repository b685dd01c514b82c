"""Saving and loading: the same model comes back, and nothing else is taken for it."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from deep_implicit_attention.models import (
    DeepImplicitAttentionTransformer,
    DeepImplicitAttentionViT,
)
from deep_implicit_attention.models._pretrained import Pretrained


class Lookup(Pretrained, torch.nn.Module):
    """Another model."""

    def __init__(self, *, rows: int = 3) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(rows, 2)


def build(**changes: Any) -> DeepImplicitAttentionTransformer:
    torch.manual_seed(0)
    options = {"num_tokens": 7, "max_seq_len": 6, "dim": 8, "heads": 2}
    return DeepImplicitAttentionTransformer(**{**options, **changes})


def test_every_tensor_keeps_its_precision(tmp_path: Path) -> None:
    model = build().double()
    model.tokens.bfloat16()
    model.save_pretrained(tmp_path)
    again = DeepImplicitAttentionTransformer.from_pretrained(tmp_path)
    for (name, saved), loaded in zip(model.named_parameters(), again.parameters(), strict=True):
        assert loaded.dtype == saved.dtype, name
        assert torch.equal(loaded, saved)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"depth": 2, "attention": "vector-spin", "positions": "rotary", "heads": 2},
        {"weight_norm": True, "positions": "sinusoidal", "dropout": 0.2},
        {"steps": 3, "solver": "picard", "solver_fwd_damping": 0.1, "solver_bwd_tol": 1e-6},
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_round_trip(tmp_path: Path, changes: dict, dtype: torch.dtype) -> None:
    model = build(**changes).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} >= {"config.json", "model.safetensors"}
    again = DeepImplicitAttentionTransformer.from_pretrained(tmp_path)
    ids = torch.randint(7, (2, 6))
    with torch.no_grad():
        logits = model(ids)
        assert torch.equal(again(ids), logits)
    assert logits.dtype == dtype
    assert not again.training
    assert repr(again) == repr(model)
    config = json.loads((tmp_path / "config.json").read_text())
    for name, value in changes.items():
        assert config[name] == value


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    Lookup().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="weights of Lookup, not of DeepImplicit"):
        DeepImplicitAttentionTransformer.from_pretrained(tmp_path)
    build().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"weights of DeepImplicit.*, not of Lookup"):
        Lookup.from_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    save_file(weights, tmp_path / "model.safetensors")  # from who knows where
    with pytest.raises(ValueError, match="weights of another model"):
        DeepImplicitAttentionTransformer.from_pretrained(tmp_path)


@pytest.mark.parametrize("kept", [0.0, 0.001, 0.5, 0.99])
def test_a_truncated_checkpoint_is_refused(tmp_path: Path, kept: float) -> None:
    build().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        DeepImplicitAttentionTransformer.from_pretrained(tmp_path)


def test_weights_that_do_not_fit_the_config_are_refused(tmp_path: Path) -> None:
    build().save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    for changes, named in (
        ({"dim": 16}, r"expand.weight \(64, 16\) \(32, 8\)"),
        ({"depth": 2}, "blocks.1.* not in the file"),
        ({"positions": "rotary"}, "positions unknown to the model"),
    ):
        written = json.loads(config.read_text())
        config.write_text(json.dumps({**written, **changes}))
        with pytest.raises(ValueError, match=named):
            DeepImplicitAttentionTransformer.from_pretrained(tmp_path)
        config.write_text(json.dumps(written))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"config\.json is damaged: "),
        ("[1]", r"config\.json must hold a JSON object, got list"),
        ('{"max_seq_len": 6, "dim": 8}', "makes no DeepImplicit.* argument: 'num_tokens'"),
        ('{"num_tokens": 7, "max_seq_len": 6, "dim": 8, "foo": 1}', "makes no .* option 'foo'"),
        ('{"num_tokens": 7, "max_seq_len": 6, "dim": -8}', "makes no DeepImplicit.* dim must be"),
    ],
)
def test_a_damaged_config_is_refused(tmp_path: Path, content: str, message: str) -> None:
    build().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(content)
    with pytest.raises((TypeError, ValueError), match=message) as raised:
        DeepImplicitAttentionTransformer.from_pretrained(tmp_path)
    assert str(tmp_path) in str(raised.value)


def test_arguments_beside_the_config(tmp_path: Path) -> None:
    build().save_pretrained(tmp_path)
    other = DeepImplicitAttentionTransformer.from_pretrained(tmp_path, solver_fwd_tol=1e-2)
    assert "solver_fwd_tol=0.01" in repr(other.blocks[0])
    with pytest.raises(TypeError, match=r"with the arguments given .* unknown option 'foo'"):
        DeepImplicitAttentionTransformer.from_pretrained(tmp_path, foo=1)


def test_a_folder_that_does_not_exist(tmp_path: Path) -> None:
    for name in (str(tmp_path / "none"), "./none", "some/where/none", "~/none"):
        with pytest.raises(FileNotFoundError, match=f"there is no folder '{name}'"):
            DeepImplicitAttentionTransformer.from_pretrained(name)
    with pytest.raises(OSError) as raised:  # noqa: PT011 (its kind is huggingface_hub's)
        DeepImplicitAttentionTransformer.from_pretrained(
            "runs/none", local_files_only=True, cache_dir=tmp_path
        )
    assert raised.value.__notes__ == [
        "There is no folder runs/none here, so it was looked for on the Hub."
    ]


def test_missing_files_and_pickles_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors is missing"):
        DeepImplicitAttentionTransformer.from_pretrained(tmp_path)
    build().save_pretrained(tmp_path)
    (tmp_path / "config.json").rename(tmp_path / "config.txt")
    with pytest.raises(FileNotFoundError, match=r"config\.json is missing"):
        DeepImplicitAttentionTransformer.from_pretrained(tmp_path)
    (tmp_path / "config.txt").rename(tmp_path / "config.json")
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps({"table": 1}))
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors is missing"):
        DeepImplicitAttentionTransformer.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(pickle.dumps({"table": 1}))
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        DeepImplicitAttentionTransformer.from_pretrained(tmp_path)


def test_push_to_hub_uploads_what_save_pretrained_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import hub_mixin

    uploaded: dict[str, set[str]] = {}

    class Api:
        def __init__(self, **options: Any) -> None:
            pass

        def create_repo(self, repo_id: str, **options: Any) -> Any:
            return type("Repo", (), {"repo_id": repo_id})()

        def upload_folder(self, *, repo_id: str, folder_path: Any, **options: Any) -> str:
            uploaded[repo_id] = {path.name for path in Path(folder_path).iterdir()}
            return "done"

    monkeypatch.setattr(hub_mixin, "HfApi", Api)
    build().push_to_hub("someone/model")
    assert uploaded["someone/model"] >= {"config.json", "model.safetensors"}
    assert not any(name.endswith((".bin", ".pt", ".pkl")) for name in uploaded["someone/model"])


def test_numbers_of_other_libraries_are_saved_as_numbers(tmp_path: Path) -> None:
    changes = {
        "heads": np.int64(4), "rotary_base": np.float32(100), "positions": "rotary",
        "dim": np.uint8(16), "depth": np.int32(2), "weight_norm": np.bool_(True),
        "dropout": np.float64(0.25), "solver_fwd_tol": np.float64(1e-4),
    }  # fmt: skip
    model = build(**changes).eval()
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert {name: config[name] for name in changes} == {
        "heads": 4,
        "rotary_base": 100.0,
        "positions": "rotary",
        "dim": 16,
        "depth": 2,
        "weight_norm": True,
        "dropout": 0.25,
        "solver_fwd_tol": 1e-4,
    }
    again = DeepImplicitAttentionTransformer.from_pretrained(tmp_path)
    ids = torch.randint(7, (2, 6))
    torch.testing.assert_close(again(ids), model(ids), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("solver_fwd_tol", np.float32(0.25)),
        ("solver_fwd_max_iter", np.int64(40)),
        ("steps", np.int32(3)),
        ("solver_bwd_tol", np.float16(0.5)),
    ],
)
def test_options_of_the_layers_too(tmp_path: Path, name: str, value: np.generic) -> None:
    model = build(**{name: value}).eval()
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())[name] == value.item()
    again = DeepImplicitAttentionTransformer.from_pretrained(tmp_path)
    ids = torch.randint(7, (2, 6))
    torch.testing.assert_close(again(ids), model(ids), rtol=0, atol=0)


def test_lists_of_such_numbers_too(tmp_path: Path) -> None:
    options = {"image_size": 8, "patch_size": 4, "num_classes": 3, "dim": 6, "channels": 1}
    widths = tuple(np.array([4, 6]))
    DeepImplicitAttentionViT(**options, stem="convolution", widths=widths).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["widths"] == [4, 6]
    assert DeepImplicitAttentionViT.from_pretrained(tmp_path).stem[0].out_channels == 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_what_is_computed_and_not_saved_has_the_precision_of_the_weights(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    model = build(positions="sinusoidal").to(dtype).eval()
    model.save_pretrained(tmp_path)
    again = DeepImplicitAttentionTransformer.from_pretrained(tmp_path)
    assert again.positions.dtype == dtype
    ids = torch.randint(7, (2, 6))
    torch.testing.assert_close(again(ids), model(ids), rtol=0, atol=1e-6)


def test_weights_that_are_no_real_numbers_are_refused(tmp_path: Path) -> None:
    build().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    for dtype in (torch.int32, torch.bool, torch.complex64):
        tokens = weights["tokens.weight"].to(dtype)
        metadata = {"model": "DeepImplicitAttentionTransformer"}
        save_file({**weights, "tokens.weight": tokens}, path, metadata)
        with pytest.raises(ValueError, match=rf"tokens.weight torch.float32 {dtype}"):
            DeepImplicitAttentionTransformer.from_pretrained(tmp_path)


def test_blocks_that_share_their_weights_come_back_as_equal_ones(tmp_path: Path) -> None:
    model = build(depth=3, weight_norm=True).eval()
    model.blocks[2] = model.blocks[0]
    model.save_pretrained(tmp_path)
    loaded = DeepImplicitAttentionTransformer.from_pretrained(tmp_path)
    ids = torch.tensor([[1, 6, 2, 0, 5]])
    assert torch.equal(loaded(ids), model(ids))
