"""Libraries that the core does without."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any


def require(module: str, extra: str) -> Any:
    """Import `module`, or say which line installs it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not module.startswith(error.name):
            raise
        raise _missing(module, extra, error.name) from error


def check_installed(library: str, extra: str) -> None:
    """Say which line installs `library` if it is not there, without the time to import it."""
    if importlib.util.find_spec(library) is None:
        raise _missing(library, extra, library)


def _missing(module: str, extra: str, name: str) -> ModuleNotFoundError:
    return ModuleNotFoundError(
        f"{module} is not installed; in the project's folder: pip install -c constraints.txt "
        f"-e '.[{extra}]'",
        name=name,
    )
