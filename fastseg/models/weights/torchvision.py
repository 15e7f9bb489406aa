"""torchvision's DeepLab v3, whose keys and form are our default's."""

from __future__ import annotations

from typing import Any

from fastseg.models.deeplab_v3 import DeepLabV3, deeplab_v3
from fastseg.models.weights import deeplab
from fastseg.models.weights.architecture import Architecture, Shapes
from fastseg.models.weights.encoders import encoder_of

_MOBILENET = "mobilenet_v3_large"


def _read(shapes: Shapes) -> dict[str, Any]:
    mobilenet = "backbone.0.0.weight" in shapes
    return {
        "num_classes": shapes["classifier.4.weight"][0],
        "encoder": _MOBILENET if mobilenet else encoder_of(shapes, "backbone."),
        "aux": any(key.startswith("aux_classifier.") for key in shapes),
    }


def _unsaid(options: dict[str, Any]) -> dict[str, Any]:
    mobilenet = options["encoder"] == _MOBILENET
    return {
        "output_stride": 16 if mobilenet else 8,
        "rates": (12, 24, 36),
        "dropout": 0.5,
        "align_corners": False,
        "encoder_options": {} if mobilenet else {"keep_dilation": True},
    }


def _deviations(options: dict[str, Any]) -> list[str]:
    return [
        *deeplab.encoder_deviations(options, multi_grid=True),
        *deeplab.head_deviations(options),
        "A 3x3 convolution of 256 channels comes between the ASPP and the logits.",
        *(["In training there is an auxiliary head, which the paper does not have."] if options["aux"] else []),
    ]


ARCHITECTURES = [
    Architecture(
        name="torchvision's DeepLabV3",
        builder=deeplab_v3,
        model=DeepLabV3,
        table=[],
        recognises=lambda keys: {"classifier.0.convs.0.0.weight", "classifier.4.weight"} <= keys,
        read=_read,
        unsaid=_unsaid,
        found=deeplab.found,
        deviations=_deviations,
    )
]
