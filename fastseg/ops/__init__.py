"""Public operators: drop-ins of torch.nn.functional with a choice of backend."""

from fastseg.ops.conv2d import conv2d
from fastseg.ops.depthwise import depthwise_conv2d

__all__ = ["conv2d", "depthwise_conv2d"]
