"""The folder of a run survives crashes, and says what is wrong with it."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save
from torch import nn

from deep_implicit_attention.models import DeepImplicitAttentionTransformer
from deep_implicit_attention.training import Run, seed_everything

RECORDS = [
    {"epoch": 1, "loss": 0.1 + 0.2, "tiny": 5e-324, "flag": True},
    {"epoch": 2, "name": "zwölf\nLinien ✓", "nothing": None, "list": [1, 2.5]},
]


def layer(seed: int, width: int = 3) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(width, 2), nn.BatchNorm1d(2))


def same(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    run = Run(tmp_path / "a" / "deep" / "folder")
    run.start({"recipe": "x", "epochs": 3})
    return run


def test_weights_come_back_bit_for_bit(run: Run) -> None:
    saved, other = layer(0), layer(1)
    saved(torch.randn(5, 3))  # moves the running statistics, which are not parameters
    saved[0].weight.data = torch.randn(3, 2).T  # not contiguous
    run.save_weights(saved, 1)
    assert not same(saved, other)
    run.load_weights(other)
    assert same(saved, other)


def test_metrics_and_configuration_round_trip(run: Run) -> None:
    assert run.metrics() == []
    for record in RECORDS:
        run.log(**record)
    assert run.metrics() == RECORDS
    lines = (run.folder / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == RECORDS
    assert run.config() == {"recipe": "x", "epochs": 3}
    assert Run(run.folder).metrics() == RECORDS


def test_a_line_of_metrics_that_is_damaged_is_named(run: Run) -> None:
    assert run.last_metrics() is None
    for record in RECORDS:
        run.log(**record)
    assert run.last_metrics() == RECORDS[-1]
    path = run.folder / "metrics.jsonl"
    for torn in ('{"epoch": 3, "st', "[1]", "7"):
        path.write_text("\n".join(json.dumps(record) for record in RECORDS) + "\n" + torn)
        assert run.last_metrics() is None
        with pytest.raises(ValueError, match=r"metrics\.jsonl is damaged: line 3: ") as caught:
            run.metrics()
        assert str(path) in str(caught.value)


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_crash_while_writing_leaves_the_old_files(
    run: Run, failing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, other = layer(0), layer(1)
    run.save_weights(old, 1)

    def crash(*_: object) -> None:
        raise OSError("disk full")

    target = (os, "fsync") if failing == "fsync" else (Path, "replace")
    with monkeypatch.context() as patch:
        patch.setattr(*target, crash)
        with pytest.raises(OSError, match="disk full"):
            run.save_weights(layer(2), 1)
    run.load_weights(other)
    assert same(old, other)
    run.save_weights(layer(2), 1)  # what the crash left behind is not in the way
    run.load_weights(other)
    assert same(layer(2), other)
    assert {p.name for p in run.folder.iterdir()} == {"config.json", "model.safetensors"}


def test_a_full_disk_is_told_with_the_name_of_the_file(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    writes = {
        "model.safetensors": lambda: run.save_weights(layer(0), 1),
        "metrics.jsonl": lambda: run.log(epoch=1),
    }
    for name, write in writes.items():
        with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)) as caught:
            write()
        assert caught.value.filename == str(run.folder / name)
    assert not list(run.folder.glob("*.part"))


def test_a_full_disk_leaves_the_mark_of_a_run_that_is_started_anew(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (run.folder / "notes.txt").write_text("mine")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
            run.start({})
    run.start({})  # notes alone would be a folder of something else
    assert {p.name for p in run.folder.iterdir()} == {"config.json", "notes.txt"}


def test_weights_that_cannot_be_read_or_say_nothing_of_their_step(run: Run) -> None:
    path = run.folder / "model.safetensors"
    path.mkdir()
    for read in (run.saved_step, lambda: run.load_weights(layer(0))):
        with pytest.raises(OSError, match=os.strerror(errno.EISDIR)) as caught:
            read()
        assert caught.value.filename == str(path)
    path.rmdir()
    for saved in ("null", "half"):
        path.write_bytes(save({}, {"saved": saved}))
        with pytest.raises(ValueError, match=r"model\.safetensors is damaged: .*; delete it"):
            run.saved_step()


def test_a_crash_in_the_first_write_leaves_no_checkpoint(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(_: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", crash)
    with pytest.raises(OSError, match="disk full"):
        run.save_weights(layer(0), 1)
    assert not (run.folder / "model.safetensors").exists()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors") as caught:
        run.load_weights(layer(1))
    assert str(run.folder) in str(caught.value)


@pytest.mark.parametrize("case", ["other model", "truncated", "garbage", "empty"])
def test_weights_that_do_not_fit(run: Run, case: str) -> None:
    run.save_weights(layer(0), 1)
    path = run.folder / "model.safetensors"
    content = path.read_bytes()
    broken = {"truncated": content[:-20], "garbage": b"\xff" * 200, "empty": b""}
    path.write_bytes(broken.get(case, content))
    with pytest.raises(ValueError, match=r"model\.safetensors") as caught:
        run.load_weights(layer(1, width=4 if case == "other model" else 3))
    told = str(caught.value)
    assert str(path) in told
    assert "\n" not in told
    assert ("is of another model" if case == "other model" else "is damaged") in told


def test_start_removes_metrics_and_weights_of_an_earlier_run(run: Run) -> None:
    run.log(epoch=1)
    run.save_weights(layer(0), 1)
    (run.folder / "notes.txt").write_text("mine")
    run.start({"recipe": "y"})
    assert {p.name for p in run.folder.iterdir()} == {"config.json", "notes.txt"}
    assert run.metrics() == []
    assert run.config() == {"recipe": "y"}


MADE = [
    *("learning_curves.png", "confusion_matrix.png", "convergence.png", "convergence_2.png"),
    *("couplings.png", "couplings_12.png", "ising.png", "completions.png", "samples.png"),
    *("couplings.gif", "report.html", "vocabulary.json", "sample.txt"),
    *("machine.npz", "answers.npz", "report.html.part"),
]
OWN = ["my.npz", "holiday.png", "index.html", "my.gif", "report2.html", "couplings_of_mine.png"]


def test_start_removes_what_runs_leave_and_nothing_else(run: Run) -> None:
    for name in (*MADE, *OWN):
        (run.folder / name).write_text("drawn")
    run.start({"recipe": "y"})
    assert {p.name for p in run.folder.iterdir()} == {"config.json", *OWN}


@pytest.mark.parametrize(
    "name", ["model.safetensors", "metrics.jsonl", "checkpoints/step-1.safetensors", *MADE, *OWN]
)
def test_start_leaves_a_folder_that_is_no_run_as_it_is(name: str, tmp_path: Path) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine")
    with pytest.raises(ValueError, match=r"files but no run \(no config\.json\)") as caught:
        Run(tmp_path).start({})
    assert str(tmp_path) in str(caught.value)
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == [tmp_path / name]
    assert (tmp_path / name).read_text() == "mine"


def test_start_leaves_a_pretrained_model_as_it_is(tmp_path: Path) -> None:
    model = DeepImplicitAttentionTransformer(num_tokens=3, max_seq_len=4, dim=4, heads=1)
    model.save_pretrained(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert {"config.json", "model.safetensors"} <= {path.name for path in before}
    with pytest.raises(ValueError, match=r"no run \(model\.safetensors but no metrics\.jsonl\)"):
        Run(tmp_path).start({})
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_start_in_a_folder_with_hidden_files(tmp_path: Path) -> None:
    (tmp_path / ".gitignore").write_text("*")
    Run(tmp_path).start({})
    assert {p.name for p in tmp_path.iterdir()} == {".gitignore", "config.json"}


@pytest.mark.parametrize("earlier", [False, True])
@pytest.mark.parametrize("where", ["fsync", "replace", "unlink"])
def test_start_after_a_crash_in_start(
    where: str, earlier: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the crash left behind is no run, but may become one."""
    run = Run(tmp_path / "run")
    if earlier:
        run.start({"recipe": "old"})
        run.log(epoch=1)
        run.save_weights(layer(0), 1)
    whole, left = getattr(os if where == "fsync" else Path, where), 1 + (where == "replace")

    def crash(*arguments: Any, **options: Any) -> Any:
        nonlocal left
        left -= 1
        if left == 0 or not earlier:
            raise OSError("killed")
        return whole(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os if where == "fsync" else Path, where, crash)
        with pytest.raises(OSError, match="killed"):
            run.start({"recipe": "new"})
    assert not run.is_started()
    run.start({"recipe": "new"})
    assert {p.name for p in run.folder.iterdir()} == {"config.json"}
    assert run.config() == {"recipe": "new"}


def test_a_seed_fixes_the_numbers() -> None:
    draws = []
    for seed in (3, 3, 4):
        seed_everything(seed)
        draws.append(torch.rand(5))
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert torch.are_deterministic_algorithms_enabled()
