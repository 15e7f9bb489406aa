"""accelerate, restore and accelerated: fastseg's layers inside a model that somebody already has.

A layer changes its class and keeps everything else: the object, its Parameters, its hooks, its state-dict keys. What
the undo needs is one attribute, `_fastseg`, in the layer's `__dict__`. A module whose forward passes convolutions'
outputs to batch norms gets a pair of hooks (see fastseg/nn/folding.py), or runs them in one call when it is a
Sequential (see fastseg/nn/sequential.py).
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import NamedTuple

import torch

from fastseg import dispatch
from fastseg.chains import FoundChain, find_chains
from fastseg.nn.conv import AcceleratedConv2d
from fastseg.nn.folding import Chain, Scope, foldable_class, is_scope_hook, original_class
from fastseg.nn.fused_module import Fusion, fused_class
from fastseg.nn.head import resizing_class
from fastseg.nn.pyramid import Separable
from fastseg.nn.sequential import SeparableStep, Step, folded_class, is_plain_sequential, steps_of
from fastseg.ops.conv2d import operator_of
from fastseg.pyramids import find_pyramids

_ON_FALLBACK = ("silent", "warn", "error")
_MEMORY_FORMATS = (torch.channels_last, torch.contiguous_format, None)


class Settings:
    """The one attribute of an accelerated layer: what it runs with, and what the undo needs."""

    def __init__(self, original: type, backend: str | None = None, memory_format: torch.memory_format | None = None):
        self.original = original
        self.backend = backend  # None: the surrounding choice
        self.memory_format = memory_format
        self.chain: Chain | None = None
        self.steps: list[Step | SeparableStep] = []  # of a Sequential
        self.fusion: Fusion | None = None  # of a module that is recognised as a whole
        self.weight_layout: tuple[torch.Size, tuple[int, ...]] | None = None  # shape and strides, where they changed


def accelerate(
    model: torch.nn.Module,
    *,
    backend: str = "auto",
    memory_format: torch.memory_format | None = torch.channels_last,
    on_fallback: str = "silent",
) -> torch.nn.Module:
    """Make the convolutions and bilinear resizes of `model` run on fastseg's kernels, in place, and return `model`.

    Every torch.nn.Conv2d becomes a subclass of it: the same object with the same Parameters, hooks and state-dict keys,
    so optimizers, checkpoints, DistributedDataParallel, deepcopy, pickle, torch.compile and torch.export work as before
    (torch.jit.script does not: restore first). Results are the same up to rounding, in eval and in train mode. In eval
    mode without gradients, a batch norm and an activation behind a convolution are applied inside it, from their
    present values in each call; nothing is cached and no parameter changes. Under torch.func's transforms layers run
    native.

    torch.nn.Upsample and torch.nn.UpsamplingBilinear2d, and the models and blocks of torchvision and
    segmentation_models_pytorch whose forward calls torch.nn.functional.interpolate, resize on
    `fastseg.ops.upsample_bilinear2d`.

    Subclasses of torch.nn.Conv2d with a forward of their own are left alone. Accelerating again replaces the settings.

    Args:
        model: any module; a torch.nn.Conv2d itself will do.
        backend: "auto", "native", "reference", "cpu", "triton" or "cuda", for layers whose operator family has kernels
            (depthwise); the others run native. "auto" takes the surrounding choice (`fastseg.backend`,
            FASTSEG_BACKEND).
        memory_format: torch.channels_last or torch.contiguous_format converts the input of each convolution that is not
            in it, and keeps the weights in it; None leaves layouts alone. A model that calls `.view` on feature maps
            needs None: a view across channels_last strides does not exist.
        on_fallback: "silent"; "warn" warns once a reason when convolutions are left to native although a kernel could
            be expected: grouped ones, depthwise ones that the backend cannot run on the parameters' device and dtype,
            depthwise subclasses with their own forward. Dense convolutions do not count. "error" raises instead.

    Raises:
        TypeError: `model` is no torch.nn.Module.
        ValueError: unknown `backend`, `memory_format` or `on_fallback`.
        BackendError: on_fallback="error" and something falls back. The model is then as it was.

    Example:
        >>> import torch, fastseg
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(8, 8, 3, groups=8), torch.nn.BatchNorm2d(8), torch.nn.ReLU())
        >>> fastseg.accelerate(model.eval())(torch.randn(1, 8, 9, 9)).shape
        torch.Size([1, 8, 7, 7])
    """
    _check(model, backend, memory_format, on_fallback)
    _speak(model, backend, on_fallback)
    chains = find_chains(model)
    restore(model)
    pyramids = find_pyramids(model)
    for module in list(model.modules()):
        if type(module) is torch.nn.Conv2d:
            _swap_convolution(module, requested(module, backend), memory_format)
    _swap_followers(model, chains)
    for module, fusion in pyramids.items():
        if _followed(fusion, chains):
            continue
        settings = Settings(type(module), None if backend == "auto" else backend, memory_format)
        settings.fusion = fusion
        _swap(module, fused_class(type(module)), settings)
    _swap_resizes(model, None if backend == "auto" else backend)
    return model


def restore(model: torch.nn.Module) -> torch.nn.Module:
    """Undo `fastseg.accelerate` exactly, in place, and return `model`; a model that is not accelerated stays as it is.

    Parameters keep their present values and get back their strides.

    Raises:
        TypeError: `model` is no torch.nn.Module.

    Example:
        >>> import torch, fastseg
        >>> model = fastseg.accelerate(torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3)))
        >>> type(fastseg.restore(model)[0])
        <class 'torch.nn.modules.conv.Conv2d'>
    """
    _check_module(model)
    _undo(model.modules())
    return model


@contextlib.contextmanager
def accelerated(model: torch.nn.Module, **options) -> Iterator[torch.nn.Module]:
    """`with accelerated(model):` accelerates inside the block; the end of it, exceptions included, is an exact undo.

    Args:
        model, options: as `fastseg.accelerate`. A model that is accelerated already gets its earlier settings back.

    Example:
        >>> import torch, fastseg
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3))
        >>> with fastseg.accelerated(model), torch.no_grad():
        ...     y = model(torch.randn(1, 3, 9, 9))
    """
    _check_module(model)
    modules = list(model.modules())
    earlier = [_Earlier.of(module) for module in modules]
    accelerate(model, **options)
    try:
        yield model
    finally:
        _undo([*modules, *model.modules()])  # also what left the model, or came into it, meanwhile
        for record in earlier:
            record.reinstate()


def requested(layer: torch.nn.Conv2d, backend: str) -> str | None:
    """What `layer` asks of dispatch when `backend` is asked of the model: a family without kernels is never forced."""
    operator = operator_of(layer.in_channels, layer.groups)
    if dispatch.reason_not("reference", dispatch.Problem(operator, "cpu", torch.float32)) is not None:
        return "auto"
    return None if backend == "auto" else backend


def _check_module(model) -> None:
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"expected model to be a torch.nn.Module, but got {type(model).__name__}")


def _check(model, backend, memory_format, on_fallback) -> None:
    _check_module(model)
    if backend not in dispatch.BACKENDS:
        raise ValueError(f"expected backend to be one of {', '.join(dispatch.BACKENDS)}, but got {backend!r}")
    if memory_format not in _MEMORY_FORMATS:
        raise ValueError(
            "expected memory_format to be torch.channels_last, torch.contiguous_format or None, "
            f"but got {memory_format!r}"
        )
    if on_fallback not in _ON_FALLBACK:
        raise ValueError(f"expected on_fallback to be one of {', '.join(_ON_FALLBACK)}, but got {on_fallback!r}")


def _speak(model, backend, on_fallback) -> None:
    if on_fallback == "silent":
        return
    names: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        reason = fallback_reason(module, backend) if isinstance(module, torch.nn.Conv2d) else None
        if reason is not None:
            names.setdefault(reason, []).append(name or type(module).__name__)
    sentences = [_sentence(reason, layers) for reason, layers in names.items()]
    if sentences and on_fallback == "error":
        raise dispatch.BackendError("; ".join(sentences))
    for sentence in sentences:
        warnings.warn(f"fastseg: {sentence}", stacklevel=3)


def _sentence(reason: str, layers: list[str]) -> str:
    shown = ", ".join(layers[:3]) + (", ..." if len(layers) > 3 else "")
    plural = "convolution is" if len(layers) == 1 else "convolutions are"
    return f"{len(layers)} {plural} left to native ({shown}): {reason}"


def fallback_reason(layer: torch.nn.Conv2d, backend: str) -> str | None:
    """Why `layer` stays native although a kernel could be expected, or None."""
    dense = operator_of(layer.in_channels, layer.groups) == "dilated_conv2d"
    if backend == "native" or (dense and backend == "auto"):
        return None  # for most dense convolutions native is the fastest, and nothing is missing
    if original_class(layer) is not torch.nn.Conv2d:
        return own_forward_reason(layer)
    try:
        operator, weight = operator_of(layer.in_channels, layer.groups), layer.weight
        problem = dispatch.Problem(operator, weight.device.type, weight.dtype)
        choice = dispatch.choose(problem, requested(layer, backend) or "auto")
    except dispatch.BackendError as error:
        return str(error)
    return choice.reason if choice.backend == "native" else None


def own_forward_reason(layer: torch.nn.Conv2d) -> str | None:
    """Why a convolution that is no plain torch.nn.Conv2d is left alone; None when it is one."""
    kind = original_class(layer)
    return None if kind is torch.nn.Conv2d else f"{kind.__name__} has a forward of its own"


def _swap_convolution(layer, backend, memory_format) -> None:
    settings = Settings(torch.nn.Conv2d, backend, memory_format)
    weight = layer._parameters.get("weight")
    if memory_format is not None and type(weight) is torch.nn.Parameter and weight.dim() == 4:
        strides = torch.empty(weight.shape, device="meta", memory_format=memory_format).stride()
        if weight.stride() != strides and _may_restride(weight, strides):
            settings.weight_layout = (weight.shape, weight.stride())
            weight.data = _restrided(weight.data, strides)
    _swap(layer, AcceleratedConv2d, settings)


def _may_restride(weight, strides) -> bool:
    """Whether the weight may get these strides: memory that others see too stays where it is."""
    if weight.layout != torch.strided or weight.is_inference():
        return False
    if _same_memory(weight, strides):
        return True
    if weight.device.type == "cpu" and weight.is_shared():
        return False
    return weight.untyped_storage().nbytes() == weight.numel() * weight.element_size()


def _same_memory(values, strides) -> bool:
    """Whether the strides differ in dimensions of size 1 only, where they mean nothing.

    DistributedDataParallel and optimizers compare strides nevertheless, and gradients come with those of the layout.
    """
    dimensions = zip(values.shape, values.stride(), strides, strict=True)
    return all(size == 1 or now == then for size, now, then in dimensions)


def _restrided(values, strides) -> torch.Tensor:
    if _same_memory(values, strides):
        return values.as_strided(values.shape, strides)
    return torch.empty_strided(values.shape, strides, dtype=values.dtype, device=values.device).copy_(values)


def _swap_followers(model, chains: dict[torch.nn.Conv2d, FoundChain]) -> None:
    """Let every plain Sequential run the chains among its children; the owners of the others arm theirs."""
    chain_of = {convolution: found.chain for convolution, found in chains.items()}
    for convolution, found in chains.items():
        convolution._fastseg.chain = found.chain
    inside = set()
    for module in list(model.modules()):
        if is_plain_sequential(module):
            inside |= _swap_sequential(module, chain_of)
    owners: dict[torch.nn.Module, list[FoundChain]] = {}
    for found in chains.values():
        if found.chain not in inside:
            owners.setdefault(found.owner, []).append(found)
    for owner, links in owners.items():
        scope = Scope()
        for _, chain, watched in links:
            scope.links.append((chain, watched))
            for module in (chain.norm, chain.activation):
                if module is not None and "_fastseg" not in vars(module):
                    _swap(module, foldable_class(module), Settings(type(module)))
        scope.install(owner)


def _swap_resizes(model, backend: str | None) -> None:
    for module in list(model.modules()):
        kind = None if "_fastseg" in vars(module) else resizing_class(module, backend)
        if kind is not None:
            _swap(module, kind, Settings(type(module), backend))


def _followed(fusion: Fusion, chains: dict[torch.nn.Conv2d, FoundChain]) -> bool:
    """Whether a norm outside follows the module: folded into the last convolution it saves more than fusing does."""
    if not isinstance(fusion.whole, Separable):
        return False
    last = fusion.whole.second
    return last.norm is None and last.conv in chains


def _swap_sequential(owner, chain_of: dict[torch.nn.Conv2d, Chain]) -> set[Chain | None]:
    """Let `owner` run the chains and separable convolutions among its children, if there are any; which chains."""
    steps = steps_of(owner, chain_of)
    inside = {step.chain for step in steps if isinstance(step, Step)}
    pairs = [step for step in steps if isinstance(step, SeparableStep)]
    inside |= {half.chain for pair in pairs for half in (pair.first, pair.second)}
    if pairs or inside - {None}:
        settings = Settings(type(owner))
        settings.steps = steps
        _swap(owner, folded_class(type(owner)), settings)
    return inside - {None}


def _swap(module, kind, settings) -> None:
    module.__class__ = kind
    # torch.fx keeps modules whole whose `__module__` is in torch.nn, and an accelerated layer should stay one of them.
    vars(module).update(_fastseg=settings, __module__=settings.original.__module__)


def _undo(modules) -> None:
    for module in modules:
        _remove_scopes(module)
        settings = vars(module).pop("_fastseg", None)
        if settings is None:
            continue
        module.__class__ = settings.original
        del vars(module)["__module__"]
        if settings.weight_layout is not None:
            _set_strides(module._parameters.get("weight"), *settings.weight_layout)


def _set_strides(parameter, shape, strides) -> None:
    if parameter is not None and parameter.shape == shape and parameter.stride() != strides:
        parameter.data = _restrided(parameter.data, strides)


def _remove_scopes(module) -> None:
    for registry in ("_forward_hooks", "_forward_pre_hooks"):
        hooks = vars(module).get(registry, {})
        for key in [key for key, hook in hooks.items() if is_scope_hook(hook)]:
            del hooks[key]
            for flags in ("_forward_hooks_with_kwargs", "_forward_hooks_always_called"):
                vars(module)[flags].pop(key, None)


class _Earlier(NamedTuple):
    """A module as an earlier `accelerate` left it."""

    module: torch.nn.Module
    kind: type
    settings: Settings | None
    weight_strides: tuple[int, ...] | None
    scopes: list[Scope]

    @classmethod
    def of(cls, module) -> _Earlier:
        settings = vars(module).get("_fastseg")
        restrided = settings is not None and settings.weight_layout is not None
        scopes = [hook.__self__ for hook in vars(module).get("_forward_hooks", {}).values() if is_scope_hook(hook)]
        return cls(module, type(module), settings, module.weight.stride() if restrided else None, scopes)

    def reinstate(self) -> None:
        for scope in self.scopes:
            scope.install(self.module)
        if self.settings is not None:
            _swap(self.module, self.kind, self.settings)
            if self.weight_strides is not None:
                _set_strides(self.module.weight, self.settings.weight_layout[0], self.weight_strides)
