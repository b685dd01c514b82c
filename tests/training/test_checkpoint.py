"""Checkpoint files: whole or absent, refused when damaged or foreign, pruned as promised."""

from __future__ import annotations

import errno
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from deep_implicit_attention.training import Checkpoints, Run
from deep_implicit_attention.training._checkpoint import (
    load_model,
    load_optimizer,
    optimizer_tensors,
    whole_tensors,
)

Build = Callable[..., Any]
PARTS = {"model": {"a.b": torch.tensor([1.0, 2.0])}, "random": {"0/cpu": torch.get_rng_state()}}


@pytest.fixture
def checkpoints(tmp_path: Path) -> Checkpoints:
    return Checkpoints(tmp_path / "checkpoints")


def test_what_is_written_is_read(checkpoints: Checkpoints) -> None:
    state = {"step": 3, "best": float("inf"), "sum": 0.1 + 0.2, "names": ["ä"], "nothing": None}
    checkpoints.write(3, PARTS, state)
    found = checkpoints.read(3)
    assert found.state == state
    assert found.parts.keys() == PARTS.keys()
    for part, tensors in PARTS.items():
        assert found.parts[part].keys() == tensors.keys()
        assert all(torch.equal(found.parts[part][k], v) for k, v in tensors.items())


def test_the_newest_and_the_best_are_kept(checkpoints: Checkpoints) -> None:
    for step in (5, 10, 100, 15, 20):
        checkpoints.write(step, PARTS, {})
    assert checkpoints.steps() == [5, 10, 15, 20, 100]
    checkpoints.prune(2, 10)
    assert checkpoints.steps() == [10, 20, 100]
    checkpoints.prune(2, 100)
    assert checkpoints.steps() == [20, 100]
    checkpoints.prune(5, None)
    assert checkpoints.steps() == [20, 100]


def test_clear_leaves_what_is_not_its_own(checkpoints: Checkpoints) -> None:
    checkpoints.clear()
    checkpoints.write(5, PARTS, {})
    (checkpoints.folder / "step-00000010.safetensors.part").write_bytes(b"half")
    (checkpoints.folder / "notes.txt").write_text("mine")
    checkpoints.clear()
    assert [p.name for p in checkpoints.folder.iterdir()] == ["notes.txt"]
    (checkpoints.folder / "notes.txt").unlink()
    checkpoints.clear()
    assert not checkpoints.folder.exists()


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_crash_while_writing_leaves_the_ones_before(
    failing: str, checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints.write(5, PARTS, {"step": 5})

    def crash(*_: object) -> None:
        raise OSError("power cut")

    with monkeypatch.context() as patch:
        patch.setattr(os, failing, crash)
        for step in (5, 10):
            with pytest.raises(OSError, match="power cut"):
                checkpoints.write(step, PARTS, {"step": -1})
    assert checkpoints.steps() == [5]
    assert checkpoints.read(5).state == {"step": 5}


class Trap:
    """Runs when it is unpickled."""

    def __reduce__(self) -> tuple:
        return os.mkdir, ("trapped",)


@pytest.mark.parametrize("case", ["truncated", "header only", "empty", "garbage", "pickle"])
def test_a_damaged_file(
    case: str, checkpoints: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    checkpoints.write(5, PARTS, {})
    path = checkpoints.path(5)
    content = path.read_bytes()
    broken = {
        "truncated": content[:-1],
        "header only": content[:40],
        "empty": b"",
        "garbage": b"\xff" * 500,
        "pickle": pickle.dumps(Trap()),
    }
    path.write_bytes(broken[case])
    with pytest.raises(ValueError, match=r"step-00000005\.safetensors is damaged.*delete it"):
        checkpoints.read(5)
    assert not (tmp_path / "trapped").exists()


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}, {"training": '{"format": "x"}'}])
def test_weights_are_no_checkpoint(
    metadata: dict[str, str] | None, checkpoints: Checkpoints
) -> None:
    checkpoints.folder.mkdir()
    save_file({"weight": torch.ones(2)}, checkpoints.path(5), metadata)
    with pytest.raises(ValueError, match="is not a checkpoint of a training"):
        checkpoints.read(5)


