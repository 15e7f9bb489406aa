"""Drop-in modules of torch.nn: same constructor order, same parameter names; and the blocks of DeepLab."""

from fastseg.nn.aspp import ASPP, SeparableASPP
from fastseg.nn.conv import Conv2d
from fastseg.nn.head import BilinearUpsample, UpsampleCrossEntropyLoss
from fastseg.nn.separable import SeparableConv2d

__all__ = ["ASPP", "BilinearUpsample", "Conv2d", "SeparableASPP", "SeparableConv2d", "UpsampleCrossEntropyLoss"]
