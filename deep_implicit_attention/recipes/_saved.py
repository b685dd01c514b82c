"""Runs in their folders: started, resumed, finished, measured again."""

from __future__ import annotations

import math
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..training import Devices, Run
from ..training._run import CONFIG, METRICS, plain
from ._flags import TrainingFlags
from ._image_recipe import Digits, Mnist
from ._mnist_vit import MnistViT
from ._settings import misfits, typed
from ._shakespeare import Shakespeare, has_vocabulary

RECIPES: dict[str, type[Any]] = {
    "digits": Digits,
    "mnist": Mnist,
    "mnist-vit": MnistViT,
    "shakespeare": Shakespeare,
}

# Where data lie; what they are is told by their bytes.
_PLACES = ("text", "data_dir")
# What may be another when a run is resumed: it decides where and how often, not what is computed.
_FREE = {
    *("resume", "run_dir", *_PLACES, "threads", "device"),
    *("checkpoint_every", "keep_checkpoints", "trackers"),
}


def start(run: Run, recipe: TrainingFlags, devices: Devices) -> bool:
    """Start the run of a recipe, or find that it is to be resumed; returns which.

    `ValueError` for a run that was started with other settings.
    """
    resume = False
    if devices.is_main:
        config = {"recipe": _name(recipe), **vars(recipe)}
        resume = recipe.resume and run.is_started()
        if resume:
            _check_same(run, plain(config))
        else:
            run.start(config)
    return devices.agree(resume)


def finished(run: Run) -> dict[str, Any] | None:
    """The result of a run that is finished, the last line of its metrics; else None."""
    last = run.last_metrics()
    return last if last and last.get("interrupted") is False else None


def load_recipe(run: Run) -> Any:
    """The recipe of a run, with its settings."""
    config, name = run.config(), _recipe_of(run)
    kind = RECIPES.get(name)
    if kind is None:
        raise ValueError(
            f"{run.folder} is a run of {name}: only those of {', '.join(RECIPES)} have a model "
            "that can be loaded"
        )
    types = typing.get_type_hints(kind)
    for problem in misfits(config, types).values():
        raise ValueError(f"{run.folder / CONFIG} is damaged: {problem}")
    settings = {name: typed(value, types[name]) for name, value in config.items() if name in types}
    return kind(**found(settings, run))


def found(settings: dict[str, Any], run: Run) -> dict[str, Any]:
    """`settings` of a run with the places of its data as they are now.

    They were given from where the run was started: from here, or from a folder above its own.
    """
    above = [Path(), *run.folder.resolve().parents]

    def place(path: Path) -> Path:
        return next((there for there in (top / path for top in above) if there.exists()), path)

    known = {name: settings[name] for name in _PLACES if settings.get(name) is not None}
    return {**settings, **{name: place(path) for name, path in known.items()}}


def evaluate_run(folder: str | Path) -> tuple[dict[str, float], dict[str, float]]:
    """The test metrics of a finished run: measured again from its weights, and as logged."""
    run = Run(folder)
    recipe = load_recipe(run)
    result = finished(run)
    if result is None:
        raise ValueError(
            f"the run in {folder} is not finished: dia train {run.config()['recipe']} --resume "
            "with its settings goes on"
        )
    measured = recipe.evaluate(run)
    missing = [name for name in measured if name not in result]
    if missing:
        raise ValueError(f"the last line of metrics in {folder} lacks {', '.join(missing)}")
    return measured, {
        name: _number(result, name, f"the last line of {METRICS}") for name in measured
    }


def generate_run(folder: str | Path, prompt: str, **options: Any) -> str:
    """A continuation of `prompt` by the language model of a run, from its best weights.

    Asks the run's recipe for `generate(run, prompt, **options)`; `ValueError` where it has none.
    """
    run = Run(folder)
    name = _recipe_of(run)
    if not hasattr(RECIPES.get(name), "generate"):
        raise ValueError(
            f"{folder} is a run of {name}: dia generate needs a run of a language model"
        )
    return load_recipe(run).generate(run, prompt, **options)


def report_run(
    folder: str | Path, out: str | Path | None = None, *, tell: Callable[[str], Any] | None = None
) -> Path:
    """Write one self-contained HTML page on the run in `folder` to `out` (default: `report.html`
    in it), and return where it is. `tell` is called with the title of each section that is begun.

    Results and evaluations are those of the metrics file; figures and the part that moves through
    the relaxation are computed from the best weights. What is not there (weights, data, metrics) or
    is of another version is named at the top of the page, and the rest is shown.

    Raises:
        ValueError: if there is no run in the folder.
    """
    from ._report_page import write_report  # matplotlib takes a second to import

    return write_report(Path(folder), None if out is None else Path(out), tell)


def agree(measured: dict[str, float], logged: dict[str, float]) -> bool:
    """Whether two measurements are the same, but for the last digits of another machine."""
    return all(
        math.isclose(value, logged[name], rel_tol=1e-4, abs_tol=1e-9)
        or (math.isnan(value) and math.isnan(logged[name]))
        for name, value in measured.items()
        if not name.endswith("residual")
    )


def column(history: list[dict[str, Any]], name: str) -> list[float]:
    """The numbers `name` of all evaluations; `ValueError` for a line that has none."""
    return [
        _number(record, name, f"line {number} of {METRICS}")
        for number, record in enumerate(history, start=1)
    ]


def _number(record: dict[str, Any], name: str, line: str) -> float:
    """A number of the metrics, where what is not finite is null."""
    value = record.get(name, "nothing")
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{line} is damaged: {name} must be a number, got {value!r}")
    return value


def _recipe_of(run: Run) -> str:
    """The name of a run's recipe, in a sentence "nothing" where there is none."""
    return str(run.config().get("recipe", "nothing"))


def _name(recipe: Any) -> str:
    return next(name for name, kind in RECIPES.items() if type(recipe) is kind)


def _check_same(run: Run, config: dict[str, Any]) -> None:
    before = run.config()
    if before.get("recipe") != config["recipe"]:
        raise ValueError(
            f"{run.folder} is a run of {_recipe_of(run)}, not of {config['recipe']}: name the "
            "folder of one, or leave out --resume and start anew in another"
        )
    # Which text it was the vocabulary tells; where that is lost, only the name does.
    free = _FREE if has_vocabulary(run) else _FREE - {"text"}
    changed = [
        f"{name} {before.get(name)} (now {value})"
        for name, value in config.items()
        if name not in free and before.get(name) != value
    ]
    if changed:
        raise ValueError(
            f"the run in {run.folder} was started with {', '.join(changed)}: resume with the same "
            "settings, or leave out --resume to start anew"
        )
