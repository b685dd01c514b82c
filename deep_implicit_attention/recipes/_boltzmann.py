"""The recipe `boltzmann`: machines that learn binarised digits, draw some, and complete halves."""

from __future__ import annotations

import math
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..solvers._validate import check_seed
from ..training import Run, digits, require
from ._flags import check_threads, refuse
from ._made import save_arrays, save_figure

PARAMETERS, COMPLETIONS, SAMPLES = "machine.npz", "completions.png", "samples.png"
SIDE, SHOWN = 8, 12
KNOWN = np.arange(SIDE * SIDE) < SIDE * SIDE // 2  # the upper half

# Those without couplings or without a model, which the machines are compared with.
INDEPENDENT, NEIGHBOUR, NEIGHBOURS = "independent", "nearest-neighbour", "k-nearest-neighbours"
METHODS = ("naive", "tap", "adaptive-tap", "pseudolikelihood", "pcd")


@dataclass(frozen=True)
class Boltzmann:
    """The 1,797 digits of 8x8 pixels bundled with scikit-learn, each pixel black or white: 64 spins
    of P(S) ~ exp(1/2 sum_ij J_ij S_i S_j + sum_i h_i S_i).

    Each method learns from the training images with every penalty of --l2, and the one with the
    fewest wrong pixels in the lower halves of the validation images, completed from the upper
    halves, learns once more from both; its completions of the test images are counted once. The
    best machine on the validation images draws digits of its own. Takes five minutes on a core.

    Compared with independent pixels, with the lower half of the nearest training image (by pixels
    of the upper half), and with the majority of the k nearest, k chosen on the validation images.
    """

    methods: tuple[str, ...] = METHODS
    """methods to learn by: naive, tap, adaptive-tap, pseudolikelihood, pcd (with hidden units)"""
    l2: tuple[float, ...] = (0.001, 0.01, 0.1)
    """penalties (l2/2) sum J^2 to choose from"""
    num_hidden: int = 64
    """hidden units, for pcd"""
    num_updates: int = 2000
    """steps of gradient ascent, for pcd"""
    validation: float = 0.2
    """part of the training images set aside to choose the penalty"""
    samples: int = 24
    """digits to draw from the best machine; 0 for none"""
    seed: int = 0
    """random seed of the validation images, the chains and the draws"""
    run_dir: Path = Path("runs/boltzmann")
    """folder for metrics, parameters and figures: new, empty, or an earlier run's to overwrite"""
    threads: int = 1
    """CPU threads (0 leaves it to PyTorch)"""

    def check(self) -> None:
        """Raise `ValueError` for settings out of range."""
        for name in self.methods:
            if name not in METHODS:
                raise ValueError(f"unknown method {name!r}; there are {', '.join(METHODS)}")
        if not self.methods or len(set(self.methods)) < len(self.methods):
            got = " ".join(self.methods) or "none"
            raise ValueError(f"methods must be some of {', '.join(METHODS)}, each once, got {got}")
        if not self.l2 or not all(0 < value < math.inf for value in self.l2):
            got = " ".join(map(str, self.l2)) or "none"
            raise ValueError(f"l2 must be numbers above 0, at least one, got {got}")
        for name, least in (("num_hidden", 1), ("num_updates", 1), ("samples", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if len(set(self.l2)) < len(self.l2):
            raise ValueError(f"l2 must differ, got {' '.join(map(str, self.l2))}")
        if "pcd" not in self.methods:
            refuse(self, "methods without pcd", "num_hidden", "num_updates")
        check_seed(self.seed)
        check_threads(self.threads)


@dataclass(frozen=True)
class Halves:
    """Binarised images `(n, 64)` of ±1, of the three parts."""

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray

    @property
    def both(self) -> np.ndarray:
        """All that is not for the test."""
        return np.concatenate([self.train, self.validation])


def run_boltzmann(recipe: Boltzmann) -> list[dict[str, Any]]:
    """Learn, complete, draw; prints the table and returns the lines of `metrics.jsonl`."""
    require("sklearn", "boltzmann")
    recipe.check()
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    data = digit_halves(recipe)
    run = Run(recipe.run_dir)
    with run.alone():
        return _complete(recipe, run, data)


def _complete(recipe: Boltzmann, run: Run, data: Halves) -> list[dict[str, Any]]:
    run.start({"recipe": "boltzmann", **vars(recipe)})
    console = require("rich.console", "train").Console(highlight=False, markup=False, emoji=False)
    console.width = max(console.width, 100)
    console.print(
        f"{len(data.train)} training, {len(data.validation)} validation and {len(data.test)} test "
        f"images, seed {recipe.seed}; pixels of the lower half wrong:",
        soft_wrap=True,
    )
    rows = _baselines(data)
    for row in rows:
        _print(console, row)
    best, machine = math.inf, None
    for name in (INDEPENDENT, *recipe.methods):
        with console.status(name), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # edge pixels never change; the table says the rest
            row, fitted = _choose(recipe, name, data)
        rows.append(row)
        _print(console, row)
        if row["validation_error"] < best:
            best, machine = row["validation_error"], fitted
    for row in rows:
        run.log(**{key: value for key, value in row.items() if key != "completed"})
    save_arrays(run.folder / PARAMETERS, couplings=machine.couplings_, fields=machine.fields_)  # type: ignore[union-attr]
    _draw(recipe, run, data, rows, machine, console)
    console.print(f"metrics, parameters and figures are in {run.folder}/", soft_wrap=True)
    return rows


def digit_halves(recipe: Boltzmann) -> Halves:
    """The split of the recipe `digits`, pixels of 0 to 16 white from 8 on."""
    data = digits(recipe.validation, recipe.seed)
    parts = (data.train.images, data.validation.images, data.test.images)
    # Standardised images: black is data.background, and 16 is the largest value there is.
    white = max(part.max().item() for part in parts)
    middle = 0.5 * (data.background + white) - 1e-4
    flat = (part.flatten(1).numpy() for part in parts)
    return Halves(*(np.where(part >= middle, 1.0, -1.0) for part in flat))


def _error(images: np.ndarray, truth: np.ndarray) -> float:
    """Part of the pixels of the lower half that are wrong."""
    return float((images[:, ~KNOWN] != truth[:, ~KNOWN]).mean())


def _baselines(data: Halves) -> list[dict[str, Any]]:
    counts = (1, 3, 5, 9, 15, 25)
    errors = [_error(neighbours(data.train, data.validation, k), data.validation) for k in counts]
    chosen = int(np.argmin(errors))
    rows = []
    for name, index in ((NEIGHBOUR, 0), (NEIGHBOURS, chosen)):
        begin = time.perf_counter()
        completed = neighbours(data.both, data.test, counts[index])
        rows.append(
            {
                "method": name,
                "neighbours": counts[index],
                "validation_error": errors[index],
                "test_error": _error(completed, data.test),
                "complete_seconds": round(time.perf_counter() - begin, 2),
                "completed": completed,
            }
        )
    return rows


def neighbours(known: np.ndarray, images: np.ndarray, count: int) -> np.ndarray:
    """Lower halves by the majority of the `count` images nearest in the upper half."""
    overlap = images[:, KNOWN] @ known[:, KNOWN].T
    nearest = np.argsort(-overlap, axis=1, kind="stable")[:, :count]
    return np.where(KNOWN, images, np.where(known[nearest].sum(axis=1) > 0, 1.0, -1.0))


def _choose(recipe: Boltzmann, name: str, data: Halves) -> tuple[dict[str, Any], Any]:
    """The line of a method, its penalty chosen on the validation images, and its machine."""
    penalties = (0.0,) if name == INDEPENDENT else recipe.l2
    machines = [_machine(recipe, name, l2).fit(data.train) for l2 in penalties]
    errors = [_error(m.complete(data.validation, KNOWN).X, data.validation) for m in machines]
    chosen = int(np.argmin(errors))
    begin = time.perf_counter()
    machine = _machine(recipe, name, penalties[chosen]).fit(data.both)
    middle = time.perf_counter()
    completed = machine.complete(data.test, KNOWN).X
    end = time.perf_counter()
    row = {
        "method": name,
        "l2": penalties[chosen],
        "validation_error": errors[chosen],
        "test_error": _error(completed, data.test),
        "fit_seconds": round(middle - begin, 2),
        "complete_seconds": round(end - middle, 2),
        "completed": completed,
    }
    return row, machine


def _machine(recipe: Boltzmann, name: str, l2: float) -> Any:
    from ..boltzmann import BoltzmannMachine

    return BoltzmannMachine(
        name.replace("-", "_"),  # type: ignore[arg-type]
        num_hidden=recipe.num_hidden if name == "pcd" else 0,
        num_updates=recipe.num_updates,
        l2=l2,
        random_state=recipe.seed,
    )


def _print(console: Any, row: dict[str, Any]) -> None:
    detail = {name: row[name] for name in ("l2", "neighbours") if row.get(name)}
    said = ", ".join(f"{name} {value:g}" for name, value in detail.items())
    fit = f"fit {row['fit_seconds']:.2f} s, " if "fit_seconds" in row else ""
    console.print(
        f"{row['method']:21} validation {row['validation_error']:6.2%}  test "
        f"{row['test_error']:6.2%}  {fit}complete {row['complete_seconds']:.2f} s  {said}",
        soft_wrap=True,
    )


def _draw(
    recipe: Boltzmann, run: Run, data: Halves, rows: list[dict], machine: Any, console: Any
) -> None:
    from .. import plots  # matplotlib takes a second to import

    chosen = np.arange(0, len(data.test), max(1, len(data.test) // SHOWN))[:SHOWN]
    truth = data.test[chosen]
    images = {"image": truth, "given": np.where(KNOWN, truth, np.nan)}
    for row in rows:
        images[f"{row['method']} {row['test_error']:.1%}"] = row["completed"][chosen]
    shaped = {name: flat.reshape(-1, SIDE, SIDE) for name, flat in images.items()}
    title = "lower halves completed from upper ones; wrong pixels of all test images"
    save_figure(run.folder / COMPLETIONS, plots.image_rows(shaped, title))
    if not recipe.samples:
        return
    with console.status("drawing"), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        drawn = machine.sample(recipe.samples, random_state=recipe.seed)
    for warning in caught:
        console.print(str(warning.message), soft_wrap=True)
    columns = min(SHOWN, recipe.samples)
    missing = np.full((-len(drawn) % columns, SIDE * SIDE), np.nan)  # in the last row
    whole = np.concatenate([drawn, missing]).reshape(-1, columns, SIDE, SIDE)
    named = {" " * i or "drawn": images for i, images in enumerate(whole)}
    title = f"digits drawn from the machine learned by {machine.method}"
    save_figure(run.folder / SAMPLES, plots.image_rows(named, title))
