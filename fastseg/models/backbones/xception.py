"""Aligned Xception-65 (Chen et al., "Encoder-Decoder with Atrous Separable Convolution", 2018, figure 4).

    stride 2    two convolutions: 3x3/2 32, 3x3 64
           4    entry block 1, 128
           8    entry block 2, 256; its second separable convolution, still at stride 4, is DeepLab v3+'s low level
          16    entry block 3, 728; sixteen middle blocks
          32    exit block 1, 728 1024 1024; exit block 2, 1536 1536 2048

A block is three separable convolutions, the last of which has the stride, and a shortcut: a convolution where the block
changes size or channels, the input itself in the middle flow, none around exit block 2. ReLU comes in front of each
separable convolution, and behind each of its halves in exit block 2; batch norm is everywhere.

A stride that an output stride of 16 or 8 leaves out comes behind everything else in its block, so that dilation begins
with the block after it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from fastseg.models.layers import check_choice, conv_norm_act, separable_norm_act

MIDDLE_BLOCKS = 16


class _Block(nn.Module):
    """Three separable convolutions, and the shortcut added to their result.

    Args:
        widths: of the three.
        shortcut: "conv", "input" or None.
    """

    def __init__(self, in_channels: int, widths: Sequence[int], stride: int, dilation: int, shortcut: str | None, eps):
        super().__init__()
        self.convs = nn.Sequential(*_separable(in_channels, widths, stride, dilation, shortcut is None, eps))
        self.shortcut = nn.Identity()
        if shortcut == "conv":
            self.shortcut = nn.Sequential(
                *conv_norm_act(in_channels, widths[-1], 1, stride, activation="none", eps=eps)
            )
        self.adds = shortcut is not None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.convs(x)
        return y + self.shortcut(x) if self.adds else y


class _LowLevelBlock(_Block):
    """A `_Block` that gives its second separable convolution's result as well."""

    def __init__(self, *args):
        super().__init__(*args)
        layers = list(self.convs)
        third = len(layers) * 2 // 3
        self.convs, self.last = nn.Sequential(*layers[:third]), nn.Sequential(*layers[third:])

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        low_level = self.convs(x)
        return self.last(low_level) + self.shortcut(x), low_level


def _separable(in_channels, widths, stride, dilation, active, eps) -> list[nn.Module]:
    """`active`: ReLU behind each half, rather than one in front of both."""
    activation = "relu" if active else "none"
    layers: list[nn.Module] = []
    for index, width in enumerate(widths):
        step = stride if index == len(widths) - 1 else 1
        layers += [] if active else [nn.ReLU()]
        layers += separable_norm_act(
            in_channels, width, step, dilation, between=activation, activation=activation, eps=eps
        )
        in_channels = width
    return layers


class Xception65(nn.Module):
    """The aligned Xception-65 without its classifier.

    Args:
        output_stride: 8, 16 or 32, of the last features.
        in_channels: of the images.
        eps: of every batch norm.

    Shapes: [N, in_channels, H, W] -> the features behind the second convolution, the low level, those behind entry
    block 2, the middle flow and the exit, five tensors [N, channels[i], ~H / strides[i], ~W / strides[i]].

    Raises:
        ValueError: an unknown output stride.

    Example:
        >>> import torch
        >>> backbone = Xception65(output_stride=16).eval()
        >>> backbone.channels, backbone.strides
        ((64, 256, 256, 728, 2048), (2, 4, 8, 16, 16))
        >>> backbone(torch.randn(1, 3, 33, 33))[-1].shape
        torch.Size([1, 2048, 3, 3])
    """

    def __init__(self, output_stride: int = 16, *, in_channels: int = 3, eps: float = 1e-3):
        super().__init__()
        check_choice("output_stride", output_stride, (8, 16, 32))
        self.stem = nn.Sequential(
            *conv_norm_act(in_channels, 32, 3, 2, eps=eps),
            *conv_norm_act(32, 64, 3, eps=eps),
        )
        # Of entry block 3 and exit block 1, which lose their stride at 8 and 16.
        third, fourth = (2 if output_stride >= 16 else 1), (2 if output_stride == 32 else 1)
        middle, end = 2 // third, 4 // (third * fourth)
        self.entry1 = _Block(64, (128,) * 3, 2, 1, "conv", eps)
        self.entry2 = _LowLevelBlock(128, (256,) * 3, 2, 1, "conv", eps)
        self.entry3 = _Block(256, (728,) * 3, third, 1, "conv", eps)
        self.middle = nn.Sequential(*(_Block(728, (728,) * 3, 1, middle, "input", eps) for _ in range(MIDDLE_BLOCKS)))
        self.exit1 = _Block(728, (728, 1024, 1024), fourth, middle, "conv", eps)
        self.exit2 = _Block(1024, (1536, 1536, 2048), 1, end, None, eps)
        self.channels: tuple[int, ...] = (64, 256, 256, 728, 2048)
        self.strides: tuple[int, ...] = (2, 4, 8, 8 * third, 8 * third * fourth)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        stem = self.stem(images)
        entry, low_level = self.entry2(self.entry1(stem))
        middle = self.middle(self.entry3(entry))
        return [stem, low_level, entry, middle, self.exit2(self.exit1(middle))]
