"""Normalises the arguments of a convolution, and leaves everything unusual to PyTorch's own checks."""

from __future__ import annotations

from typing import NamedTuple

import torch


class ConvArguments(NamedTuple):
    """A valid, batched convolution: stride and dilation (h, w), padding (top, bottom, left, right)."""

    input: torch.Tensor  # [N, C, H, W]
    stride: list[int]
    padding: list[int]
    dilation: list[int]
    batched: bool


def _pair(value) -> list[int] | None:
    if isinstance(value, int):
        return [value, value]
    if not isinstance(value, (tuple, list)) or len(value) not in (1, 2):
        return None
    first, last = value[0], value[-1]
    return [first, last] if isinstance(first, int) and isinstance(last, int) else None


def _padding(padding, kernel, stride, dilation) -> list[int] | None:
    if padding == "valid":
        return [0, 0, 0, 0]
    if padding == "same":
        if stride != [1, 1]:
            return None
        total = [dilation[i] * (kernel[i] - 1) for i in range(2)]
        # An odd total puts the extra row or column after the image, as PyTorch does.
        return [total[0] // 2, total[0] - total[0] // 2, total[1] // 2, total[1] - total[1] // 2]
    pair = _pair(padding)
    return pair and [pair[0], pair[0], pair[1], pair[1]]


def _autocast_unites(*tensors) -> bool:
    """Whether autocast gives these tensors one dtype: under it, activations are bfloat16 and parameters float32."""
    device_type = tensors[0].device.type
    return (
        torch.amp.is_autocast_available(device_type)
        and torch.is_autocast_enabled(device_type)
        and all(t is None or (t.is_floating_point() and t.dtype != torch.float64) for t in tensors)
    )


def normalise(input, weight, bias, stride, padding, dilation, groups) -> ConvArguments | None:
    """The arguments in normal form, or None when the call is not plainly valid.

    None means that PyTorch has the word: it raises its own exception, or knows a case that is rarer than it looks.
    """
    tensor = torch.Tensor
    if not isinstance(input, tensor) or not isinstance(weight, tensor) or not isinstance(bias, (tensor, type(None))):
        return None
    same_device = input.device == weight.device and (bias is None or input.device == bias.device)
    same_dtype = input.dtype == weight.dtype and (bias is None or input.dtype == bias.dtype)
    if not same_device or not (same_dtype or _autocast_unites(input, weight, bias)):
        return None
    if input.layout != torch.strided or input.dim() not in (3, 4) or weight.dim() != 4 or not isinstance(groups, int):
        return None
    stride, dilation = _pair(stride), _pair(dilation)
    if stride is None or dilation is None or min(stride) < 1 or min(dilation) < 1 or groups < 1:
        return None
    outputs, depth, *kernel = weight.shape
    padding = _padding(padding, kernel, stride, dilation)
    if padding is None or min(padding) < 0:
        return None
    channels, height, width = input.shape[-3:]
    if channels < 1 or outputs < 1 or channels != depth * groups or outputs % groups != 0:
        return None
    if bias is not None and (bias.dim() != 1 or bias.shape[0] != outputs):
        return None
    reach = dilation[0] * (kernel[0] - 1) + 1, dilation[1] * (kernel[1] - 1) + 1
    if min(kernel) < 1 or height + padding[0] + padding[1] < reach[0] or width + padding[2] + padding[3] < reach[1]:
        return None
    batched = input.dim() == 4
    return ConvArguments(input if batched else input.unsqueeze(0), stride, padding, dilation, batched)
