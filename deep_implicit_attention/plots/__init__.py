"""Floor 5: figures, as pure functions from arrays, and the page that shows them."""

from ._animation import animation
from ._curves import Panel, curves
from ._figures import confusion_matrix, convergence, learning_curves
from ._graph import coupling_graph, couplings_over_image, couplings_over_text
from ._inference import approximation_errors
from ._spin_images import image_rows

__all__ = [
    "Panel",
    "animation",
    "approximation_errors",
    "confusion_matrix",
    "convergence",
    "coupling_graph",
    "couplings_over_image",
    "couplings_over_text",
    "curves",
    "image_rows",
    "learning_curves",
]
