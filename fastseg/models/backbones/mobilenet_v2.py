"""MobileNetV2 (Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks", 2018), dilated.

Parameters are named, and at first distributed, as torchvision's.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from fastseg.models.layers import check_choice, conv_norm_act

# Factor by which a block widens, channels, blocks, stride of the first of them.
STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
# The last block at each stride, where features are taken.
LAST_OF_STRIDE = (1, 3, 6, 13)


class _InvertedResidual(nn.Module):
    """Pointwise, depthwise and pointwise convolution, and the input added where the result is of its size."""

    def __init__(
        self, in_channels: int, out_channels: int, factor: int, stride: int, dilation: int, padding: str, eps: float
    ):
        super().__init__()
        width = in_channels * factor
        depthwise = conv_norm_act(width, width, 3, stride, dilation, groups=width, activation="relu6", eps=eps)
        self.padding = dilation if padding == "block" else 0
        if self.padding:
            depthwise[0].padding = (0, 0)
        expansion = [nn.Sequential(*conv_norm_act(in_channels, width, 1, activation="relu6", eps=eps))]
        self.conv = nn.Sequential(
            *(expansion if factor > 1 else []),
            nn.Sequential(*depthwise),
            *conv_norm_act(width, out_channels, 1, activation="none", eps=eps),
        )
        self.adds = stride == 1 and in_channels == out_channels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(F.pad(x, [self.padding] * 4) if self.padding else x)
        return x + y if self.adds else y


class MobileNetV2(nn.Module):
    """MobileNetV2 without its classifier.

    Args:
        output_stride: 8, 16 or 32, of the last features.
        in_channels: of the images.
        tail: whether the last features are those behind the 1x1 convolution to 1280 channels, as in
            segmentation_models_pytorch, rather than the 320 channels in front of it, as in TensorFlow's DeepLab.
        keep_dilation: whether the first block of a stage that is dilated keeps the dilation of the stage before it.
        padding: where zeros are put around: "conv", around the input of each 3x3 convolution; "block", around the input
            of each block, which expands them to the batch norm's shift, and not at all around images. The second is
            that of the PyTorch DeepLabV3Plus by VainF.
        eps: of every batch norm.

    Shapes: [N, in_channels, H, W] -> the features behind the last block at each stride, five tensors
    [N, channels[i], ~H / strides[i], ~W / strides[i]].

    Raises:
        ValueError: an unknown output stride or padding.

    Example:
        >>> import torch
        >>> backbone = MobileNetV2(output_stride=16).eval()
        >>> backbone.channels, backbone.strides
        ((16, 24, 32, 96, 320), (2, 4, 8, 16, 16))
        >>> backbone(torch.randn(1, 3, 65, 65))[-1].shape
        torch.Size([1, 320, 5, 5])
    """

    def __init__(
        self, output_stride: int = 32, *, in_channels: int = 3, tail: bool = False, keep_dilation: bool = False,
        padding: str = "conv", eps: float = 1e-5,
    ):  # fmt: skip
        super().__init__()
        check_choice("output_stride", output_stride, (8, 16, 32))
        check_choice("padding", padding, ("conv", "block"))
        stem = conv_norm_act(in_channels, 32, 3, 2, activation="relu6", eps=eps)
        if padding == "block":
            stem[0].padding = (0, 0)
        features: list[nn.Module] = [nn.Sequential(*stem)]
        width, reached, dilation, strides = 32, 2, 1, []
        for factor, channels, count, stride in STAGES:
            before = dilation
            if reached * stride > output_stride:
                dilation, stride = dilation * stride, 1
            reached *= stride
            for index in range(count):
                rate, step = (before if keep_dilation else dilation, stride) if index == 0 else (dilation, 1)
                features.append(_InvertedResidual(width, channels, factor, step, rate, padding, eps))
                width = channels
                strides.append(reached)
        if tail:
            features.append(nn.Sequential(*conv_norm_act(width, 1280, 1, activation="relu6", eps=eps)))
        self.features = nn.Sequential(*features)
        self.channels: tuple[int, ...] = (16, 24, 32, 96, 1280 if tail else 320)
        self.strides: tuple[int, ...] = (*(strides[index - 1] for index in LAST_OF_STRIDE), reached)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        found, y = [], images
        for index, block in enumerate(self.features):
            y = block(y)
            if index in LAST_OF_STRIDE:
                found.append(y)
        return [*found, y]
