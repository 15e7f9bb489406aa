"""Depthwise-separable convolution in Triton: the depthwise result is a tile of the matrix product, never a tensor.

    z[n, c, p, q] = dact(dbias[c] + dscale[c] * sum over (r, s) of v[c, r, s] * x[n, c // m, ih, iw])
    y[n, k, p, q] = act(bias[k] + scale[k] * sum over c of w[k, c] * z[n, c, p, q])
    ih = p * stride - pad + r * dilation, and so for columns

A program owns BLOCK_P x BLOCK_S pixels x BLOCK_N output channels and walks the channels BLOCK_D at a time. In each step
it computes z of its pixels in registers, as the depthwise kernels do, rounds it to the dtype of x and multiplies it by
a block of w. Pixels come in *strips*: BLOCK_P output rows of one column, as far apart as the dilation, so that
neighbours share input rows however large the dilation is. For a 3x3 filter with stride 1 and BLOCK_P = 2:

    input row    h      h+d     h+2d    h+3d         a tile row [BLOCK_S, BLOCK_D] of x is loaded for each of them,
                 |-------|-------|       |           S times, shifted by s*d columns: 6 loads an output instead of 9
    output row       p       p+d

Strips are flattened over images, row tiles, phases and columns: tiles end inside the last strips alone, also for images
that are smaller than a tile. Each of the BLOCK_P rows is a product of its own, with the same block of w.

x is read about once (shifted loads meet in L1; blocks of output channels are neighbours in the grid and meet in L2), y
is written once, and z, written and read again by two convolutions, is never there. What limits the kernel is
arithmetic: about 26 instructions for an element of z of a 3x3 filter, again for each block of output channels, beside
BLOCK_N multiply-adds of the matrix unit. The loop over filter columns stays a loop: unrolled, its loads take so many
registers that fewer warps run side by side, and those are what hides the latency of loads.

A masked tap leaves the sum alone instead of adding a zero, for 0 * inf is NaN: padding is skipped whatever the weights.

Several branches of one image (separable_aspp) share a launch: a table says for each block of output channels which
branch it belongs to. Branches without a depthwise half multiply x itself, in a loop that Triton pipelines.

Row offsets of taps are 64-bit scalars. Offsets of pixels have 32 bits unless IS_INDEX_64, which the host sets from the
sizes. Tile shapes and the table are triton_plan.py's business.
"""

from __future__ import annotations

import contextlib
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from fastseg.ops.geometry import empty_output
from fastseg.ops.separable.triton_plan import (
    BRANCH_FIELDS,
    CONFIGS,
    IEEE_CONFIGS,
    NARROW_CONFIGS,
    Branch,
    Config,
    Layout,
    max_results,
    plan_forward,
)
from fastseg.ops.triton_common import (
    MAX_GROUP,
    ConvShape,
    activate,
    check_like,
    coalesced,
    conv_shape,
    fail,
    group_size,
    in_groups,
    input_index,
    is_inside,
    launch,
    load_tile,
    multiply_add,
    needs_index_64,
    on_device,
    split_index,
    store_tile,
    tile_pointers,
    widen,
)

__all__ = [
    "CONFIGS",
    "IEEE_CONFIGS",
    "NARROW_CONFIGS",
    "Branch",
    "Config",
    "Vectors",
    "adjacent_channels",
    "forced_config",
    "forward",
    "run_branches",
]

# Arguments that change from layer to layer and gain nothing from being known when a kernel is compiled: alignment is
# told by GROUP_*.
RUNTIME_SIZES = (
    *("N", "n_depth", "n_outputs", "H", "W", "P", "Q", "n_branches", "n_blocks"),
    *("s_xn", "s_xh", "s_xw", "s_wk", "s_yn", "s_yp", "s_yq"),
)
_BRANCH_FIELDS = tl.constexpr(BRANCH_FIELDS)


