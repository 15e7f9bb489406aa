"""Index arithmetic of convolutions, in one place: output sizes, live ranges, and the output's memory format.

Everywhere: stride and dilation are (h, w), padding is (top, bottom, left, right), and output pixel p reads input pixel
p * stride - pad + tap * dilation.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch._prims_common import suggest_memory_format

# Stride, padding and dilation of a 1x1 convolution that leaves the image's size alone.
POINTWISE = ((1, 1), (0, 0, 0, 0), (1, 1))


def output_size(size, kernel, stride, padding, dilation) -> tuple[int, int]:
    """Height and width of a convolution's output, for (height, width) of image and kernel."""
    return tuple(
        (size[i] + padding[2 * i] + padding[2 * i + 1] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1
        for i in range(2)
    )


def same_padding(weight: torch.Tensor, dilation: int) -> tuple[tuple[int, ...], ...]:
    """Stride, padding and dilation with which an odd kernel at `dilation` leaves the image's size alone."""
    rows, columns = (dilation * (k // 2) for k in weight.shape[2:])
    return (1, 1), (rows, rows, columns, columns), (dilation, dilation)


def live_outputs(size: int, outputs: int, stride: int, pad: int, offset: int) -> tuple[slice, slice]:
    """The outputs p with 0 <= p * stride - pad + offset < size, and the inputs they read, as two slices."""
    first = max(0, -((offset - pad) // stride))
    last = min(outputs - 1, (size - 1 + pad - offset) // stride)
    if last < first:
        return slice(0, 0), slice(0, 0)
    start = first * stride - pad + offset
    return slice(first, last + 1), slice(start, start + (last - first) * stride + 1, stride)


def live_pairs(size: int, outputs: int, stride: int, pad: int, dilation: int, taps: int) -> int:
    """Along one axis, in how many pairs of an output and a tap the tap looks at the image."""
    reached = (live_outputs(size, outputs, stride, pad, tap * dilation)[0] for tap in range(taps))
    return sum(outputs.stop - outputs.start for outputs in reached)


def tap_slices(input, weight, size, stride, padding, dilation) -> Iterator[tuple]:
    """Each filter tap (r, s) with the index of the outputs that it reaches, and that of the inputs it reads there.

    `size` is the outputs' (height, width).
    """
    for r, s in itertools.product(range(weight.shape[2]), range(weight.shape[3])):
        rows, image_rows = live_outputs(input.shape[2], size[0], stride[0], padding[0], r * dilation[0])
        columns, image_columns = live_outputs(input.shape[3], size[1], stride[1], padding[2], s * dilation[1])
        yield (r, s), (..., rows, columns), (..., image_rows, image_columns)


def conv_memory_format(input: torch.Tensor, weight: torch.Tensor) -> torch.memory_format:
    """torch.nn.functional.conv2d's rule: channels_last when input or weight suggests it, but never float64 on a GPU."""
    if input.is_cuda and input.dtype == torch.float64:
        return torch.contiguous_format
    formats = (suggest_memory_format(input), suggest_memory_format(weight))
    return torch.channels_last if torch.channels_last in formats else torch.contiguous_format


def empty_output(input: torch.Tensor, weight: torch.Tensor, size, channels: int | None = None) -> torch.Tensor:
    """An uninitialised [N, channels or K, *size] in the memory format conv2d gives its output."""
    channels = weight.shape[0] if channels is None else channels
    return torch.empty(
        (input.shape[0], channels, *size),
        dtype=input.dtype,
        device=input.device,
        memory_format=conv_memory_format(input, weight),
    )


def empty_gradients(input: torch.Tensor, weight: torch.Tensor, output_mask) -> tuple[torch.Tensor | None, ...]:
    """Uninitialised gradients of input, weight and bias; None for those that `output_mask` leaves out."""
    return (
        empty_output(input, weight, input.shape[2:], input.shape[1]) if output_mask[0] else None,
        torch.empty_like(weight) if output_mask[1] else None,
        weight.new_empty(weight.shape[0]) if output_mask[2] else None,
    )
