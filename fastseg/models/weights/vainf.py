"""VainF's DeepLabV3Plus-Pytorch: DeepLab v3 and v3+ on ResNet-50, ResNet-101 and MobileNetV2."""

from __future__ import annotations

from typing import Any

from fastseg.models.deeplab_v3 import DeepLabV3, deeplab_v3, fitting_rates
from fastseg.models.deeplab_v3plus import DeepLabV3Plus, deeplab_v3plus
from fastseg.models.weights import deeplab
from fastseg.models.weights.architecture import Architecture, Shapes
from fastseg.models.weights.encoders import encoder_of

# MobileNetV2's blocks up to the low-level features; those behind them go on counting.
_LOW, _BLOCKS = 4, 18
_BACKBONE = [
    (f"backbone.features.{n}.", f"backbone.{'low' if n < _LOW else 'high'}_level_features.{n}.") for n in range(_BLOCKS)
]
# Our order of channels in front of the decoder's convolution is encoder, low level; theirs is low level, encoder.
_LOW_LEVEL_CHANNELS = 48


def _encoder(shapes: Shapes) -> str:
    mobilenet = "backbone.low_level_features.0.0.weight" in shapes
    return "mobilenet_v2" if mobilenet else encoder_of(shapes, "backbone.")


def _read_v3(shapes: Shapes) -> dict[str, Any]:
    return {"num_classes": shapes["classifier.classifier.4.weight"][0], "encoder": _encoder(shapes)}


def _read_v3plus(shapes: Shapes) -> dict[str, Any]:
    return {
        "num_classes": shapes["classifier.classifier.3.weight"][0],
        "encoder": _encoder(shapes),
        "separable": "classifier.aspp.convs.1.0.body.0.weight" in shapes,
        "separable_norm": False,
        "decoder_convs": 1,
    }


def _unsaid(options: dict[str, Any]) -> dict[str, Any]:
    output_stride = options.get("output_stride", 16)  # of its training script
    form = {"keep_dilation": True}
    return {
        "output_stride": output_stride,
        "rates": fitting_rates(output_stride),
        "dropout": 0.1,
        "align_corners": False,
        "encoder_options": form | {"padding": "block"} if options["encoder"] == "mobilenet_v2" else form,
    }


def _deviations_v3(options: dict[str, Any]) -> list[str]:
    return [
        *deeplab.encoder_deviations(options, multi_grid=True),
        *deeplab.head_deviations(options),
        "A 3x3 convolution of 256 channels comes between the ASPP and the logits.",
    ]


def _deviations_v3plus(options: dict[str, Any]) -> list[str]:
    said = [
        *deeplab.encoder_deviations(options),
        *deeplab.head_deviations(options),
        "The decoder has one 3x3 convolution, the paper's two.",
    ]
    if options["separable"]:
        said.append("Separable convolutions have no batch norm and ReLU between their halves.")
    else:
        said.append("ASPP and decoder have dense 3x3 convolutions, the paper's fastest separable ones.")
    return said


def _v3plus(table: list[tuple[str, str]], first: str, rolled: dict[str, tuple[int, int]]) -> Architecture:
    return Architecture(
        name="VainF's deeplabv3plus",
        builder=deeplab_v3plus,
        model=DeepLabV3Plus,
        table=[
            *_BACKBONE,
            *table,
            ("aspp.", "classifier.aspp."),
            ("decoder.low_level.", "classifier.project."),
            ("classifier.", "classifier.classifier.3."),
        ],
        recognises=lambda keys: {"classifier.project.0.weight", first} <= keys,
        read=_read_v3plus,
        unsaid=_unsaid,
        found=deeplab.found,
        deviations=_deviations_v3plus,
        rolled=rolled,
    )


ARCHITECTURES = [
    Architecture(
        name="VainF's deeplabv3",
        builder=deeplab_v3,
        model=DeepLabV3,
        table=[*_BACKBONE, ("classifier.", "classifier.classifier.")],
        recognises=lambda keys: {"classifier.classifier.0.convs.0.0.weight", "classifier.classifier.4.weight"} <= keys,
        read=_read_v3,
        unsaid=_unsaid,
        found=deeplab.found,
        deviations=_deviations_v3,
    ),
    _v3plus(
        [("decoder.convs.0.0.", "classifier.classifier.0."), ("decoder.convs.0.1.", "classifier.classifier.1.")],
        "classifier.classifier.0.weight",
        {"decoder.convs.0.0.weight": (1, _LOW_LEVEL_CHANNELS)},
    ),
    _v3plus(
        [
            *((f"aspp.convs.{n}.0.", f"classifier.aspp.convs.{n}.0.body.") for n in (1, 2, 3)),
            ("decoder.convs.0.0.", "classifier.classifier.0.body.0."),
            ("decoder.convs.0.1.", "classifier.classifier.0.body.1."),
            ("decoder.convs.0.2.", "classifier.classifier.1."),
        ],
        "classifier.classifier.0.body.0.weight",
        {
            "decoder.convs.0.0.weight": (0, _LOW_LEVEL_CHANNELS),
            "decoder.convs.0.1.weight": (1, _LOW_LEVEL_CHANNELS),
        },
    ),
]
