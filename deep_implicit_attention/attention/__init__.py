"""Floor 3: attention mechanisms, one file each, as maps whose fixed point is the response.

Wrap one in `deep_implicit_attention.deq.DEQFixedPoint`.
"""

from ._adatap import DEQAdaTAPMeanFieldAttention
from ._mean_field import DEQMeanFieldAttention
from ._mlp_mixer import DEQMLPMixerAttention
from ._softmax import DEQVanillaSoftmaxAttention
from ._vector_spin import DEQVectorSpinAttention

__all__ = [
    "DEQAdaTAPMeanFieldAttention",
    "DEQMLPMixerAttention",
    "DEQMeanFieldAttention",
    "DEQVanillaSoftmaxAttention",
    "DEQVectorSpinAttention",
]
