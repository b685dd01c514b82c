"""Floor 2: spin systems and their mean-field theory, without neural networks.

A `SpinSystem` is couplings and a prior; an inference method (`NaiveMeanField`, `TAP`, `Exact`,
`GibbsSampler`) takes it and fields to a `Response`: magnetizations, covariances, free energy,
batched over fields and differentiable in couplings, fields and prior parameters.
"""

from ._adaptive_tap import AdaptiveTAP
from ._block_gibbs import BlockGibbs
from ._ensembles import ferromagnet, hopfield, lattice, sherrington_kirkpatrick
from ._exact import Exact
from ._expectation_propagation import ExpectationPropagation
from ._gaussian import GaussianPrior
from ._gibbs import GibbsSampler
from ._ising import IsingPrior
from ._mcmc import Sampling, effective_sample_size, split_r_hat
from ._method import IteratedMethod
from ._naive import NaiveMeanField
from ._potts import PottsPrior
from ._prior import Prior
from ._response import Response
from ._self_averaging_tap import SelfAveragingTAP
from ._spherical import SphericalPrior
from ._system import SpinSystem
from ._tap import TAP

__all__ = [
    "TAP",
    "AdaptiveTAP",
    "BlockGibbs",
    "Exact",
    "ExpectationPropagation",
    "GaussianPrior",
    "GibbsSampler",
    "IsingPrior",
    "IteratedMethod",
    "NaiveMeanField",
    "PottsPrior",
    "Prior",
    "Response",
    "Sampling",
    "SelfAveragingTAP",
    "SphericalPrior",
    "SpinSystem",
    "effective_sample_size",
    "ferromagnet",
    "hopfield",
    "lattice",
    "sherrington_kirkpatrick",
    "split_r_hat",
]
