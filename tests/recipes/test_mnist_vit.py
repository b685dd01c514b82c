"""`dia train mnist-vit` on a few small images: what it leaves, resumes and refuses."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from deep_implicit_attention import recipes, training
from deep_implicit_attention.recipes import MnistViT
from deep_implicit_attention.training import ImageData, Progress, Run, Split

from .conftest import Outcome, invoke
from .reports import Page, unpacked
from .test_resume import assert_same_end, records

TINY = (
    "--epochs 2 --batch-size 20 --patch-size 4 --dim 6 --widths 6 6 --learning-rate 0.02 "
    "--coupling-rate 0.5 --shift 0 --rotation 0 --zoom 0 --ema None --seed 3"
)
# Every mechanism, stem, pooling and kind of positions at least once.
VARIANTS = {
    "mean-field": "--positions none --solver broyden",
    "mlp-mixer": "--depth 2 --weight-norm --positions sinusoidal --widths",
    "adaptive-tap": "--positions learned",
    "softmax": "--heads 2 --dim 8 --positions rotary --dropout 0.1 --epochs 16",
    "vector-spin": "--heads 1 --depth 2 --pooling mean --solver picard",
}
Train = Callable[..., Outcome]


@pytest.fixture(scope="module")
def data() -> ImageData:
    """Images of 8 × 8 pixels with a bright quarter, which is the label."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(240) % 4
    images = 0.5 * torch.randn(240, 1, 8, 8, generator=generator)
    for label in range(4):
        row, column = 4 * (label // 2), 4 * (label % 2)
        images[labels == label, :, row : row + 4, column : column + 4] += 2
    every = Split(images, labels)
    parts = [every[torch.arange(*ends)] for ends in ((0, 160), (160, 200), (200, 240))]
    return ImageData(*parts, background=0.0)


@pytest.fixture
def train(data: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Train:
    """Call `dia train mnist-vit *flags` with those images in the place of MNIST."""
    monkeypatch.setattr(training, "mnist", lambda *_, **__: data)
    folder = tmp_path / "run"

    def call(*flags: str) -> Outcome:
        own = ["--run-dir", str(folder)]
        return invoke(folder, "train", "mnist-vit", *TINY.split(), *own, *flags)

    return call


def scores(folder: Path, images: Tensor, data: ImageData) -> Tensor:
    """What the weights in a run's folder say."""
    recipe = recipes.load_recipe(Run(folder))
    model = recipe.model(data).eval()
    Run(folder).load_weights(model)
    with torch.no_grad():
        return model(images)


@pytest.mark.quick("mean-field")
@pytest.mark.parametrize("attention", VARIANTS)
def test_learns_what_can_be_learned(attention: str, train: Train, data: ImageData) -> None:
    run = train("--attention", attention, "--epochs", "8", *VARIANTS[attention].split())
    assert run.status == 0, run.err
    *epochs, last = records(run.folder)
    found = scores(run.folder, data.test.images, data)
    assert last["test_accuracy"] > 0.9  # chance is 0.25
    right = (found.argmax(dim=1) == data.test.labels).double().mean().item()
    assert last["test_accuracy"] == pytest.approx(right)
    assert last["test_loss"] == pytest.approx(F.cross_entropy(found, data.test.labels).item(), 1e-4)
    best = min(epochs, key=lambda record: record["validation_loss"])
    assert (last["best_epoch"], last["interrupted"]) == (best["epoch"], False)
    # Adaptive TAP is a closed form, which iterates nothing.
    radii = [record["spectral_radius"] for record in epochs]
    assert set(radii) == {0.0} if attention == "adaptive-tap" else 0 < min(radii) < max(radii) < 1
    assert not any("signs_of_divergence" in record for record in epochs)
    assert last["test_residual"] <= 1e-3
    sites = 4 + ("--pooling mean" not in VARIANTS[attention])
    assert "160 training, 40 validation and 40 test images" in run.out
    assert f"{sites} sites of {8 if attention == 'softmax' else 6} components" in run.out
    blocks = ["_1", "_2"] if "--depth 2" in VARIANTS[attention] else [""]
    pictures = {f"{name}{block}.png" for name in ("convergence", "couplings") for block in blocks}
    others = {"config.json", "metrics.jsonl", "model.safetensors", "checkpoints"}
    assert run.files() == pictures | others | {"learning_curves.png", "confusion_matrix.png"}
    # And from the folder alone.
    again = invoke(run.folder, "evaluate", str(run.folder))
    assert again.status == 0, again.err
    shown = {line.split()[0]: line.split()[1:] for line in again.out.splitlines()}
    assert float(shown["test_loss"][0]) == pytest.approx(last["test_loss"], rel=1e-4)


def test_settings_reach_the_model(data: ImageData) -> None:
    recipe = MnistViT(
        attention="vector-spin", patch_size=2, dim=12, depth=3, heads=3, widths=(5, 6, 7),
        pooling="mean", positions="rotary", dropout=0.3, weight_norm=True, solver="picard",
        tol=0.02, max_iter=9,
    )  # fmt: skip
    config = recipe.model(data)._hub_mixin_config  # what `save_pretrained` keeps
    names = ("attention", "patch_size", "dim", "depth", "heads", "widths", "pooling", "positions")
    for name in (*names, "dropout", "weight_norm", "solver"):
        assert config[name] == getattr(recipe, name), name
    assert (config["image_size"], config["channels"], config["stem"]) == (8, 1, "convolution")
    for direction in ("fwd", "bwd"):
        assert config[f"solver_{direction}_tol"] == 0.02
        assert config[f"solver_{direction}_max_iter"] == 9
    assert MnistViT(patch_size=4, widths=()).model(data)._hub_mixin_config["stem"] == "patch"


def test_as_it_stands_it_is_the_model_of_the_example() -> None:
    blank = torch.zeros(1, 1, 28, 28)
    split = Split(blank, torch.zeros(1, dtype=torch.long))
    model = MnistViT().model(ImageData(split, split, split, 0.0))
    assert model.count_params() == 23_970 <= 26_000
    assert model.sites(blank).shape == (1, 17, 10)
    schedule = MnistViT().schedule()
    from examples import mnist as example

    for name in ("shift", "rotation", "zoom", "smoothing", "weight_decay", "batch_size"):
        assert getattr(schedule, name) == getattr(example.MOVES, name), name
    assert schedule.learning_rate == example.RATE
    assert schedule.learning_rate * schedule.coupling_rate == pytest.approx(example.BLOCK_RATE)
    assert schedule.epochs == 20


@pytest.mark.slow
@pytest.mark.parametrize("flags", ["--dropout 0.2 --attention softmax --dim 8", "--ema 0.8"])
def test_interrupted_and_resumed(
    flags: str, train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recipes._images, "_draw", lambda *_: None)
    every = [*flags.split(), "--epochs", "4", "--shift", "1", "--checkpoint-every", "3"]
    assert train(*every).status == 0
    (tmp_path / "run").rename(tmp_path / "whole")
    seen = 0

    def pressed(*_: Any) -> None:
        nonlocal seen
        seen += 1
        if seen == 21:  # in the third epoch of eight batches
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Progress, "batch", pressed)
        assert train(*every).status == 130
    assert train(*every, "--resume").status == 0
    assert_same_end(tmp_path / "run", tmp_path / "whole")


def test_ends_early_where_nothing_is_learned_any_more(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recipes._images, "_draw", lambda *_: None)
    flags = "--learning-rate 0 --weight-decay 0 --patience 2 --epochs 9 --widths"  # nothing moves
    run = train(*flags.split())
    *epochs, last = records(run.folder)
    assert [record["epoch"] for record in epochs] == [1, 2, 3]
    assert (last["ending"], last["best_epoch"]) == ("early", 1)
    assert "the training ends early" in run.out


@pytest.mark.parametrize("attention", ["mean-field", "softmax"])
def test_divergence_is_told_before_the_loss_is_no_number(attention: str, train: Train) -> None:
    flags = ["--attention", attention, "--dim", "8", "--epochs", "20"]
    run = train(*flags, "--learning-rate", "1000", "--coupling-rate", "1")
    ended = re.search(r"not finite in step (\d+) .*--learning-rate", run.complaint())
    told = re.search(r"step (\d+) \(epoch .*lower --learning-rate", run.out)
    assert ended
    assert told
    assert int(told[1]) < int(ended[1])


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        ("--patch-size 3", "image_size must be a multiple of patch_size, got 8 and 3"),
        ("--patch-size 0", "patch_size"),
        ("--dim 0", "dim"),
        ("--depth 0", "depth"),
        ("--heads 2", "mean-field has none"),
        ("--attention softmax --heads 4", "dim must be divisible by heads, got dim=6, heads=4"),
        ("--positions rotary", "mean-field takes learned"),
        ("--attention adaptive-tap --weight-norm", "adaptive-tap has none"),
        ("--attention adaptive-tap --solver picard", "--solver has no meaning for adaptive-tap"),
        ("--attention adaptive-tap --max-iter 9", "--max-iter has no meaning for adaptive-tap"),
        ("--widths 6 0", "widths"),
        ("--widths 6", "at least 2 entries"),
        ("--dropout 1", "dropout"),
        ("--tol -1", "tol"),
        ("--batch-size 161", "160 training images do not fill a batch of batch_size 161"),
        ("--accumulate 3", "20 rows cannot be cut"),
    ],
)
def test_settings_that_do_not_fit(flags: str, part: str, train: Train, tmp_path: Path) -> None:
    assert part in train(*flags.split()).complaint()
    assert not (tmp_path / "run").exists()


