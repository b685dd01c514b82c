"""Floor 6: named runs. A recipe's dataclass is its flags, its settings and its saved file."""

from ._images import Digits, ImageRecipe, Mnist, run_images

__all__ = ["Digits", "ImageRecipe", "Mnist", "run_images"]
