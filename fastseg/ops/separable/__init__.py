"""Depthwise-separable convolution: a depthwise and a pointwise convolution in one kernel."""

from __future__ import annotations

import torch

from fastseg import dispatch
from fastseg.ops import depthwise, dilated  # noqa: F401  the operators of the gradient
from fastseg.ops.activation import check_activation
from fastseg.ops.arguments import normalise
from fastseg.ops.convolution import call_operator, chosen_by_size
from fastseg.ops.library import OVERLOADS
from fastseg.ops.native import native_conv2d
from fastseg.ops.separable import op as _op  # noqa: F401  registers the operator


def separable_conv2d(
    input: torch.Tensor,
    depthwise_weight: torch.Tensor,
    pointwise_weight: torch.Tensor,
    depthwise_bias: torch.Tensor | None = None,
    pointwise_bias: torch.Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | str = 0,
    dilation: int | tuple[int, int] = 1,
    *,
    depthwise_activation: str = "none",
    activation: str = "none",
    backend: str | None = None,
) -> torch.Tensor:
    """Depthwise convolution, then a 1x1 convolution, without the result in between ever being in memory.

    Args:
        input: [N, C, H, W] or [C, H, W]; float32, float16, bfloat16 or float64; any strides. channels_last is fastest.
        depthwise_weight: [C * m, 1, R, S] with channel multiplier m >= 1, in the input's dtype.
        pointwise_weight: [K, C * m, 1, 1].
        depthwise_bias: [C * m] or None.
        pointwise_bias: [K] or None.
        stride, padding, dilation: of the depthwise convolution, as in `fastseg.ops.conv2d`.
        depthwise_activation, activation: "none", "relu", "relu6", "hardswish" or "silu", behind the first and the
            second convolution.
        backend: "auto", "native", "reference", "cpu", "triton" or "cuda"; None takes the surrounding choice
            (`fastseg.backend`, FASTSEG_BACKEND, "auto").

    Returns:
        [N, K, P, Q] in the memory format that conv2d gives: channels_last when input or depthwise_weight is.

    Raises:
        RuntimeError, TypeError: as conv2d does for the same mistake.
        ValueError: unknown activation or `backend`.
        BackendError: the backend named cannot run this call.

    Sums are accumulated in float32 (float64 for float64); of 16-bit tensors the intermediate is rounded as two
    convolutions would round it. The backward pass computes it again. Forward and all gradients are bitwise repeatable;
    double backward is supported. As in Chollet, "Xception" (2017).

    Example:
        >>> import torch, fastseg
        >>> x = torch.randn(2, 16, 33, 33).to(memory_format=torch.channels_last)
        >>> depthwise, pointwise = torch.randn(16, 1, 3, 3), torch.randn(24, 16, 1, 1)
        >>> fastseg.ops.separable_conv2d(x, depthwise, pointwise, padding=1, depthwise_activation="relu").shape
        torch.Size([2, 24, 33, 33])
    """
    check_activation(depthwise_activation)
    check_activation(activation)
    groups = None
    if isinstance(input, torch.Tensor):
        groups = input.shape[-3] if input.dim() >= 3 else 1
    tensors = (input, depthwise_weight, pointwise_weight, depthwise_bias, pointwise_bias)
    arguments = normalise(input, depthwise_weight, depthwise_bias, stride, padding, dilation, groups)
    if arguments is None or not _follows(pointwise_weight, pointwise_bias, depthwise_weight):
        return _native(*tensors, stride, padding, dilation, groups, depthwise_activation, activation)

    def run(name):
        return separable_conv2d(
            *tensors, stride, padding, dilation, depthwise_activation=depthwise_activation, activation=activation,
            backend=name,
        )  # fmt: skip

    geometry = map(tuple, (arguments.stride, arguments.padding, arguments.dilation))
    detail = (*depthwise_weight.shape, *pointwise_weight.shape[:1], *geometry, depthwise_activation, activation)
    choice = chosen_by_size("separable_conv2d", arguments.input, backend, detail, tensors, run)
    if choice.backend == "native":
        dispatch.count_native("separable_conv2d", choice.reason)
        return _native(*tensors, stride, padding, dilation, groups, depthwise_activation, activation)
    y = call_operator(
        OVERLOADS["separable_conv2d"][choice.backend], tensors,
        arguments.input, *tensors[1:], arguments.stride, arguments.padding, arguments.dilation,
        depthwise_activation, activation,
    )  # fmt: skip
    return y if arguments.batched else y.squeeze(0)


def _follows(weight, bias, depthwise_weight) -> bool:
    """Whether these are plainly a 1x1 convolution of what the depthwise filters give."""
    if not isinstance(weight, torch.Tensor) or not isinstance(bias, (torch.Tensor, type(None))):
        return False
    if weight.dim() != 4 or weight.shape[0] < 1 or tuple(weight.shape[1:]) != (depthwise_weight.shape[0], 1, 1):
        return False
    if bias is not None and bias.shape != weight.shape[:1]:
        return False
    like = depthwise_weight
    return all(t is None or (t.dtype == like.dtype and t.device == like.device) for t in (weight, bias))


def _native(input, depthwise_weight, pointwise_weight, depthwise_bias, pointwise_bias, stride, padding, dilation,
            groups, depthwise_activation, activation):  # fmt: skip
    """ATen's two convolutions, with their checks and exceptions."""
    z = native_conv2d(input, depthwise_weight, depthwise_bias, stride, padding, dilation, groups, depthwise_activation)
    if isinstance(pointwise_weight, torch.Tensor) and tuple(pointwise_weight.shape[2:]) != (1, 1):
        raise RuntimeError(
            f"expected pointwise_weight of shape [K, {z.shape[-3]}, 1, 1], but got {list(pointwise_weight.shape)}"
        )
    return native_conv2d(z, pointwise_weight, pointwise_bias, 1, 0, 1, 1, activation)
