"""Encoders in other libraries' state dicts: which network they are, and their weights alone in our models."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from fastseg.models.backbones.mobilenet_v2 import MobileNetV2
from fastseg.models.backbones.mobilenet_v3 import MobileNetV3Large
from fastseg.models.backbones.resnet import RESNETS, ResNet
from fastseg.models.backbones.timm import TimmBackbone
from fastseg.models.backbones.vgg import VGG16
from fastseg.models.weights.architecture import Shapes, keys_difference, renamed_key

# Keys that networks of torchvision begin with, and those of what is behind their features.
_STEMS = ({"conv1.weight", "layer1.0.conv1.weight"}, {"features.0.0.weight"}, {"features.0.weight"})
_HEADS = ("fc.", "classifier.")


def encoder_of(shapes: Shapes, prefix: str) -> str | None:
    """The name of the network whose keys begin with `prefix`, as the builders have it; None where only timm knows it.

    Raises:
        ValueError: none that we have.
    """
    keys = [key.removeprefix(prefix) for key in shapes if key.startswith(prefix)]
    if any(key.startswith("model.") for key in keys):
        return None
    if "features.1.conv.0.0.weight" in keys:
        return "mobilenet_v2"
    blocks = tuple(len({key.split(".")[1] for key in keys if key.startswith(f"layer{n}.")}) for n in (1, 2, 3, 4))
    bottleneck = f"{prefix}layer1.0.conv3.weight" in shapes
    for name, (block, counts) in RESNETS.items():
        if counts == blocks and (block.expansion == 4) == bottleneck and not name.endswith("_beta"):
            _check_width(shapes, prefix)
            return name
    raise ValueError(
        f"no encoder here has these weights: expected {', '.join(RESNETS)}, mobilenet_v2 or one of timm, but got "
        + (f"layers of {blocks} blocks" if any(blocks) else f"keys like {prefix}{keys[0] if keys else '...'}")
    )


def _check_width(shapes: Shapes, prefix: str) -> None:
    width, inputs = shapes[f"{prefix}layer1.0.conv2.weight"][:2]
    if (width, inputs) != (64, 64):
        what = "grouped (ResNeXt)" if width != inputs else "wide"
        raise ValueError(f"no encoder here has these weights: expected a ResNet of width 64, but got a {what} one")


def in_channels_of(shapes: Shapes, prefix: str) -> int:
    """The channels of the images, by the first convolution behind `prefix`."""
    return next(shape[1] for key, shape in shapes.items() if key.startswith(prefix) and len(shape) == 4)


def timm_encoder(encoder: nn.Module) -> dict[str, str]:
    """The option that a model with an encoder of timm was built with."""
    return {"encoder": f"timm:{encoder.name}"} if isinstance(encoder, TimmBackbone) else {}


def is_encoder(keys: set[str]) -> bool:
    """Whether keys are those of a classification network of torchvision."""
    return any(stem <= keys for stem in _STEMS)


def encoder_weights(model: nn.Module, state: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], list[str]]:
    """The weights of a classification network under the keys of `model`'s encoder, and what is to be said.

    Raises:
        ValueError: they are another network's than the encoder of `model`.
    """
    attribute = "encoder" if isinstance(getattr(model, "encoder", None), nn.Module) else "backbone"
    encoder = getattr(model, attribute, None)
    if not isinstance(encoder, ResNet | MobileNetV2 | MobileNetV3Large | VGG16):
        raise ValueError(
            "these are the weights of a classification network, for the encoder of a model; expected a model on a "
            f"ResNet, MobileNetV2, MobileNetV3 or VGG-16, but got {type(model).__name__}"
        )
    table = [("features.", "")] if isinstance(encoder, MobileNetV3Large) else []
    wanted = {key: value.shape for key, value in encoder.state_dict().items()}
    left_out = [key for key in state if key.startswith(_HEADS)]
    if isinstance(encoder, MobileNetV2) and not any(key.startswith("features.18.") for key in wanted):
        left_out += [key for key in state if key.startswith("features.18.")]
    found = {renamed_key(key, table): value for key, value in state.items() if key not in left_out}
    difference = keys_difference(wanted, {key: value.shape for key, value in found.items()})
    if difference:
        raise ValueError(f"these weights are not those of the model's encoder: got {'; '.join(difference)}")
    said = ["These are the weights of an encoder: the rest of the model keeps what it had."]
    if left_out:
        said.append(f"The model has no place for {', '.join(sorted({_layer(key) for key in left_out}))}: left out.")
    if isinstance(encoder, ResNet) and any(stride_in_first(block) for block in encoder.layer2):
        said.append("Bottlenecks have their stride in the first 1x1 convolution here, in the 3x3 one in torchvision.")
    if isinstance(encoder, VGG16):
        said.append("Pools are 3x3 here, the last two without a stride, and 2x2 in torchvision.")
    return {f"{attribute}.{key}": value for key, value in found.items()}, said


def _layer(key: str) -> str:
    return key.rpartition(".")[0]


def stride_in_first(block: nn.Module) -> bool:
    return block.conv1.kernel_size == (1, 1) and block.conv1.stride != (1, 1)
