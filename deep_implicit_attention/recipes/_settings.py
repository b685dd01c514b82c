"""The settings of a saved run as those of a recipe, whatever a file holds of them."""

from __future__ import annotations

import dataclasses
import types
import typing
from pathlib import Path
from typing import Any


def usable(config: dict[str, Any], kind: type[Any], missing: list[str]) -> dict[str, Any]:
    """The arguments of the recipe `kind` that a configuration gives, as far as this version can
    use them; `missing` gets a sentence on those that it cannot, and those that are not there."""
    hints = typing.get_type_hints(kind)
    known = {entry.name: hints[entry.name] for entry in dataclasses.fields(kind)}
    strange = sorted(config.keys() - known.keys() - {"recipe"})
    lacking = sorted(known.keys() - config.keys())
    for settings, fate in ((strange, "left out"), (lacking, "taken at this version's defaults")):
        if settings:
            missing.append(
                f"The run is of another version: the settings {', '.join(settings)} are "
                f"{'not known here' if settings is strange else 'not in it'} and {fate}."
            )
    problems = misfits(config, known)
    for problem in problems.values():
        missing.append(f"The {problem}: it is taken at this version's default.")
    return {
        name: typed(value, known[name])
        for name, value in config.items()
        if name in known and name not in problems
    }


def misfits(config: dict[str, Any], known: dict[str, Any]) -> dict[str, str]:
    """The settings in a configuration that are not of the type in `known`, and what is wrong."""
    return {
        name: f"setting {name} must be {_named(expected)}, got {config[name]!r}"
        for name, expected in known.items()
        if name in config and not _fits(config[name], expected)
    }


def checked(recipe: Any) -> Any:
    """The recipe; `ValueError` for settings out of range."""
    recipe.check()
    return recipe


def typed(value: Any, kind: Any) -> Any:
    """A value of a JSON file as a field of type `kind` holds it."""
    kinds = {kind, *typing.get_args(kind)}
    if isinstance(value, str) and Path in kinds:
        return Path(value)
    return tuple(value) if isinstance(value, list) else value


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value of a JSON file is one of type `kind`."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, one) for one in inner)
    if origin is typing.Literal:
        return isinstance(value, str)  # which of them there are the recipe knows
    if origin is tuple:
        return isinstance(value, list | tuple) and all(_fits(part, inner[0]) for part in value)
    if kind is Path:
        return isinstance(value, str)
    if kind in (int, float):
        numbers = (int,) if kind is int else (int, float)
        return isinstance(value, numbers) and not isinstance(value, bool)
    return isinstance(value, kind)


def _named(kind: Any) -> str:
    return kind.__name__ if isinstance(kind, type) else str(kind).replace("typing.", "")
