"""Floor 3: Boltzmann machines that learn from data, by mean-field response or exactly.

`BoltzmannMachine` is an estimator with scikit-learn's habits over the spin systems of floor 2. It
needs scikit-learn, and nothing else in the package needs this room.
"""

try:
    import sklearn as _sklearn  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "sklearn":
        raise
    raise ModuleNotFoundError(
        "deep_implicit_attention.boltzmann needs scikit-learn; in the project's folder: "
        "pip install -c constraints.txt -e '.[boltzmann]'",
        name="sklearn",
    ) from error

from ._data import Completion
from ._likelihood import LogPartition
from ._machine import BoltzmannMachine
from ._warnings import EstimateWarning, FitWarning

__all__ = [
    "BoltzmannMachine",
    "Completion",
    "EstimateWarning",
    "FitWarning",
    "LogPartition",
]
