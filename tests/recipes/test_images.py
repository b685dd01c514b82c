"""`run_images` from Python: settings reach their places, figures show the right numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from deep_implicit_attention import plots, training
from deep_implicit_attention.models import DeepImplicitAttentionViT
from deep_implicit_attention.recipes import (
    Digits,
    Mnist,
    SiteRecipe,
    _images,
    run_images,
)
from deep_implicit_attention.training import ImageData

SMALL: dict[str, Any] = {
    "epochs": 1,
    "batch_size": 40,
    "widths": (4,),
    "strides": (2,),
    "dim": 3,
    "threads": 1,
}


@pytest.mark.parametrize("recipe", [Digits, Mnist])
def test_settings_reach_the_model_and_the_schedule(
    recipe: type[SiteRecipe], few_digits: Callable[..., ImageData]
) -> None:
    own = {"learning_rate": 0.123, "coupling_rate": 0.7, "smoothing": 0.01, "shift": 0.25}
    settings = recipe(
        **{**SMALL, **own, "tol": 1e-2, "max_iter": 7, "dropout": 0.4, "batch_size": 11}
    )
    flags = {"checkpoint_every": 3, "patience": 4, "accumulate": 5, "clip": 0.1, "ema": 0.2}
    flags |= {"device": "auto", "precision": "bf16", "trackers": ("x",), "on_divergence": "stop"}
    options = recipe(**flags, keep_checkpoints=7).plan_options()
    assert options == {**flags, "keep": 7}
    assert training.Plan(steps=1, evaluate_every=1, **options).keep == 7
    schedule = settings.schedule()
    for name, value in {**own, "batch_size": 11, "epochs": 1}.items():
        assert getattr(schedule, name) == value
    for name in ("rotation", "zoom", "weight_decay"):
        assert getattr(schedule, name) == getattr(settings, name)
    torch.manual_seed(0)  # with some weights no image settles in seven steps
    model = settings.model(few_digits(0, 0))
    assert (model.dim, model.dropout.p, model.grid) == (3, 0.4, 4)
    options = model.attention._options
    for direction in ("fwd", "bwd"):
        assert options[f"solver_{direction}_tol"] == 1e-2
        assert options[f"solver_{direction}_max_iter"] == 7
    with torch.no_grad():
        _, (solution,) = model(few_digits(0, 0).test.images[:9], return_solution=True)
    assert solution.steps.max() <= 7
    assert solution.residual[solution.converged].max() <= 1e-2


def test_every_setting_is_a_shared_one_but_the_data_folder() -> None:
    shared = {field.name for field in dataclasses.fields(SiteRecipe)}
    assert {field.name for field in dataclasses.fields(Digits)} == shared
    assert {field.name for field in dataclasses.fields(Mnist)} == shared | {"data_dir"}


def test_seed_and_part_reach_the_data(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(training, "digits", lambda *a: asked.append(a))
    monkeypatch.setattr(training, "mnist", lambda *a, download: asked.append((*a, download)))
    Digits(validation=0.3, seed=4).load()
    Mnist(validation=0.2, seed=5, data_dir=Path("x")).load()
    Mnist(validation=0.2, seed=5).load(download=False)
    assert asked == [(0.3, 4), (Path("x"), 0.2, 5, True), (None, 0.2, 5, False)]


def test_the_figures_show_the_run(
    few_digits: Callable[..., ImageData], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = few_digits(0, 0)
    monkeypatch.setattr(training, "digits", few_digits)
    drawn: dict[str, tuple] = {}
    models = []
    figures = {"learning_curves", "confusion_matrix", "convergence", "coupling_graph"}
    for name in figures:
        monkeypatch.setattr(
            plots, name, lambda *a, name=name: drawn.update({name: a}) or Figure((1, 1))
        )
    build = Digits.model

    def noted(self: Digits, some: ImageData) -> Any:
        models.append(build(self, some))
        return models[-1]

    monkeypatch.setattr(Digits, "model", noted)
    settings = Digits(**{**SMALL, "epochs": 3, "run_dir": tmp_path})
    result = run_images(settings)
    *epochs, last = training.Run(tmp_path).metrics()
    assert last == result
    assert set(drawn) == figures

    columns = ("epoch", "train_loss", "validation_loss", "train_accuracy", "validation_accuracy")
    assert drawn["learning_curves"][:5] == tuple([r[c] for r in epochs] for c in columns)

    model = models[-1].eval()  # the one that was tested
    with torch.no_grad():
        scores, (solution,) = model(data.test.images, return_solution=True)
    expected = np.zeros((10, 10), dtype=int)
    for true, predicted in zip(data.test.labels.tolist(), scores.argmax(1).tolist(), strict=True):
        expected[true, predicted] += 1
    counts, names = drawn["confusion_matrix"][:2]
    np.testing.assert_array_equal(counts, expected)
    assert list(names) == list("0123456789")
    assert np.trace(counts) == round(result["test_accuracy"] * 120)

    trace, tolerance = drawn["convergence"][:2]
    assert tolerance == settings.tol
    last = trace[solution.steps.numpy() - 1, np.arange(trace.shape[1])]
    np.testing.assert_allclose(last, solution.residual.numpy(), rtol=1e-4)
    np.testing.assert_array_equal(np.isfinite(trace).sum(axis=0), solution.steps.numpy())

    strengths, places, sites = drawn["coupling_graph"][:3]
    norms = torch.linalg.matrix_norm(model.attention.fun.weight().detach())
    np.testing.assert_allclose(strengths, norms.numpy(), rtol=1e-5)
    assert strengths.shape == (17, 17)
    assert len(places) == len(sites) == 17


def test_the_validation_accuracy_is_that_of_the_best_epoch(
    few_digits: Callable[..., ImageData], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_images, "_draw", lambda *_: None)
    monkeypatch.setattr(training.Run, "saved_epoch", lambda _: 2)
    monkeypatch.setattr(training.Run, "load_weights", lambda *_: None)
    history = [{"epoch": k, "validation_accuracy": 0.25 * k} for k in (1, 2, 3)]
    run, data = training.Run(tmp_path), few_digits(0, 0)
    result = _images._test(Digits(**SMALL), run, data, history)
    assert (result["best_epoch"], result["validation_accuracy"]) == (2, 0.5)


def test_couplings_are_those_of_each_block_and_the_mean_over_heads(
    few_digits: Callable[..., ImageData], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[np.ndarray] = []
    monkeypatch.setattr(plots, "coupling_graph", lambda J, *_: drawn.append(J) or Figure((1, 1)))
    torch.manual_seed(0)
    data = few_digits(0, 0)
    model = DeepImplicitAttentionViT(
        image_size=8, patch_size=4, num_classes=10, dim=4, channels=1, attention="softmax",
        heads=2, depth=2, on_failure="ignore",
    ).eval()  # fmt: skip
    names = ("epoch", "train_loss", "validation_loss", "train_accuracy", "validation_accuracy")
    history = [dict.fromkeys(names, 0.5)]
    test = training.measure(model, data.test)
    _images._draw(training.Run(tmp_path), model, data, history, test, 1e-3)
    with torch.no_grad():
        _, solutions = model(data.test.images, return_solution=True)
        every = model.couplings(data.test.images, solutions).numpy()  # blocks, images, heads, N, N
    assert len(drawn) == 2
    for block, shown in zip(every, drawn, strict=True):
        expected = sum(head for image in block for head in image) / (2 * len(data.test))
        np.testing.assert_allclose(shown, expected, rtol=1e-4, atol=1e-6)
    pictures = {path.name for path in tmp_path.glob("co*.png")}
    assert pictures == {"confusion_matrix.png"} | {
        f"{name}_{k}.png" for name in ("couplings", "convergence") for k in (1, 2)
    }


@pytest.mark.parametrize("grid", [2, 3])
@pytest.mark.parametrize("pooling", ["token", "mean"])
def test_sites_lie_as_their_names_say(grid: int, pooling: str) -> None:
    model = DeepImplicitAttentionViT(
        image_size=2 * grid, patch_size=2, num_classes=2, dim=3, pooling=pooling
    )
    places, names = _images.sites_of(model)
    places, names = list(places), list(names)
    assert len(places) == len(names) == model.sites(torch.zeros(1, 3, 2 * grid, 2 * grid)).shape[1]
    if pooling == "token":
        place, name = places.pop(0), names.pop(0)
        assert name == "class"
        assert place[0] < 0  # outside the grid
        assert place[1] == (grid - 1) / 2
    for k, (place, name) in enumerate(zip(places, names, strict=True)):
        row, column = divmod(k, grid)  # the order in which the patches are flattened
        assert name == f"{row},{column}"
        assert tuple(place) == (column, row)
