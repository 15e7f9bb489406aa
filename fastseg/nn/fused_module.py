"""A module that `fastseg.accelerate` recognised as a whole: its forward is one or two operator calls.

The module keeps its children, its keys and its hooks. Whatever the operators cannot do as the children would (foreign
hooks on one of them, autocast, a mixture of norms) runs child by child, as before; so does what torch.compile traces.
"""

from __future__ import annotations

import functools

import torch

from fastseg.nn.conv import AcceleratedConv2d, to_memory_format, under_transform
from fastseg.nn.folding import has_foreign_hooks, original_class
from fastseg.nn.pyramid import Pyramid, Separable

Link = tuple[torch.nn.Module, str, torch.nn.Module]


class Fusion:
    """What a module is as a whole, and the modules inside it as (parent, name, module)."""

    def __init__(self, whole: Pyramid | Separable, watched: list[Link]):
        self.whole = whole
        self.watched = watched

    def reason_not(self) -> str | None:
        """Why the module has to run child by child, whatever the input, or None."""
        for parent, name, module in self.watched:
            if parent._modules.get(name) is not module:
                return f"{name} was replaced"
            if has_foreign_hooks(module):
                return f"{name} has hooks"
            if isinstance(module, torch.nn.Conv2d) and type(module) is not AcceleratedConv2d:
                return f"{name} was restored by itself"
        return None


class FusedModule:
    """What the class of a recognised module gets as a base. Its settings have a Fusion, `_fastseg.fusion`."""

    _fastseg = None

    def forward(self, *args, **kwargs):
        plain = torch.compiler.is_compiling() or len(args) != 1 or kwargs
        y = None if plain else self._fused(*args, super().forward)
        return super().forward(*args, **kwargs) if y is None else y

    def _fused(self, input, forward):
        settings = self._fastseg
        if settings is None or not isinstance(input, torch.Tensor) or under_transform() or torch.jit.is_tracing():
            return None
        if settings.fusion.reason_not() is not None:
            return None
        input = to_memory_format(input, settings.memory_format)
        return settings.fusion.whole.run(input, settings.backend, lambda: forward(input))

    def __reduce_ex__(self, protocol):
        _, _, *state = super().__reduce_ex__(protocol)
        return _new, (original_class(self),), *state


@functools.cache
def fused_class(original: type) -> type:
    """The class that a recognised module of class `original` gets."""
    names = {"__module__": original.__module__, "__qualname__": original.__qualname__, "__doc__": original.__doc__}
    return type(original.__name__, (FusedModule, original), names)


def _new(original: type):
    """For copy and pickle, which cannot find a class that was made here."""
    kind = fused_class(original)
    return kind.__new__(kind)
