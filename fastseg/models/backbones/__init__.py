"""The networks that turn images into features; see `build_backbone`."""

from __future__ import annotations

import functools
import inspect

from torch import nn

from fastseg.models.backbones.mobilenet_v2 import MobileNetV2
from fastseg.models.backbones.mobilenet_v3 import MobileNetV3Large
from fastseg.models.backbones.resnet import RESNETS, ResNet
from fastseg.models.backbones.timm import TimmBackbone
from fastseg.models.backbones.xception import Xception65

BACKBONES = {
    **{name: functools.partial(ResNet, name) for name in RESNETS},
    "mobilenet_v2": MobileNetV2,
    "mobilenet_v3_large": MobileNetV3Large,
    "xception65": Xception65,
}
TIMM = "timm:"


def build_backbone(encoder: str, output_stride: int, in_channels: int = 3, **options) -> nn.Module:
    """A network that gives a list of features, from high resolution to low.

    Its `channels` and `strides` say the width of each of them, and by how much it is smaller than the images.

    Args:
        encoder: a key of `BACKBONES`, or "timm:NAME" for a network of timm.
        output_stride: of the last features.
        in_channels: of the images.
        options: of the network's class; None leaves an option at its default.

    Raises:
        ImportError: "timm:NAME", and timm is not installed.
        ValueError: an unknown encoder, output stride or option.

    Example:
        >>> build_backbone("resnet50", 8, multi_grid=(1, 2, 4)).strides
        (2, 4, 8, 8, 8)
    """
    options = {name: value for name, value in options.items() if value is not None}
    if encoder.startswith(TIMM):
        return TimmBackbone(encoder.removeprefix(TIMM), output_stride, in_channels=in_channels, **options)
    if encoder not in BACKBONES:
        known = ", ".join(map(repr, BACKBONES))
        raise ValueError(f"expected encoder to be one of {known} or '{TIMM}NAME', but got {encoder!r}")
    kind = BACKBONES[encoder]
    allowed = [p.name for p in inspect.signature(kind).parameters.values() if p.kind is p.KEYWORD_ONLY]
    unknown = [name for name in options if name not in allowed]
    if unknown:
        raise ValueError(f"expected options of {encoder} ({', '.join(allowed)}), but got {', '.join(unknown)}")
    return kind(output_stride=output_stride, in_channels=in_channels, **options)
