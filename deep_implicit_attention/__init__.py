"""Deep implicit attention: attention as the collective response of a spin system.

The names live in the subpackages, from the ground up: `solvers`, `deq`, `spins`, `attention`,
`boltzmann`, `models`, `training`, `plots`, `recipes`.
"""

__version__ = "0.1.0"
