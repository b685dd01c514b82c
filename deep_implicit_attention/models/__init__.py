"""Floor 4: models. Each file reads top to bottom as one model."""

from ._count import count_params
from ._decode import left_pad
from ._image_classifier import ImageClassifier
from ._site_classifier import SiteClassifier
from ._transformer import DeepImplicitAttentionTransformer
from ._vit import DeepImplicitAttentionViT

__all__ = [
    "DeepImplicitAttentionTransformer",
    "DeepImplicitAttentionViT",
    "ImageClassifier",
    "SiteClassifier",
    "count_params",
    "left_pad",
]
