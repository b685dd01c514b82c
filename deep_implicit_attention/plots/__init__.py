"""Floor 5: figures, as pure functions from arrays."""

from ._figures import confusion_matrix, convergence, coupling_graph, learning_curves

__all__ = ["confusion_matrix", "convergence", "coupling_graph", "learning_curves"]
