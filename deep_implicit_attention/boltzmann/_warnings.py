"""What a user should know about a fit or a score, said where the user called."""

from __future__ import annotations

import os
import sys
import warnings

_HERE = os.path.dirname(__file__)


class FitWarning(UserWarning):
    """The data leave something open, and the fit says how it was settled."""


class EstimateWarning(UserWarning):
    """A log-likelihood is an estimate, not the exact value."""


def warn(message: str, category: type[Warning]) -> None:
    """Warn, with the first line outside this folder as the place."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_HERE):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)
