"""Floor 4: models. Each file reads top to bottom as one model."""

from ._count import count_params
from ._site_classifier import SiteClassifier

__all__ = ["SiteClassifier", "count_params"]
