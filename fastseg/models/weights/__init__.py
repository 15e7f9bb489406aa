"""Weights of other libraries in our models, and back: `load_weights`, `from_state_dict`, `to_state_dict`."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from fastseg.models.layers import check_choice
from fastseg.models.model import SegmentationModel
from fastseg.models.weights import milesial, smp, torchvision, vainf
from fastseg.models.weights.architecture import COUNTER, Architecture, form_difference, keys_difference, listed
from fastseg.models.weights.encoders import encoder_weights, is_encoder

LIBRARIES = {
    "torchvision": torchvision.ARCHITECTURES,
    "smp": smp.ARCHITECTURES,
    "vainf": vainf.ARCHITECTURES,
    "milesial": milesial.ARCHITECTURES,
}
SOURCES = ("fastseg", *LIBRARIES)
# Where training scripts keep the state dict, what wrappers put before its keys, and what is not weights beside them.
_INSIDE = ("state_dict", "model_state_dict", "model_state", "model")
_PREFIXES = ("module.", "_orig_mod.", "model.")
_NO_WEIGHTS = ("mask_values",)


def load_weights(model: SegmentationModel, state_dict: Mapping[str, Any], source: str | None = None) -> list[str]:
    """Put the weights of another library's network into `model`, all of them or none.

    Args:
        model: of `fastseg.models`, on any layers, device and dtype.
        state_dict: as its library saves it; also inside a checkpoint ("state_dict", "model_state", ...), and with the
            prefixes of DataParallel, torch.compile and Lightning.
        source: "torchvision" (deeplabv3_*; and resnet*, mobilenet_v2, mobilenet_v3_large and vgg16 for a model's
            encoder alone), "smp" (Unet, DeepLabV3 and DeepLabV3Plus of segmentation_models_pytorch 0.6), "vainf"
            (deeplabv3_* and deeplabv3plus_* of VainF's DeepLabV3Plus-Pytorch), "milesial" (the padded U-Net of
            Pytorch-UNet), or "fastseg", `model`'s own. None recognises it by the keys.

    Returns:
        In what that library's network, and so `model`, deviates from the paper, and what the weights leave open; a
        sentence each. One UserWarning says them all aloud. For `model`'s own weights there are none.

    Raises:
        ValueError: the keys are not those of `source`, or of no source; the weights have no counterpart here; or
            `model` is another one than the weights', in parameters or in what it computes with them, and how to build
            the right one. `model` is then as it was.

    Example:
        >>> import torch, warnings
        >>> from fastseg.models import load_weights, to_state_dict, unet
        >>> model, other = (unet(3, 2, base_channels=4, padding="same", norm="batch") for _ in range(2))
        >>> with warnings.catch_warnings():
        ...     warnings.simplefilter("ignore")
        ...     said = load_weights(model, to_state_dict(other, "milesial"))
        >>> said[1]
        'Each 3x3 convolution has a batch norm behind it and no bias, where the paper has no norm.'
    """
    state = unwrapped(state_dict)
    source = _recognised(state, source, model)
    if source == "fastseg":
        difference = keys_difference(_shapes(model.state_dict()), _shapes(state))
        if difference:
            raise ValueError(f"expected the state dict of this model, but got {'; '.join(difference)}")
        _copy(model, state)
        return []
    if source == "torchvision" and is_encoder(set(state)):
        renamed, said = encoder_weights(model, state)
        _copy(model, model.state_dict() | renamed)
        return _say(said)
    architecture = _architecture(state, source)
    options = architecture.options(_shapes(state), _found(architecture, model))
    wanted = _wanted(architecture, options, state)
    difference = _difference(model, wanted)
    if difference:
        raise ValueError(
            f"these weights of {architecture.name} need a model as {architecture.call(options)} builds it, or "
            f"fastseg.models.from_state_dict, but got another: {'; '.join(difference)}"
        )
    _copy(model, architecture.to_ours(state))
    return _say(architecture.said(options))


def from_state_dict(
    state_dict: Mapping[str, Any], source: str | None = None, *, layers: str = "fastseg", **options
) -> SegmentationModel:
    """The model that fits the weights of another library's network, with these weights in it.

    Classes, encoder, widths and the form of the decoder are read off the shapes.

    Args:
        state_dict, source: as in `load_weights`, but for "fastseg" and encoders alone, which tell too little.
        layers: "fastseg" or "native".
        options: of the model's builder that shapes do not tell, such as output_stride, rates and dropout: those not
            given are the library's defaults. Where the encoder is of timm, encoder="timm:NAME" has to be given.

    Returns:
        A model in train mode, as all builders'. What `load_weights` returns is said aloud, in one UserWarning.

    Raises:
        ValueError: as in `load_weights`; or an option that contradicts the weights.
        TypeError: an option that the builder does not have.

    Example:
        >>> import torch, warnings
        >>> from fastseg.models import from_state_dict, to_state_dict, unet
        >>> state = to_state_dict(unet(3, 7, base_channels=4, depth=2, padding="same", norm="batch"), "milesial")
        >>> with warnings.catch_warnings():
        ...     warnings.simplefilter("ignore")
        ...     model = from_state_dict(state)
        >>> model(torch.randn(2, 3, 33, 33)).shape
        torch.Size([2, 7, 33, 33])
    """
    model, said = model_and_remarks(state_dict, source, layers=layers, **options)
    _say(said)
    return model


def model_and_remarks(
    state_dict: Mapping[str, Any], source: str | None = None, *, layers: str = "fastseg", **options
) -> tuple[SegmentationModel, list[str]]:
    """The model of `from_state_dict`, and what that says aloud."""
    state = unwrapped(state_dict)
    source = _recognised(state, source, None)
    if source == "fastseg" or is_encoder(set(state)):
        raise ValueError(
            "these weights do not tell the model they are for: build it, and use fastseg.models.load_weights"
        )
    architecture = _architecture(state, source)
    shapes = _shapes(state)
    read = architecture.told(shapes)
    for key in read.keys() & options.keys():
        if options[key] != read[key]:
            raise ValueError(f"expected {key}={read[key]!r}, as the weights have it, but got {options[key]!r}")
    takes = inspect.signature(architecture.builder).parameters
    for key in options:
        if key not in takes:
            raise TypeError(f"{architecture.builder.__name__} takes no {key}; it takes {', '.join(takes)}")
    options = architecture.options(shapes, options)
    _wanted(architecture, options, state)
    model = architecture.builder(**options, layers=layers)
    _copy(model, architecture.to_ours(state))
    return model, architecture.said(options)


def to_state_dict(model: SegmentationModel, source: str) -> dict[str, torch.Tensor]:
    """The weights of `model` as another library's network has them: the way back of `load_weights`.

    Args:
        model: of `fastseg.models`.
        source: one of those of `load_weights`.

    Returns:
        A new dict, strictly what the network of that library takes; the tensors are `model`'s own where its layout is
        theirs. A UserWarning says how to build that network where its defaults are not what `model` is.

    Raises:
        ValueError: no network of that library computes what `model` does, and what differs.

    Example:
        >>> from fastseg.models import to_state_dict, unet
        >>> list(to_state_dict(unet(3, 2, base_channels=4, padding="same", norm="batch"), "milesial"))[0]
        'inc.double_conv.0.weight'
    """
    check_choice("source", source, SOURCES)
    if source == "fastseg":
        return dict(model.state_dict())
    refusals = []
    for architecture in LIBRARIES[source]:
        if not isinstance(model, architecture.model):
            continue
        state = architecture.to_theirs(model.state_dict())
        try:
            options = architecture.options(_shapes(state), _found(architecture, model))
            difference = _difference(model, _wanted(architecture, options, state))
        except ValueError as error:
            refusals.append(f"it is not {architecture.name}: {error}")
            continue
        if difference:
            refusals.append(f"it is not {architecture.name}: {'; '.join(difference)}")
            continue
        unusual = architecture.unusual(options)
        if unusual:
            chosen = {key: options[key] for key in architecture.unsaid(options)}
            _say([f"The weights do not tell {chosen}, and the defaults of {architecture.name} are {unusual}."])
        return state
    reason = "; ".join(refusals) or f"{type(model).__name__} is none of its networks"
    raise ValueError(f"no network of {source!r} computes what this model does: {reason}")


def unwrapped(state_dict: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The tensors, out of what checkpoints and wrappers put around them."""
    inside = next((state_dict[key] for key in _INSIDE if isinstance(state_dict.get(key), Mapping)), None)
    if inside is not None:
        return unwrapped(inside)
    state = {key: value for key, value in state_dict.items() if key not in _NO_WEIGHTS}
    other = [key for key, value in state.items() if not isinstance(value, torch.Tensor)]
    if other or not state:
        got = f"{other[0]} of {type(state[other[0]]).__name__}" if other else "an empty one"
        raise ValueError(f"expected a state dict, tensors by name, but got {got}")
    for prefix in _PREFIXES:
        if all(key.startswith(prefix) for key in state):
            return unwrapped({key.removeprefix(prefix): value for key, value in state.items()})
    return state


