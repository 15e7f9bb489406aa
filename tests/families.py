"""The operator families under contract. A new one joins every promise of test_contract.py by one entry in FAMILIES."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

import fastseg
from fastseg.testing import Expected, expected_depthwise, integer_tensor, random_tensor

Tensors = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Family:
    """One differentiable operator of `tensors` -> tensor.

    cases: readable id -> whatever the functions below take as `case`; small shapes.
    key_cases: ids of a few that together reach every path of the kernels.
    make(case, dtype, maker, device, seed): the differentiable tensors, the image first.
    run(case, tensors, backend), native(case, tensors): the operator, and PyTorch's own.
    expected(case, tensors, grad_output, roundoff): the output's and each tensor's gradient's Expected.
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


@dataclass(frozen=True)
class DepthwiseCase:
    """Arguments as torch.nn.functional.conv2d takes them; groups is `channels`."""

    batch: int
    channels: int
    size: tuple[int, int]
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] | str = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    multiplier: int = 1
    activation: str = "none"
    bias: bool = True

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
    "3x3": DepthwiseCase(2, 8, (7, 9)),
    "3x3-no-bias": DepthwiseCase(1, 16, (6, 5), bias=False),
    "3x3-d2": DepthwiseCase(1, 16, (9, 8), padding=(2, 2), dilation=(2, 2)),
    "3x3-d6-wide": DepthwiseCase(1, 33, (13, 7), padding=(6, 6), dilation=(6, 6)),
    "dilation-over-size": DepthwiseCase(1, 4, (5, 6), padding=(7, 7), dilation=(7, 7)),
    "3x3-s2": DepthwiseCase(2, 8, (9, 10), stride=(2, 2)),
    "3x3-s2-d2": DepthwiseCase(1, 8, (11, 10), stride=(2, 2), padding=(2, 2), dilation=(2, 2)),
    "3x5-s2x1-d1x2": DepthwiseCase(1, 5, (8, 9), (3, 5), (2, 1), (0, 3), (1, 2)),
    "5x5": DepthwiseCase(1, 8, (8, 9), (5, 5), padding=(2, 2)),
    "5x5-s2": DepthwiseCase(1, 12, (9, 9), (5, 5), (2, 2), (2, 2)),
    "5x5-d2": DepthwiseCase(1, 8, (10, 9), (5, 5), padding=(4, 4), dilation=(2, 2)),
    "7x7": DepthwiseCase(1, 8, (9, 8), (7, 7), padding=(3, 3)),
    "4x2-same": DepthwiseCase(1, 6, (7, 8), (4, 2), padding="same", dilation=(1, 3)),
    "9x2": DepthwiseCase(1, 3, (10, 6), (9, 2), padding=(4, 0)),
    "1x1": DepthwiseCase(1, 7, (5, 5), (1, 1), padding=(0, 0)),
    "1x1-s2": DepthwiseCase(1, 8, (5, 6), (1, 1), stride=(2, 2), padding=(0, 0)),
    "stride-over-kernel": DepthwiseCase(1, 8, (11, 11), (2, 2), (3, 4), (0, 0)),
    "padding-over-kernel": DepthwiseCase(1, 8, (4, 5), padding=(4, 5)),
    "kernel-is-image": DepthwiseCase(2, 4, (3, 4), (5, 6), padding=(1, 1)),
    "one-pixel": DepthwiseCase(2, 8, (1, 1)),
    "multiplier-2": DepthwiseCase(2, 4, (6, 7), multiplier=2),
    "multiplier-3-s2": DepthwiseCase(1, 3, (7, 7), stride=(2, 2), multiplier=3),
    "one-channel": DepthwiseCase(1, 1, (6, 6), multiplier=4),
    "67-channels": DepthwiseCase(1, 67, (4, 5)),
    "empty-batch": DepthwiseCase(0, 8, (5, 5)),
    "relu": DepthwiseCase(1, 8, (6, 7), activation="relu"),
    "relu6": DepthwiseCase(1, 8, (6, 7), activation="relu6"),
    "hardswish": DepthwiseCase(1, 8, (6, 7), padding=(2, 2), dilation=(2, 2), activation="hardswish"),
    "silu": DepthwiseCase(1, 8, (6, 7), stride=(2, 2), activation="silu"),
}


def _make_depthwise(case: DepthwiseCase, dtype, maker=random_tensor, device="cpu", seed=0) -> Tensors:
    outputs = case.channels * case.multiplier
    x = maker((case.batch, case.channels, *case.size), dtype, seed=seed + 1, device=device)
    weight = maker((outputs, 1, *case.kernel), dtype, seed=seed + 2, device=device)
    return (x, weight, maker((outputs,), dtype, seed=seed + 3, device=device)) if case.bias else (x, weight)


def _run_depthwise(case: DepthwiseCase, tensors: Tensors, backend: str) -> torch.Tensor:
    return fastseg.ops.depthwise_conv2d(
        *tensors,
        stride=case.stride,
        padding=case.padding,
        dilation=case.dilation,
        activation=case.activation,
        backend=backend,
    )


def _native_depthwise(case: DepthwiseCase, tensors: Tensors) -> torch.Tensor:
    y = F.conv2d(*tensors, stride=case.stride, padding=case.padding, dilation=case.dilation, groups=tensors[0].shape[1])
    return getattr(F, case.activation)(y) if case.activation != "none" else y


def _expected_depthwise(case: DepthwiseCase, tensors: Tensors, grad_output, roundoff) -> tuple[Expected, ...]:
    bias = tensors[2] if case.bias else None
    wanted = expected_depthwise(
        tensors[0], tensors[1], bias, *case.geometry, case.activation, grad_output, roundoff=roundoff
    )
    return tuple(wanted) if case.bias else tuple(wanted[:3])


def _draw_depthwise(draw, integers, sampled) -> DepthwiseCase:
    """Shapes biased to edges: 0 and 1, sizes around a tile, dilation over the size, even kernels, kernel over image."""
    kernel = (draw(sampled([1, 2, 3, 4, 5, 7])), draw(sampled([1, 2, 3, 3, 5, 6])))
    dilation = (draw(sampled([1, 1, 2, 3, 8])), draw(sampled([1, 1, 2, 5])))
    padding = (draw(integers(0, 9)), draw(integers(0, 6)))
    size = []
    for axis in range(2):
        smallest = max(1, dilation[axis] * (kernel[axis] - 1) + 1 - 2 * padding[axis])
        size.append(smallest + draw(sampled([0, 0, 1, 2, 3, 7, 8, 9])))
    return DepthwiseCase(
        draw(sampled([0, 1, 1, 2, 3])),
        draw(sampled([1, 2, 3, 7, 8, 9, 15, 16, 17, 33])),
        tuple(size),
        kernel,
        (draw(sampled([1, 1, 2, 3])), draw(sampled([1, 1, 2, 4]))),
        padding,
        dilation,
        draw(sampled([1, 1, 1, 2, 3])),
        bias=draw(sampled([True, False])),
    )


FAMILIES = [
    Family(
        "depthwise_conv2d",
        DEPTHWISE_CASES,
        _make_depthwise,
        _run_depthwise,
        _native_depthwise,
        _expected_depthwise,
        _draw_depthwise,
        ("3x3", "3x3-s2-d2", "3x5-s2x1-d1x2", "5x5-d2", "multiplier-3-s2"),
    )
]

__all__ = ["FAMILIES", "DepthwiseCase", "Family", "integer_tensor"]
