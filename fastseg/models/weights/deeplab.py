"""What state dicts of all libraries' DeepLabs have in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from fastseg.models.deeplab_v3 import MULTI_GRID, DeepLabV3, fitting_rates
from fastseg.models.deeplab_v3plus import DeepLabV3Plus
from fastseg.models.weights.encoders import timm_encoder

# The dropout behind the ASPP in the authors' code.
_DROPOUT = 0.1


def found(model: DeepLabV3 | DeepLabV3Plus) -> dict[str, Any]:
    """The options of a DeepLab that its users choose and its shapes do not tell."""
    aspp = model.aspp if isinstance(model, DeepLabV3Plus) else model.classifier[0]
    return {
        **timm_encoder(model.backbone),
        "output_stride": model.backbone.strides[-1],
        "rates": _rates(aspp),
        "dropout": aspp.project[-1].p,
    }


def _rates(aspp: nn.Module) -> tuple[int, ...]:
    first = [next(m for m in branch.modules() if isinstance(m, nn.Conv2d)) for branch in aspp.convs]
    return tuple(conv.dilation[0] for conv in first if conv.kernel_size == (3, 3))


def encoder_deviations(options: dict[str, Any], multi_grid: bool = False) -> list[str]:
    """Of a ResNet or MobileNet in DeepLab v3, whose paper has a multi-grid, and v3+."""
    encoder, form, said = options["encoder"], options["encoder_options"], []
    if encoder.startswith("resnet"):
        said.append("The ResNet begins with one 7x7 convolution, where the authors' code has three 3x3.")
        if multi_grid:
            said.append(
                f"The blocks of its last layer have one dilation, where the paper's multi-grid is {MULTI_GRID}."
            )
    if form.get("keep_dilation"):
        said.append("The first block of a dilated layer keeps the dilation of the layer before it.")
    if form.get("tail"):
        said.append(
            "Features are taken behind MobileNetV2's 1x1 convolution to 1280 channels, which the authors leave out."
        )
    if form.get("padding") == "block":
        said.append(
            "MobileNetV2's blocks are padded in front of their 1x1 expansion, so that what surrounds the 3x3 "
            "convolution is the batch norm's shift and not zero; the network's first convolution is not padded."
        )
    return said


def head_deviations(options: dict[str, Any]) -> list[str]:
    """Of what is behind the encoder, in both of v3 and v3+."""
    said, rates = [], tuple(options["rates"])
    if rates != fitting_rates(options["output_stride"]):
        fitting = _words(fitting_rates(options["output_stride"]))
        said.append(
            f"Rates are {_words(rates)} at output stride {options['output_stride']}, where the paper has {fitting}."
        )
    if options["dropout"] != _DROPOUT:
        said.append(f"Dropout behind the ASPP is {options['dropout']}, {_DROPOUT} in the authors' code.")
    if options.get("align_corners"):
        said.append("Resizes align corners (align_corners=True).")
    return said


def _words(numbers: Sequence[int]) -> str:
    *first, last = map(str, numbers)
    return f"{', '.join(first)} and {last}" if first else last
