"""What a user should know about a fit or a score that is not a failure."""

from __future__ import annotations


class FitWarning(UserWarning):
    """The data leave something open, and the fit says how it was settled."""


class EstimateWarning(UserWarning):
    """A log-likelihood is an estimate, not the exact value."""
