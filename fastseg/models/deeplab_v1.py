"""DeepLab v1 (Chen et al., "Semantic Image Segmentation with Deep Convolutional Nets and Fully Connected CRFs", 2015).

VGG-16 whose last two pools do not subsample and whose layers behind them are dilated instead. The paper's variants
differ in fc6, the first of the layers that once were fully connected: LargeFOV sees as much as VGG-16's with an eighth
of the parameters. The paper's CRF is no part of the network.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from fastseg.models.backbones.vgg import VGG16, fully_convolutional
from fastseg.models.layers import check_choice, finish
from fastseg.models.model import SegmentationModel


class _Fc6(NamedTuple):
    kernel_size: int
    dilation: int
    width: int  # of fc7, too


VARIANTS = {
    "largefov": _Fc6(3, 12, 1024),
    "7x7": _Fc6(7, 4, 4096),
    "4x4": _Fc6(4, 4, 4096),
    "4x4-dilation8": _Fc6(4, 8, 4096),
}


def deeplab_v1(
    num_classes: int = 21, *, variant: str = "largefov", dropout: float = 0.5, align_corners: bool = True,
    layers: str = "fastseg",
) -> SegmentationModel:  # fmt: skip
    """DeepLab v1 on VGG-16, output stride 8.

    Args:
        num_classes: K.
        variant: fc6 is, in pixels of stride 8,
            "largefov"       3x3, dilation 12, 1024 channels; extent 25
            "7x7"            7x7, dilation 4, 4096 channels; extent 25
            "4x4"            4x4, dilation 4, 4096 channels; extent 13
            "4x4-dilation8"  4x4, dilation 8, 4096 channels; extent 25
        dropout: probability, behind fc6 and fc7.
        align_corners: of the resize of the logits; True, as in the authors' network, fits images of 8 k + 1 pixels a
            side, whose features lie on every eighth pixel.
        layers: "fastseg" or "native".

    Returns:
        A `SegmentationModel`: images [N, 3, H, W] -> logits [N, K, H, W].

    Raises:
        ValueError: an unknown option.

    Example:
        >>> import torch
        >>> deeplab_v1(21)(torch.randn(1, 3, 33, 41)).shape
        torch.Size([1, 21, 33, 41])
    """
    check_choice("variant", variant, tuple(VARIANTS))
    return finish(DeepLabV1(num_classes, VARIANTS[variant], dropout, align_corners, layers), layers)


class DeepLabV1(SegmentationModel):
    """See `deeplab_v1`."""

    def __init__(self, num_classes: int, fc6: _Fc6, dropout: float, align_corners: bool, layers: str):
        super().__init__(num_classes, layers, align_corners)
        self.backbone = VGG16()
        self.classifier = fully_convolutional(num_classes, *fc6, dropout)

    def logits(self, images: torch.Tensor) -> torch.Tensor:
        """[N, 3, H, W] -> [N, K, h, w], at an eighth of the images' size."""
        return self.classifier(self.backbone(images)[-1])
