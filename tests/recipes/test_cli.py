"""`dia train`: what it leaves, what it says, how it ends."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import json
import math
import re
import shutil
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from deep_implicit_attention import recipes, training
from deep_implicit_attention.recipes import Digits, Mnist
from deep_implicit_attention.training import ImageData, Progress, Run, _data, measure

from .conftest import invoke

Dia = Callable[..., Any]
INSTALL = "pip install -c constraints.txt -e '.[train]'"


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def pictures(folder: Path) -> list[Path]:
    """The pictures in `folder`, all of them whole."""
    found = sorted(folder.glob("*.png"))
    for path in found:
        content = path.read_bytes()
        assert content.startswith(b"\x89PNG")
        assert content.endswith(b"IEND\xaeB`\x82")
    return found


def rebuilt(config: dict[str, Any], data: ImageData) -> Any:
    """The untrained model of a saved configuration."""
    names = {field.name for field in dataclasses.fields(Digits)}
    recipe = Digits(**{name: value for name, value in config.items() if name in names})
    return recipe.model(data)


# --- a whole run ----------------------------------------------------------------------------


def test_a_run_leaves_its_files(finished: Any) -> None:
    assert finished.status == 0
    assert finished.err == ""
    assert len(pictures(finished.folder)) == 4
    others = {name for name in finished.files() if not name.endswith(".png")}
    assert others == {"config.json", "metrics.jsonl", "model.safetensors", "checkpoints"}
    assert str(finished.folder) in finished.out


def test_the_configuration_is_the_recipe(finished: Any) -> None:
    config = json.loads((finished.folder / "config.json").read_text())
    assert config.pop("recipe") == "digits"
    assert set(config) == {field.name for field in dataclasses.fields(Digits)}
    given = {"epochs": 2, "batch_size": 128, "seed": 3, "dim": 3, "widths": [4], "threads": 1}
    assert {name: config[name] for name in given} == given
    assert config["run_dir"] == str(finished.folder)


def test_the_accuracy_said_is_the_last_line_of_the_metrics(finished: Any) -> None:
    *epochs, last = metrics(finished.folder)
    assert [record["epoch"] for record in epochs] == [1, 2]
    said = re.search(r"test accuracy ([\d.]+)% \((\d+) of (\d+)\)", finished.out)
    assert said
    per_cent, right, total = (float(group) for group in said.groups())
    assert last["test_accuracy"] == pytest.approx(right / total)
    assert per_cent == pytest.approx(100 * right / total, abs=0.005)
    assert total == 360
    assert last["interrupted"] is False
    best = min(epochs, key=lambda r: r["validation_loss"])
    assert last["best_epoch"] == best["epoch"]
    assert last["validation_accuracy"] == best["validation_accuracy"]
    seconds = sum(record["seconds"] for record in epochs)
    assert last["training_seconds"] == pytest.approx(seconds, abs=0.051)
    assert "equilibrium" not in finished.out


def test_the_checkpoint_scores_what_was_said(finished: Any) -> None:
    last = metrics(finished.folder)[-1]
    config = json.loads((finished.folder / "config.json").read_text())
    data = training.digits(config["validation"], config["seed"])
    model = rebuilt(config, data)
    model.load_state_dict(load_file(finished.folder / "model.safetensors"))
    model.eval()
    right, loss = 0, 0.0
    with torch.no_grad():
        logs = model(data.test.images).log_softmax(dim=1).double()
    for row, label in zip(logs, data.test.labels.tolist(), strict=True):
        right += int(row.argmax()) == label
        loss -= row[label].item() / 360
    assert last["test_accuracy"] == pytest.approx(right / 360)
    assert last["test_loss"] == pytest.approx(loss, rel=1e-5)
    assert measure(model, data.validation).accuracy == pytest.approx(last["validation_accuracy"])
    # 17 sites with a symmetric 3×3 matrix a pair or an ordered pair; all else from the shapes.
    shapes = {name: p.numel() for name, p in model.named_parameters() if "_weight" not in name}
    assert last["parameters"] - sum(shapes.values()) in (17 * 8 * 6, 17 * 16 * 6)


def test_one_line_an_epoch(finished: Any) -> None:
    lines = [line.split() for line in finished.out.splitlines()]
    records = metrics(finished.folder)[:-1]
    shown = [line for line in lines if line and line[0] in ("1", "2")]
    assert [int(line[0]) for line in shown] == [1, 2]
    for line, record in zip(shown, records, strict=True):
        assert float(line[1]) == pytest.approx(record["train_loss"], abs=1e-4)
        assert f"{record['validation_accuracy']:.2%}" in line


# --- the same and other seeds ---------------------------------------------------------------


def test_a_seed_decides_the_run(dia: Dia, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipes._images, "_draw", lambda *_: None)

    def outcome(seed: str) -> tuple[list[dict[str, Any]], bytes]:
        torch.manual_seed(1000)
        torch.rand(int(seed) + 1)
        run = dia("digits", "--seed", seed, "--dropout", "0.1")
        assert run.status == 0
        records = [
            {k: v for k, v in record.items() if "seconds" not in k}
            for record in metrics(run.folder)
        ]
        return records, (run.folder / "model.safetensors").read_bytes()

    first, other, again = outcome("5"), outcome("6"), outcome("5")
    assert first == again
    assert first[0] != other[0]


# --- interrupts -----------------------------------------------------------------------------


def interrupt(monkeypatch: pytest.MonkeyPatch, epoch: int, batch: int) -> None:
    """Ctrl-C in the given batch of the given epoch."""
    count = 0

    def pressed(_: Progress, now: int, *__: Any) -> None:
        nonlocal count
        count += now == epoch
        if count == batch:
            raise KeyboardInterrupt

    monkeypatch.setattr(Progress, "batch", pressed)


def test_interrupt_in_the_middle_leaves_a_usable_run(
    dia: Dia, few_digits: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(monkeypatch, 3, 2)
    run = dia("digits", "--epochs", "9")
    assert run.status == 130
    *epochs, last = metrics(run.folder)
    assert [record["epoch"] for record in epochs] == [1, 2]
    assert last["interrupted"] is True
    assert len(pictures(run.folder)) == 4
    assert "test accuracy" in run.out
    data = few_digits(0, 0)
    model = rebuilt(json.loads((run.folder / "config.json").read_text()), data)
    Run(run.folder).load_weights(model)
    assert measure(model, data.test).loss == pytest.approx(last["test_loss"], rel=1e-6)
    best = epochs[last["best_epoch"] - 1]
    assert measure(model, data.validation).loss == pytest.approx(best["validation_loss"], rel=1e-5)


@pytest.mark.parametrize("earlier", [False, True])
def test_interrupt_before_the_first_epoch(
    earlier: bool, dia: Dia, finished: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if earlier:
        shutil.copytree(finished.folder, tmp_path / "run")
    interrupt(monkeypatch, 1, 1)
    run = dia("digits")
    assert run.status == 130
    assert "no epoch was finished" in run.out
    assert "test accuracy" not in run.out
    assert run.files() == {"config.json"}  # and no picture of an earlier run


@pytest.mark.parametrize("epoch", [1, 2])
@pytest.mark.parametrize("write", ["save_weights", "log"])
def test_interrupt_while_an_epoch_is_written(
    write: str, epoch: int, dia: Dia, few_digits: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every epoch is better here, and what is reported is what the checkpoint does."""
    monkeypatch.setattr(recipes._images, "_draw", lambda *_: None)
    whole, count = getattr(Run, write), 0

    def pressed(*arguments: Any, **record: Any) -> None:
        nonlocal count
        count += 1
        if count == epoch:
            raise KeyboardInterrupt
        whole(*arguments, **record)

    monkeypatch.setattr(Run, write, pressed)
    run = dia("digits", "--epochs", "6")
    assert run.status == 130
    if not (run.folder / "model.safetensors").exists():
        assert "no epoch was finished" in run.out
        return
    *epochs, last = metrics(run.folder)
    data = few_digits(0, 0)
    model = rebuilt(json.loads((run.folder / "config.json").read_text()), data)
    Run(run.folder).load_weights(model)
    measured = measure(model, data.validation)
    assert measured.accuracy == last["validation_accuracy"]
    for record in epochs:
        own = record["epoch"] == last["best_epoch"]
        assert (measured.loss == pytest.approx(record["validation_loss"], rel=1e-6)) == own


