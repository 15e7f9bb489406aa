"""The branches of separable ASPP in Triton: all by the kernel of fastseg/ops/separable/triton.py, in one launch.

Each block of output channels belongs to a branch with a dilation of its own, and the blocks of one tile of pixels are
neighbours in the grid: whichever branch reads a part of x first, the others find it in L2. Results are written side by
side into one tensor. Branches with filters of another size take a launch of their own; no published network has any.

Statistics are two stages: each program leaves the sum and the sum of squares of its tile in fp32, taken from the
accumulators, and those are added up in fp64 in a fixed order. No atomics, the same bits every time.
"""

from __future__ import annotations

import torch

from fastseg.ops.geometry import empty_output, same_padding
from fastseg.ops.separable.triton import Branch, Vectors, adjacent_channels, run_branches
from fastseg.ops.triton_common import DTYPES, ConvShape, check_like, coalesced, fail, on_device


def forward(
    input, depthwise_weights, weights, depthwise_bias, bias, dilations, depthwise_activation, activation, statistics,
    depthwise_scale, scale,
):  # fmt: skip
    """Parallel separable convolutions of one image; see fastseg.ops.separable_aspp.

    Args:
        input: [N, C, H, W], any strides; float16, bfloat16 or float32.
        depthwise_weights: [C, 1, R, S] with odd R and S of each branch that has a depthwise half.
        weights: [K_b, C, 1, 1] of each branch; those without a depthwise half come first.
        depthwise_bias, bias: [B * C] for B depthwise halves and [sum of K_b], as `input` or float32, or None.
        dilations: one of each depthwise half.
        depthwise_activation, activation: "none", "relu", "relu6", "hardswish" or "silu".
        statistics: whether to sum up what goes into `activation`.
        depthwise_scale, scale: as the biases, in float32, multiplied before those are added, or None.

    Returns:
        [N, sum of K_b, H, W] and, in float64, the sums and the sums of squares [2, sum of K_b], or an empty tensor.
    """
    _check(input, depthwise_weights, weights, dilations)
    outputs = sum(weight.shape[0] for weight in weights)
    vectors = Vectors(depthwise_scale, depthwise_bias, scale, bias)
    vectors.check(len(depthwise_weights) * input.shape[1], outputs, input)
    with on_device(input):
        output = empty_output(input, weights[0], input.shape[2:], outputs)
        sums = input.new_zeros((2, outputs) if statistics else (0,), dtype=torch.float64)
        if output.numel() == 0:
            return output, sums
        x, y = coalesced(input, torch.channels_last), adjacent_channels(output)
        weight = torch.cat([weight.flatten(1) for weight in weights])  # [outputs, C]
        activations = depthwise_activation, activation
        for shape, branches, filters in _launches(input, depthwise_weights, weights, dilations):
            partials = run_branches(shape, branches, x, filters, weight, vectors, activations, y, statistics)
            if partials is not None:
                sums += partials.sum(0, dtype=torch.float64)
        if y is not output:
            output.copy_(y)
    return output, sums


def _launches(input, depthwise_weights, weights, dilations):
    """(shape, branches, depthwise filters) of each launch: one for each filter size; plain branches join the first."""
    N, C, H, W = input.shape
    plain = len(weights) - len(depthwise_weights)
    sizes = dict.fromkeys(weight.shape[2:] for weight in depthwise_weights) or [(1, 1)]
    groups = {size: ([], []) for size in sizes}
    first_output = 0
    for i, weight in enumerate(weights):
        outputs = weight.shape[0]
        if i < plain:
            next(iter(groups.values()))[0].append(Branch(outputs, first_output))
        else:
            filter = depthwise_weights[i - plain]
            branches, filters = groups[filter.shape[2:]]
            _, (top, _, left, _), dilation = same_padding(filter, dilations[i - plain])
            first_tap = sum(other.numel() for other in filters)
            branches.append(Branch(outputs, first_output, dilation, (top, left), (i - plain) * C, first_tap))
            filters.append(filter)
        first_output += outputs
    return [
        (ConvShape(N, C, H, W, C, H, W, *size, 1, 1, 0, 0, 1, 1), tuple(branches), filters)
        for size, (branches, filters) in groups.items()
    ]


def _check(input, depthwise_weights, weights, dilations) -> None:
    """What guards memory."""
    if input.dim() != 4 or input.dtype not in DTYPES:
        fail("4-D float16, bfloat16 or float32 input", f"{input.dim()}-D {input.dtype}")
    if not len(depthwise_weights) == len(dilations) <= len(weights) or len(weights) == 0:
        fail(
            "a dilation for each depthwise weight, and no more of them than weights",
            f"{len(dilations)} dilations, {len(depthwise_weights)} depthwise weights and {len(weights)} weights",
        )
    if min(dilations, default=1) < 1:
        fail("positive dilations", f"{list(dilations)}")
    channels = input.shape[1]
    for weight in weights:
        check_like("weight", weight, (*weight.shape[:1], channels, 1, 1), input)
    for weight in depthwise_weights:
        check_like("depthwise weight", weight, (channels, 1, *weight.shape[2:]), input)
        if weight.dim() != 4 or any(k % 2 == 0 for k in weight.shape[2:]):
            fail("depthwise weights with odd R and S", f"{list(weight.shape)}")
