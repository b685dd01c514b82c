"""Floor 2: spin systems. So far: the priors of a single spin.

`IsingPrior`, `GaussianPrior`, `PottsPrior` and `SphericalPrior` give the partition function of one
spin in a field, its mean and its covariance, differentiable to any order.
"""

from ._gaussian import GaussianPrior
from ._ising import IsingPrior
from ._potts import PottsPrior
from ._spherical import SphericalPrior

__all__ = ["GaussianPrior", "IsingPrior", "PottsPrior", "SphericalPrior"]