# --- what goes wrong ------------------------------------------------------------------------


def test_a_folder_without_data(dia: Dia, tmp_path: Path) -> None:
    line = dia("mnist", "--data-dir", str(tmp_path / "nothing")).complaint()
    assert str(tmp_path / "nothing") in line
    assert not (tmp_path / "run").exists()


def test_the_variable_that_names_a_folder_without_data(
    dia: Dia, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DIA_DATA", str(tmp_path / "nothing"))
    line = dia("mnist").complaint()
    assert f"{tmp_path / 'nothing'}, the folder that the variable DIA_DATA names" in line
    monkeypatch.setenv("DIA_DATA", "elsewhere")
    line = dia("mnist", "--data-dir", str(tmp_path)).complaint()
    assert f"{tmp_path}, the folder that data_dir names" in line


def test_a_folder_with_damaged_data(dia: Dia, tmp_path: Path) -> None:
    for name in _data._MNIST:
        (tmp_path / name).write_bytes(b"\0\0\x08\x01\0\0\0\x01\x07")
    line = dia("mnist", "--data-dir", str(tmp_path)).complaint()
    assert str(tmp_path / "train-images-idx3-ubyte") in line


@pytest.mark.parametrize("status", ["404", "no connection"])
def test_a_download_that_fails(
    status: str, dia: Dia, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pooch
    import requests

    def fail(*_: Any, **__: Any) -> None:
        if status == "404":
            raise requests.exceptions.HTTPError("404 Client Error: Not Found")
        raise requests.exceptions.ConnectionError("name resolution failed")

    monkeypatch.setattr(pooch, "os_cache", lambda project: tmp_path / project)
    monkeypatch.setattr(pooch, "retrieve", fail)
    line = dia("mnist").complaint()
    assert "404" in line or "name resolution" in line


@pytest.mark.parametrize(
    "flags",
    [
        "--batch-size 0",
        "--batch-size 121",
        "--epochs 0",
        "--epochs -1",
        "--learning-rate -1",
        "--smoothing 2",
        "--zoom 1",
        "--dropout 2",
        "--dim 0",
        "--strides 3",
        "--widths 4 4",
        "--widths 0",
        "--threads 100000",
        "--threads -1",
    ],
)
def test_settings_out_of_range(
    flags: str, dia: Dia, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recipes._images, "_draw", lambda *_: None)
    assert dia("digits", *flags.split()).complaint()


@pytest.mark.parametrize("recipe", ["digits", "mnist", "mnist-vit", "shakespeare"])
@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--tol -1", "tol must be above 0, got -1.0"),
        ("--tol 0", "tol must be above 0, got 0.0"),
        ("--max-iter 0", "max_iter must be at least 1, got 0"),
        ("--keep-checkpoints 0", "keep_checkpoints must be at least 1, got 0"),
    ],
)
def test_settings_out_of_range_are_called_as_their_flags(
    flags: str, said: str, recipe: str, tmp_path: Path
) -> None:
    run = invoke(tmp_path, "train", recipe, *flags.split())
    assert run.complaint() == f"dia: {said}"


