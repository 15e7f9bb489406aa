"""DeepLab v2 (Chen et al., "DeepLab: Semantic Image Segmentation with Deep Convolutional Nets, Atrous Convolution, and
Fully Connected CRFs", 2017).

    images - network --------------------------- max - logits
           \\ x 3/4 - the same network - resize /  /
            \\ x 1/2 - the same network - resize _/

The network is a ResNet-101 or VGG-16 of output stride 8 and atrous spatial pyramid pooling: dilated branches that each
give logits, added up. The paper's CRF is no part of it.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import nn

from fastseg.models.backbones.resnet import ResNet
from fastseg.models.backbones.vgg import VGG16, fully_convolutional
from fastseg.models.layers import ASPP, check_choice, finish
from fastseg.models.model import SegmentationModel

RATES = (6, 12, 18, 24)
# Numerator and denominator of the scales below 1.
_SMALLER = ((3, 4), (1, 2))


def deeplab_v2(
    num_classes: int = 21, *, encoder: str = "resnet101", multi_scale: bool = True, rates: Sequence[int] = RATES,
    dropout: float = 0.5, align_corners: bool = True, layers: str = "fastseg",
) -> SegmentationModel:  # fmt: skip
    """DeepLab v2, output stride 8.

    Args:
        num_classes: K.
        encoder: "resnet101", whose branches are one 3x3 convolution each; or "vgg16", where they are fc6 (3x3, 1024
            channels), fc7 and fc8 (1x1), with ReLU and dropout between.
        multi_scale: whether the network looks at the images at scales 1, 3/4 and 1/2, and the logits are the largest of
            the three for each pixel and class. In training, `forward` then gives a list: logits [N, K, H, W] of each
            scale, and the maximum; and `loss` is the sum of the four losses.
        rates: the dilation of each branch.
        dropout: probability, in the branches of "vgg16".
        align_corners: of every resize; True, as in the authors' network, fits images of 8 k + 1 pixels a side, whose
            features lie on every eighth pixel.
        layers: "fastseg" or "native".

    Returns:
        A `SegmentationModel`: images [N, 3, H, W] -> logits [N, K, H, W].

    Raises:
        ValueError: an unknown option.

    Batch norms see each scale in training, one after the other; the authors kept theirs in eval mode.

    Example:
        >>> import torch
        >>> model = deeplab_v2(21, encoder="vgg16").eval()
        >>> model(torch.randn(1, 3, 33, 41)).shape
        torch.Size([1, 21, 33, 41])
    """
    check_choice("encoder", encoder, ("resnet101", "vgg16"))
    rates = tuple(rates)
    if encoder == "resnet101":
        backbone = ResNet("resnet101", 8, stride_in="1x1", ceil_mode=True)
        classifier: nn.Module = _aspp(num_classes, rates)
    else:
        backbone = VGG16()
        classifier = _Sum(fully_convolutional(num_classes, dilation=rate, dropout=dropout) for rate in rates)
    smaller = _SMALLER if multi_scale else ()
    return finish(DeepLabV2(backbone, classifier, num_classes, smaller, align_corners, layers), layers)


class DeepLabV2(SegmentationModel):
    """See `deeplab_v2`."""

    def __init__(
        self, backbone: nn.Module, classifier: nn.Module, num_classes: int, smaller: Sequence[tuple[int, int]],
        align_corners: bool, layers: str,
    ):  # fmt: skip
        super().__init__(num_classes, layers, align_corners)
        self.backbone = backbone
        self.classifier = classifier
        self.smaller = tuple(smaller)

    def scale_logits(self, images: torch.Tensor) -> list[torch.Tensor]:
        """The logits [N, K, h, w] of each scale, largest first, each at its own resolution."""
        height, width = images.shape[-2:]
        scales = [images]
        for part, whole in self.smaller:
            # Both corners of the grid stay where they are: 8 k + 1 pixels become 6 k + 1 and 4 k + 1.
            size = ((height - 1) * part // whole + 1, (width - 1) * part // whole + 1)
            scales.append(self.resize(images, size))
        return [self.classifier(self.backbone(scale)[-1]) for scale in scales]

    def _maximum(self, scales: list[torch.Tensor]) -> torch.Tensor:
        size = scales[0].shape[-2:]
        return functools.reduce(torch.maximum, [scales[0], *(self.resize(logits, size) for logits in scales[1:])])

    def logits(self, images: torch.Tensor) -> torch.Tensor:
        """[N, 3, H, W] -> [N, K, h, w], at an eighth of the images' size."""
        return self._maximum(self.scale_logits(images))

    def training_logits(self, images: torch.Tensor) -> list[tuple[torch.Tensor, float]]:
        scales = self.scale_logits(images)
        return [(logits, 1.0) for logits in (scales if len(scales) == 1 else [*scales, self._maximum(scales)])]

    def forward(self, images: torch.Tensor) -> torch.Tensor | list[torch.Tensor]:
        """[N, 3, H, W] -> logits [N, K, H, W]; in training on several scales a list, the maximum last."""
        if not self.training or not self.smaller:
            return super().forward(images)
        return [self.resize(logits, images.shape[-2:]) for logits, _ in self.training_logits(images)]


class _Sum(nn.Module):
    """Branches whose results are added up."""

    def __init__(self, branches):
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return sum(branch(x) for branch in self.branches)


def _aspp(num_classes: int, rates: tuple[int, ...]) -> ASPP:
    pyramid = ASPP(
        2048, num_classes, rates, pointwise=False, pooling=None, norm=None, activation="none", reduction="sum"
    )
    for (conv,) in pyramid.convs:
        nn.init.normal_(conv.weight, 0, 0.01)
        nn.init.zeros_(conv.bias)
    return pyramid
