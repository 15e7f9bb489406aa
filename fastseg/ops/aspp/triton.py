"""Parallel dense convolutions of one image in Triton: all branches, and all their rectangles, in one launch.

    z_b[n, k, p, q] = sum over (r, s, c) of w_b[k, c, r, s] * x[n, c, p + (r - R // 2) * d_b, q + (s - S // 2) * d_b]
    "concat": y = act(scale * (z_0, z_1, ... side by side) + bias)        "sum": y = act(scale * (z_0 + ...) + bias)

One branch of one image fills a seventh of a large device, so branches share the launch, the longest sums first. A tile
is that of fastseg/ops/dilated/triton.py: BLOCK_M pixels of a rectangle with constant live taps x BLOCK_N channels, and
its inner loop is the same code (add_taps). Around it runs a loop over the products that add up to a tile:

    what                targets        products of a tile
    forward, "concat"   slices of y    its own branch
    forward, "sum"      y              every branch, over the channels of x
    grad_input          grad_x         every branch, over its channels of grad_y

So nothing is summed up in memory: y is written once, into the one buffer that the branches share, and grad_x is rounded
once from one accumulator. Two tables (triton_plan.py) say where the tiles and the products are. Weights are used where
they lie: a product picks its branch's pointer before its loop begins.

Statistics of batch normalisation come from the accumulators: each program leaves the sum and the sum of squares of its
tile in fp32, and those are added up in fp64 in a fixed order. Gradients of weights are the two kernels of the dilated
family: one launch over the taps of all branches, and a second stage for each weight. No atomics, the same bits every
time.

Channels are adjacent in every tensor, which is copied once where they are not. What limits the kernel is what limits
dilated_product: the matrix unit for large tiles, else loads from L2.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from fastseg.ops.aspp.op import empty_input_gradient, output_channels
from fastseg.ops.aspp.triton_plan import PIECE_FIELDS, SUM_FIELDS, plan_branches
from fastseg.ops.dilated import triton as dilated
from fastseg.ops.dilated.triton import (
    CONFIGS,
    IEEE_CONFIGS,
    NARROW_CONFIGS,
    Config,
    adjacent_channels,
    check_bias,
    check_scale,
    device_limits,
    forced_config,
    launch_grad_weights,
    needs_wide_offsets,
    outer_strides,
    precision,
    vector,
)
from fastseg.ops.dilated.triton_plan import Layout
from fastseg.ops.dilated.triton_product import add_taps, find_row, scale_and_shift, store_product
from fastseg.ops.geometry import empty_output, same_padding
from fastseg.ops.triton_common import (
    ConvShape,
    check_like,
    coalesced,
    conv_shape,
    fail,
    group_size,
    in_groups,
    launch,
    on_device,
    split_index,
    widen,
)

__all__ = [
    "CONFIGS",
    "IEEE_CONFIGS",
    "NARROW_CONFIGS",
    "Config",
    "backward",
    "forced_config",
    "forward",
]

# Arguments that change from layer to layer and gain nothing from being known when a kernel is compiled.
SIZES = (
    *("N", "C", "n_pieces", "n_channels", "s_sums"),
    *("s_sn", "s_sh", "s_sw", "s_tn", "s_th", "s_tw"),
)
_PIECE_FIELDS = tl.constexpr(PIECE_FIELDS)
_SUM_FIELDS = tl.constexpr(SUM_FIELDS)


def _product_name(specialization) -> str:
    return "aspp_grad_input" if specialization.constants["IS_GRAD_INPUT"] else "aspp_forward"


# fmt: off
@triton.heuristics({
    "HAS_SCALE": lambda args: args["p_scale"] is not None,
    "HAS_BIAS": lambda args: args["p_bias"] is not None,
    "HAS_STATISTICS": lambda args: args["p_statistics"] is not None,
})
@triton.jit(do_not_specialize=SIZES, repr=_product_name)
def aspp_product(
    p_source,  # [N, source channels, H, W]: x or gy, channels adjacent
    p_weights,  # of each branch [K_b, C, R, S], dense channels_last
    p_scale,  # [n_channels] fp32 or None
    p_bias,  # [n_channels] or None
    p_target,  # [N, n_channels, H, W]: y or gx, channels adjacent
    p_statistics,  # [2, tiles, n_channels] fp32 or None
    p_pieces,  # [n_pieces, PIECE_FIELDS]
    p_sums,  # [sums of all pieces, SUM_FIELDS]
    N, C, n_pieces,
    n_channels,  # of the target
    s_sums,  # from the sums of the statistics to the sums of squares
    s_sn, s_sh, s_sw,
    s_tn, s_th, s_tw,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_PIECES: tl.constexpr,
    GROUP_SOURCE: tl.constexpr, GROUP_WEIGHT: tl.constexpr, GROUP_TARGET: tl.constexpr,
    ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
    HAS_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_STATISTICS: tl.constexpr,
    IS_GRAD_INPUT: tl.constexpr, IS_DEPTH_WHOLE: tl.constexpr, IS_INDEX_64: tl.constexpr,
):
    # fmt: on
    p_piece = find_row(p_pieces, tl.program_id(0), n_pieces, _PIECE_FIELDS, BLOCK_PIECES)
    i_th, n_h = tl.load(p_piece + 1).to(tl.int64), tl.load(p_piece + 2)
    i_tw, n_w = tl.load(p_piece + 3).to(tl.int64), tl.load(p_piece + 4)
    i_channel, n_columns = tl.load(p_piece + 5), tl.load(p_piece + 6)
    i_first_sum, n_sums = tl.load(p_piece + 7), tl.load(p_piece + 8)
    i_block, i_tile = split_index(tl.program_id(0) - tl.load(p_piece), tl.cdiv(n_columns, BLOCK_N))

    o_pixel = widen(i_tile, IS_INDEX_64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n_pixels = widen(N, IS_INDEX_64) * n_h * n_w
    m_pixel = o_pixel < n_pixels
    # Beyond the last pixel a tile reads that one again: loads need no mask.
    o_w, o_image = split_index(tl.minimum(o_pixel, n_pixels - 1), n_w)
    o_h, o_image = split_index(o_image, n_h)
    o_source = o_image * s_sn + o_h * s_sh + o_w * s_sw
    o_target = o_image * s_tn + (i_th + o_h) * s_th + (i_tw + o_w) * s_tw
    o_column = widen(i_block, IS_INDEX_64) * BLOCK_N + tl.arange(0, BLOCK_N)

    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for i_sum in tl.range(i_first_sum, i_first_sum + n_sums):
        p_sum = p_sums + i_sum * _SUM_FIELDS
        i_branch, i_source_channel, n_depth = tl.load(p_sum), tl.load(p_sum + 1), tl.load(p_sum + 2)
        s_wk, i_weight_tap = widen(tl.load(p_sum + 3), IS_INDEX_64) * C, tl.load(p_sum + 4).to(tl.int64)
        n_r, i_sh = tl.load(p_sum + 5), tl.load(p_sum + 6).to(tl.int64)
        jump_sh, jump_r = tl.load(p_sum + 7).to(tl.int64), tl.load(p_sum + 8).to(tl.int64)
        n_s, i_sw = tl.load(p_sum + 9), tl.load(p_sum + 10).to(tl.int64)
        jump_sw, jump_s = tl.load(p_sum + 11).to(tl.int64), tl.load(p_sum + 12).to(tl.int64)
        p_weight = p_weights[0]
        for i in tl.static_range(1, len(p_weights)):
            p_weight = tl.where(i_branch == i, p_weights[i], p_weight)
        # Every sum has steps: filters are odd, and their centres see no padding.
        acc = add_taps(
            acc, p_source + (i_sh * s_sh + i_sw * s_sw + i_source_channel), p_weight + i_weight_tap * C,
            o_source, o_column, n_depth, n_columns,
            n_r, n_s, jump_sh * s_sh, jump_sw * s_sw, jump_r * C, jump_s * C, s_wk,
            0, n_r * n_s * tl.cdiv(n_depth, BLOCK_D),
            BLOCK_D, GROUP_SOURCE, GROUP_WEIGHT, PRECISION, IS_GRAD_INPUT, IS_DEPTH_WHOLE, IS_INDEX_64, False, True,
        )  # fmt: skip

    if HAS_SCALE:
        p_scale += i_channel
    if HAS_BIAS:
        p_bias += i_channel
    acc = scale_and_shift(
        acc, p_scale, p_bias, o_image, o_column, n_columns, GROUP_TARGET, HAS_SCALE, HAS_BIAS, HAS_IMAGE_BIAS=False
    )  # fmt: skip
    store_product(acc, p_target + i_channel, o_target, m_pixel, o_column, n_columns, GROUP_TARGET, ACTIVATION)
    if HAS_STATISTICS:
        m_column = o_column < in_groups(n_columns, GROUP_TARGET)
        i_row = tl.load(p_piece + 9).to(tl.int64) + i_tile
        p_row = p_statistics + i_row * n_channels + i_channel + o_column  # [BLOCK_N]
        b_seen = tl.where(m_pixel[:, None], acc, 0.0)
        tl.store(p_row, tl.sum(b_seen, 0), mask=m_column)
        tl.store(p_row + tl.cast(s_sums, tl.int64), tl.sum(b_seen * b_seen, 0), mask=m_column)


def forward(input, weights, bias, dilations, activation, reduction, statistics, scale):
    """Parallel convolutions of one image with "same" padding; see fastseg.ops.aspp.

    Args:
        input: [N, C, H, W], any strides; float16, bfloat16 or float32.
        weights: [K_b, C, R, S] with odd R and S of each branch, the same dtype and device.
        bias: [K] or None, in the weights' dtype or float32; K is the sum of K_b, for "sum" K_b itself.
        dilations: one of each branch.
        activation: "none", "relu", "relu6", "hardswish" or "silu".
        reduction: "concat" or "sum".
        statistics: whether to sum up what goes into `activation`.
        scale: [K] in float32 or None, multiplied to the sums before the bias is added.

    Returns:
        [N, K, H, W] in the memory format torch.nn.functional.conv2d would give it and, in float64, the sums and the
        sums of squares [2, K] over images and pixels, or an empty tensor.
    """
    shapes = _branch_shapes(input, weights, dilations, reduction)
    channels = output_channels(weights, reduction)
    if bias is not None:
        check_bias(bias, (channels,), input)
    if scale is not None:
        check_scale(scale, channels, input)
    with on_device(input):
        output = empty_output(input, weights[0], input.shape[2:], channels)
        sums = input.new_zeros((2, channels) if statistics else (0,), dtype=torch.float64)
        if output.numel() == 0:
            return output, sums
        partials = _launch_product(
            "outputs", shapes, reduction, input, weights, output, vector(scale), vector(bias), activation, statistics
        )  # fmt: skip
        if partials is not None:
            torch.sum(partials, 1, dtype=torch.float64, out=sums)
    return output, sums


def backward(grad_output, input, weights, dilations, reduction, needs_input, needs_weights):
    """The gradients of `forward` without activation and scale, as (grad_input, grad_weights).

    Args:
        grad_output: [N, K, H, W], any strides.
        input, weights, dilations, reduction: as `forward` got them.
        needs_input, needs_weights: which gradients to compute; an empty tensor or list stands for the other.

    Returns:
        grad_input in the memory format of `forward`'s output, and the gradients of `weights`, with their strides.
    """
    shapes = _branch_shapes(input, weights, dilations, reduction)
    size = (input.shape[0], output_channels(weights, reduction), *input.shape[2:])
    check_like("grad_output", grad_output, size, input)
    with on_device(input):
        grad_input = empty_input_gradient(input, weights, needs_input)
        grad_weights = [torch.empty_like(weight) for weight in weights] if needs_weights else []
        if grad_output.numel() == 0:
            return grad_input.zero_(), [grad.zero_() for grad in grad_weights]
        if input.shape[1] == 0:
            return grad_input, grad_weights
        gy = coalesced(grad_output, torch.channels_last)
        if needs_input:
            _launch_product("inputs", shapes, reduction, gy, weights, grad_input)
        if needs_weights:
            x = coalesced(input, torch.channels_last)
            launch_grad_weights(shapes, _first_channels(shapes, reduction), gy, x, grad_weights)
    return grad_input, grad_weights


def _launch_product(
    targets, shapes, reduction, source, weights, target, scale=None, bias=None, activation="none", statistics=False
):  # fmt: skip
    """Fill `target`; the partial sums [2, tiles, channels] of the statistics where they are asked for, else None."""
    source = coalesced(source, torch.channels_last)
    weights = [weight.contiguous(memory_format=torch.channels_last) for weight in weights]
    result = adjacent_channels(target)
    outputs = math.gcd(*(shape.K for shape in shapes))  # branches begin at multiples of it
    channels = (shapes[0].C, outputs) if targets == "outputs" else (outputs, shapes[0].C)
    layout = Layout(
        GROUP_SOURCE=math.gcd(group_size(source.shape[1], source), channels[0]),
        GROUP_WEIGHT=group_size(shapes[0].C, *weights),
        GROUP_TARGET=math.gcd(group_size(result.shape[1], result), channels[1]),
        IS_INDEX_64=needs_wide_offsets(source, result, *weights),
        PRECISION=precision(source.dtype),
    )
    limits = device_limits(source.device)
    has_epilogue = statistics or not (scale is bias is None and activation == "none")
    plan = plan_branches(
        targets, tuple(shapes), reduction == "sum", source.element_size(), layout, limits, dilated.forced, has_epilogue
    )
    partials = None
    if statistics:
        # Branches of fewer tiles than others leave rows of zeros.
        partials = source.new_zeros((2, plan.tiles, result.shape[1]), dtype=torch.float32)
    launch(
        aspp_product,
        plan.programs,
        p_source=source,
        p_weights=tuple(weights),
        p_scale=scale,
        p_bias=bias,
        p_target=result,
        p_statistics=partials,
        p_pieces=plan.pieces.on(source.device),
        p_sums=plan.sums.on(source.device),
        n_channels=result.shape[1],
        s_sums=plan.tiles * result.shape[1],
        **outer_strides("s_sn s_sh s_sw", source),
        **outer_strides("s_tn s_th s_tw", result),
        ACTIVATION=activation,
        **plan.arguments,
    )
    if result is not target:
        target.copy_(result)
    return partials


def _branch_shapes(input, weights, dilations, reduction: str) -> list[ConvShape]:
    if len(weights) != len(dilations) or len(weights) == 0:
        fail("a dilation of each of one or more weights", f"{len(weights)} weights and {len(dilations)} dilations")
    if reduction not in ("concat", "sum"):
        fail('reduction "concat" or "sum"', repr(reduction))
    shapes = [
        conv_shape(input, weight, *same_padding(weight, dilation))
        for weight, dilation in zip(weights, dilations, strict=True)
    ]
    for weight, shape in zip(weights, shapes, strict=True):
        wanted = (shapes[0].K if reduction == "sum" else shape.K, shape.C)
        if tuple(weight.shape[:2]) != wanted or shape.R % 2 == 0 or shape.S % 2 == 0:
            fail(f"weights [{wanted[0]}, {wanted[1]}, R, S] with odd R and S", f"{list(weight.shape)}")
    return shapes


def _first_channels(shapes, reduction: str) -> list[int]:
    """Where each branch begins among the output's channels."""
    return [0 if reduction == "sum" else sum(shape.K for shape in shapes[:i]) for i in range(len(shapes))]
