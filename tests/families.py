"""The operator families under contract. A new one joins every promise of test_contract.py by one entry in FAMILIES.

The file is long because it holds the cases of all of them: a promise is read beside every case it is tested with.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

import fastseg
from fastseg.ops.geometry import same_padding
from fastseg.testing import (
    UNIT_ROUNDOFF,
    Expected,
    expected_branches,
    expected_conv,
    expected_separable,
    integer_tensor,
    random_tensor,
)

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
    "3x3-d4-short": ConvCase(1, 8, (11, 7), padding=(4, 4), dilation=(4, 4)),  # phases of two and three positions
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


@dataclass(frozen=True)
class SeparableCase(ConvCase):
    """A depthwise convolution and a pointwise one with `features` output channels."""

    features: int = 8
    depthwise_activation: str = "none"


# Channels that fill no vector, one, and several tiles of the product; every path of the depthwise half.
SEPARABLE_CASES = {
    "3x3": SeparableCase(2, 8, (7, 9), features=16),
    "3x3-no-bias": SeparableCase(1, 16, (6, 5), bias=False, features=8),
    "3x3-d2-relu-between": SeparableCase(
        1, 16, (9, 8), padding=(2, 2), dilation=(2, 2), features=24, depthwise_activation="relu"
    ),
    "3x3-d6": SeparableCase(2, 24, (13, 8), padding=(6, 6), dilation=(6, 6), features=40),
    "3x3-s2": SeparableCase(2, 8, (9, 10), stride=(2, 2), features=16),
    "3x5-s2x1-d1x2": SeparableCase(1, 5, (8, 9), (3, 5), (2, 1), (0, 3), (1, 2), features=7),
    "5x5-same": SeparableCase(1, 12, (8, 9), (5, 5), padding="same", features=8),
    "7x7": SeparableCase(1, 8, (9, 8), (7, 7), padding=(3, 3), features=9),
    "one-pixel": SeparableCase(2, 8, (1, 1), features=8),
    "multiplier-2": SeparableCase(2, 4, (6, 7), multiplier=2, features=12),
    "67-to-19": SeparableCase(1, 67, (4, 5), features=19),
    "one-channel": SeparableCase(1, 1, (6, 6), features=3),
    "several-tiles": SeparableCase(1, 136, (12, 13), padding=(4, 4), dilation=(4, 4), features=152),
    "empty-batch": SeparableCase(0, 8, (5, 5), features=8),
    "relu6-between": SeparableCase(1, 8, (6, 7), features=8, depthwise_activation="relu6", activation="relu"),
    "hardswish": SeparableCase(1, 8, (6, 7), features=8, depthwise_activation="silu", activation="hardswish"),
    "silu": SeparableCase(1, 8, (6, 7), stride=(2, 2), features=8, depthwise_activation="hardswish", activation="silu"),
}


@dataclass(frozen=True)
class BranchesCase:
    """Parallel convolutions of one image; `widths` output channels, `kernels` and `dilations` one per branch."""

    batch: int
    channels: int
    size: tuple[int, int]
    widths: tuple[int, ...]
    kernels: tuple[int, ...]
    dilations: tuple[int, ...]
    reduction: str = "concat"
    activation: str = "none"
    bias: bool = True
    depthwise_activation: str = "none"

    @property
    def branches(self) -> int:
        return len(self.widths)


ASPP_CASES = {
    "3x3": BranchesCase(2, 8, (7, 9), (8, 8, 8), (1, 3, 3), (1, 2, 4)),
    "no-bias": BranchesCase(1, 16, (6, 5), (8, 16), (3, 1), (2, 1), bias=False),
    "v3": BranchesCase(2, 24, (13, 9), (16, 16, 16, 16), (1, 3, 3, 3), (1, 3, 6, 9)),
    "sum": BranchesCase(1, 16, (9, 8), (21, 21, 21), (3, 3, 3), (2, 4, 6), reduction="sum"),
    "sum-wide": BranchesCase(2, 8, (6, 7), (24, 24), (3, 1), (3, 1), reduction="sum"),
    "dilation-over-size": BranchesCase(1, 8, (5, 6), (8, 8), (3, 3), (7, 2)),
    "uneven-widths": BranchesCase(1, 13, (7, 6), (5, 19, 8), (3, 1, 5), (2, 1, 2)),
    "one-branch": BranchesCase(1, 8, (5, 5), (8,), (3,), (2,)),
    "one-pixel": BranchesCase(2, 16, (1, 1), (8, 8), (1, 3), (1, 6)),
    "several-tiles": BranchesCase(1, 136, (12, 13), (72, 72, 72), (1, 3, 3), (1, 4, 8)),
    "empty-batch": BranchesCase(0, 8, (5, 5), (8, 8), (1, 3), (1, 2)),
    "relu": BranchesCase(1, 8, (6, 7), (8, 8), (1, 3), (1, 2), activation="relu"),
    "hardswish": BranchesCase(1, 8, (6, 7), (8, 8), (1, 3), (1, 2), activation="hardswish"),
    "sum-silu": BranchesCase(1, 8, (6, 7), (8, 8), (3, 3), (1, 2), reduction="sum", activation="silu"),
}

# A branch with a kernel of 1 is plain; the plain ones come first.
SEPARABLE_ASPP_CASES = {
    "3x3": BranchesCase(2, 8, (7, 9), (8, 8, 8), (1, 3, 3), (1, 2, 4)),
    "no-bias": BranchesCase(1, 16, (6, 5), (8, 16), (1, 3), (1, 2), bias=False),
    "v3+": BranchesCase(2, 24, (13, 9), (16, 16, 16, 16), (1, 3, 3, 3), (1, 3, 6, 9), depthwise_activation="relu"),
    "dilation-over-size": BranchesCase(1, 8, (5, 6), (8, 8), (3, 3), (7, 2)),
    "uneven-widths": BranchesCase(1, 13, (7, 6), (5, 19, 8), (1, 1, 5), (1, 1, 2)),
    "one-branch": BranchesCase(2, 8, (7, 6), (8,), (3,), (2,)),
    "one-pixel": BranchesCase(2, 16, (1, 1), (8, 8), (1, 3), (1, 6)),
    "several-tiles": BranchesCase(1, 136, (12, 13), (72, 72, 72), (1, 3, 3), (1, 4, 8)),
    "empty-batch": BranchesCase(0, 8, (5, 5), (8, 8), (1, 3), (1, 2)),
    "relu": BranchesCase(1, 8, (6, 7), (8, 8), (1, 3), (1, 2), activation="relu"),
    "silu": BranchesCase(1, 8, (6, 7), (8, 8), (1, 3), (1, 2), activation="silu", depthwise_activation="hardswish"),
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


def _draw_conv(draw, integers, sampled, kind=ConvCase, **channels) -> ConvCase:
    """Shapes biased to edges: 0 and 1, sizes around a tile, dilation over the size, even kernels, kernel over image."""
    kernel = (draw(sampled([1, 2, 3, 4, 5, 7])), draw(sampled([1, 2, 3, 3, 5, 6])))
    dilation = (draw(sampled([1, 1, 2, 3, 8])), draw(sampled([1, 1, 2, 5])))
    padding = (draw(integers(0, 9)), draw(integers(0, 6)))
    size = []
    for axis in range(2):
        smallest = max(1, dilation[axis] * (kernel[axis] - 1) + 1 - 2 * padding[axis])
        size.append(smallest + draw(sampled([0, 0, 1, 2, 3, 7, 8, 9])))
    return kind(
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


def _make_separable(case: SeparableCase, dtype, maker=random_tensor, device="cpu", seed=0) -> Tensors:
    x, depthwise, *bias = _make_conv(case, dtype, maker, device, seed)
    shape = (case.features, depthwise.shape[0], 1, 1)
    pointwise = maker(shape, dtype, seed=seed + 4, device=device)
    if not case.bias:
        return x, depthwise, pointwise
    return x, depthwise, pointwise, *bias, maker(shape[:1], dtype, seed=seed + 5, device=device)


def _run_separable(case: SeparableCase, tensors: Tensors, backend: str) -> torch.Tensor:
    return fastseg.ops.separable_conv2d(
        *tensors,
        stride=case.stride,
        padding=case.padding,
        dilation=case.dilation,
        depthwise_activation=case.depthwise_activation,
        activation=case.activation,
        backend=backend,
    )


def _activated(z: torch.Tensor, activation: str) -> torch.Tensor:
    return z if activation == "none" else getattr(F, activation)(z)


def _native_separable(case: SeparableCase, tensors: Tensors) -> torch.Tensor:
    x, depthwise, pointwise, *biases = tensors
    first, second = biases or (None, None)
    geometry = dict(stride=case.stride, padding=case.padding, dilation=case.dilation, groups=case.channels)
    z = _activated(F.conv2d(x, depthwise, first, **geometry), case.depthwise_activation)
    return _activated(F.conv2d(z, pointwise, second), case.activation)


def _expected_separable(case: SeparableCase, tensors: Tensors, grad_output, roundoff, tf32=False):
    biases = tensors[3:] if case.bias else (None, None)
    wanted = expected_separable(
        *tensors[:3], *biases, *case.geometry, case.depthwise_activation, case.activation, grad_output,
        roundoff=roundoff, tf32=tf32,
    )  # fmt: skip
    return wanted if case.bias else wanted[:4]


def _make_branches(case: BranchesCase, dtype, maker=random_tensor, device="cpu", seed=0) -> Tensors:
    x = maker((case.batch, case.channels, *case.size), dtype, seed=seed + 1, device=device)
    weights = [
        maker((width, case.channels, kernel, kernel), dtype, seed=seed + 2 + i, device=device)
        for i, (width, kernel) in enumerate(zip(case.widths, case.kernels, strict=True))
    ]
    biases = [maker((width,), dtype, seed=seed + 7 + i, device=device) for i, width in enumerate(case.widths)]
    return (x, *weights, *biases) if case.bias else (x, *weights)


def _split(case: BranchesCase, tensors: Tensors):
    x, rest = tensors[0], tensors[1:]
    return x, rest[: case.branches], rest[case.branches :] if case.bias else (None,) * case.branches


def _run_aspp(case: BranchesCase, tensors: Tensors, backend: str) -> torch.Tensor:
    x, weights, biases = _split(case, tensors)
    return fastseg.ops.aspp(
        x, weights, biases, case.dilations, activation=case.activation, reduction=case.reduction, backend=backend
    )


def _native_aspp(case: BranchesCase, tensors: Tensors) -> torch.Tensor:
    x, weights, biases = _split(case, tensors)
    z = [
        F.conv2d(x, weight, bias, padding=dilation * (kernel // 2), dilation=dilation)
        for weight, bias, kernel, dilation in zip(weights, biases, case.kernels, case.dilations, strict=True)
    ]
    return _activated(torch.cat(z, 1) if case.reduction == "concat" else sum(z), case.activation)


def _expected_aspp(case: BranchesCase, tensors: Tensors, grad_output, roundoff, tf32=False):
    x, weights, biases = _split(case, tensors)
    bias = None
    if case.bias:
        bias = torch.cat([b.detach().double() for b in biases]) if case.reduction == "concat" else sum(biases)
    wanted = expected_branches(
        x, weights, bias, case.dilations, case.activation, case.reduction, grad_output, roundoff=roundoff, tf32=tf32
    )
    if grad_output is None or not case.bias:
        return wanted[: 2 + case.branches]
    grads = _parts(wanted[-1], case.widths) if case.reduction == "concat" else [wanted[-1]] * case.branches
    return *wanted[:-1], *grads


def _parts(wanted: Expected, widths) -> list[Expected]:
    return [Expected(*pair) for pair in zip(wanted.value.split(widths), wanted.bound.split(widths), strict=True)]


def _make_separable_aspp(case: BranchesCase, dtype, maker=random_tensor, device="cpu", seed=0) -> Tensors:
    """x, the depthwise weights, the pointwise ones, the biases of both."""
    channels = case.channels
    own = [kernel for kernel in case.kernels if kernel > 1]

    def tensor(shape, number):
        return maker(shape, dtype, seed=seed + number, device=device)

    x = tensor((case.batch, channels, *case.size), 1)
    depthwise = [tensor((channels, 1, kernel, kernel), 2 + i) for i, kernel in enumerate(own)]
    pointwise = [tensor((width, channels, 1, 1), 6 + i) for i, width in enumerate(case.widths)]
    if not case.bias:
        return x, *depthwise, *pointwise
    first = [tensor((channels,), 10 + i) for i in range(len(own))]
    return x, *depthwise, *pointwise, *first, *(tensor((width,), 14 + i) for i, width in enumerate(case.widths))


def _split_separable(case: BranchesCase, tensors: Tensors):
    """x, then per branch: depthwise weight or None, pointwise weight, depthwise bias or None, bias or None."""
    x, rest = tensors[0], list(tensors[1:])
    own = sum(kernel > 1 for kernel in case.kernels)
    plain = [None] * (case.branches - own)
    depthwise, rest = plain + rest[:own], rest[own:]
    pointwise, rest = rest[: case.branches], rest[case.branches :]
    if not case.bias:
        return x, depthwise, pointwise, [None] * case.branches, [None] * case.branches
    return x, depthwise, pointwise, plain + rest[:own], rest[own:]


def _run_separable_aspp(case: BranchesCase, tensors: Tensors, backend: str) -> torch.Tensor:
    return fastseg.ops.separable_aspp(
        *_split_separable(case, tensors),
        case.dilations,
        depthwise_activation=case.depthwise_activation,
        activation=case.activation,
        backend=backend,
    )


def _native_separable_aspp(case: BranchesCase, tensors: Tensors) -> torch.Tensor:
    x, *branches = _split_separable(case, tensors)
    found = []
    for depthwise, pointwise, first, second, dilation in zip(*branches, case.dilations, strict=True):
        z = x
        if depthwise is not None:
            padding = dilation * (depthwise.shape[2] // 2)
            z = F.conv2d(x, depthwise, first, padding=padding, dilation=dilation, groups=case.channels)
            z = _activated(z, case.depthwise_activation)
        found.append(_activated(F.conv2d(z, pointwise, second), case.activation))
    return torch.cat(found, 1)


def _expected_separable_aspp(case: BranchesCase, tensors: Tensors, grad_output, roundoff, tf32=False):
    x, *branches = _split_separable(case, tensors)
    outputs, grad_x, grads = [], [], ([], [], [], [])
    parts = [None] * case.branches if grad_output is None else grad_output.split(case.widths, 1)
    options = dict(roundoff=roundoff, tf32=tf32)
    for depthwise, pointwise, first, second, dilation, part in zip(*branches, case.dilations, parts, strict=True):
        if depthwise is None:
            wanted = expected_branches(x, [pointwise], second, [1], case.activation, "concat", part, **options)
            wanted = wanted if part is None else (*wanted[:2], None, wanted[2], None, wanted[3])
        else:
            wanted = expected_separable(
                x, depthwise, pointwise, first, second, *same_padding(depthwise, dilation),
                case.depthwise_activation, case.activation, part, **options,
            )  # fmt: skip
        outputs.append(wanted[0])
        if part is not None:
            grad_x.append(wanted[1])
            for found, one in zip(grads, wanted[2:], strict=True):
                found.append(one)
    output = Expected(*(torch.cat(parts, 1) for parts in zip(*outputs, strict=True)))
    if grad_output is None:
        return (output,)
    # One addition, and in 16 bits one rounding, for every branch's share of the sum over branches.
    grad_input = Expected(sum(g.value for g in grad_x), sum(g.bound for g in grad_x))
    unit = UNIT_ROUNDOFF[x.dtype] if roundoff is None else roundoff
    grad_input = Expected(
        grad_input.value, grad_input.bound + case.branches * unit * sum(g.value.abs() for g in grad_x)
    )
    found = [one for kind in grads for one in kind if one is not None]
    without_biases = len(tensors) if not case.bias else None
    return output, grad_input, *(found if case.bias else found[: without_biases - 1])


def _draw_branches(draw, integers, sampled, *, separable: bool) -> BranchesCase:
    branches = draw(integers(1, 3))
    reduction = "concat" if separable else draw(sampled(["concat", "concat", "sum"]))
    widths = tuple(draw(sampled([1, 2, 8, 15, 16, 17, 33])) for _ in range(branches))
    kernels = tuple(draw(sampled([1, 3, 3, 5])) for _ in range(branches))
    return BranchesCase(
        batch=draw(sampled([0, 1, 1, 2, 3])),
        channels=draw(sampled([1, 2, 3, 7, 8, 9, 16, 17, 33])),
        size=(draw(sampled([1, 2, 5, 8, 9])), draw(sampled([1, 3, 7, 8]))),
        widths=widths if reduction == "concat" else widths[:1] * branches,
        kernels=tuple(sorted(kernels, key=lambda kernel: kernel > 1)) if separable else kernels,
        dilations=tuple(draw(sampled([1, 2, 3, 8])) for _ in range(branches)),
        reduction=reduction,
        bias=draw(sampled([True, False])),
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
    Family(
        name="separable_conv2d",
        cases=SEPARABLE_CASES,
        make=_make_separable,
        run=_run_separable,
        native=_native_separable,
        expected=_expected_separable,
        draw=partial(_draw_conv, kind=SeparableCase, multiplier=[1, 1, 2], features=[1, 2, 8, 15, 16, 17, 33]),
        key_cases=("3x3", "3x3-d6", "3x5-s2x1-d1x2", "multiplier-2"),
        strided_cases=("3x3", "3x3-s2", "one-pixel", "67-to-19"),
        takes_tf32=True,
    ),
    Family(
        name="aspp",
        cases=ASPP_CASES,
        make=_make_branches,
        run=_run_aspp,
        native=_native_aspp,
        expected=_expected_aspp,
        draw=partial(_draw_branches, separable=False),
        key_cases=("3x3", "v3", "sum-wide", "uneven-widths"),
        strided_cases=("3x3", "sum", "one-pixel", "uneven-widths"),
        takes_tf32=True,
    ),
    Family(
        name="separable_aspp",
        cases=SEPARABLE_ASPP_CASES,
        make=_make_separable_aspp,
        run=_run_separable_aspp,
        native=_native_separable_aspp,
        expected=_expected_separable_aspp,
        draw=partial(_draw_branches, separable=True),
        key_cases=("3x3", "dilation-over-size", "uneven-widths"),
        strided_cases=("3x3", "uneven-widths", "one-pixel"),
        takes_tf32=True,
    ),
]

__all__ = ["FAMILIES", "ConvCase", "Family", "integer_tensor"]
