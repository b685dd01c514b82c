"""Floor 5: figures, as pure functions from arrays, and the page that shows them."""

from ._animation import animation
from ._curves import Panel, curves
from ._exactness import against_exact, phase_diagram
from ._figures import confusion_matrix, convergence, learning_curves
from ._graph import coupling_graph, couplings_over_image, couplings_over_text
from ._inference import approximation_errors
from ._relaxation import magnetization_maps, relaxation, relaxation_horizon
from ._solvers import solver_comparison
from ._spin_images import image_rows

__all__ = [
    "Panel",
    "against_exact",
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
    "magnetization_maps",
    "phase_diagram",
    "relaxation",
    "relaxation_horizon",
    "solver_comparison",
]