def test_another_model_is_not_resumed(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipes._images, "_draw", lambda *_: None)
    assert train("--epochs", "1").status == 0
    line = train("--epochs", "1", "--attention", "mlp-mixer", "--resume").complaint()
    assert "attention mean-field (now mlp-mixer)" in line
    config = json.loads((train("--epochs", "1").folder / "config.json").read_text())
    assert (config["recipe"], config["attention"]) == ("mnist-vit", "mean-field")


@pytest.mark.slow
@pytest.mark.parametrize("attention", VARIANTS)
def test_the_report_shows_every_mechanism(
    attention: str, train: Train, data: ImageData, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recipes._images, "_draw", lambda *_: None)
    run = train("--attention", attention, *VARIANTS[attention].split())
    assert run.status == 0, run.err
    report = invoke(run.folder, "report", str(run.folder))
    assert report.status == 0, report.err
    page = Page(run.folder / "report.html")
    assert not page.notices
    assert page.values["metric"].items() >= records(run.folder)[-1].items()  # but for the times
    assert {"Watch it settle", "Convergence", "Couplings", "Errors"} <= set(page.titles)
    shown = page.data
    sites = 4 + shown["token"]
    assert (shown["grid"], shown["token"]) == (2, "--pooling mean" not in VARIANTS[attention])
    count, frames = len(shown["examples"]), len(shown["steps"]) + 1
    assert shown["lengths"]["shape"] == [count, frames, sites]
    images = data.test.images[[one["index"] for one in shown["examples"]]]
    last = scores(run.folder, images, data).softmax(dim=1)
    np.testing.assert_allclose(unpacked(shown["probabilities"])[:, -1], last, atol=1e-4)
    # One graph of couplings for each block, beside its matrix.
    blocks = 2 if "--depth 2" in VARIANTS[attention] else 1
    graphs = page.source.count("Couplings between patches")
    matrices = len(re.findall(r"Couplings between patches[^<\"]*, as a matrix", page.source))
    assert (graphs, matrices) == (4 * blocks, 2 * blocks)  # each as caption and label
