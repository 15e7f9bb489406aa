"""DeepLab v3 (Chen et al., "Rethinking Atrous Convolution for Semantic Image Segmentation", 2017).

images - backbone, output stride 8 or 16 - ASPP - (3x3 convolution) - 1x1 convolution - logits
                  \\ (auxiliary head, in the loss alone)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from fastseg.models.backbones import build_backbone
from fastseg.models.backbones.resnet import RESNETS
from fastseg.models.layers import ASPP, SeparableASPP, check_choice, conv_norm_act, finish
from fastseg.models.model import SegmentationModel

# The multi-grid of the paper's best networks.
MULTI_GRID = (1, 2, 4)
# What the auxiliary head's loss counts, as in torchvision's training.
AUXILIARY = 0.5


def deeplab_v3(
    num_classes: int = 21, *, encoder: str = "resnet50", output_stride: int | None = None,
    multi_grid: Sequence[int] | None = None, rates: Sequence[int] | None = None, aux: bool = False,
    weights_layout: str = "torchvision", in_channels: int = 3, channels: int = 256, separable: bool = False,
    dropout: float | None = None, align_corners: bool = False, single_image: str = "error",
    encoder_options: Mapping[str, Any] | None = None, layers: str = "fastseg",
) -> SegmentationModel:  # fmt: skip
    """DeepLab v3, in torchvision's form or the paper's.

    Args:
        num_classes: K.
        encoder: "resnet50", "resnet101" or another of `fastseg.models.backbones.BACKBONES`, or "timm:NAME".
        output_stride: of the features, 8, 16 or 32; None for 8, with "mobilenet_v3_large" for 16, as in torchvision.
        multi_grid: factors of the dilations of the three blocks of a ResNet's last layer; None for (1, 2, 4) in the
            paper's form and (1, 1, 1) in torchvision's.
        rates: the dilations of the ASPP's 3x3 branches; None for those that fit the output stride: 6, 12 and 18 at 16,
            the double at 8, and for torchvision's 12, 24 and 36 with "mobilenet_v3_large".
        aux: whether there is an auxiliary head, behind the last layer but one (of "mobilenet_v3_large" at stride 8).
            Its loss counts half; `forward` and `predict` leave it out.
        weights_layout: "torchvision", whose `deeplabv3_*` state dicts then load strictly: the first block of a ResNet's
            dilated layer keeps the dilation of the layer before it, a 3x3 convolution comes before the logits, dropout
            is 0.5. "paper": the layer's dilation from its first block, nothing between ASPP and logits, dropout 0.1.
        in_channels: of the images.
        channels: of each branch of the ASPP, and behind it.
        separable: whether the ASPP's 3x3 branches are depthwise separable, as segmentation_models_pytorch has them on
            demand: no norm between the halves.
        dropout: probability, behind the ASPP; None for that of the form.
        align_corners: of the resize to the images' size; True in segmentation_models_pytorch.
        single_image: what the ASPP's pooled branch does in training with a batch of one image, whose batch norm would
            have one value a channel: "error" raises as torch.nn.BatchNorm2d does; "running_stats" takes the running
            statistics there, without updating them.
        encoder_options: more options of the encoder's class, such as `eps`.
        layers: "fastseg" or "native".

    Returns:
        A `SegmentationModel`: images [N, in_channels, H, W], of any size -> logits [N, K, H, W].

    Raises:
        ImportError: "timm:NAME", and timm is not installed.
        ValueError: an unknown option.

    Example:
        >>> import torch
        >>> model = deeplab_v3(21, encoder="mobilenet_v3_large").eval()
        >>> model(torch.randn(1, 3, 65, 70)).shape
        torch.Size([1, 21, 65, 70])
    """
    check_choice("weights_layout", weights_layout, ("torchvision", "paper"))
    resnet, mobilenet = encoder in RESNETS, encoder == "mobilenet_v3_large"
    torchvision = weights_layout == "torchvision"
    if output_stride is None:
        output_stride = 16 if mobilenet else 8
    if multi_grid is None and resnet and not torchvision:
        multi_grid = MULTI_GRID
    options = {"keep_dilation": True} if torchvision and resnet else {}
    options |= {"multi_grid": multi_grid, **(encoder_options or {})}
    backbone = build_backbone(encoder, output_stride, in_channels, **options)
    if rates is None:
        rates = (12, 24, 36) if torchvision and mobilenet else fitting_rates(output_stride)
    aspp = (SeparableASPP if separable else ASPP)(
        backbone.channels[-1], channels, tuple(rates), single_image=single_image,
        dropout=(0.5 if torchvision else 0.1) if dropout is None else dropout,
    )  # fmt: skip
    refinement = conv_norm_act(channels, channels) if torchvision else []
    classifier = nn.Sequential(aspp, *refinement, nn.Conv2d(channels, num_classes, 1))
    aux_index = 2 if mobilenet else len(backbone.channels) - 2
    aux_classifier = _auxiliary(backbone.channels[aux_index], num_classes) if aux else None
    model = DeepLabV3(backbone, classifier, aux_classifier, aux_index, num_classes, align_corners, layers)
    return finish(model, layers)


def fitting_rates(output_stride: int) -> tuple[int, ...]:
    """6, 12 and 18 at output stride 16, and what is the same in the image's pixels at others."""
    return tuple(rate * 16 // output_stride for rate in (6, 12, 18))


class DeepLabV3(SegmentationModel):
    """See `deeplab_v3`."""

    def __init__(
        self, backbone: nn.Module, classifier: nn.Module, aux_classifier: nn.Module | None, aux_index: int,
        num_classes: int, align_corners: bool, layers: str,
    ):  # fmt: skip
        super().__init__(num_classes, layers, align_corners)
        self.backbone = backbone
        self.classifier = classifier
        self.aux_classifier = aux_classifier
        self.aux_index = aux_index  # of the features that it reads

    def logits(self, images: torch.Tensor) -> torch.Tensor:
        """[N, C, H, W] -> [N, K, h, w], at the output stride."""
        return self.classifier(self.backbone(images)[-1])

    def training_logits(self, images: torch.Tensor) -> list[tuple[torch.Tensor, float]]:
        features = self.backbone(images)
        found = [(self.classifier(features[-1]), 1.0)]
        if self.aux_classifier is not None:
            found.append((self.aux_classifier(features[self.aux_index]), AUXILIARY))
        return found


def _auxiliary(in_channels: int, num_classes: int) -> nn.Sequential:
    width = in_channels // 4
    return nn.Sequential(*conv_norm_act(in_channels, width), nn.Dropout(0.1), nn.Conv2d(width, num_classes, 1))
