"""Weights from a file, and the model of `fastseg.models` that they are for."""

from __future__ import annotations

import pickle
import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from fastseg.errors import UserError, first_line, package
from fastseg.models import weights
from fastseg.models.weights.architecture import COUNTER
from fastseg.models.weights.encoders import is_encoder


def read(path: Path) -> dict[str, torch.Tensor]:
    """The state dict in a file of torch.save or safetensors, on the CPU, out of what a training script wraps it in.

    Nothing in the file is executed: torch.load runs with weights_only=True.

    Raises:
        UserError: no such file, not a checkpoint, objects other than tensors in it, no state dict in it.
    """
    if not path.is_file():
        raise UserError(f"{path} is a folder, not a file of weights" if path.is_dir() else f"there is no file {path}")
    found = _safetensors(path) if path.suffix == ".safetensors" else _torch(path)
    if not isinstance(found, Mapping):
        raise UserError(f"{path} holds no state dict, as model.state_dict() gives it, but {type(found).__name__}")
    try:
        return weights.unwrapped(found)
    except ValueError as error:
        raise UserError(f"{path} holds no state dict: {first_line(error)}") from error


def _safetensors(path: Path):
    module = package("safetensors.torch", "safetensors")
    try:
        return module.load_file(path)
    except Exception as error:  # the package has an exception class of its own, and raises OSError too
        raise UserError(f"{path} is no safetensors file that can be read: {first_line(error)}") from error


def _torch(path: Path):
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        if named is None:
            raise UserError(f"{path} is no checkpoint that torch.load reads") from error
        raise UserError(
            f"{path} holds Python objects ({named[1]}), and loading those could run code: "
            "save the state dict alone, torch.save(model.state_dict(), file)"
        ) from error
    except (OSError, EOFError, RuntimeError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{path} is no checkpoint that torch.load reads: {first_line(error)}") from error


def model_with(
    state: Mapping[str, torch.Tensor], path: Path, source: str | None, name: str, build: Callable[[], torch.nn.Module],
    **options,
) -> tuple[torch.nn.Module, list[str]]:  # fmt: skip
    """The model that `state`, read from `path`, is for, with these weights in it, and what is to be said about them.

    Args:
        source: as in `fastseg.models.load_weights`.
        name: of the builder whose model is wanted.
        build: makes the one that was asked for. The weights of another library's network get the model that they fit,
            with `options` where weights do not tell.

    Raises:
        UserError: they do not fit; what differs.
    """
    if source in (None, "torchvision") and is_encoder(set(state)):
        raise UserError(f"{path} holds the weights of an encoder alone: the rest of {name} would be random")
    builders = _builders(state, source)
    model = build() if source in (None, "fastseg") else None
    own = model is not None and (not builders or _same_shapes(model, state))
    if not own and builders and name not in builders:
        raise UserError(f"{path} does not fit {name}: it holds weights of {' or '.join(sorted(builders))}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they say what load_weights returns
            if own:
                return model, weights.load_weights(model, state, source)
        return weights.model_and_remarks(state, source, **options)
    except (ValueError, TypeError) as error:
        classes = None if model is None else _classes(model, state)
        hint = "" if classes is None else f"; the file is of {classes} classes: --classes {classes}"
        raise UserError(f"{path} does not fit {name}: {first_line(error)}{hint}") from error


def _builders(state: Mapping[str, torch.Tensor], source: str | None) -> set[str]:
    """Of which of our builders' models other libraries' networks with such keys are."""
    kinds = [kind for library, kinds in weights.LIBRARIES.items() if source in (None, library) for kind in kinds]
    return {kind.builder.__name__ for kind in kinds if kind.recognises(set(state))}


def _shapes(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Size]:
    return {key: value.shape for key, value in state.items() if not key.endswith(COUNTER)}


def _same_shapes(model: torch.nn.Module, state: Mapping[str, torch.Tensor]) -> bool:
    return _shapes(model.state_dict()) == _shapes(state)


def _classes(model: torch.nn.Module, state: Mapping[str, torch.Tensor]) -> int | None:
    """How many classes `state` has if nothing but their number keeps it from fitting `model`."""
    wanted, given = _shapes(model.state_dict()), _shapes(state)
    if wanted.keys() != given.keys():
        return None
    misshapen = [(wanted[key], given[key]) for key in wanted if wanted[key] != given[key]]
    alike = all(ours[:1] == (model.num_classes,) and ours[1:] == theirs[1:] for ours, theirs in misshapen)
    counts = {theirs[0] for _, theirs in misshapen if theirs}
    return counts.pop() if alike and len(counts) == 1 else None
