"""ResNet (He et al., "Deep Residual Learning for Image Recognition", 2015), dilated as the DeepLab papers dilate it.

    stride 2    conv1 7x7/2, bn1, ReLU
           4    max pool 3x3/2, layer1
           8    layer2
          16    layer3
          32    layer4          an output stride of 16 or 8 turns the last one or two strides into dilation

The "beta" form is the one that DeepLab v3 and v3+ report with (resnet_v1_101_beta of TensorFlow's release): three 3x3
convolutions 64, 64, 128 for the 7x7, and a stage's stride in its last block, which here is the first of the next layer.

Parameters are named, and at first distributed, as torchvision's.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import nn

from fastseg.models.layers import check_choice, conv_norm_act


class _BasicBlock(nn.Module):
    """Two 3x3 convolutions, the first with the stride, and the input added to their result."""

    expansion = 1

    def __init__(
        self, in_channels: int, width: int, stride: int, dilations: tuple[int, int], stride_in: str, eps: float
    ):
        super().__init__()
        first, second = dilations
        self.conv1 = nn.Conv2d(in_channels, width, 3, stride, first, first, bias=False)
        self.bn1 = nn.BatchNorm2d(width, eps)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(width, width, 3, 1, second, second, bias=False)
        self.bn2 = nn.BatchNorm2d(width, eps)
        self.downsample = _shortcut(in_channels, width, stride, eps)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return self.relu(y + (x if self.downsample is None else self.downsample(x)))


class _Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions, and the input added to their result; the 3x3 takes the first of the dilations."""

    expansion = 4

    def __init__(
        self, in_channels: int, width: int, stride: int, dilations: tuple[int, int], stride_in: str, eps: float
    ):
        super().__init__()
        first, second = (stride, 1) if stride_in == "1x1" else (1, stride)
        dilation = dilations[0]
        out_channels = width * self.expansion
        self.conv1 = nn.Conv2d(in_channels, width, 1, first, bias=False)
        self.bn1 = nn.BatchNorm2d(width, eps)
        self.conv2 = nn.Conv2d(width, width, 3, second, dilation, dilation, bias=False)
        self.bn2 = nn.BatchNorm2d(width, eps)
        self.conv3 = nn.Conv2d(width, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels, eps)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _shortcut(in_channels, out_channels, stride, eps)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return self.relu(y + (x if self.downsample is None else self.downsample(x)))


def _shortcut(in_channels, out_channels, stride, eps) -> nn.Module | None:
    if in_channels == out_channels:
        return None if stride == 1 else nn.MaxPool2d(1, stride)
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels, eps))


# Block and how many of them in each stage.
RESNETS = {
    "resnet18": (_BasicBlock, (2, 2, 2, 2)),
    "resnet34": (_BasicBlock, (3, 4, 6, 3)),
    "resnet50": (_Bottleneck, (3, 4, 6, 3)),
    "resnet101": (_Bottleneck, (3, 4, 23, 3)),
    "resnet50_beta": (_Bottleneck, (3, 4, 6, 3)),
    "resnet101_beta": (_Bottleneck, (3, 4, 23, 3)),
}


class ResNet(nn.Module):
    """A ResNet without its classifier.

    Args:
        name: "resnet18", "resnet34", "resnet50", "resnet101", "resnet50_beta" or "resnet101_beta".
        output_stride: 8, 16 or 32, of the last features.
        in_channels: of the images.
        multi_grid: what the dilation of each block of layer4 is multiplied with, as (1, 2, 4) in DeepLab v3; None is 1.
        stride_in: the convolution of a bottleneck that has the stride: the "3x3" (torchvision) or the first "1x1"
            (Caffe, DeepLab v2). Basic blocks have it in their first convolution.
        keep_dilation: whether the first block of a stage that is dilated keeps the dilation of the stage before it
            (torchvision) rather than having the stage's own (the DeepLab papers).
        ceil_mode: of the max pool; True in DeepLab v2.
        eps: of every batch norm.

    Shapes: [N, in_channels, H, W] -> the features behind the first ReLU and behind each layer, five tensors
    [N, channels[i], ~H / strides[i], ~W / strides[i]].

    Raises:
        ValueError: an unknown name or option, or a multi_grid that has not one factor for each block of layer4.

    Example:
        >>> import torch
        >>> backbone = ResNet("resnet18", output_stride=16).eval()
        >>> [tuple(y.shape) for y in backbone(torch.randn(1, 3, 65, 65))][-2:]
        [(1, 256, 5, 5), (1, 512, 5, 5)]
        >>> backbone.channels, backbone.strides
        ((64, 64, 128, 256, 512), (2, 4, 8, 16, 16))
    """

    def __init__(
        self, name: str = "resnet50", output_stride: int = 32, *, in_channels: int = 3,
        multi_grid: Sequence[int] | None = None, stride_in: str = "3x3", keep_dilation: bool = False,
        ceil_mode: bool = False, eps: float = 1e-5,
    ):  # fmt: skip
        super().__init__()
        check_choice("name", name, tuple(RESNETS))
        check_choice("output_stride", output_stride, (8, 16, 32))
        check_choice("stride_in", stride_in, ("3x3", "1x1"))
        block, counts = RESNETS[name]
        multi_grid = tuple(multi_grid or (1,) * counts[-1])
        if len(multi_grid) != counts[-1]:
            raise ValueError(f"expected multi_grid to have {counts[-1]} factors for {name}, but got {multi_grid}")
        beta = name.endswith("_beta")
        width = 128 if beta else 64
        self.conv1 = _small_stem(in_channels, eps) if beta else nn.Conv2d(in_channels, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(width, eps)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1, ceil_mode=ceil_mode)
        channels, strides, reached, dilation = [width], [2], 4, 1
        for stage, widths in enumerate(_widths(counts, beta)):
            stride, before = 1 if stage == 0 else 2, dilation
            if reached * stride > output_stride:
                dilation, stride = dilation * stride, 1
            grid = [1] * len(widths)
            if stage == 3:
                grid[-len(multi_grid) :] = multi_grid
            blocks = []
            for index, (inner, factor) in enumerate(zip(widths, grid, strict=True)):
                first = before if index == 0 and (keep_dilation or beta) else dilation
                dilations = (first * factor, dilation * factor)
                blocks.append(block(width, inner, stride if index == 0 else 1, dilations, stride_in, eps))
                width = inner * block.expansion
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
            reached *= stride
            channels.append(width)
            strides.append(reached)
        self.channels: tuple[int, ...] = tuple(channels)
        self.strides: tuple[int, ...] = tuple(strides)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        features = [self.relu(self.bn1(self.conv1(images)))]
        features.append(self.layer1(self.maxpool(features[0])))
        for layer in (self.layer2, self.layer3, self.layer4):
            features.append(layer(features[-1]))
        return features


def _small_stem(in_channels: int, eps: float) -> nn.Sequential:
    return nn.Sequential(
        *conv_norm_act(in_channels, 64, 3, 2, eps=eps),
        *conv_norm_act(64, 64, 3, eps=eps),
        *conv_norm_act(64, 128, 3)[:1],
    )


def _widths(counts: Sequence[int], beta: bool) -> list[list[int]]:
    """The inner width of each block of each layer."""
    found = [[64 * 2**stage] * count for stage, count in enumerate(counts)]
    if beta:
        for before, after in itertools.pairwise(found):
            after.insert(0, before.pop())
    return found
