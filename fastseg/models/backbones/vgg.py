"""VGG-16 (Simonyan and Zisserman, 2014) as DeepLab v1 and v2 use it: output stride 8, fully connected layers as
convolutions.

    stride 2    conv1_1, conv1_2, max pool 3x3/2                      64 channels
           4    conv2_1, conv2_2, max pool 3x3/2                     128
           8    conv3_1, conv3_2, conv3_3, max pool 3x3/2            256
           8    conv4_1, conv4_2, conv4_3, max pool 3x3              512
           8    conv5_1, conv5_2, conv5_3, dilated by 2, max pool 3x3    512

Parameters are named, and at first distributed, as torchvision's `vgg16`.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import nn

_WIDTHS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


class VGG16(nn.Module):
    """The convolutions of VGG-16, with DeepLab's pools and dilation.

    Pools are 3x3 in ceil mode, as in Caffe, so that images of 8 k + 1 pixels a side give features of k + 1.

    Shapes: [N, 3, H, W] -> the features behind each pool, five tensors [N, channels[i], ~H / strides[i],
    ~W / strides[i]].

    Example:
        >>> import torch
        >>> [tuple(y.shape) for y in VGG16()(torch.randn(1, 3, 33, 33))][-2:]
        [(1, 512, 5, 5), (1, 512, 5, 5)]
    """

    channels = (64, 128, 256, 512, 512)
    strides = (2, 4, 8, 8, 8)

    def __init__(self):
        super().__init__()
        modules: list[nn.Module] = []
        inputs = 3
        for block, widths in enumerate(_WIDTHS):
            dilation = 2 if block == 4 else 1
            for width in widths:
                modules += [nn.Conv2d(inputs, width, 3, 1, dilation, dilation), nn.ReLU(inplace=True)]
                inputs = width
            modules.append(nn.MaxPool2d(3, 2 if block < 3 else 1, 1, ceil_mode=True))
        self.features = nn.Sequential(*modules)
        self.apply(_initialize)

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        x, features = images, []
        for module in self.features:
            x = module(x)
            if isinstance(module, nn.MaxPool2d):
                features.append(x)
        return features


def fully_convolutional(
    num_classes: int, kernel_size: int = 3, dilation: int = 12, width: int = 1024, dropout: float = 0.5
) -> nn.Sequential:
    """VGG-16's fully connected layers as convolutions that keep the size: [N, 512, h, w] -> [N, num_classes, h, w]."""
    fc6 = nn.Conv2d(512, width, kernel_size, padding=dilation * (kernel_size - 1) // 2, dilation=dilation)
    fc7 = nn.Conv2d(width, width, 1)
    fc8 = nn.Conv2d(width, num_classes, 1)
    for layer in (fc6, fc7):
        _initialize(layer)
    nn.init.normal_(fc8.weight, 0, 0.01)
    nn.init.zeros_(fc8.bias)
    modules = OrderedDict(
        fc6=fc6, relu6=nn.ReLU(inplace=True), dropout6=nn.Dropout(dropout),
        fc7=fc7, relu7=nn.ReLU(inplace=True), dropout7=nn.Dropout(dropout), fc8=fc8,
    )  # fmt: skip
    return nn.Sequential(modules)


def _initialize(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(module.bias)
