"""Batch norm and activation folded into the convolution in front of them, anew in every call.

In eval mode batch norm is y * scale + shift, so a convolution can apply it, and the activation behind it, by itself:

    conv(x, w, b) -> norm -> act    becomes    act(conv(x, w * scale, b * scale + shift))

Nothing is cached. A cache of folded weights would have to notice `.data =`, an EMA, functional_call and
load_state_dict, and version counters see only some of them; a stale fold is a silent wrong answer, and computing scale
and shift costs a few operations on [K].

Three things keep it right:
- Only chains that fastseg/chains.py found in the traced forward of some module (the owner) are candidates: nobody but
  the norm sees the convolution's output there, and nobody but the activation the norm's.
- The owner's Scope, a pair of hooks, arms its chains for the time of one call of the owner. A convolution called by
  anybody else is not armed and returns what it always did.
- A convolution that folded marks its result for the norm, the norm passes the mark to the activation, and each of them
  lets through only what is marked for it. If a mark was not collected when the owner's call ends, its forward took
  another way than tracing saw: the call is repeated without folding, and the chain stays off.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
import warnings
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook

_PLAIN = (torch.Tensor, torch.nn.Parameter)
_REDUCED = (torch.float16, torch.bfloat16)


class Chain:
    """The norm, and perhaps the activation, that follow one convolution. Compared by identity."""

    def __init__(self, norm: torch.nn.Module, activation: torch.nn.Module | None, activation_name: str):
        self.norm = norm
        self.activation = activation  # None: there is none, or the norm holds it
        self.activation_name = activation_name
        self.enabled = True


class Scope:
    """Arms an owner's chains while the owner's forward runs.

    `links` has, for each chain, every module from the owner down to the chain's members as (parent, name, module): they
    must be in place, in eval mode, and free of foreign hooks, which would see values in the middle of the chain.
    """

    def __init__(self):
        self.links: list[tuple[Chain, list[tuple[torch.nn.Module, str, torch.nn.Module]]]] = []

    def install(self, owner: torch.nn.Module) -> None:
        owner.register_forward_pre_hook(self.before, prepend=True)
        owner.register_forward_hook(self.after, prepend=True, with_kwargs=True, always_call=True)

    def before(self, owner, args):
        if torch.compiler.is_compiling() or torch.jit.is_tracing() or _has_any_global_hook():
            return
        if owner.training:
            return
        for chain, watched in self.links:
            if chain.enabled and all(_in_place(*link) for link in watched):
                _armed.uncollected[chain] = 0

    def after(self, owner, args, kwargs, result):
        if torch.compiler.is_compiling():
            return None
        missed = [chain for chain, _ in self.links if _armed.uncollected.pop(chain, 0)]
        if not missed or result is None:  # None: forward raised, and its exception is on its way
            return None
        for chain in missed:
            chain.enabled = False
        warnings.warn(
            f"fastseg: {type(owner).__name__}.forward did not pass a convolution's output to the batch norm that "
            "followed it when it was traced; the call was repeated without folding, which stays off there",
            stacklevel=2,
        )
        return owner.forward(*args, **kwargs)


class _Armed(threading.local):
    """This thread's armed chains, each with the number of folded results that wait for their last collector."""

    def __init__(self):
        self.uncollected: dict[Chain, int] = {}


_armed = _Armed()


@contextlib.contextmanager
def disarmed() -> Iterator[None]:
    """Chains that were armed outside fold nothing inside, where results are thrown away and nobody collects marks."""
    outside, _armed.uncollected = _armed.uncollected, {}
    try:
        yield
    finally:
        _armed.uncollected = outside


def _in_place(parent, name, module) -> bool:
    return parent._modules.get(name) is module and not module.training and not has_foreign_hooks(module)


