"""A torch.nn.Sequential under `fastseg.accelerate`: convolution, norm and activation become one operator call.

Where a Sequential's own children are a chain (see fastseg/nn/folding.py), nothing has to be armed or marked: its
forward is known, so it can see by itself that the chain is whole, and three module calls become one. In deep networks
of small layers those calls take longer than the arithmetic. Sequentials inside it count as their children. A depthwise
convolution and a pointwise one behind it, each with its chain, are one call as well.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch.nn.modules.module import _has_any_global_hook

from fastseg.nn.conv import AcceleratedConv2d, folded_if_right, to_memory_format, under_transform
from fastseg.nn.folding import Chain, has_foreign_hooks, original_class
from fastseg.nn.pyramid import Link, run_separable


class Step(NamedTuple):
    """Children of a Sequential that run together: one module, or the members of a chain."""

    modules: tuple[torch.nn.Module, ...]
    chain: Chain | None
    inner: tuple[torch.nn.Module, ...] = ()  # inside the norm: the activation of timm's

    def run(self, input):
        result = None if self.chain is None else _folded(self, input)
        if result is not None:
            return result
        for module in self.modules:
            input = module(input)
        return input


class SeparableStep(NamedTuple):
    """A depthwise convolution and the pointwise one behind it, each with its chain, as `links` says them."""

    first: Step
    second: Step
    links: tuple[Link, Link]

    @property
    def modules(self) -> tuple[torch.nn.Module, ...]:
        return self.first.modules + self.second.modules

    def run(self, input):
        result = _separable(self, input)
        return self.second.run(self.first.run(input)) if result is None else result


class FoldedSequential:
    """What the class of a Sequential with chains gets as a base. Its settings, `_fastseg.steps`, cover its children."""

    _fastseg = None

    def forward(self, input):
        settings = self._fastseg
        plain = settings is None or self.training or torch.compiler.is_compiling() or _has_any_global_hook()
        if plain or not isinstance(input, torch.Tensor) or under_transform() or not _covers(settings.steps, self):
            return super().forward(input)
        for step in settings.steps:
            input = step.run(input)
        return input

    def __reduce_ex__(self, protocol):
        _, _, *state = super().__reduce_ex__(protocol)
        return _new, (original_class(self),), *state


def _covers(steps: list[Step | SeparableStep], sequential) -> bool:
    """Whether the children are still those that the steps were made for."""
    return [m for step in steps for m in step.modules] == _children(sequential)


def _children(sequential, trained: bool = False) -> list[torch.nn.Module] | None:
    """The children in order, those of plain Sequentials among them in their place.

    None where somebody looks at one of these, or where one is in train mode, unless it may be (`trained`).
    """
    found = []
    for child in sequential._modules.values():
        if not is_plain_sequential(child):
            found.append(child)
            continue
        looked_at = has_foreign_hooks(child) or (child.training and not trained)
        inner = None if looked_at else _children(child, trained)
        if inner is None:
            return None
        found += inner
    return found


def _ready(step: Step) -> bool:
    """Whether nobody looks at the step's modules, and its convolution was not restored by itself."""
    if any(module.training or has_foreign_hooks(module) for module in step.modules + step.inner):
        return False
    convolution = step.modules[0]
    return type(convolution) is AcceleratedConv2d and convolution._fastseg is not None


def _folded(step: Step, input: torch.Tensor) -> torch.Tensor | None:
    """The chain's result in one call, or None when its modules have to run one by one."""
    if not _ready(step):
        return None
    settings = step.modules[0]._fastseg
    input = to_memory_format(input, settings.memory_format)
    return folded_if_right(step.modules[0], step.chain, input, settings.backend)


def _separable(step: SeparableStep, input: torch.Tensor) -> torch.Tensor | None:
    """The separable convolution in one call, or None when its halves have to run one by one."""
    if not (_ready(step.first) and _ready(step.second)):
        return None
    settings = step.first.modules[0]._fastseg
    input = to_memory_format(input, settings.memory_format)
    return run_separable(*step.links, input, settings.backend, lambda: step.second.run(step.first.run(input)))


def is_plain_sequential(module: torch.nn.Module) -> bool:
    """Whether `module` runs its children in order and does nothing else."""
    return original_class(module).forward is torch.nn.Sequential.forward and "forward" not in vars(module)


def steps_of(sequential: torch.nn.Sequential, chains: dict[torch.nn.Conv2d, Chain]) -> list[Step | SeparableStep]:
    """The children of `sequential` in steps; `chains` are those whose convolution is found there.

    A chain that is interrupted, by an Identity say, runs module by module.
    """
    children, steps = _children(sequential, trained=True), []
    while children:
        chain = chains.get(children[0])
        members = (
            () if chain is None else tuple(m for m in (children[0], chain.norm, chain.activation) if m is not None)
        )
        whole = chain is not None and tuple(children[: len(members)]) == members
        steps.append(Step(members, chain, tuple(chain.norm.children())) if whole else Step((children[0],), None))
        del children[: len(steps[-1].modules)]
    return _paired(steps)


def _paired(steps: list[Step]) -> list[Step | SeparableStep]:
    found: list[Step | SeparableStep] = []
    for step in steps:
        if found and isinstance(found[-1], Step) and _is_depthwise(found[-1]) and _is_pointwise(step):
            first = found.pop()
            links = tuple(Link.chain([*pair.modules])[0] for pair in (first, step))
            found.append(SeparableStep(first, step, links))
        else:
            found.append(step)
    return found


def _is_depthwise(step: Step) -> bool:
    conv = step.modules[0]
    return original_class(conv) is torch.nn.Conv2d and 1 < conv.in_channels == conv.groups


def _is_pointwise(step: Step) -> bool:
    conv = step.modules[0]
    if original_class(conv) is not torch.nn.Conv2d or conv.groups != 1 or conv.kernel_size != (1, 1):
        return False
    return conv.stride == (1, 1) and conv.padding in ((0, 0), "valid")


@functools.cache
def folded_class(original: type) -> type:
    """The class that a Sequential of class `original` gets."""
    names = {"__module__": original.__module__, "__qualname__": original.__qualname__, "__doc__": original.__doc__}
    return type(original.__name__, (FoldedSequential, original), names)


def _new(original: type):
    """For copy and pickle, which cannot find a class that was made here."""
    kind = folded_class(original)
    return kind.__new__(kind)