@pytest.mark.parametrize("command", ["train digits", "train digits --resume", "ising", "boltzmann"])
def test_a_folder_that_is_no_run_is_left_as_it_is(
    command: str, few_digits: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "digits", few_digits)
    own = ["holiday.png", "report.html", "model.safetensors", "checkpoints/step-1.safetensors"]
    for name in own:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
    run = invoke(tmp_path, *command.split(), "--run-dir", str(tmp_path))
    assert f"{tmp_path} holds files but no run" in run.complaint()
    assert {p for p in tmp_path.rglob("*") if p.is_file()} == {tmp_path / name for name in own}


def test_a_run_folder_that_is_a_file(dia: Dia, tmp_path: Path) -> None:
    (tmp_path / "run").write_text("mine")
    assert str(tmp_path / "run") in dia("digits").complaint()
    assert (tmp_path / "run").read_text() == "mine"


def test_training_that_blows_up(dia: Dia, monkeypatch: pytest.MonkeyPatch) -> None:
    build = Digits.model

    def broken(self: Digits, data: ImageData) -> Any:
        model = build(self, data)
        torch.nn.init.constant_(model.head[1].bias, torch.nan)
        return model

    monkeypatch.setattr(Digits, "model", broken)
    assert "--learning-rate" in dia("digits").complaint()