@triton.jit
def find_branch(p_branches, i_block, n_branches, BLOCK_BRANCHES: tl.constexpr):
    """The row of the branch that a block of output channels belongs to: the last that begins at or before it."""
    o_branch = tl.arange(0, BLOCK_BRANCHES)
    b_first = tl.load(p_branches + o_branch * _BRANCH_FIELDS, mask=o_branch < n_branches, other=2147483647)
    return p_branches + (tl.sum((b_first <= i_block).to(tl.int32)) - 1) * _BRANCH_FIELDS


# fmt: off
@triton.heuristics({
    "HAS_DEPTHWISE_SCALE": lambda args: args["p_dscale"] is not None,
    "HAS_DEPTHWISE_BIAS": lambda args: args["p_dbias"] is not None,
    "HAS_SCALE": lambda args: args["p_scale"] is not None,
    "HAS_BIAS": lambda args: args["p_bias"] is not None,
    "HAS_SUMS": lambda args: args["p_sums"] is not None,
})
@triton.jit(do_not_specialize=RUNTIME_SIZES)
def separable_forward(
    p_x,  # [N, C, H, W], channels adjacent
    p_taps,  # [R, S, n_depth] fp32 of each branch
    p_weight,  # [n_outputs, n_depth], channels adjacent
    p_dscale, p_dbias,  # [n_depth] of each branch, fp32 (the bias: or as x), or None
    p_scale, p_bias,  # [n_outputs] fp32 (the bias: or as x) or None
    p_y,  # [N, n_outputs, P, Q], channels adjacent
    p_sums,  # [tiles, 2, n_outputs] fp32 or None
    p_branches,  # [n_branches, BRANCH_FIELDS]
    N,
    n_depth,  # C * MULTIPLIER
    n_outputs,  # of all branches
    H, W, P, Q,
    n_branches, n_blocks,
    s_xn, s_xh, s_xw,
    s_wk,
    s_yn, s_yp, s_yq,
    R: tl.constexpr, S: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    JUMP: tl.constexpr,  # input rows of the phase from one output row of the strip to the next
    MULTIPLIER: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_BRANCHES: tl.constexpr,
    GROUP_X: tl.constexpr, GROUP_DEPTH: tl.constexpr, GROUP_WEIGHT: tl.constexpr, GROUP_Y: tl.constexpr,
    DEPTHWISE_ACTIVATION: tl.constexpr, ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
    HAS_DEPTHWISE_SCALE: tl.constexpr, HAS_DEPTHWISE_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SUMS: tl.constexpr, HAS_PLAIN: tl.constexpr,
    IS_DEPTH_WHOLE: tl.constexpr, IS_INDEX_64: tl.constexpr,
):
    # fmt: on
    i_block, i_tile = split_index(tl.program_id(0), n_blocks)
    p_branch = find_branch(p_branches, i_block, n_branches, BLOCK_BRANCHES)
    i_block -= tl.load(p_branch)
    i_output, n_own, i_channel, i_tap = (
        tl.load(p_branch + 1), tl.load(p_branch + 2), tl.load(p_branch + 3), tl.load(p_branch + 4)
    )  # fmt: skip
    n_phases, n_tiles = tl.load(p_branch + 5), tl.load(p_branch + 6)
    dilation_h, dilation_w = tl.load(p_branch + 7), tl.load(p_branch + 8)
    pad_h, pad_w = tl.load(p_branch + 9), tl.load(p_branch + 10)

    o_strip = widen(i_tile, IS_INDEX_64) * BLOCK_S + tl.arange(0, BLOCK_S)
    n_strips = widen(N, IS_INDEX_64) * n_tiles * n_phases * Q
    # Branches have different numbers of tiles: a program without pixels does no step.
    n_steps = tl.where(i_tile * BLOCK_S < n_strips, tl.cdiv(n_depth, BLOCK_D), 0)
    m_strip = o_strip < n_strips
    # Beyond the last strip, and the last row of w, a tile reads that one again: loads need no mask.
    o_q, o_image = split_index(tl.minimum(o_strip, n_strips - 1), Q)
    o_phase, o_image = split_index(o_image, n_phases)
    o_tile, o_image = split_index(o_image, n_tiles)
    o_p = o_phase + o_tile * BLOCK_P * n_phases
    o_h = input_index(o_p, 0, STRIDE_H, pad_h, dilation_h)
    o_w = input_index(o_q, 0, STRIDE_W, pad_w, dilation_w)
    o_x = (o_image * s_xn + o_h * s_xh + o_w * s_xw)[:, None]  # [BLOCK_S, 1]: of tap (0, 0)
    o_own = i_block * BLOCK_N + tl.arange(0, BLOCK_N)
    o_output = widen(i_output + o_own, IS_INDEX_64)
    o_depth = widen(tl.arange(0, BLOCK_D), IS_INDEX_64)
    o_weight = widen(i_output + tl.minimum(o_own, n_own - 1), IS_INDEX_64)[:, None] * s_wk + o_depth[None, :]
    o_depth = o_depth[None, :]  # [1, BLOCK_D]

    acc = (tl.zeros([BLOCK_S, BLOCK_N], tl.float32),) * BLOCK_P  # one for each row of the strips
    if HAS_PLAIN and i_channel < 0:
        for i_depth in tl.range(0, n_steps * BLOCK_D, BLOCK_D, num_stages=3):
            m_depth = True if IS_DEPTH_WHOLE else i_depth + o_depth < in_groups(n_depth, GROUP_DEPTH)
            b_weight = tl.load(tile_pointers(p_weight + i_depth, o_weight, GROUP_WEIGHT), mask=m_depth, other=0.0)
            products = ()
            for i in tl.static_range(BLOCK_P):
                p_row = p_x + (i * s_xh + i_depth)
                m_x = (o_h + i < H)[:, None] & m_depth
                b_x = tl.load(tile_pointers(p_row, o_x + o_depth, GROUP_X), mask=m_x, other=0.0)  # [BLOCK_S, BLOCK_D]
                products = products + (multiply_add(b_x, b_weight.T, acc[i], PRECISION),)
            acc = products
    else:
        p_taps += i_tap
        for i_depth in tl.range(0, n_steps * BLOCK_D, BLOCK_D, num_stages=1):
            m_depth = True if IS_DEPTH_WHOLE else i_depth + o_depth < in_groups(n_depth, GROUP_DEPTH)
            b_weight = tl.load(tile_pointers(p_weight + i_depth, o_weight, GROUP_WEIGHT), mask=m_depth, other=0.0)
            if MULTIPLIER == 1:
                o_source = o_x + (i_depth + o_depth)
            else:
                o_source = o_x + (i_depth + o_depth) // MULTIPLIER

            z = (tl.zeros([BLOCK_S, BLOCK_D], tl.float32),) * BLOCK_P
            for i_r in tl.range(0, R, BLOCK_R, num_stages=1):
                for i_s in tl.range(0, S, num_stages=1):
                    i_w = widen(i_s, IS_INDEX_64) * dilation_w
                    m_w = is_inside(o_w + i_w, W, IS_INDEX_64)[:, None] & m_depth
                    p_column = p_x + tl.cast(i_w, tl.int64) * s_xw
                    b_taps = ()  # BLOCK_R x [1, BLOCK_D]
                    for r in tl.static_range(BLOCK_R):
                        p_tap = p_taps + (((i_r + r) * S + i_s) * n_depth + i_depth)
                        b_taps = b_taps + (load_tile(p_tap, o_depth, m_depth & (i_r + r < R), GROUP_DEPTH),)

                    for j in tl.static_range((BLOCK_P - 1) * JUMP + BLOCK_R):
                        i_h = widen(i_r + j, IS_INDEX_64) * dilation_h
                        m_x = m_w & is_inside(o_h + i_h, H, IS_INDEX_64)[:, None]
                        b_x = load_tile(p_column + tl.cast(i_h, tl.int64) * s_xh, o_source, m_x, GROUP_X)
                        sums = ()
                        for i in tl.static_range(BLOCK_P):
                            if j - i * JUMP >= 0 and j - i * JUMP < BLOCK_R:
                                m_tap = m_x & (i_r + j - i * JUMP < R)
                                sums = sums + (tl.where(m_tap, z[i] + b_x * b_taps[j - i * JUMP], z[i]),)
                            else:
                                sums = sums + (z[i],)
                        z = sums

            if HAS_DEPTHWISE_SCALE:
                b_dscale = load_tile(p_dscale + i_channel + i_depth, o_depth, m_depth, 1)  # [1, BLOCK_D]
            if HAS_DEPTHWISE_BIAS:
                b_dbias = load_tile(p_dbias + i_channel + i_depth, o_depth, m_depth, 1)  # [1, BLOCK_D]
            tiles = ()  # all of them before the first product, which waits for shared memory once
            for i in tl.static_range(BLOCK_P):
                b_z = z[i]  # [BLOCK_S, BLOCK_D]
                if HAS_DEPTHWISE_SCALE:
                    b_z *= b_dscale
                if HAS_DEPTHWISE_BIAS:
                    b_z += b_dbias
                b_z = activate(b_z, DEPTHWISE_ACTIVATION)
                if not IS_DEPTH_WHOLE and (HAS_DEPTHWISE_SCALE or HAS_DEPTHWISE_BIAS):  # no values beyond the last
                    b_z = tl.where(m_depth, b_z, 0.0)
                tiles = tiles + (b_z.to(p_x.dtype.element_ty),)
            products = ()
            for i in tl.static_range(BLOCK_P):
                products = products + (multiply_add(tiles[i], b_weight.T, acc[i], PRECISION),)
            acc = products

    m_output = o_own < in_groups(n_own, GROUP_Y)
    rows = ()  # BLOCK_P x [BLOCK_S, BLOCK_N]
    for i in tl.static_range(BLOCK_P):
        b_y = acc[i]
        if HAS_SCALE:
            b_y *= tl.load(p_scale + o_output, mask=m_output)[None, :]  # [1, BLOCK_N]
        if HAS_BIAS:
            b_y += tl.load(p_bias + o_output, mask=m_output).to(tl.float32)[None, :]  # [1, BLOCK_N]
        rows = rows + (b_y,)
    o_y = o_image * s_yn + o_p * s_yp + o_q * s_yq
    for i in tl.static_range(BLOCK_P):
        m_y = (m_strip & (o_p + i * n_phases < P))[:, None] & m_output[None, :]
        p_row = p_y + tl.cast(i * n_phases, tl.int64) * s_yp
        store_tile(p_row, o_y[:, None] + o_output[None, :], activate(rows[i], ACTIVATION), m_y, GROUP_Y)
    if HAS_SUMS:
        p_sums += i_tile.to(tl.int64) * 2 * n_outputs
        for power in tl.static_range(1, 3):  # one after the other: both together would not fit the registers
            b_sum = tl.zeros([BLOCK_S, BLOCK_N], tl.float32)
            for i in tl.static_range(BLOCK_P):
                b_y = tl.where((m_strip & (o_p + i * n_phases < P))[:, None], rows[i], 0.0)
                b_sum += b_y if power == 1 else b_y * b_y
            tl.store(p_sums + (power - 1) * n_outputs + o_output, tl.sum(b_sum, 0), mask=m_output)  # [BLOCK_N]


