"""MobileNetV3-Large (Howard et al., "Searching for MobileNetV3", 2019), dilated.

Parameters are named, and at first distributed, as those of the backbone of torchvision's DeepLab.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from fastseg.models.layers import check_choice, conv_norm_act


class _Block(NamedTuple):
    """A row of the paper's table 1."""

    kernel: int
    width: int  # inside
    channels: int
    squeezes: bool
    activation: str
    stride: int


BLOCKS = (
    _Block(3, 16, 16, False, "relu", 1),
    _Block(3, 64, 24, False, "relu", 2),
    _Block(3, 72, 24, False, "relu", 1),
    _Block(5, 72, 40, True, "relu", 2),
    _Block(5, 120, 40, True, "relu", 1),
    _Block(5, 120, 40, True, "relu", 1),
    _Block(3, 240, 80, False, "hardswish", 2),
    _Block(3, 200, 80, False, "hardswish", 1),
    _Block(3, 184, 80, False, "hardswish", 1),
    _Block(3, 184, 80, False, "hardswish", 1),
    _Block(3, 480, 112, True, "hardswish", 1),
    _Block(3, 672, 112, True, "hardswish", 1),
    _Block(5, 672, 160, True, "hardswish", 2),
    _Block(5, 960, 160, True, "hardswish", 1),
    _Block(5, 960, 160, True, "hardswish", 1),
)
# Where features are taken: the last at each stride; at 8 the first, which torchvision's auxiliary head reads.
FEATURES = (1, 3, 4, 12, 16)


class _SqueezeExcitation(nn.Module):
    """The input times a factor for each channel, made of the means of all channels."""

    def __init__(self, channels: int):
        super().__init__()
        squeezed = _in_eights(channels / 4)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc1 = nn.Conv2d(channels, squeezed, 1)
        self.activation = nn.ReLU(inplace=True)
        self.fc2 = nn.Conv2d(squeezed, channels, 1)
        self.scale_activation = nn.Hardsigmoid(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale_activation(self.fc2(self.activation(self.fc1(self.pool(x)))))


def _in_eights(channels: float) -> int:
    """The nearest multiple of eight, or the next where that would take more than a tenth away."""
    nearest = int(channels + 4) // 8 * 8
    return nearest if nearest >= 0.9 * channels else nearest + 8


class _InvertedResidual(nn.Module):
    """Pointwise, depthwise and pointwise convolution, and the input added where the result is of its size."""

    def __init__(self, in_channels: int, row: _Block, stride: int, dilation: int, eps: float):
        super().__init__()
        width, activation = row.width, row.activation
        layers: list[nn.Module] = []
        if width != in_channels:
            layers.append(nn.Sequential(*conv_norm_act(in_channels, width, 1, activation=activation, eps=eps)))
        layers.append(
            nn.Sequential(
                *conv_norm_act(width, width, row.kernel, stride, dilation, groups=width, activation=activation, eps=eps)
            )
        )
        if row.squeezes:
            layers.append(_SqueezeExcitation(width))
        layers.append(nn.Sequential(*conv_norm_act(width, row.channels, 1, activation="none", eps=eps)))
        self.block = nn.Sequential(*layers)
        self.adds = row.stride == 1 and in_channels == row.channels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.block(x)
        return x + y if self.adds else y


class MobileNetV3Large(nn.Sequential):
    """MobileNetV3-Large without its classifier; its children, "0" to "16", run in order.

    Args:
        output_stride: 8, 16 or 32, of the last features.
        in_channels: of the images.
        eps: of every batch norm.

    Shapes: [N, in_channels, H, W] -> features, five tensors [N, channels[i], ~H / strides[i], ~W / strides[i]]; the
    last is behind the 1x1 convolution to 960 channels.

    Raises:
        ValueError: an unknown output stride.

    Example:
        >>> import torch
        >>> backbone = MobileNetV3Large(output_stride=16).eval()
        >>> backbone.channels, backbone.strides
        ((16, 24, 40, 112, 960), (2, 4, 8, 16, 16))
        >>> backbone(torch.randn(1, 3, 65, 65))[-1].shape
        torch.Size([1, 960, 5, 5])
    """

    def __init__(self, output_stride: int = 32, *, in_channels: int = 3, eps: float = 1e-3):
        check_choice("output_stride", output_stride, (8, 16, 32))
        layers: list[nn.Module] = [
            nn.Sequential(*conv_norm_act(in_channels, 16, 3, 2, activation="hardswish", eps=eps))
        ]
        width, reached, dilation, strides = 16, 2, 1, [2]
        for row in BLOCKS:
            stride = row.stride
            if reached * stride > output_stride:
                dilation, stride = dilation * stride, 1
            reached *= stride
            layers.append(_InvertedResidual(width, row, stride, dilation, eps))
            width = row.channels
            strides.append(reached)
        layers.append(nn.Sequential(*conv_norm_act(width, 6 * width, 1, activation="hardswish", eps=eps)))
        super().__init__(*layers)
        self.channels: tuple[int, ...] = (*(BLOCKS[index - 1].channels for index in FEATURES[:-1]), 6 * width)
        self.strides: tuple[int, ...] = (*(strides[index] for index in FEATURES[:-1]), reached)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.BatchNorm2d):
                module.momentum = 0.01

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        found, y = [], images
        for index, layer in enumerate(self):
            y = layer(y)
            if index in FEATURES:
                found.append(y)
        return found