def _shapes(state: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in state.items()}


def _recognised(state: Mapping[str, torch.Tensor], source: str | None, model: nn.Module | None) -> str:
    """`source`, or whose the keys of `state` are."""
    if source is not None:
        check_choice("source", source, SOURCES)
        return source
    keys = set(state)
    found = [name for name, kinds in LIBRARIES.items() if any(kind.recognises(keys) for kind in kinds)]
    if is_encoder(keys):
        found.append("torchvision")
    if not found and model is not None and keys & set(model.state_dict()):
        return "fastseg"
    if len(found) == 1:
        return found[0] if model is None else _own_or(found[0], state, model)
    shown = ", ".join(list(state)[:3])
    what = f"those of {' and '.join(map(repr, found))} alike: say which" if found else "of none that we know"
    raise ValueError(f"expected keys of one of {', '.join(map(repr, SOURCES))}, but got {what}: {shown}, ...")


def _own_or(source: str, state: Mapping[str, torch.Tensor], model: nn.Module) -> str:
    """`source`, whose keys `state` has, unless `model` with the very same keys is none of its networks.

    Our DeepLab v3 has torchvision's keys, in forms that torchvision does not have too.
    """
    if keys_difference(_shapes(model.state_dict()), _shapes(state)):
        return source
    architecture = _architecture(state, source)
    try:
        options = architecture.options(_shapes(state), _found(architecture, model))
        difference = _difference(model, _wanted(architecture, options, state))
    except ValueError:
        return "fastseg"
    return "fastseg" if difference else source


