"""Models by their names on the command line."""

from __future__ import annotations

import difflib
import inspect
from typing import Any

import torch

import fastseg.models
from fastseg.errors import UserError, first_line, package, unknown

MODELS = ("unet", "deeplab_v1", "deeplab_v2", "deeplab_v3", "deeplab_v3plus")


def load_model(name: str) -> torch.nn.Module:
    """A model with random weights on torch.nn's layers by its name; nothing is downloaded.

    Raises:
        UserError: there is no such model, or its package is not installed.
    """
    library, _, rest = name.partition(":")
    if library in MODELS:
        return reference_model(library, reference_options(library, rest, {}) | {"layers": "native"})
    if library == "timm" and rest:
        return _timm(rest)
    if library == "smp" and rest:
        return _smp(*rest.partition(":")[::2])
    return _torchvision(name)


def reference_options(name: str, kind: str, options: dict[str, Any]) -> dict[str, Any]:
    """`options` of the builder `name` in `fastseg.models`, with what stands behind the colon in NAME:KIND.

    Raises:
        UserError: there is no such model or option.
    """
    if name not in MODELS:
        raise UserError(unknown(name, "model of fastseg", MODELS))
    takes = list(inspect.signature(getattr(fastseg.models, name)).parameters)
    if kind:
        key = "encoder" if "encoder" in takes else "variant"
        if key in options:
            raise UserError(f"{name}:{kind} and the {key} {options[key]!r} say two things")
        options = options | {key: kind}
    for key in options:
        if key not in takes:
            raise UserError(f"{name} takes no {key}; it takes {', '.join(takes)}")
    return options


def reference_model(name: str, options: dict[str, Any]) -> torch.nn.Module:
    """A model of `fastseg.models`.

    Raises:
        UserError: the builder does not take the value of an option.
    """
    try:
        return getattr(fastseg.models, name)(**options)
    except (TypeError, ValueError, ImportError) as error:
        raise UserError(f"{name} cannot be built: {first_line(error)}") from error


def channels_of(model: torch.nn.Module) -> int:
    """How many channels `model` takes, by its first convolution; 3 where that cannot be told."""
    convolution = next((m for m in model.modules() if isinstance(m, torch.nn.Conv2d)), None)
    return 3 if convolution is None else convolution.in_channels


def _torchvision(name: str) -> torch.nn.Module:
    if difflib.get_close_matches(name, MODELS, cutoff=0.8):
        raise UserError(unknown(name, "model of fastseg", MODELS))
    models = package("torchvision.models", "torchvision")
    segmentation = package("torchvision.models.segmentation", "torchvision")
    names = [*models.list_models(module=models), *models.list_models(module=segmentation)]
    if name not in names:
        raise UserError(unknown(name, "torchvision model", names) + "; timm:NAME and smp:CLASS:ENCODER name others")
    builder = models.get_model_builder(name)
    without = {"weights": None, "weights_backbone": None, "init_weights": True}
    wanted = inspect.signature(builder).parameters
    # Classification models take anything in **kwargs and pass it on, so only what is named is given.
    return builder(**{key: value for key, value in without.items() if key in wanted})


def _timm(name: str) -> torch.nn.Module:
    timm = package("timm", "timm")
    if not timm.is_model(name.partition(".")[0]):
        raise UserError(unknown(name, "timm model", timm.list_models()))
    return timm.create_model(name, pretrained=False)


def _smp(name: str, encoder: str) -> torch.nn.Module:
    smp = package("segmentation_models_pytorch", "segmentation-models-pytorch")
    names = [key for key, value in vars(smp).items() if isinstance(value, type) and issubclass(value, torch.nn.Module)]
    if name not in names:
        raise UserError(unknown(name, "segmentation_models_pytorch class", names))
    encoder = encoder or "resnet34"
    try:
        return getattr(smp, name)(encoder, encoder_weights=None)
    except (KeyError, ValueError, RuntimeError) as error:
        encoders = smp.encoders.get_encoder_names()
        if encoder not in encoders:
            raise UserError(unknown(encoder, "segmentation_models_pytorch encoder", encoders)) from error
        raise UserError(f"{name} cannot be built on {encoder}: {first_line(error)}") from error
