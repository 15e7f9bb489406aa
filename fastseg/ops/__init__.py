"""Public operators: drop-ins of torch.nn.functional with a choice of backend."""

from fastseg.ops.aspp import aspp
from fastseg.ops.conv2d import conv2d
from fastseg.ops.depthwise import depthwise_conv2d
from fastseg.ops.head import upsample_argmax, upsample_bilinear2d, upsample_cross_entropy
from fastseg.ops.separable import separable_conv2d
from fastseg.ops.separable_aspp import separable_aspp

__all__ = [
    "aspp",
    "conv2d",
    "depthwise_conv2d",
    "separable_aspp",
    "separable_conv2d",
    "upsample_argmax",
    "upsample_bilinear2d",
    "upsample_cross_entropy",
]
