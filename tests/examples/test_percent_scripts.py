"""The examples in cells: their functions at small size, and that they are made of cells."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import fields
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from deep_implicit_attention.recipes._saved import RECIPES

FOLDER = Path(__file__).parents[2] / "examples"


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["sherrington_kirkpatrick", "completion"])
def test_cells_begin_with_text(name: str) -> None:
    lines = (FOLDER / f"{name}.py").read_text().splitlines()
    assert lines[0] == "# %% [markdown]"
    assert lines[1].startswith("# # ")
    assert sum(line == "# %%" for line in lines) >= 3


def test_examples_leave_the_folders_of_recipes_alone() -> None:
    """`save_pretrained` would replace the configuration and the weights of a run there."""
    folders = {field.default for recipe in RECIPES.values() for field in fields(recipe)
               if field.name == "run_dir"}  # fmt: skip
    assert Path("runs/shakespeare") in folders
    for path in FOLDER.glob("*.py"):
        for named in re.findall(r'Path\("(runs/[^"]+)"\)', path.read_text()):
            assert Path(named) not in folders, path


def test_methods_side_by_side(capsys: pytest.CaptureFixture[str]) -> None:
    module = example("sherrington_kirkpatrick")
    errors = module.table(0.5, spins=8)
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 1 + len(module.METHODS) == 6
    assert errors["TAP"] < errors["naive mean field"]
    assert errors["expectation propagation"] == pytest.approx(errors["adaptive TAP"], rel=1e-6)
    figure = module.picture((0.25, 0.5), 0.5, spins=8)
    exact, answers = module.compare(0.5, spins=8)
    left = {line.get_label(): line for line in figure.axes[0].lines}
    np.testing.assert_allclose(left["_TAP"].get_ydata(), answers["TAP"].magnetization.detach())
    np.testing.assert_allclose(left["_TAP"].get_xdata(), exact.magnetization.detach())


def test_sampling_is_right_up_to_its_bars() -> None:
    module = example("sherrington_kirkpatrick")
    figure = module.sampled(0.5, spins=8, draws=100)
    bars = next(c for c in figure.axes[0].containers if "Gibbs" in str(c.get_label()))
    points, (segments,) = bars[0], bars[2]
    inside = [
        low[1] <= x <= high[1]
        for x, (low, high) in zip(points.get_xdata(), segments.get_segments(), strict=True)
    ]
    assert sum(inside) >= 6


def test_a_method_that_fails_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    module = example("sherrington_kirkpatrick")
    module.METHODS = {"TAP": module.TAP(max_iter=1, on_failure="ignore")}
    assert module.table(1.0, spins=6) == {}
    assert "did not converge" in capsys.readouterr().out


def test_completion_is_better_than_independent_pixels() -> None:
    module = example("completion")
    train, test = module.load()
    assert (train.shape[1], len(train) + len(test)) == (64, 1797)
    assert set(np.unique(train)) == {-1, 1}
    torch.manual_seed(0)
    shown = test[:60]
    error = {}
    for method in ("independent", "tap"):
        every = module.complete(module.learn(train[:600], method), shown)
        assert np.array_equal(every.X[:, module.UPPER], shown[:, module.UPPER])
        likelier = every.probability[:, ~module.UPPER] > 0.5
        assert np.array_equal(every.X[:, ~module.UPPER] > 0, likelier)
        error[method] = module.wrong(every.X, shown)
    assert error["tap"] < 0.9 * error["independent"]
