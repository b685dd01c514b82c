"""Deep implicit attention: attention as the collective response of a spin system.

The names live in the subpackages, from the ground up: `solvers`, `deq`, `attention`, `models`,
`training`, `recipes`.
"""

__version__ = "0.1.0"
