"""Floor 6: named runs. A recipe's dataclass is its flags, its settings and its saved file."""

from ._compare import run_ising
from ._images import Digits, ImageRecipe, Mnist, run_images
from ._ising import Ising

__all__ = ["Digits", "ImageRecipe", "Ising", "Mnist", "run_images", "run_ising"]
