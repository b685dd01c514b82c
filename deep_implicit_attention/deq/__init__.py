"""Floor 1: fixed points as differentiable functions.

`fixed_point` solves z = f(z, *args) and attaches the solution to the graph by an adjoint;
`DEQFixedPoint` makes a layer of a module that states such equations; the diagnostics say how well
a map contracts.
"""

from ._adjoints import Implicit, OneStep, Phantom
from ._diagnostics import error_bound, jacobian_norm, jacobian_penalty, spectral_radius
from ._failure import ConvergenceError, ConvergenceWarning
from ._fixed_point import fixed_point
from ._layer import DEQFixedPoint
from ._linear_map import LinearMap, Pullback
from ._module import DEQModule
from ._state_cache import StateCache

__all__ = [
    "ConvergenceError",
    "ConvergenceWarning",
    "DEQFixedPoint",
    "DEQModule",
    "Implicit",
    "LinearMap",
    "OneStep",
    "Phantom",
    "Pullback",
    "StateCache",
    "error_bound",
    "fixed_point",
    "jacobian_norm",
    "jacobian_penalty",
    "spectral_radius",
]
