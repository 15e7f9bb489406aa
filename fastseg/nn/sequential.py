"""A torch.nn.Sequential under `fastseg.accelerate`: convolution, norm and activation become one operator call.

Where a Sequential's own children are a chain (see fastseg/nn/folding.py), nothing has to be armed or marked: its
forward is known, so it can see by itself that the chain is whole, and three module calls become one. In deep networks
of small layers those calls take longer than the arithmetic.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch.nn.modules.module import _has_any_global_hook

from fastseg.nn.conv import AcceleratedConv2d, folded_if_right, to_memory_format, under_transform
from fastseg.nn.folding import Chain, has_foreign_hooks, original_class


class Step(NamedTuple):
    """Children of a Sequential that run together: one module, or the members of a chain."""

    modules: tuple[torch.nn.Module, ...]
    chain: Chain | None
    inner: tuple[torch.nn.Module, ...] = ()  # inside the norm: the activation of timm's


class FoldedSequential:
    """What the class of a Sequential with chains gets as a base. Its settings, `_fastseg.steps`, cover its children."""

    _fastseg = None

    def forward(self, input):
        settings = self._fastseg
        plain = settings is None or self.training or torch.compiler.is_compiling() or _has_any_global_hook()
        if plain or not isinstance(input, torch.Tensor) or under_transform() or not _covers(settings.steps, self):
            return super().forward(input)
        for step in settings.steps:
            result = None if step.chain is None else _folded(step, input)
            if result is None:
                for module in step.modules:
                    input = module(input)
            else:
                input = result
        return input

    def __reduce_ex__(self, protocol):
        _, _, *state = super().__reduce_ex__(protocol)
        return _new, (original_class(self),), *state


def _covers(steps: list[Step], sequential) -> bool:
    """Whether the children are still those that the steps were made for."""
    return [m for step in steps for m in step.modules] == list(sequential._modules.values())


def _folded(step: Step, input: torch.Tensor) -> torch.Tensor | None:
    """The chain's result in one call, or None when its modules have to run one by one."""
    for module in step.modules + step.inner:
        if module.training or has_foreign_hooks(module):
            return None
    convolution = step.modules[0]
    if type(convolution) is not AcceleratedConv2d or convolution._fastseg is None:
        return None  # it was restored by itself
    settings = convolution._fastseg
    input = to_memory_format(input, settings.memory_format)
    return folded_if_right(convolution, step.chain, input, settings.backend)


def is_plain_sequential(module: torch.nn.Module) -> bool:
    """Whether `module` runs its children in order and does nothing else."""
    return type(module).forward is torch.nn.Sequential.forward and "forward" not in vars(module)


def steps_of(sequential: torch.nn.Sequential, chains: dict[torch.nn.Conv2d, Chain]) -> list[Step]:
    """The children of `sequential` in steps; `chains` are those whose convolution and owner are found there.

    A chain that is interrupted, by an Identity say, runs module by module.
    """
    children, steps = list(sequential._modules.values()), []
    while children:
        chain = chains.get(children[0])
        members = (
            () if chain is None else tuple(m for m in (children[0], chain.norm, chain.activation) if m is not None)
        )
        whole = chain is not None and tuple(children[: len(members)]) == members
        steps.append(Step(members, chain, tuple(chain.norm.children())) if whole else Step((children[0],), None))
        del children[: len(steps[-1].modules)]
    return steps


@functools.cache
def folded_class(original: type) -> type:
    """The class that a Sequential of class `original` gets."""
    names = {"__module__": original.__module__, "__qualname__": original.__qualname__, "__doc__": original.__doc__}
    return type(original.__name__, (FoldedSequential, original), names)


def _new(original: type):
    """For copy and pickle, which cannot find a class that was made here."""
    kind = folded_class(original)
    return kind.__new__(kind)
