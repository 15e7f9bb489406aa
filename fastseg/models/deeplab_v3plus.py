"""DeepLab v3+ (Chen et al., "Encoder-Decoder with Atrous Separable Convolution for Semantic Image Segmentation", 2018).

images - backbone - features, output stride 16 - ASPP - resize x 4 - concat - 3x3 - 3x3 - 1x1 - logits, stride 4
                  \\ low level, stride 4 - 1x1, 48 channels ---------- /
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from fastseg.models.backbones import build_backbone
from fastseg.models.deeplab_v3 import fitting_rates
from fastseg.models.layers import ASPP, Resize, SeparableASPP, check_choice, conv_norm_act, finish, separable_norm_act
from fastseg.models.model import SegmentationModel

LOW_LEVEL_STRIDE = 4


def deeplab_v3plus(
    num_classes: int = 21, *, encoder: str = "xception65", output_stride: int = 16, in_channels: int = 3,
    encoder_options: Mapping[str, Any] | None = None, rates: Sequence[int] | None = None,
    separable: bool | str = True, separable_norm: bool = True, channels: int = 256, pooling: str | None = "last",
    dropout: float = 0.1, single_image: str = "error", refine: bool = False,
    decoder_convs: int = 2, low_level_channels: int = 48, align_corners: bool = False, layers: str = "fastseg",
) -> SegmentationModel:  # fmt: skip
    """DeepLab v3+, in the paper's form unless options say otherwise.

    Args:
        num_classes: K.

        encoder: "xception65", "resnet50", "resnet101", "resnet101_beta" (the paper's ResNet), "mobilenet_v2" or another
            of `fastseg.models.backbones.BACKBONES`, or "timm:NAME".
        output_stride: of the encoder's last features, 8, 16 or 32.
        in_channels: of the images.
        encoder_options: more options of the encoder's class, such as {"multi_grid": (1, 2, 4)} of ResNets.

        rates: the dilations of the ASPP's 3x3 branches, () for none; None for those that fit the output stride: 6, 12
            and 18 at 16, the double at 8.
        separable: whether 3x3 convolutions are depthwise separable in both ASPP and decoder; "aspp" or "decoder" for
            one of them.
        separable_norm: whether these have batch norm and ReLU between their halves; segmentation_models_pytorch has
            neither.
        channels: of each branch of the ASPP, and of the decoder.
        pooling: where the ASPP's pooled branch stands among the others: "last", "first" (TensorFlow, mmsegmentation),
            or None for none.
        dropout: probability, behind the ASPP.
        single_image: what the pooled branch does in training with a batch of one image, whose batch norm would have one
            value a channel: "error" raises as torch.nn.BatchNorm2d does; "running_stats" takes the running statistics
            there, without updating them.
        refine: whether one more 3x3 convolution, separable as the decoder's, follows the ASPP, as in
            segmentation_models_pytorch.

        decoder_convs: how many 3x3 convolutions the decoder has; 0 for no decoder: logits straight from the ASPP.
        low_level_channels: of the low-level features there.
        align_corners: of both resizes; True in TensorFlow and segmentation_models_pytorch.
        layers: "fastseg" or "native".

    Returns:
        A `SegmentationModel`: images [N, in_channels, H, W], of any size -> logits [N, K, H, W].

    Raises:
        ImportError: "timm:NAME", and timm is not installed.
        ValueError: an unknown option, or an encoder without features at stride 4.

    Example:
        >>> import torch
        >>> model = deeplab_v3plus(21, encoder="mobilenet_v2").eval()
        >>> model(torch.randn(1, 3, 65, 70)).shape
        torch.Size([1, 21, 65, 70])
        >>> model.predict(torch.randn(1, 3, 65, 70)).dtype
        torch.int64
    """
    check_choice("separable", separable, (True, False, "aspp", "decoder"))
    if decoder_convs < 0:
        raise ValueError(f"expected decoder_convs to be a number of convolutions, but got {decoder_convs}")
    backbone = build_backbone(encoder, output_stride, in_channels, **(encoder_options or {}))
    if decoder_convs and LOW_LEVEL_STRIDE not in backbone.strides:
        raise ValueError(f"expected an encoder with features at stride 4, but {encoder} has them at {backbone.strides}")
    rates = fitting_rates(output_stride) if rates is None else tuple(rates)
    between = "relu" if separable_norm else None
    pyramid = {"pooling": pooling, "dropout": dropout, "single_image": single_image}
    if separable in (True, "aspp"):
        norm = "batch" if separable_norm else None
        aspp = SeparableASPP(backbone.channels[-1], channels, rates, depthwise_norm=norm, **pyramid)
    else:
        aspp = ASPP(backbone.channels[-1], channels, rates, **pyramid)

    def convolution(inputs: int) -> nn.Sequential:
        if separable in (True, "decoder"):
            return nn.Sequential(*separable_norm_act(inputs, channels, between=between))
        return nn.Sequential(*conv_norm_act(inputs, channels))

    decoder = None
    if decoder_convs:
        low_level = conv_norm_act(backbone.channels[backbone.strides.index(LOW_LEVEL_STRIDE)], low_level_channels, 1)
        inputs = [channels + low_level_channels, *[channels] * (decoder_convs - 1)]
        decoder = Decoder(nn.Sequential(*low_level), nn.Sequential(*map(convolution, inputs)), align_corners)
    refinement = convolution(channels) if refine else nn.Sequential()
    classifier = nn.Conv2d(channels, num_classes, 1)
    model = DeepLabV3Plus(backbone, aspp, refinement, decoder, classifier, num_classes, align_corners, layers)
    return finish(model, layers)


class Decoder(nn.Module):
    """ASPP's result, enlarged, beside low-level features of the backbone, then convolutions.

    Args:
        low_level: the 1x1 convolution of the low-level features.
        convs: those of both together.
        align_corners: of the enlargement.
    """

    def __init__(self, low_level: nn.Module, convs: nn.Module, align_corners: bool):
        super().__init__()
        self.low_level = low_level
        self.resize = Resize(align_corners)
        self.convs = convs

    def forward(self, x: torch.Tensor, low_level: torch.Tensor) -> torch.Tensor:
        """[N, C, h, w], [N, L, H, W] -> [N, K, H, W]."""
        low_level = self.low_level(low_level)
        return self.convs(torch.cat([self.resize(x, low_level.shape[-2:]), low_level], 1))


class DeepLabV3Plus(SegmentationModel):
    """See `deeplab_v3plus`."""

    def __init__(
        self, backbone: nn.Module, aspp: nn.Module, refinement: nn.Module, decoder: Decoder | None,
        classifier: nn.Module, num_classes: int, align_corners: bool, layers: str,
    ):  # fmt: skip
        super().__init__(num_classes, layers, align_corners)
        self.backbone = backbone
        self.aspp = aspp
        self.refinement = refinement
        self.decoder = decoder
        self.classifier = classifier

    def logits(self, images: torch.Tensor) -> torch.Tensor:
        """[N, C, H, W] -> [N, K, h, w], at stride 4; without a decoder, at the output stride."""
        features = self.backbone(images)
        y = self.refinement(self.aspp(features[-1]))
        if self.decoder is not None:
            y = self.decoder(y, features[self.backbone.strides.index(LOW_LEVEL_STRIDE)])
        return self.classifier(y)
