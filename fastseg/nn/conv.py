"""Conv2d on fastseg's operators, and the class that `fastseg.accelerate` gives to a torch.nn.Conv2d."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fastseg import dispatch, extension, ops
from fastseg.measuring import Attempt
from fastseg.nn import folding
from fastseg.ops.activation import apply_activation
from fastseg.ops.arguments import ConvArguments, normalise
from fastseg.ops.batch_norm import batch_norm_activation_, fold_batch_norm, folded_conv2d, scale_and_shift
from fastseg.ops.conv2d import operator_of
from fastseg.ops.convolution import geometry_of
from fastseg.ops.library import OVERLOADS


def convolve(layer: torch.nn.Conv2d, input, weight, bias, activation: str, backend: str | None) -> torch.Tensor:
    """`layer`'s convolution of `input` with the weight and bias given; padding mode, stride and so on are its own."""
    padding = layer.padding
    if layer.padding_mode != "zeros":
        input = F.pad(input, layer._reversed_padding_repeated_twice, mode=layer.padding_mode)
        padding = 0
    return ops.conv2d(
        input, weight, bias, layer.stride, padding, layer.dilation, layer.groups, activation=activation, backend=backend
    )


class Conv2d(torch.nn.Conv2d):
    """torch.nn.Conv2d that runs on `fastseg.ops.conv2d`: same arguments, parameters and state-dict keys.

    Args:
        As torch.nn.Conv2d, and by keyword:
        activation: "none", "relu", "relu6", "hardswish" or "silu", applied to the output.
        backend: as in `fastseg.ops.conv2d`; None takes the surrounding choice.

    Shapes, dtypes, errors and promises: see `fastseg.ops.conv2d`. `padding_mode` other than "zeros" pads the input
    first, as torch.nn.Conv2d does.

    Example:
        >>> import torch, fastseg
        >>> layer = fastseg.nn.Conv2d(16, 16, 3, padding=2, dilation=2, groups=16, activation="relu")
        >>> layer(torch.randn(1, 16, 20, 20)).shape
        torch.Size([1, 16, 20, 20])
    """

    def __init__(self, *args, activation: str = "none", backend: str | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.activation = activation
        self.backend = backend

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return convolve(self, input, self.weight, self.bias, self.activation, self.backend)

    def extra_repr(self) -> str:
        extra = super().extra_repr()
        if self.activation != "none":
            extra += f", activation={self.activation}"
        return extra if self.backend is None else f"{extra}, backend={self.backend}"


class AcceleratedConv2d(torch.nn.Conv2d):
    """What a torch.nn.Conv2d becomes under `fastseg.accelerate`: the same object with this class.

    Its settings are one attribute, `_fastseg` (see fastseg/accelerate.py), so that the undo is exact; one that somebody
    constructs has none and is a torch.nn.Conv2d. Where a batch norm follows and folding is right for this very call,
    the result already contains it and the activation after it (see fastseg/nn/folding.py).
    """

    _fastseg = None

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        settings = self._fastseg
        if settings is None or not isinstance(input, torch.Tensor) or under_transform():
            return super().forward(input)  # torch.fx, a mistake that PyTorch words, or torch.func
        input = to_memory_format(input, settings.memory_format)
        chain = settings.chain
        if chain is not None and folding.is_armed(chain) and folding.collectors_in_place(chain):
            y = folded_if_right(self, chain, input, settings.backend)
            if y is not None:
                return folding.mark(y, chain)
        return convolve(self, input, self.weight, self.bias, "none", settings.backend)


def under_transform() -> bool:
    """Whether torch.func transforms this call: vmap knows neither channels_last nor fastseg's operators."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def to_memory_format(input: torch.Tensor, memory_format: torch.memory_format | None) -> torch.Tensor:
    """`input` in `memory_format`: itself when it is so already, or cannot be, or when None leaves layouts alone."""
    if memory_format is None or input.dim() != 4 or input.layout != torch.strided:
        return input
    return input.contiguous(memory_format=memory_format)


def folded_if_right(layer: torch.nn.Conv2d, chain: folding.Chain, input, backend: str | None) -> torch.Tensor | None:
    """`folded`, or None where it does not pay or is not right for this call."""
    # On a GPU it depends on the kernel, which may have to be measured: only where it can matter.
    if not folding.pays(layer, input.shape, input.device.type, "triton" if input.is_cuda else "native"):
        return None
    operands = folding.Operands.of(layer, chain.norm)
    if not folding.may_fold(input, operands):
        return None
    if input.is_cuda:
        plan = _plan(layer, chain, input, operands, backend)
        if plan is None or plan[0].backend == "native":
            return None
    return folded(layer, chain, input, operands, backend)


def folded(
    layer: torch.nn.Conv2d, chain: folding.Chain, input, operands: folding.Operands, backend: str | None
) -> torch.Tensor:
    """`layer`'s convolution, then the chain's norm and activation, scaled wherever that is faster."""
    weight, statistics, eps = operands.weight, operands.statistics, chain.norm.eps
    scales = folding.scales_weight(layer, weight, input.shape, input.device.type)
    plan = None
    if input.dtype == weight.dtype and not _autocasts(input.device.type):
        plan = _plan(layer, chain, input, operands, backend)
    if plan is not None:
        choice, arguments = plan
        if input.is_cpu and choice.backend in ("cpu", "native"):
            if choice.backend == "native":
                dispatch.count_native(operator_of(input.shape[1], layer.groups), choice.reason)
            return folded_conv2d(
                input, weight, *statistics, eps, layer.stride, layer.padding, layer.dilation, layer.groups,
                chain.activation_name, scales, choice.backend,
            )  # fmt: skip
        if arguments is not None and choice.backend != "native":
            # Scale and shift may be wider than the tensors: the sums take them before they are rounded.
            scale, shift = scale_and_shift(*statistics, eps)
            return OVERLOADS["dilated_conv2d"][choice.backend](
                input, weight, shift, arguments.stride, arguments.padding, arguments.dilation,
                chain.activation_name, scale,
            )  # fmt: skip
    if scales:
        scaled, shift = fold_batch_norm(weight, *statistics, eps)
        return convolve(layer, input, scaled, shift, chain.activation_name, backend)
    y = convolve(layer, input, weight, None, "none", backend)
    return batch_norm_activation_(y, *statistics, eps, chain.activation_name)


def _autocasts(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


def _apart(layer: torch.nn.Conv2d, chain: folding.Chain, input, operands: folding.Operands) -> torch.Tensor:
    """What the chain's modules compute, one after the other."""
    y = convolve(layer, input, operands.weight, operands.bias, "none", "native")
    _, mean, variance, gamma, beta = operands.statistics
    return apply_activation(
        F.batch_norm(y, mean, variance, gamma, beta, False, 0.0, chain.norm.eps), chain.activation_name
    )


def norm_epilogue(chain: folding.Chain) -> str:
    """What dispatch calls the epilogue of a convolution that the chain is folded into."""
    return f"norm+{chain.activation_name}"


def _plan(
    layer: torch.nn.Conv2d, chain: folding.Chain, input, operands: folding.Operands, backend: str | None
) -> tuple[dispatch.Choice, ConvArguments | None] | None:
    """What runs `layer` and its chain on `input`, and of a dense convolution its arguments in normal form.

    None where the layer or the build leaves no choice, or where the mistake in a call is PyTorch's to tell.
    """
    if extension.EXTENSION is None or layer.padding_mode != "zeros" or isinstance(layer.padding, str):
        return None
    operator, device_type, weight = operator_of(input.shape[1], layer.groups), input.device.type, operands.weight
    arguments = geometry = attempt = None
    sized = dispatch.depends_on_geometry(operator, device_type)
    if sized or operator == "dilated_conv2d":
        arguments = normalise(input, weight, None, layer.stride, layer.padding, layer.dilation, layer.groups)
        if arguments is None:
            return None
    if sized:
        geometry = geometry_of(arguments, weight)

        def run(name):
            if name == "native" and input.is_cuda:
                return _apart(layer, chain, input, operands)
            return folded(layer, chain, input, operands, name)

        attempt = Attempt(run, (input, weight))
    problem = dispatch.Problem(operator, device_type, input.dtype, geometry, epilogue=norm_epilogue(chain))
    return dispatch.choose(problem, backend, attempt), arguments if operator == "dilated_conv2d" else None
