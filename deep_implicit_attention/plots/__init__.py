"""Floor 5: figures, as pure functions from arrays."""

from ._curves import Panel, curves
from ._figures import confusion_matrix, convergence, coupling_graph, learning_curves
from ._inference import approximation_errors
from ._spin_images import image_rows

__all__ = [
    "Panel",
    "approximation_errors",
    "confusion_matrix",
    "convergence",
    "coupling_graph",
    "curves",
    "image_rows",
    "learning_curves",
]