def has_foreign_hooks(module: torch.nn.Module) -> bool:
    """Whether somebody other than fastseg looks at this module's calls."""
    if module._backward_hooks or module._backward_pre_hooks:
        return True
    if not module._forward_hooks and not module._forward_pre_hooks:
        return False
    hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    return not all(is_scope_hook(hook) for hook in hooks)


def is_scope_hook(hook) -> bool:
    return isinstance(getattr(hook, "__self__", None), Scope)


def is_armed(chain: Chain) -> bool:
    return not torch.compiler.is_compiling() and chain in _armed.uncollected


class Operands(NamedTuple):
    """The tensors of one fold: the convolution's and the norm's, each [K] but the weight."""

    weight: torch.Tensor  # [K, C / groups, R, S]
    bias: torch.Tensor | None
    mean: torch.Tensor
    variance: torch.Tensor
    gamma: torch.Tensor | None
    beta: torch.Tensor | None

    @property
    def statistics(self) -> tuple[torch.Tensor | None, ...]:
        """All but the weight, in the order of fastseg.ops.batch_norm."""
        return self[1:]

    @classmethod
    def of(cls, layer: torch.nn.Conv2d, norm: torch.nn.BatchNorm2d) -> Operands:
        return cls(layer.weight, layer.bias, norm.running_mean, norm.running_var, norm.weight, norm.bias)


def collectors_in_place(chain: Chain) -> bool:
    """Whether the norm and the activation will look for a mark: neither was restored by itself."""
    return isinstance(chain.norm, Foldable) and isinstance(chain.activation, (Foldable, type(None)))


def may_fold(input: torch.Tensor, operands: Operands) -> bool:
    """Whether a chain may be applied in this call: no gradient, ordinary tensors, no tracing."""
    weight, mean, variance = operands.weight, operands.mean, operands.variance
    if mean is None or variance is None or mean.shape != weight.shape[:1]:
        return False  # here, and below, native's norm has the word
    if variance.dtype != weight.dtype and not (variance.dtype == torch.float32 and weight.dtype in _REDUCED):
        return False
    if not input.is_floating_point() or input.layout != torch.strided:
        return False
    device, recording = input.device, torch.is_grad_enabled()
    for tensor in (input, *operands):
        if tensor is None:
            continue
        if type(tensor) not in _PLAIN or tensor.device != device or (recording and tensor.requires_grad):
            return False
    return not torch._C._len_torch_dispatch_stack() and forward_ad._current_level < 0


def pays(layer: torch.nn.Conv2d, shape: tuple[int, ...], device_type: str, backend: str) -> bool:
    """Whether the passes over the output that folding saves cost more than computing scale and shift.

    `backend` runs the convolution. On a GPU its epilogue has to take scale and shift, as that of the dense kernels
    does: a pass of small operators is slower than native's norm.
    """
    if len(shape) != 4:
        return False  # batch norm takes no unbatched input
    if device_type == "cuda" and (layer.groups != 1 or backend == "native"):
        return False
    return _output_pixels(layer, shape) * layer.out_channels >= FEWEST_OUTPUTS.get(device_type, 0)


# Output elements from which folding pays; on a GPU each of its small operations is a launch.
FEWEST_OUTPUTS = {"cuda": 2**22}


