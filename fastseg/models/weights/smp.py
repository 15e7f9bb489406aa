"""segmentation_models_pytorch 0.6: Unet, DeepLabV3 and DeepLabV3Plus, on the encoders that we have too."""

from __future__ import annotations

import functools
from typing import Any

from torch import nn

from fastseg.models.deeplab_v3 import DeepLabV3, deeplab_v3
from fastseg.models.deeplab_v3plus import DeepLabV3Plus, deeplab_v3plus
from fastseg.models.layers import Resize
from fastseg.models.unet import EncoderUNet, unet
from fastseg.models.weights import deeplab
from fastseg.models.weights.architecture import Architecture, Shapes
from fastseg.models.weights.encoders import encoder_of, in_channels_of, timm_encoder

_HEAD = ("classifier.", "segmentation_head.0.")
_UNET_STEPS = 5


def _read(shapes: Shapes) -> dict[str, Any]:
    """What all of its networks have in common."""
    if any(key.startswith("classification_head.") for key in shapes):
        raise ValueError(
            "no model here has segmentation_models_pytorch's classification head (aux_params): leave out the keys that "
            "begin with 'classification_head.'"
        )
    encoder = encoder_of(shapes, "encoder.")
    return {
        **({} if encoder is None else {"encoder": encoder}),
        "in_channels": in_channels_of(shapes, "encoder."),
        "num_classes": shapes["segmentation_head.0.weight"][0],
    }


def _read_unet(shapes: Shapes) -> dict[str, Any]:
    steps = len({key.split(".")[2] for key in shapes if key.startswith("decoder.blocks.")})
    if any(".attention" in key for key in shapes):
        raise ValueError("no model here has its attention: expected a Unet with decoder_attention_type=None")
    if len(shapes.get("decoder.blocks.0.conv1.1.running_mean", ())) != 1:
        raise ValueError("expected a Unet with batch norm in the decoder, as it has by default")
    if any(key.startswith("decoder.center.") for key in shapes):
        raise ValueError("no model here has the two convolutions between encoder and decoder of its Unet on VGG")
    if steps != _UNET_STEPS:
        raise ValueError(f"expected a Unet with encoder_depth={_UNET_STEPS}, but got a decoder of {steps} steps")
    widths = tuple(shapes[f"decoder.blocks.{step}.conv2.0.weight"][0] for step in range(steps))
    return {**_read(shapes), "decoder_channels": widths}


def _encoder(options: dict[str, Any]) -> str:
    if "encoder" not in options:
        raise ValueError("the weights' encoder is of timm, and they do not tell which: expected encoder='timm:NAME'")
    return options["encoder"]


def _unsaid_unet(options: dict[str, Any]) -> dict[str, Any]:
    _encoder(options)
    return {"up": "nearest", "dropout": 0.0}


def _found_unet(model: nn.Module) -> dict[str, Any]:
    bilinear = isinstance(model.decoder.blocks[0].resize, Resize)
    return {
        **timm_encoder(model.encoder),
        "up": "bilinear" if bilinear else "nearest",
        "dropout": model.dropout.p,
    }


def _deviations_unet(options: dict[str, Any]) -> list[str]:
    return [
        f"The contracting path is {options['encoder']}, whose first features have stride 2.",
        "The last step up therefore joins nothing, and its convolutions see what comes up alone.",
        "Convolutions are padded, so that logits have the images' size, where the paper's are not.",
        "Each 3x3 convolution of the decoder has a batch norm behind it and no bias, where the paper has no norm.",
        f"Resizes ({options['up']}) stand for the 2x2 up-convolutions.",
        "Logits come from a 3x3 convolution, the paper's from a 1x1.",
    ]


_UNET = Architecture(
    name="segmentation_models_pytorch's Unet",
    builder=unet,
    model=EncoderUNet,
    table=[
        *(
            (f"decoder.blocks.{step}.convs.{3 * half + part}.", f"decoder.blocks.{step}.conv{half + 1}.{part}.")
            for step in range(_UNET_STEPS)
            for half in (0, 1)
            for part in (0, 1)
        ),
        _HEAD,
    ],
    recognises=lambda keys: {"decoder.blocks.0.conv1.0.weight", "segmentation_head.0.weight"} <= keys,
    read=_read_unet,
    unsaid=_unsaid_unet,
    found=_found_unet,
    deviations=_deviations_unet,
)


