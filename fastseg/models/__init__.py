"""The reference models."""

from fastseg.models.counts import summary
from fastseg.models.deeplab_v1 import deeplab_v1
from fastseg.models.deeplab_v2 import deeplab_v2
from fastseg.models.deeplab_v3 import deeplab_v3
from fastseg.models.deeplab_v3plus import deeplab_v3plus
from fastseg.models.unet import unet
from fastseg.models.weights import from_state_dict, load_weights, to_state_dict

__all__ = [
    "deeplab_v1",
    "deeplab_v2",
    "deeplab_v3",
    "deeplab_v3plus",
    "from_state_dict",
    "load_weights",
    "summary",
    "to_state_dict",
    "unet",
]