_forced: Config | None = None


@contextlib.contextmanager
def forced_config(config: Config):
    """Run the kernel with `config`, whatever the problem."""
    global _forced
    previous, _forced = _forced, config
    try:
        yield
    finally:
        _forced = previous


def forward(
    input, depthwise_weight, pointwise_weight, depthwise_bias, bias, stride, padding, dilation,
    depthwise_activation, activation, depthwise_scale=None, scale=None,
):  # fmt: skip
    """Depthwise-separable convolution; see fastseg.ops.separable_conv2d.

    Args:
        input: [N, C, H, W], any strides; float16, bfloat16 or float32.
        depthwise_weight: [C * m, 1, R, S], the same dtype and device.
        pointwise_weight: [K, C * m, 1, 1], the same.
        depthwise_bias, bias: [C * m] and [K], in the weights' dtype or float32, or None.
        stride, dilation: (height, width). padding: (top, bottom, left, right).
        depthwise_activation, activation: "none", "relu", "relu6", "hardswish" or "silu".
        depthwise_scale, scale: [C * m] and [K] in float32 or None, multiplied to the sums before a bias is added.

    Returns:
        [N, K, P, Q] in the memory format that torch.nn.functional.conv2d would give the depthwise result.
    """
    shape = conv_shape(input, depthwise_weight, stride, padding, dilation)
    outputs = pointwise_weight.shape[0]
    if depthwise_weight.shape[1] != 1 or shape.C == 0 or shape.K % shape.C != 0:
        fail("depthwise weight [C * m, 1, R, S]", f"{list(depthwise_weight.shape)} for {shape.C} channels")
    check_like("pointwise weight", pointwise_weight, (outputs, shape.K, 1, 1), input)
    vectors = Vectors(depthwise_scale, depthwise_bias, scale, bias)
    vectors.check(shape.K, outputs, input)
    activations = depthwise_activation, activation
    with on_device(input):
        output = empty_output(input, depthwise_weight, (shape.P, shape.Q), outputs)
        if output.numel() > 0:
            branch = Branch(outputs, 0, tuple(dilation), (shape.pad_top, shape.pad_left), first_channel=0)
            x, y = coalesced(input, torch.channels_last), adjacent_channels(output)
            weight = _rows(pointwise_weight)
            run_branches(shape, (branch,), x, [depthwise_weight], weight, vectors, activations, y)
            if y is not output:
                output.copy_(y)
    return output