def test_a_checkpoint_that_cannot_be_read_or_has_strange_metadata(
    checkpoints: Checkpoints,
) -> None:
    path = checkpoints.path(5)
    path.mkdir(parents=True)
    with pytest.raises(OSError, match=os.strerror(errno.EISDIR)) as caught:
        checkpoints.read(5)
    assert caught.value.filename == str(path)
    path.rmdir()
    save_file({"weight": torch.ones(2)}, path, {"training": "[]"})
    with pytest.raises(ValueError, match=r"is damaged.*must be an object, got list; delete it"):
        checkpoints.read(5)


def test_tied_weights_are_saved_twice() -> None:
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    model[1].weight = model[0].weight
    state = whole_tensors(model.state_dict())
    assert len({value.data_ptr() for value in state.values()}) == 2
    torch.nn.init.zeros_(model[0].weight)
    load_model(model, state, Path("x"))
    assert model[1].weight is model[0].weight
    assert torch.equal(model[0].weight, state["0.weight"])


def test_weights_in_another_order_of_memory_are_saved(checkpoints: Checkpoints) -> None:
    model = nn.Conv2d(3, 4, 2).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    assert not model.weight.is_contiguous()
    checkpoints.write(1, {"model": whole_tensors(model.state_dict())}, {})
    assert torch.equal(checkpoints.read(1).parts["model"]["weight"], model.weight)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("1.bias"), r"1\.bias is missing"),
        (lambda s: s.update(extra=torch.ones(1)), "extra is unknown"),
        (
            lambda s: s.update({"0.weight": torch.ones(4, 3)}),
            r"\(4, 3\), expected float32 \(2, 3\)",
        ),
        (lambda s: s.update({"0.weight": s["0.weight"].double()}), r"float64 .*expected float32"),
        (lambda s: s.clear(), r"0\.weight is missing.* and 1 more"),
    ],
)
def test_weights_of_another_model(change: Callable[[dict], Any], message: str) -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = whole_tensors(model.state_dict())
    torch.nn.init.ones_(state["1.weight"])
    change(state)
    with pytest.raises(ValueError, match=rf"x\.safetensors is of another model: .*{message}"):
        load_model(model, state, Path("x.safetensors"))
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


@pytest.mark.parametrize(
    "kind",
    [
        lambda p: torch.optim.AdamW(p, lr=0.1, amsgrad=True),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        lambda p: torch.optim.SGD(p, lr=0.1),
        lambda p: torch.optim.RAdam(p, lr=0.1),
    ],
)
def test_an_optimizer_goes_on_bit_for_bit(kind: Callable[..., torch.optim.Optimizer]) -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 3)

    def build() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
        groups = [{"params": model[1].parameters()}, {"params": model[0].parameters(), "lr": 0.2}]
        model.register_parameter("unused", nn.Parameter(torch.ones(1)))
        return model, kind(groups)

    def steps(model: nn.Module, optimizer: torch.optim.Optimizer, count: int) -> None:
        for _ in range(count):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()

    model, optimizer = build()
    steps(model, optimizer, 3)
    weights, state = whole_tensors(model.state_dict()), optimizer_tensors(model, optimizer)
    steps(model, optimizer, 3)
    other, second = build()
    load_model(other, weights, Path("x"))
    load_optimizer(other, second, state, Path("x"))
    steps(other, second, 3)
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    with pytest.raises(ValueError, match=r"another model.*2\.weight"):
        load_optimizer(other, second, {"2.weight/exp_avg": torch.ones(1)}, Path("x"))


def test_the_file_holds_no_pickle(regression: Build, trainer: Build, tmp_path: Path) -> None:
    trainer(regression(), ema=0.5).train()
    checkpoints = Run(tmp_path).checkpoints
    content = checkpoints.path(12).read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    assert {name.split("/")[0] for name in header if name != "__metadata__"} == {
        *("model", "average", "optimizer", "random", "generator", "task")
    }
    assert set(json.loads(header["__metadata__"]["training"])) == {"format", "state"}