@pytest.mark.parametrize(
    ("missing", "recipe"),
    [
        ("tyro", "digits"),
        ("accelerate", "digits"),
        ("sklearn", "digits"),
        ("rich", "digits"),
        ("matplotlib", "digits"),
        ("pooch", "mnist"),
    ],
)
def test_a_missing_library_is_named_with_its_remedy(
    missing: str, recipe: str, dia: Dia, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    run = dia(recipe)
    assert run.status == 1
    (line,) = run.err.splitlines()
    assert INSTALL in line
    assert missing in line
    assert not run.folder.exists()


# --- mnist ----------------------------------------------------------------------------------


def test_mnist_from_a_folder(dia: Dia, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    sums = {}
    for part, count in (("train", 60), ("t10k", 20)):
        for name, shape in (("images-idx3", (count, 28, 28)), ("labels-idx1", (count,))):
            array = random.integers(0, 10, shape, dtype=np.uint8)
            sizes = struct.pack(f">{len(shape)}I", *shape)
            content = bytes([0, 0, 8, len(shape)]) + sizes + array.tobytes()
            file = f"{part}-{name}-ubyte"
            sums[file] = hashlib.sha256(content).hexdigest()
            (tmp_path / f"{file}.gz").write_bytes(gzip.compress(content))
    monkeypatch.setattr(_data, "_MNIST", sums)
    monkeypatch.setattr(recipes._images, "_draw", lambda *_: None)
    flags = "--widths 2 2 2 --strides 2 2 2 --batch-size 16 --validation 0.25 --epochs 1"
    run = dia("mnist", "--data-dir", str(tmp_path), *flags.split())
    assert run.status == 0, run.err
    assert "45 training, 15 validation and 20 test images" in run.out
    assert "17 sites of 3 components" in run.out  # 28 -> 14 -> 7 -> 4, and the token
    config = json.loads((run.folder / "config.json").read_text())
    assert (config["recipe"], config["data_dir"]) == ("mnist", str(tmp_path))
    first = metrics(run.folder)[0]["train_loss"]
    monkeypatch.setenv("DIA_DATA", str(tmp_path))
    again = dia("mnist", *flags.split())
    assert again.status == 0
    assert metrics(again.folder)[0]["train_loss"] == first


def test_settings_out_of_range_leave_an_earlier_run_as_it_was(dia: Dia) -> None:
    folder = dia("digits", "--epochs", "1").folder
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    assert "widths must be at least 1, got 0" in dia("digits", "--widths", "0").complaint()
    assert before == {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}


def test_a_run_without_a_finite_loss_says_what_it_leaves(dia: Dia) -> None:
    run = dia("digits", "--epochs", "1", "--learning-rate", "1e38", "--batch-size", "120")
    assert run.status == 1
    assert "no evaluation had a finite loss" in run.out
    assert "metrics and checkpoints are in" in run.out
    assert {"metrics.jsonl", "checkpoints"} <= run.files()


@pytest.mark.parametrize(
    ("residual", "solved"), [(9e-4, True), (1e-3, True), (2e-3, False), (math.nan, False)]
)
def test_a_residual_beyond_the_tolerance_is_no_equilibrium(residual: float, solved: bool) -> None:
    result = {"test_accuracy": 0.5, "best_epoch": 1, "training_seconds": 1.0}
    result |= {"test_solver_steps": 3.0, "test_residual": residual}
    lines = recipes._images._report(recipes.Digits(tol=1e-3), result, 360)
    assert ("not every test image reached equilibrium" in lines[-1]) is not solved


def test_threads(dia: Dia, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    for threads in ("1", "0"):  # 0 leaves it to PyTorch
        assert "widths" in dia("digits", "--threads", threads, "--widths", "0").complaint()
    assert asked == [1]


def test_mnist_is_as_small_as_it_says() -> None:
    split = training.Split(torch.zeros(1, 1, 28, 28), torch.zeros(1, dtype=torch.long))
    model = Mnist().model(ImageData(split, split, split, 0.0))
    assert 20_000 < model.count_params() <= 26_000
    assert Mnist().epochs == 20