def _read_v3(shapes: Shapes) -> dict[str, Any]:
    return {
        **_read(shapes),
        "channels": shapes["segmentation_head.0.weight"][1],
        "separable": "decoder.aspp.convs.1.0.0.weight" in shapes,
    }


def _read_v3plus(shapes: Shapes) -> dict[str, Any]:
    return {
        **_read(shapes),
        "channels": shapes["segmentation_head.0.weight"][1],
        "separable": True if "decoder.aspp.0.convs.1.0.0.weight" in shapes else "decoder",
        "separable_norm": False,
        "refine": True,
        "decoder_convs": 1,
    }


def _unsaid(output_stride: int, options: dict[str, Any]) -> dict[str, Any]:
    encoder, form = _encoder(options), {}
    if encoder == "mobilenet_v2":
        form = {"tail": True}
    elif encoder.startswith("resnet"):
        form = {"keep_dilation": False}
    return {
        "output_stride": output_stride,
        "rates": (12, 24, 36),
        "dropout": 0.5,
        "align_corners": True,
        "encoder_options": form,
    }


def _dilation(options: dict[str, Any]) -> list[str]:
    if options["encoder"].startswith("timm:"):
        return []
    return ["Dilated layers have their dilation in 1x1 convolutions too, where it means nothing; here it is left out."]


def _deviations_v3(options: dict[str, Any]) -> list[str]:
    said = [
        *deeplab.encoder_deviations(options, multi_grid=True),
        *_dilation(options),
        *deeplab.head_deviations(options),
        f"A 3x3 convolution of {options['channels']} channels comes between the ASPP and the logits.",
    ]
    if options["separable"]:
        said.append("The ASPP's 3x3 branches are separable, without batch norm and ReLU between their halves.")
    return said


def _deviations_v3plus(options: dict[str, Any]) -> list[str]:
    said = [
        *deeplab.encoder_deviations(options),
        *_dilation(options),
        *deeplab.head_deviations(options),
        "A separable 3x3 convolution follows the ASPP.",
        "The decoder has one 3x3 convolution, the paper's two.",
        "Separable convolutions have no batch norm and ReLU between their halves.",
    ]
    if options["separable"] == "decoder":
        said.append("The ASPP's 3x3 branches are dense, the decoder's convolution is separable.")
    return said


_V3 = Architecture(
    name="segmentation_models_pytorch's DeepLabV3",
    builder=deeplab_v3,
    model=DeepLabV3,
    table=[
        ("backbone.", "encoder."),
        ("classifier.0.", "decoder.aspp."),
        ("classifier.1.", "decoder.conv."),
        ("classifier.2.", "decoder.bn."),
        ("classifier.4.", "segmentation_head.0."),
    ],
    recognises=lambda keys: {"decoder.aspp.convs.0.0.weight", "segmentation_head.0.weight"} <= keys,
    read=_read_v3,
    unsaid=functools.partial(_unsaid, 8),
    found=deeplab.found,
    deviations=_deviations_v3,
)
_V3PLUS = Architecture(
    name="segmentation_models_pytorch's DeepLabV3Plus",
    builder=deeplab_v3plus,
    model=DeepLabV3Plus,
    table=[
        ("backbone.", "encoder."),
        ("aspp.", "decoder.aspp.0."),
        *((f"refinement.{n}.", f"decoder.aspp.1.{n}.") for n in (0, 1)),
        ("refinement.2.", "decoder.aspp.2."),
        ("decoder.low_level.", "decoder.block1."),
        *((f"decoder.convs.0.{n}.", f"decoder.block2.0.{n}.") for n in (0, 1)),
        ("decoder.convs.0.2.", "decoder.block2.1."),
        _HEAD,
    ],
    recognises=lambda keys: {"decoder.aspp.0.convs.0.0.weight", "segmentation_head.0.weight"} <= keys,
    read=_read_v3plus,
    unsaid=functools.partial(_unsaid, 16),
    found=deeplab.found,
    deviations=_deviations_v3plus,
)

ARCHITECTURES = [_UNET, _V3, _V3PLUS]