def _architecture(state: Mapping[str, torch.Tensor], source: str) -> Architecture:
    keys = set(state)
    for architecture in LIBRARIES[source]:
        if architecture.recognises(keys):
            return architecture
    known = ", ".join(architecture.name for architecture in LIBRARIES[source])
    raise ValueError(f"expected the weights of {known}, but got keys like {', '.join(list(state)[:3])}")


def _found(architecture: Architecture, model: nn.Module) -> dict[str, Any]:
    return architecture.found(model) if isinstance(model, architecture.model) else {}


def _wanted(architecture: Architecture, options: Mapping[str, Any], state: Mapping[str, torch.Tensor]) -> nn.Module:
    """The model that the weights belong to, without memory.

    Raises:
        ValueError: they fit none.
    """
    with torch.device("meta"):
        wanted = architecture.builder(**options, layers="native")
    difference = listed("an unexpected", architecture.strays(state))
    difference = difference or keys_difference(_shapes(wanted.state_dict()), _shapes(architecture.to_ours(state)))
    if difference:
        raise ValueError(
            f"these weights are like those of {architecture.name}, but do not fit "
            f"{architecture.call(options)}: got {'; '.join(difference)}"
        )
    return wanted


def _difference(model: nn.Module, wanted: nn.Module) -> list[str]:
    shapes = (_shapes(wanted.state_dict()), _shapes(model.state_dict()))
    return keys_difference(*shapes) or form_difference(model, wanted)


def _copy(model: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """What has been found to fit; counters that are not there start anew."""
    counters = {key: torch.zeros_like(value) for key, value in model.state_dict().items() if key.endswith(COUNTER)}
    model.load_state_dict(counters | dict(state))


def _say(sentences: list[str]) -> list[str]:
    if sentences:
        warnings.warn(" ".join(sentences), stacklevel=3)
    return sentences