class Vectors(NamedTuple):
    """What is multiplied and added to the sums of both halves; of several branches, side by side. Each may be None."""

    depthwise_scale: torch.Tensor | None
    depthwise_bias: torch.Tensor | None
    scale: torch.Tensor | None
    bias: torch.Tensor | None

    def check(self, channels: int, outputs: int, like) -> None:
        """Raise unless scales are float32, biases that or as `like`, and the sizes right."""
        for name, vector in self._asdict().items():
            if vector is None:
                continue
            size = channels if name.startswith("depthwise") else outputs
            dtypes = (torch.float32,) if name.endswith("scale") else (torch.float32, like.dtype)
            if vector.shape != (size,) or vector.dtype not in dtypes or vector.device != like.device:
                fail(
                    f"{name.replace('_', ' ')} of shape {[size]}, {' or '.join(map(str, dict.fromkeys(dtypes)))} on "
                    f"{like.device}",
                    f"{list(vector.shape)}, {vector.dtype} on {vector.device}",
                )


def run_branches(
    shape: ConvShape, branches: tuple[Branch, ...], x, depthwise_weights, weight, vectors: Vectors,
    activations: tuple[str, str], y, statistics: bool = False,
) -> torch.Tensor | None:  # fmt: skip
    """Compute `branches` of one kernel size, in one launch.

    Args:
        shape: of a depthwise convolution of `x`; dilation and padding are the branches' own.
        x: [N, C, H, W], channels adjacent.
        depthwise_weights: [C * m, 1, R, S] of each branch that has a depthwise half.
        weight: [outputs of all branches, C * m], channels adjacent.
        vectors: of all branches.
        activations: between the halves, and behind the second.
        y: [N, outputs of all branches, P, Q], channels adjacent, where the results go. It is not empty.
        statistics: whether to return the sums, and the sums of squares, of what goes into the second activation.

    Returns:
        [tiles, 2, outputs of all branches] in float32, to be added up, or None.
    """
    layout, itemsize = _layout(shape, branches, x, weight, y), x.element_size()
    room = max_results(x.device, itemsize, layout, statistics)
    plan = plan_forward(shape, branches, itemsize, layout, room, _forced)
    sums = None
    if statistics:  # a branch leaves alone what is other branches', and tiles that it has not
        sums = x.new_zeros((plan.tiles, 2, y.shape[1]), dtype=torch.float32)
    depthwise_scale, depthwise_bias, scale, bias = (None if v is None else v.contiguous() for v in vectors)
    launch(
        separable_forward,
        plan.programs,
        p_x=x,
        p_taps=_filter_taps(depthwise_weights, x),
        p_weight=weight,
        p_dscale=depthwise_scale,
        p_dbias=depthwise_bias,
        p_scale=scale,
        p_bias=bias,
        p_y=y,
        p_sums=sums,
        p_branches=plan.table.on(x.device),
        n_outputs=y.shape[1],
        s_xn=x.stride(0),
        s_xh=x.stride(2),
        s_xw=x.stride(3),
        s_wk=weight.stride(0),
        s_yn=y.stride(0),
        s_yp=y.stride(2),
        s_yq=y.stride(3),
        DEPTHWISE_ACTIVATION=activations[0],
        ACTIVATION=activations[1],
        **plan.arguments,
    )
    return sums