def _output_pixels(layer: torch.nn.Conv2d, shape: tuple[int, ...]) -> int:
    """N * P * Q for an input of [N, C, H, W], to within the border."""
    return shape[0] * (shape[2] // layer.stride[0]) * (shape[3] // layer.stride[1])


# Products per output up to which scaling the weight beats a pass over the output: oneDNN takes a bias and an activation
# at no cost in convolutions that memory limits, and is slower for them in the others.
MOST_SCALED = {"cpu": 512}


def scales_weight(layer: torch.nn.Conv2d, weight: torch.Tensor, shape: tuple[int, ...], device_type: str) -> bool:
    """Whether to scale the weight rather than the output.

    A weight of lower precision is never scaled: rounding the product would cost accuracy that native has.
    """
    products = weight[0].numel()
    most = min(_output_pixels(layer, shape), MOST_SCALED.get(device_type, products))
    return weight.dtype not in _REDUCED and products <= most


def mark(y: torch.Tensor, chain: Chain) -> torch.Tensor:
    """Mark a folded result for the chain's norm."""
    _armed.uncollected[chain] += 1
    y._fastseg_fold = (chain, chain.norm)
    return y


def _collect(module: torch.nn.Module, input) -> bool:
    """Whether `input` is marked for `module`; passes the mark on to the chain's next member, or takes it off."""
    if torch.compiler.is_compiling():
        return False
    chain, collector = getattr(input, "_fastseg_fold", (None, None))
    if collector is not module:
        return False
    if module is chain.norm and chain.activation is not None:
        input._fastseg_fold = (chain, chain.activation)
    else:
        del input._fastseg_fold
        if chain in _armed.uncollected:
            _armed.uncollected[chain] -= 1
    return True


class Foldable:
    """A norm or activation that returns its input unchanged when the convolution in front has applied it already."""

    def forward(self, input):
        return input if _collect(self, input) else super().forward(input)


class FoldableBatchNorm2d(Foldable, torch.nn.BatchNorm2d):
    pass


class FoldableReLU(Foldable, torch.nn.ReLU):
    pass


class FoldableReLU6(Foldable, torch.nn.ReLU6):
    pass


class FoldableHardswish(Foldable, torch.nn.Hardswish):
    pass


class FoldableSiLU(Foldable, torch.nn.SiLU):
    pass


# Exact classes only: a subclass may mean something else.
_ACTIVATIONS = {
    torch.nn.ReLU: ("relu", FoldableReLU),
    torch.nn.ReLU6: ("relu6", FoldableReLU6),
    torch.nn.Hardswish: ("hardswish", FoldableHardswish),
    torch.nn.SiLU: ("silu", FoldableSiLU),
}


def activation_name(module: torch.nn.Module) -> str | None:
    """The name fastseg's operators have for this activation module, or None."""
    return _ACTIVATIONS.get(original_class(module), (None, None))[0]


def own_activation(norm: torch.nn.Module) -> str | None:
    """The activation inside a norm that folding can take, "none" without one; None when this norm cannot be folded.

    torch.nn.BatchNorm2d holds none; timm's BatchNormAct2d holds its own.
    """
    kind = original_class(norm)
    if not isinstance(norm, torch.nn.BatchNorm2d) or norm.running_mean is None or norm.running_var is None:
        return None
    if kind is torch.nn.BatchNorm2d:
        return "none"
    if kind is not _timm_norm() or type(norm.drop) is not torch.nn.Identity:
        return None
    return "none" if type(norm.act) is torch.nn.Identity else activation_name(norm.act)


def foldable_class(module: torch.nn.Module) -> type:
    """The class that a norm or activation of a chain gets under `fastseg.accelerate`."""
    kind = original_class(module)
    if kind is torch.nn.BatchNorm2d:
        return FoldableBatchNorm2d
    return _ACTIVATIONS[kind][1] if kind in _ACTIVATIONS else _foldable_timm_norm()


def original_class(module: torch.nn.Module) -> type:
    """The class of `module` before `fastseg.accelerate`."""
    settings = vars(module).get("_fastseg")
    return type(module) if settings is None else settings.original


def _timm_norm() -> type | None:
    """timm's BatchNormAct2d, if timm is in use: a model that has one has imported it."""
    module = sys.modules.get("timm.layers.norm_act")
    return getattr(module, "BatchNormAct2d", None)


@functools.cache
def _foldable_timm_norm() -> type:
    from timm.layers.norm_act import BatchNormAct2d

    return type("FoldableBatchNormAct2d", (Foldable, BatchNormAct2d), {"__module__": __name__})


def __getattr__(name):
    if name == "FoldableBatchNormAct2d":  # found here by pickle; made when first asked for, because timm is optional
        return _foldable_timm_norm()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
