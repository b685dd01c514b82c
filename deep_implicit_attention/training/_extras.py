"""Libraries that the core does without."""

from __future__ import annotations

import importlib
from typing import Any


def require(module: str, extra: str) -> Any:
    """Import `module`, or say which line installs it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not module.startswith(error.name):
            raise
        raise ModuleNotFoundError(
            f"{module} is not installed; in the project's folder: pip install -c constraints.txt "
            f"-e '.[{extra}]'",
            name=error.name,
        ) from error