def adjacent_channels(output):
    """`output` itself when its channels are adjacent, else a channels_last tensor to be copied to it."""
    if output.stride(1) == 1 or output.shape[1] == 1:
        return output
    return torch.empty_like(output, memory_format=torch.channels_last)


def _filter_taps(weights, like):
    """The depthwise filters as [R, S, C * m] in fp32, one behind the other: a tile's weights are wide loads."""
    taps = like.new_empty(sum(weight.numel() for weight in weights), dtype=torch.float32)
    first = 0
    for weight in weights:
        own = weight.squeeze(1).permute(1, 2, 0)  # [R, S, C * m]
        taps[first : first + own.numel()].view(own.shape).copy_(own)
        first += own.numel()
    return taps


def _rows(pointwise_weight):
    """[K, C * m] with adjacent channels."""
    weight = pointwise_weight.flatten(1)
    return weight if weight.stride(1) == 1 or weight.shape[1] == 1 else weight.contiguous()


def _layout(shape: ConvShape, branches, x, weight, y) -> Layout:
    outputs = [branch.outputs for branch in branches]
    firsts = [branch.first_output for branch in branches]
    # Rows and columns of the padded image, and as far as the taps of a strip beyond the last output look.
    dilation = [max(branch.dilation[axis] for branch in branches) for axis in range(2)]
    padding = [max(branch.padding[axis] for branch in branches) for axis in range(2)]
    rows = shape.H + padding[0] + shape.P * shape.stride_h + (shape.R + 2 * shape.stride_h) * dilation[0]
    columns = shape.W + padding[1] + shape.Q * shape.stride_w + shape.S * dilation[1]
    images = [(t.shape[0] - 1) * t.stride(0) + t.shape[1] for t in (x, y)]
    spans = (images[0] + rows * x.stride(2) + columns * x.stride(3), images[1] + y.stride(2) * (shape.P + dilation[0]))
    strips = 2 * shape.N * (shape.P + 2 * dilation[0]) * shape.Q
    filters = len(branches) * shape.R * shape.S * shape.K
    return Layout(
        GROUP_X=group_size(shape.C, x) if shape.K == shape.C else 1,  # k // m breaks groups up
        GROUP_DEPTH=math.gcd(MAX_GROUP, shape.K),
        GROUP_WEIGHT=group_size(shape.K, weight),
        GROUP_Y=math.gcd(group_size(y.shape[1], y), *outputs, *firsts),
        IS_INDEX_64=needs_index_64(*spans, strips, filters, weight.shape[0] * weight.stride(0) + shape.K),
        PRECISION=_precision(x.dtype),
    )


def _precision(dtype: torch.dtype) -> str:
    """How torch multiplies in convolutions of this dtype, at this moment."""
    if dtype == torch.float32 and torch.backends.cudnn.conv.fp32_precision == "tf32":
        return "tf32"
    return "ieee"
