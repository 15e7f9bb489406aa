"""A network of another library, described so that its state dict can be read into a model of ours and written again.

    state dict - shapes - options - the model that they belong to - compared with the model that is there
                 keys - table - keys of that model

What an Architecture says of itself is facts: which of its keys is which of ours, what its shapes tell, what they do
not, and in what it deviates from the paper.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from fastseg.nn.folding import original_class

Shapes = Mapping[str, Sequence[int]]
# What means nothing to the result of a trained model, or is the user's choice in any form.
_FREE = {"training", "layers", "backend", "single_image", "momentum", "inplace", "num_classes", "track_running_stats"}
_PLAIN = (bool, int, float, str, type(None))
# Counters that nothing computes with, and that files older than them do not have.
COUNTER = ".num_batches_tracked"
_SHOWN = 3


@dataclass(frozen=True)
class Architecture:
    """One kind of network of another library.

    Attributes:
        name: as it is told, "segmentation_models_pytorch's Unet".
        builder: of the model that can be it; its name is public in fastseg.models.
        model: the class of what `builder` builds.
        table: prefixes of keys, ours and theirs; the first that fits counts.
        recognises: whether keys are those of such a network.
        read: the builder's options, as far as shapes tell them.
        unsaid: the builder's options that shapes do not tell, as the library has them by default, given the others.
        found: the same options, and whatever else shapes may leave open, as a model has them.
        deviations: from the paper, sentences, given all options.
        rolled: keys of ours whose channels are in another order: the dimension, and how many of the last come first in
            theirs.
    """

    name: str
    builder: Callable[..., nn.Module]
    model: type[nn.Module]
    table: Sequence[tuple[str, str]]
    recognises: Callable[[set[str]], bool]
    read: Callable[[Shapes], dict[str, Any]]
    unsaid: Callable[[dict[str, Any]], dict[str, Any]]
    found: Callable[[nn.Module], dict[str, Any]]
    deviations: Callable[[dict[str, Any]], list[str]]
    rolled: Mapping[str, tuple[int, int]] = field(default_factory=dict)  # key -> (dimension, by)

    def to_ours(self, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Their state dict under our keys; keys that the table does not know stay as they are."""
        return self._renamed(state, [(theirs, ours) for ours, theirs in self.table], -1)

    def to_theirs(self, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The reverse of `to_ours`."""
        return self._renamed(state, self.table, 1)

    def strays(self, state: Mapping[str, torch.Tensor]) -> list[str]:
        """Keys that such a network never has: ours among theirs."""
        back = [(theirs, ours) for ours, theirs in self.table]
        return [key for key in state if renamed_key(renamed_key(key, back), self.table) != key]

    def _renamed(self, state, table, direction: int) -> dict[str, torch.Tensor]:
        renamed = {}
        for key, value in state.items():
            other = renamed_key(key, table)
            roll = self.rolled.get(key if direction > 0 else other)
            renamed[other] = value if roll is None else torch.roll(value, direction * roll[1], roll[0])
        return renamed

    def told(self, shapes: Shapes) -> dict[str, Any]:
        """What `read` reads; ValueError where a key is not there that has to be."""
        try:
            return self.read(shapes)
        except (KeyError, IndexError, StopIteration) as error:
            key = error.args[0] if isinstance(error, KeyError) else "shapes of convolutions"
            raise ValueError(f"these weights are like those of {self.name}, but have no {key}") from error

    def options(self, shapes: Shapes, other: Mapping[str, Any]) -> dict[str, Any]:
        """All options of the builder: those that shapes tell, those of `other` that they do not, and the library's."""
        known = {**other, **self.told(shapes)}
        unsaid = self.unsaid(known)
        if isinstance(unsaid.get("encoder_options"), Mapping):
            known["encoder_options"] = {**unsaid["encoder_options"], **known.get("encoder_options", {})}
        return unsaid | known

    def said(self, options: Mapping[str, Any]) -> list[str]:
        """The deviations, and what the model is where the weights leave it open."""
        deviations = self.deviations(dict(options))
        chosen = [key for key in self.unsaid(dict(options)) if key != "encoder_options"]  # deviations tell those
        if not chosen:
            return deviations
        unusual = self.unusual(options)
        defaults = f"the defaults of {self.name} are {unusual}" if unusual else f"as {self.name} has them by default"
        return [*deviations, f"The weights do not tell {_listing(options, chosen)}; {defaults}."]

    def unusual(self, options: Mapping[str, Any]) -> str:
        """The library's defaults in place of which `options` has something else; empty where there are none."""
        unsaid = self.unsaid(dict(options))
        return _listing(unsaid, [key for key in unsaid if options[key] != unsaid[key]])

    def call(self, options: Mapping[str, Any]) -> str:
        """The call of the builder, without what is its default."""
        parameters = inspect.signature(self.builder).parameters
        said = [
            key
            for key, p in parameters.items()
            if key in options and (key == "num_classes" or options[key] != p.default)
        ]
        return f"fastseg.models.{self.builder.__name__}({_listing(options, said)})"


def _listing(options: Mapping[str, Any], keys: Iterable[str]) -> str:
    return ", ".join(f"{key}={options[key]!r}" for key in keys)


def renamed_key(key: str, table: Sequence[tuple[str, str]]) -> str:
    for before, after in table:
        if key.startswith(before):
            return after + key.removeprefix(before)
    return key


def keys_difference(wanted: Shapes, got: Shapes) -> list[str]:
    """What keeps a state dict of the shapes `got` from being one of the shapes `wanted`, as sentences' ends."""
    missing = [key for key in wanted if key not in got and not key.endswith(COUNTER)]
    unexpected = [key for key in got if key not in wanted]
    misshapen = [key for key in wanted if key in got and tuple(wanted[key]) != tuple(got[key])]
    return [
        *listed("no", missing),
        *listed("an unexpected", unexpected),
        *(f"{key} {list(got[key])} where {list(wanted[key])} is wanted" for key in misshapen[:_SHOWN]),
        *([f"{len(misshapen) - _SHOWN} more of other shapes"] if len(misshapen) > _SHOWN else []),
    ]


def listed(what: str, keys: list[str]) -> list[str]:
    if not keys:
        return []
    more = f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else ""
    return [f"{what} {', '.join(keys[:_SHOWN])}{more}"]


def form_difference(model: nn.Module, wanted: nn.Module) -> list[str]:
    """In what `model` computes something else than `wanted` would with the same parameters, as sentences' ends."""
    ours, theirs = _form(model), _form(wanted)
    found = []
    for name in {**theirs, **ours}:
        if name not in ours or name not in theirs:
            found.append(f"{'no' if name in theirs else 'an unexpected'} {name} ({(theirs | ours)[name][0]})")
            continue
        (kind, got), (wanted_kind, want) = ours[name], theirs[name]
        if kind != wanted_kind:
            found.append(f"{name or 'it'} is {kind} where {wanted_kind} is wanted")
        found += [
            f"{f'{name}.{key}'.lstrip('.')} is {got[key]} where {want[key]} is wanted"
            for key in want
            if key in got and got[key] != want[key]
        ]
    return [*found[:_SHOWN], *([f"{len(found) - _SHOWN} more"] if len(found) > _SHOWN else [])]


def _form(model: nn.Module) -> dict[str, tuple[str, dict[str, Any]]]:
    """Name, and plain attributes, of the class of each module."""
    form = {}
    for name, module in model.named_modules():
        kind = original_class(module)
        norm = issubclass(kind, nn.modules.batchnorm._BatchNorm)  # of one process or many
        attributes = {
            key: value
            for key, value in vars(module).items()
            if not key.startswith("_") and key not in _FREE and _is_plain(value)
        }
        form[name] = ("BatchNorm" if norm else kind.__name__, attributes)
    return form


def _is_plain(value) -> bool:
    if isinstance(value, tuple | list):
        return all(_is_plain(item) for item in value)
    return isinstance(value, _PLAIN)
