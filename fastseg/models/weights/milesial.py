"""The padded U-Net with batch norm that is used most (milesial's Pytorch-UNet), of any width and depth."""

from __future__ import annotations

from typing import Any

from fastseg.models.unet import UNet, unet
from fastseg.models.weights.architecture import Architecture, Shapes

_DEEPEST = 9  # of a table that would go on
_TABLE = [
    ("contracting.0.", "inc.double_conv."),
    *((f"contracting.{n}.", f"down{n}.maxpool_conv.1.double_conv.") for n in range(1, _DEEPEST + 1)),
    *((f"up.{n - 1}.", f"up{n}.up.") for n in range(1, _DEEPEST + 1)),
    *((f"expanding.{n - 1}.", f"up{n}.conv.double_conv.") for n in range(1, _DEEPEST + 1)),
    ("classifier.", "outc.conv."),
]


def _read(shapes: Shapes) -> dict[str, Any]:
    base_channels, in_channels = shapes["inc.double_conv.0.weight"][:2]
    return {
        "in_channels": in_channels,
        "num_classes": shapes["outc.conv.weight"][0],
        "base_channels": base_channels,
        "depth": len({key.partition(".")[0] for key in shapes if key.startswith("down")}),
        "padding": "same",
        "norm": "batch",
        "up": "transpose" if "up1.up.weight" in shapes else "bilinear",
    }


def _deviations(options: dict[str, Any]) -> list[str]:
    said = [
        "Convolutions are padded, so that logits have the images' size, where the paper's are not.",
        "Each 3x3 convolution has a batch norm behind it and no bias, where the paper has no norm.",
        "What comes up a pixel short, where an odd size was halved, is padded with zeros; nothing is cropped.",
    ]
    if not options["dropout"]:
        said.append("There is no dropout at the end of the contracting path.")
    if options["up"] == "bilinear":
        said.append(
            "Bilinear resizes (align_corners=True) stand for the 2x2 up-convolutions, and the convolutions in front of "
            "them halve the channels."
        )
    return said


ARCHITECTURES = [
    Architecture(
        name="milesial's UNet",
        builder=unet,
        model=UNet,
        table=_TABLE,
        recognises=lambda keys: {"inc.double_conv.0.weight", "outc.conv.weight"} <= keys,
        read=_read,
        unsaid=lambda options: {"dropout": 0.0},
        found=lambda model: {"dropout": model.dropout.p},
        deviations=_deviations,
    )
]
