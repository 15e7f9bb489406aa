"""The operator families under contract. A new one joins every promise of test_contract.py by one entry in FAMILIES."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

import fastseg
from fastseg.testing import Expected, expected_conv, integer_tensor, random_tensor

Tensors = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Family:
    """One differentiable operator of `tensors` -> tensor.

    cases: readable id -> whatever the functions below take as `case`; small shapes.
    key_cases: ids of a few that together reach every path of the kernels.
    strided_cases: ids of those that run with inputs of any strides.
    make(case, dtype, maker, device, seed): the differentiable tensors, the image first.
    run(case, tensors, backend), native(case, tensors): the operator, and PyTorch's own.
    expected(case, tensors, grad_output, roundoff, tf32=False): the output's and each tensor's gradient's Expected.
    takes_tf32: whether float32 may be multiplied as TF32, as torch.backends.cudnn.conv.fp32_precision says.
    terms(case, tensors): products in the longest sum of the output and of each gradient.
    """

    name: str
    cases: dict[str, Any]
    make: Callable[..., Tensors]
    run: Callable[..., torch.Tensor]
    native: Callable[..., torch.Tensor]
    expected: Callable[..., tuple[Expected, ...]]
    draw: Callable[..., Any]
    key_cases: tuple[str, ...]
    strided_cases: tuple[str, ...]
    takes_tf32: bool = False


@dataclass(frozen=True)
class ConvCase:
    """Arguments as torch.nn.functional.conv2d takes them, of a dense or (without `outputs`) a depthwise convolution."""

    batch: int
    channels: int
    size: tuple[int, int]
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] | str = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    multiplier: int = 1
    outputs: int | None = None
    activation: str = "none"
    bias: bool = True

    @property
    def groups(self) -> int:
        return 1 if self.outputs else self.channels

    @property
    def filter(self) -> tuple[int, int, int, int]:
        """The weight's shape."""
        if self.outputs:
            return self.outputs, self.channels, *self.kernel
        return self.channels * self.multiplier, 1, *self.kernel

    @property
    def geometry(self):
        """stride, padding (top, bottom, left, right) and dilation, as the operators take them."""
        if self.padding == "same":
            total = [d * (k - 1) for d, k in zip(self.dilation, self.kernel, strict=True)]
            padding = [total[0] // 2, total[0] - total[0] // 2, total[1] // 2, total[1] - total[1] // 2]
        else:
            padding = [self.padding[0], self.padding[0], self.padding[1], self.padding[1]]
        return list(self.stride), padding, list(self.dilation)


DEPTHWISE_CASES = {
    "3x3": ConvCase(2, 8, (7, 9)),
    "3x3-no-bias": ConvCase(1, 16, (6, 5), bias=False),
    "3x3-d2": ConvCase(1, 16, (9, 8), padding=(2, 2), dilation=(2, 2)),
    "3x3-d6-wide": ConvCase(1, 33, (13, 7), padding=(6, 6), dilation=(6, 6)),
    "dilation-over-size": ConvCase(1, 4, (5, 6), padding=(7, 7), dilation=(7, 7)),
    "3x3-s2": ConvCase(2, 8, (9, 10), stride=(2, 2)),
    "3x3-s2-d2": ConvCase(1, 8, (11, 10), stride=(2, 2), padding=(2, 2), dilation=(2, 2)),
    "3x5-s2x1-d1x2": ConvCase(1, 5, (8, 9), (3, 5), (2, 1), (0, 3), (1, 2)),
    "5x5": ConvCase(1, 8, (8, 9), (5, 5), padding=(2, 2)),
    "5x5-s2": ConvCase(1, 12, (9, 9), (5, 5), (2, 2), (2, 2)),
    "5x5-d2": ConvCase(1, 8, (10, 9), (5, 5), padding=(4, 4), dilation=(2, 2)),
    "7x7": ConvCase(1, 8, (9, 8), (7, 7), padding=(3, 3)),
    "4x2-same": ConvCase(1, 6, (7, 8), (4, 2), padding="same", dilation=(1, 3)),
    "9x2": ConvCase(1, 3, (10, 6), (9, 2), padding=(4, 0)),
    "1x1": ConvCase(1, 7, (5, 5), (1, 1), padding=(0, 0)),
    "1x1-s2": ConvCase(1, 8, (5, 6), (1, 1), stride=(2, 2), padding=(0, 0)),
    "stride-over-kernel": ConvCase(1, 8, (11, 11), (2, 2), (3, 4), (0, 0)),
    "padding-over-kernel": ConvCase(1, 8, (4, 5), padding=(4, 5)),
    "kernel-is-image": ConvCase(2, 4, (3, 4), (5, 6), padding=(1, 1)),
    "one-pixel": ConvCase(2, 8, (1, 1)),
    "multiplier-2": ConvCase(2, 4, (6, 7), multiplier=2),
    "multiplier-3-s2": ConvCase(1, 3, (7, 7), stride=(2, 2), multiplier=3),
    "one-channel": ConvCase(1, 1, (6, 6), multiplier=4),
    "67-channels": ConvCase(1, 67, (4, 5)),
    "empty-batch": ConvCase(0, 8, (5, 5)),
    "relu": ConvCase(1, 8, (6, 7), activation="relu"),
    "relu6": ConvCase(1, 8, (6, 7), activation="relu6"),
    "hardswish": ConvCase(1, 8, (6, 7), padding=(2, 2), dilation=(2, 2), activation="hardswish"),
    "silu": ConvCase(1, 8, (6, 7), stride=(2, 2), activation="silu"),
}


# Channels that fill no vector, one vector, and several tiles; taps that are live everywhere, at a border, or nowhere.
DILATED_CASES = {
    "3x3": ConvCase(2, 8, (7, 9), outputs=16),
    "3x3-no-bias": ConvCase(1, 16, (6, 5), outputs=8, bias=False),
    "3x3-d2": ConvCase(1, 16, (9, 8), padding=(2, 2), dilation=(2, 2), outputs=24),
    "3x3-d6": ConvCase(2, 24, (13, 8), padding=(6, 6), dilation=(6, 6), outputs=40),
    "dilation-over-size": ConvCase(1, 8, (5, 6), padding=(7, 7), dilation=(7, 7), outputs=8),
    "3x3-s2": ConvCase(2, 8, (9, 10), stride=(2, 2), outputs=16),
    "3x3-s2-d2": ConvCase(1, 8, (11, 10), stride=(2, 2), padding=(2, 2), dilation=(2, 2), outputs=8),
    "3x5-s2x1-d1x2": ConvCase(1, 5, (8, 9), (3, 5), (2, 1), (0, 3), (1, 2), outputs=7),
    "5x5-d2": ConvCase(1, 8, (10, 9), (5, 5), padding=(4, 4), dilation=(2, 2), outputs=8),
    "7x7-s2-image": ConvCase(1, 3, (15, 14), (7, 7), (2, 2), (3, 3), outputs=16),
    "4x2-same": ConvCase(1, 6, (7, 8), (4, 2), padding="same", dilation=(1, 3), outputs=6),
    "1x1": ConvCase(2, 24, (5, 5), (1, 1), padding=(0, 0), outputs=16),
    "1x1-s2": ConvCase(1, 8, (5, 6), (1, 1), stride=(2, 2), padding=(0, 0), outputs=8),
    "1x1-dilated-padded": ConvCase(1, 8, (5, 4), (1, 1), padding=(1, 2), dilation=(5, 5), outputs=8),
    "stride-over-kernel": ConvCase(1, 8, (11, 11), (2, 2), (3, 4), (0, 0), outputs=8),
    "padding-over-kernel": ConvCase(1, 8, (4, 5), padding=(4, 5), outputs=8),
    "kernel-is-image": ConvCase(2, 4, (3, 4), (5, 6), padding=(1, 1), outputs=12),
    "one-pixel": ConvCase(2, 16, (1, 1), outputs=8),
    "thin": ConvCase(1, 40, (9, 8), padding=(3, 3), dilation=(3, 3), outputs=21),
    "67-to-19": ConvCase(1, 67, (4, 5), outputs=19),
    "one-channel": ConvCase(1, 2, (6, 6), outputs=1),
    "several-tiles": ConvCase(1, 136, (12, 13), padding=(4, 4), dilation=(4, 4), outputs=152),
    "empty-batch": ConvCase(0, 8, (5, 5), outputs=8),
    "relu": ConvCase(1, 8, (6, 7), outputs=8, activation="relu"),
    "relu6": ConvCase(1, 8, (6, 7), outputs=8, activation="relu6"),
    "hardswish": ConvCase(1, 8, (6, 7), padding=(2, 2), dilation=(2, 2), outputs=8, activation="hardswish"),
    "silu": ConvCase(1, 8, (6, 7), stride=(2, 2), outputs=8, activation="silu"),
}


def _make_conv(case: ConvCase, dtype, maker=random_tensor, device="cpu", seed=0) -> Tensors:
    x = maker((case.batch, case.channels, *case.size), dtype, seed=seed + 1, device=device)
    weight = maker(case.filter, dtype, seed=seed + 2, device=device)
    return (x, weight, maker(case.filter[:1], dtype, seed=seed + 3, device=device)) if case.bias else (x, weight)


def _run_conv(function, case: ConvCase, tensors: Tensors, backend: str) -> torch.Tensor:
    geometry = dict(stride=case.stride, padding=case.padding, dilation=case.dilation)
    return function(*tensors, **geometry, activation=case.activation, backend=backend)


def _native_conv(case: ConvCase, tensors: Tensors) -> torch.Tensor:
    geometry = dict(stride=case.stride, padding=case.padding, dilation=case.dilation, groups=case.groups)
    y = F.conv2d(*tensors, **geometry)
    return getattr(F, case.activation)(y) if case.activation != "none" else y


def _expected_conv(case: ConvCase, tensors: Tensors, grad_output, roundoff, tf32=False) -> tuple[Expected, ...]:
    bias = tensors[2] if case.bias else None
    wanted = expected_conv(
        tensors[0], tensors[1], bias, *case.geometry, case.activation, grad_output, roundoff=roundoff, tf32=tf32
    )
    return tuple(wanted) if case.bias else tuple(wanted[:3])


def _draw_conv(draw, integers, sampled, **channels) -> ConvCase:
    """Shapes biased to edges: 0 and 1, sizes around a tile, dilation over the size, even kernels, kernel over image."""
    kernel = (draw(sampled([1, 2, 3, 4, 5, 7])), draw(sampled([1, 2, 3, 3, 5, 6])))
    dilation = (draw(sampled([1, 1, 2, 3, 8])), draw(sampled([1, 1, 2, 5])))
    padding = (draw(integers(0, 9)), draw(integers(0, 6)))
    size = []
    for axis in range(2):
        smallest = max(1, dilation[axis] * (kernel[axis] - 1) + 1 - 2 * padding[axis])
        size.append(smallest + draw(sampled([0, 0, 1, 2, 3, 7, 8, 9])))
    return ConvCase(
        batch=draw(sampled([0, 1, 1, 2, 3])),
        channels=draw(sampled([1, 2, 3, 7, 8, 9, 15, 16, 17, 33])),
        size=tuple(size),
        kernel=kernel,
        stride=(draw(sampled([1, 1, 2, 3])), draw(sampled([1, 1, 2, 4]))),
        padding=padding,
        dilation=dilation,
        bias=draw(sampled([True, False])),
        **{name: draw(sampled(values)) for name, values in channels.items()},
    )


FAMILIES = [
    Family(
        name="depthwise_conv2d",
        cases=DEPTHWISE_CASES,
        make=_make_conv,
        run=partial(_run_conv, fastseg.ops.depthwise_conv2d),
        native=_native_conv,
        expected=_expected_conv,
        draw=partial(_draw_conv, multiplier=[1, 1, 1, 2, 3]),
        key_cases=("3x3", "3x3-s2-d2", "3x5-s2x1-d1x2", "5x5-d2", "multiplier-3-s2"),
        strided_cases=("3x3", "3x3-s2", "one-pixel", "multiplier-2"),
    ),
    Family(
        name="dilated_conv2d",
        cases=DILATED_CASES,
        make=_make_conv,
        run=partial(_run_conv, fastseg.ops.conv2d),
        native=_native_conv,
        expected=_expected_conv,
        draw=partial(_draw_conv, outputs=[1, 2, 8, 15, 16, 17, 33]),
        key_cases=("3x3", "3x3-d6", "3x3-s2-d2", "3x5-s2x1-d1x2", "thin"),
        strided_cases=("3x3", "3x3-s2", "one-pixel", "67-to-19"),
        takes_tf32=True,
    ),
]

__all__ = ["FAMILIES", "ConvCase", "Family", "integer_tensor"]
