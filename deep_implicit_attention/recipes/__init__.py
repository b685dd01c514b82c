"""Floor 6: named runs. A recipe's dataclass is its flags, its settings and its saved file."""

from ._boltzmann import Boltzmann, run_boltzmann
from ._compare import run_ising
from ._flags import TrainingFlags
from ._image_recipe import Digits, ImageRecipe, Mnist, SiteRecipe
from ._images import run_images
from ._ising import Ising
from ._language import run_shakespeare
from ._mnist_vit import MnistViT
from ._saved import agree, evaluate_run, generate_run, load_recipe, report_run
from ._shakespeare import Shakespeare

__all__ = [
    "Boltzmann",
    "Digits",
    "ImageRecipe",
    "Ising",
    "Mnist",
    "MnistViT",
    "Shakespeare",
    "SiteRecipe",
    "TrainingFlags",
    "agree",
    "evaluate_run",
    "generate_run",
    "load_recipe",
    "report_run",
    "run_boltzmann",
    "run_images",
    "run_ising",
    "run_shakespeare",
]
