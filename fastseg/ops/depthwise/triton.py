"""Depthwise convolution in Triton: forward, input gradient and weight gradient, in any memory layout.

    y[n, k, p, q] = act(bias[k] + sum over (r, s) of w[k, r, s] * x[n, k // m, p*stride - pad + r*dilation, ...])

A program owns BLOCK_C channels of BLOCK_Q columns, as one tile, and walks BLOCK_P rows of one *phase*: rows as far
apart as the dilation, so that neighbouring rows of the walk share input rows however large the dilation is. For a 3x3
filter with dilation d and stride 1, BLOCK_P = 4:

    input row    h      h+d     h+2d    h+3d    h+4d    h+5d        each is loaded S times, shifted by s*d columns,
                 |-------|-------|       |       |       |          and feeds up to R accumulators in registers
    output row       p       p+d    p+2d    p+3d

so an output costs S * (BLOCK_P + R - 1) / BLOCK_P loads (4.5 here) instead of R * S (9). Loads overlap in L1: DRAM sees
x once and y once, 4 bytes an output in 16 bits, which is the limit as long as the instructions stay few (about 30 an
output in channels_last).

One body serves every layout, because strides are arguments: whichever stride is 1 is known when the kernel is compiled,
and becomes the tile's last dimension, along which threads load 16 bytes (channels_last) or neighbours (contiguous).

A masked tap leaves the accumulator alone (`tl.where(mask, acc + x * w, acc)`) instead of adding a zero, for 0 * inf is
NaN; ptxas makes it a predicated multiply-add, at no cost. Padding is thereby skipped, whatever the weights.

The input gradient is the same walk with the index map inverted. With a stride, a program takes the columns of one
residue class, whose live taps are the same, so nothing is multiplied in vain. The weight gradient keeps one accumulator
tile a tap, walks over many row tiles, and reduces in two fixed stages: no atomics, the same bits every time.

Row addresses are 64-bit scalars. Offsets inside a tile have 32 bits unless IS_INDEX_64, which the host sets from the
sizes.

The three kernels are siblings, to be read side by side: a diff of two shows the mathematics. Which tile shape each gets
is triton_plan.py's business.
"""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl

from fastseg.ops.depthwise.triton_plan import (
    CONFIGS,
    REDUCE_BLOCK_K,
    REDUCE_BLOCK_SPLITS,
    Config,
    Layout,
    plan_forward,
    plan_grad_input,
    plan_grad_weight,
)
from fastseg.ops.geometry import conv_memory_format, empty_gradients, empty_output
from fastseg.ops.triton_common import (
    ConvShape,
    activate,
    can_run,
    cdiv,
    check_like,
    coalesced,
    conv_shape,
    fail,
    first_live_tap,
    group_size,
    in_groups,
    input_index,
    is_inside,
    launch,
    load_tile,
    needs_index_64,
    on_device,
    output_index,
    split_index,
    store_tile,
    strides,
    widen,
)

__all__ = ["CONFIGS", "Config", "backward", "can_run", "forced_config", "forward"]

# Arguments that change from layer to layer and gain nothing from being known when a kernel is compiled.
RUNTIME_SIZES = ("H", "W", "P", "Q", "pad_h", "pad_w", "dilation_h", "dilation_w", "n_tiles", "n_walks", "n_splits")


@triton.jit
def tile_offsets(BLOCK_Q: tl.constexpr, BLOCK_C: tl.constexpr, IS_CHANNELS_LAST: tl.constexpr):
    """Columns and channels of a tile, shaped to broadcast to it; its last dimension is the contiguous one."""
    o_q = tl.arange(0, BLOCK_Q)
    o_c = tl.arange(0, BLOCK_C)
    o_q = o_q[:, None] if IS_CHANNELS_LAST else o_q[None, :]
    o_c = o_c[None, :] if IS_CHANNELS_LAST else o_c[:, None]
    return o_q, o_c


@triton.jit
def walk_index(i_walk, n_blocks, n_phases, n_tiles, IS_INDEX_64: tl.constexpr):
    """Which walk a flattened index means: (column block, phase, row tile of the phase, image)."""
    i_block, i_walk = split_index(widen(i_walk, IS_INDEX_64), n_blocks)
    i_phase, i_walk = split_index(i_walk, n_phases)
    i_tile, i_n = split_index(i_walk, n_tiles)
    return i_block, i_phase, i_tile, i_n.to(tl.int64)


@triton.jit
def add_tiles(b_left, b_right):
    """The sums of two tuples, element by element."""
    b_sums = ()
    for i in tl.static_range(len(b_left)):
        b_sums = b_sums + (b_left[i] + b_right[i],)
    return b_sums


# fmt: off
@triton.heuristics({"HAS_BIAS": lambda args: args["p_bias"] is not None})
@triton.jit(do_not_specialize=RUNTIME_SIZES)
def depthwise_forward(
    p_x,  # [N, C, H, W]
    p_taps,  # [R, S, K] fp32
    p_bias,  # [K] or None
    p_y,  # [N, K, P, Q]
    K, H, W, P, Q, multiplier, pad_h, pad_w, dilation_h, dilation_w,
    n_phases, n_tiles,
    s_xn, s_xc, s_xh, s_xw,
    s_yn, s_yk, s_yp, s_yq,
    R: tl.constexpr, S: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    JUMP: tl.constexpr,  # input rows of the phase from one output row of the walk to the next
    BLOCK_P: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr, UNROLL_S: tl.constexpr, BY_COLUMNS: tl.constexpr, GROUP: tl.constexpr,
    ACTIVATION: tl.constexpr, HAS_BIAS: tl.constexpr, IS_CHANNELS_LAST: tl.constexpr, IS_INDEX_64: tl.constexpr,
):
    # fmt: on
    i_c, i_walk = split_index(tl.program_id(0), tl.cdiv(K, BLOCK_C))
    i_q, i_phase, i_tile, i_n = walk_index(i_walk, tl.cdiv(Q, BLOCK_Q), n_phases, n_tiles, IS_INDEX_64)
    i_p = i_phase + i_tile * BLOCK_P * n_phases

    o_q, o_k = tile_offsets(BLOCK_Q, BLOCK_C, IS_CHANNELS_LAST)
    o_q = widen(i_q * BLOCK_Q + o_q, IS_INDEX_64)
    o_k = widen(i_c * BLOCK_C + o_k, IS_INDEX_64)
    o_c = o_k // multiplier
    o_y = o_q * s_yq + o_k * s_yk
    m_k = o_k < in_groups(K, GROUP)
    m_y = (o_q < Q) & m_k
    p_x += i_n * s_xn
    p_y += i_n * s_yn

    b_zeros = (tl.zeros_like(o_q + o_k).to(tl.float32),) * BLOCK_P  # BLOCK_P x [tile]
    acc = b_zeros
    for i_r in tl.range(0, R, BLOCK_R):
        for i_s in tl.range(0, S, loop_unroll_factor=UNROLL_S):
            o_w = input_index(o_q, i_s, STRIDE_W, pad_w, dilation_w)
            o_x = o_w * s_xw + o_c * s_xc
            m_w = is_inside(o_w, W, IS_INDEX_64) & m_k
            b_taps = ()  # BLOCK_R x [channels of the tile]
            for r in tl.static_range(BLOCK_R):
                p_tap = p_taps + ((i_r + r) * S + i_s) * K
                b_taps = b_taps + (load_tile(p_tap, o_k, m_k & (i_r + r < R), GROUP),)

            sums = b_zeros if BY_COLUMNS else acc
            for j in tl.static_range((BLOCK_P - 1) * JUMP + BLOCK_R):
                i_h = input_index(i_p, i_r + j, STRIDE_H, pad_h, dilation_h)
                m_x = m_w & is_inside(i_h, H, IS_INDEX_64)
                b_x = load_tile(p_x + i_h.to(tl.int64) * s_xh, o_x, m_x, GROUP)  # [tile]
                rows = ()
                for i in tl.static_range(BLOCK_P):
                    if j - i * JUMP >= 0 and j - i * JUMP < BLOCK_R:
                        m_tap = m_x & (i_r + j - i * JUMP < R)
                        rows = rows + (tl.where(m_tap, sums[i] + b_x * b_taps[j - i * JUMP], sums[i]),)
                    else:
                        rows = rows + (sums[i],)
                sums = rows
            acc = add_tiles(acc, sums) if BY_COLUMNS else sums

    if HAS_BIAS:
        b_bias = load_tile(p_bias, o_k, m_k, 1)  # [channels of the tile]; a slice may lie at any address
    for i in tl.static_range(BLOCK_P):
        b_y = acc[i]  # [tile]
        if HAS_BIAS:
            b_y += b_bias
        i_y = i_p + i * n_phases
        store_tile(p_y + i_y.to(tl.int64) * s_yp, o_y, activate(b_y, ACTIVATION), m_y & (i_y < P), GROUP)


# fmt: off
@triton.jit(do_not_specialize=RUNTIME_SIZES)
def depthwise_grad_input(
    p_gy,  # [N, K, P, Q]
    p_taps,  # [R, S, K] fp32
    p_gx,  # [N, C, H, W]
    C, K, H, W, P, Q, multiplier, pad_h, pad_w, dilation_h, dilation_w,
    n_phases, n_tiles,
    s_gyn, s_gyk, s_gyp, s_gyq,
    s_gxn, s_gxc, s_gxh, s_gxw,
    R: tl.constexpr, S: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    STEP_R: tl.constexpr, STEP_S: tl.constexpr,  # from one live tap to the next
    BLOCK_P: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr, UNROLL_S: tl.constexpr, BY_COLUMNS: tl.constexpr, GROUP: tl.constexpr,
    IS_CHANNELS_LAST: tl.constexpr, IS_INDEX_64: tl.constexpr,
):
    # fmt: on
    LIVE_R: tl.constexpr = (R + STEP_R - 1) // STEP_R
    LIVE_S: tl.constexpr = (S + STEP_S - 1) // STEP_S
    LAST_R: tl.constexpr = BLOCK_R - 1
    i_c, i_walk = split_index(tl.program_id(0), tl.cdiv(C, BLOCK_C))
    n_blocks = STRIDE_W * tl.cdiv(tl.cdiv(W, STRIDE_W), BLOCK_Q)
    i_w, i_phase, i_tile, i_n = walk_index(i_walk, n_blocks, n_phases, n_tiles, IS_INDEX_64)
    i_class, i_w = split_index(i_w, STRIDE_W)
    i_h = i_phase + i_tile * BLOCK_P * n_phases

    o_w, o_c = tile_offsets(BLOCK_Q, BLOCK_C, IS_CHANNELS_LAST)
    o_w = widen(i_class + (i_w * BLOCK_Q + o_w) * STRIDE_W, IS_INDEX_64)
    o_c = widen(i_c * BLOCK_C + o_c, IS_INDEX_64)
    o_gx = o_w * s_gxw + o_c * s_gxc
    m_c = o_c < in_groups(C, GROUP)
    m_gx = (o_w < W) & m_c
    p_gy += i_n * s_gyn
    p_gx += i_n * s_gxn

    i_first_r = first_live_tap(i_h, R, STEP_R, STRIDE_H, pad_h, dilation_h)
    i_first_s = first_live_tap(i_class, S, STEP_S, STRIDE_W, pad_w, dilation_w)
    i_first_p = output_index(i_h, i_first_r, STRIDE_H, pad_h, dilation_h)
    i_row_step = dilation_h * STEP_R // STRIDE_H  # output rows from one live tap to the next

    b_zeros = (tl.zeros_like(o_w + o_c).to(tl.float32),) * BLOCK_P  # BLOCK_P x [tile]
    acc = b_zeros
    for i_m in range(multiplier):
        o_k = o_c * multiplier + i_m
        for i_r in tl.range(0, LIVE_R, BLOCK_R):
            for i_live_s in tl.range(0, LIVE_S, loop_unroll_factor=UNROLL_S):
                i_s = i_first_s + i_live_s * STEP_S
                o_q = output_index(o_w, i_s, STRIDE_W, pad_w, dilation_w)
                o_gy = o_q * s_gyq + o_k * s_gyk
                m_q = is_inside(o_q, Q, IS_INDEX_64) & m_c & (i_s < S)
                b_taps = ()  # BLOCK_R x [channels of the tile]
                for r in tl.static_range(BLOCK_R):
                    i_tap = i_first_r + (i_r + r) * STEP_R
                    p_tap = p_taps + (i_tap * S + i_s) * K
                    b_taps = b_taps + (load_tile(p_tap, o_k, m_c & (i_tap < R) & (i_s < S), GROUP),)

                sums = b_zeros if BY_COLUMNS else acc
                for j in tl.static_range(BLOCK_P - 1 + BLOCK_R):
                    i_p = i_first_p + (j - LAST_R - i_r) * i_row_step
                    m_gy = m_q & is_inside(i_p, P, IS_INDEX_64)
                    b_gy = load_tile(p_gy + i_p.to(tl.int64) * s_gyp, o_gy, m_gy, GROUP)  # [tile]
                    rows = ()
                    for i in tl.static_range(BLOCK_P):
                        if LAST_R + i - j >= 0 and LAST_R + i - j < BLOCK_R:
                            m_tap = m_gy & (i_first_r + (i_r + LAST_R + i - j) * STEP_R < R)
                            rows = rows + (tl.where(m_tap, sums[i] + b_gy * b_taps[LAST_R + i - j], sums[i]),)
                        else:
                            rows = rows + (sums[i],)
                    sums = rows
                acc = add_tiles(acc, sums) if BY_COLUMNS else sums

    for i in tl.static_range(BLOCK_P):
        i_gx = i_h + i * n_phases
        store_tile(p_gx + i_gx.to(tl.int64) * s_gxh, o_gx, acc[i], m_gx & (i_gx < H), GROUP)  # [tile]


# fmt: off
@triton.heuristics({"HAS_BIAS": lambda args: args["p_bias_partials"] is not None})
@triton.jit(do_not_specialize=RUNTIME_SIZES)
def depthwise_grad_weight(
    p_gy,  # [N, K, P, Q]
    p_x,  # [N, C, H, W]
    p_partials,  # [n_splits, R * S + 1, K] fp32
    p_bias_partials,  # the last row of each split of p_partials, or None
    K, H, W, P, Q, multiplier, pad_h, pad_w, dilation_h, dilation_w,
    n_phases, n_tiles, n_walks, n_splits,
    s_gyn, s_gyk, s_gyp, s_gyq,
    s_xn, s_xc, s_xh, s_xw,
    R: tl.constexpr, S: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    JUMP: tl.constexpr,  # input rows of the phase from one output row of the walk to the next
    BLOCK_P: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr, GROUP: tl.constexpr,
    HAS_BIAS: tl.constexpr, IS_CHANNELS_LAST: tl.constexpr, IS_INDEX_64: tl.constexpr,
):
    # fmt: on
    BLOCKS_R: tl.constexpr = (R + BLOCK_R - 1) // BLOCK_R
    BLOCKS_S: tl.constexpr = (S + BLOCK_S - 1) // BLOCK_S
    i_c, i_rest = split_index(tl.program_id(0), tl.cdiv(K, BLOCK_C))
    i_s, i_rest = split_index(i_rest, BLOCKS_S)
    i_r, i_split = split_index(i_rest, BLOCKS_R)
    i_r *= BLOCK_R
    i_s *= BLOCK_S

    o_column, o_k = tile_offsets(BLOCK_Q, BLOCK_C, IS_CHANNELS_LAST)
    o_k = widen(i_c * BLOCK_C + o_k, IS_INDEX_64)
    o_c = o_k // multiplier
    m_k = o_k < in_groups(K, GROUP)

    b_zero = tl.zeros_like(o_column + o_k).to(tl.float32)
    acc = (b_zero,) * (BLOCK_S * BLOCK_R)  # one [tile] a tap; those of one filter column are neighbours
    acc_bias = b_zero
    for i_walk in tl.range(i_split, n_walks, n_splits):
        i_q, i_phase, i_tile, i_n = walk_index(i_walk, tl.cdiv(Q, BLOCK_Q), n_phases, n_tiles, IS_INDEX_64)
        i_p = i_phase + i_tile * BLOCK_P * n_phases
        o_q = widen(i_q * BLOCK_Q + o_column, IS_INDEX_64)
        o_gy = o_q * s_gyq + o_k * s_gyk
        m_q = (o_q < Q) & m_k

        b_gy = ()  # BLOCK_P x [tile]
        for i in tl.static_range(BLOCK_P):
            i_gy = i_p + i * n_phases
            m_gy = m_q & (i_gy < P)
            b_gy = b_gy + (load_tile(p_gy + i_n * s_gyn + i_gy.to(tl.int64) * s_gyp, o_gy, m_gy, GROUP),)
            if HAS_BIAS:
                acc_bias = tl.where(m_gy, acc_bias + b_gy[i], acc_bias)

        for s in tl.static_range(BLOCK_S):
            o_w = input_index(o_q, i_s + s, STRIDE_W, pad_w, dilation_w)
            o_x = o_w * s_xw + o_c * s_xc
            m_w = is_inside(o_w, W, IS_INDEX_64) & m_q
            column = acc[s * BLOCK_R : (s + 1) * BLOCK_R]
            for j in tl.static_range((BLOCK_P - 1) * JUMP + BLOCK_R):
                i_h = input_index(i_p, i_r + j, STRIDE_H, pad_h, dilation_h)
                m_x = m_w & is_inside(i_h, H, IS_INDEX_64)
                b_x = load_tile(p_x + i_n * s_xn + i_h.to(tl.int64) * s_xh, o_x, m_x, GROUP)  # [tile]
                taps = ()
                for r in tl.static_range(BLOCK_R):
                    if j - r >= 0 and (j - r) % JUMP == 0 and (j - r) // JUMP < BLOCK_P:
                        m_tap = m_x & (i_p + (j - r) // JUMP * n_phases < P)
                        taps = taps + (tl.where(m_tap, column[r] + b_x * b_gy[(j - r) // JUMP], column[r]),)
                    else:
                        taps = taps + (column[r],)
                column = taps
            acc = acc[: s * BLOCK_R] + column + acc[(s + 1) * BLOCK_R :]

    AXIS_Q: tl.constexpr = 0 if IS_CHANNELS_LAST else 1
    p_partials += i_split.to(tl.int64) * (R * S + 1) * K
    for s in tl.static_range(BLOCK_S):
        for r in tl.static_range(BLOCK_R):
            b_sum = tl.sum(acc[s * BLOCK_R + r], AXIS_Q, keep_dims=True)  # [channels of the tile]
            m_tap = m_k & (i_r + r < R) & (i_s + s < S)
            store_tile(p_partials + ((i_r + r) * S + i_s + s) * K, o_k, b_sum, m_tap, GROUP)
    if HAS_BIAS:
        p_bias_partials += i_split.to(tl.int64) * (R * S + 1) * K
        b_sum = tl.sum(acc_bias, AXIS_Q, keep_dims=True)  # [channels of the tile]
        store_tile(p_bias_partials, o_k, b_sum, m_k & (i_r == 0) & (i_s == 0), GROUP)


# fmt: off
@triton.heuristics({"HAS_BIAS": lambda args: args["p_gbias"] is not None})
@triton.jit(do_not_specialize=RUNTIME_SIZES)
def depthwise_grad_weight_reduce(
    p_partials,  # [n_splits, R * S + 1, K] fp32
    p_gw,  # [K, 1, R, S]
    p_gbias,  # [K] or None
    K, n_splits,
    s_gwk, s_gwr, s_gws,
    R: tl.constexpr, S: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr, BLOCK_K: tl.constexpr, HAS_BIAS: tl.constexpr,
):
    # fmt: on
    i_k, i_tap = split_index(tl.program_id(0), tl.cdiv(K, BLOCK_K))
    o_k = (i_k * BLOCK_K + tl.arange(0, BLOCK_K)).to(tl.int64)
    o_split = tl.arange(0, BLOCK_SPLITS).to(tl.int64)[:, None]
    m_k = o_k < K

    acc = tl.zeros([BLOCK_SPLITS, BLOCK_K], tl.float32)
    for i_split in tl.range(0, n_splits, BLOCK_SPLITS):
        o_partials = ((i_split + o_split) * (R * S + 1) + i_tap) * K + o_k[None, :]
        m_partials = (i_split + o_split < n_splits) & m_k[None, :]
        acc += tl.load(p_partials + o_partials, mask=m_partials, other=0)  # [BLOCK_SPLITS, BLOCK_K]
    b_sum = tl.sum(acc, 0)  # [BLOCK_K]

    o_gw = o_k * s_gwk + (i_tap // S) * s_gwr + (i_tap % S) * s_gws
    tl.store(p_gw + o_gw, b_sum.to(p_gw.dtype.element_ty), mask=m_k & (i_tap < R * S))  # [BLOCK_K]
    if HAS_BIAS:
        tl.store(p_gbias + o_k, b_sum.to(p_gbias.dtype.element_ty), mask=m_k & (i_tap == R * S))  # [BLOCK_K]


_forced: Config | None = None


@contextlib.contextmanager
def forced_config(config: Config):
    """Run every kernel with `config`, whatever the problem."""
    global _forced
    previous, _forced = _forced, config
    try:
        yield
    finally:
        _forced = previous


def forward(input, weight, bias, stride, padding, dilation, activation):
    """Depthwise convolution; see fastseg.ops.depthwise_conv2d, whose arguments are in normal form here.

    stride and dilation are (height, width), padding is (top, bottom, left, right), float64 is not taken.
    """
    shape = _depthwise_shape(input, weight, stride, padding, dilation)
    if bias is not None:
        check_like("bias", bias, (shape.K,), input)
    with on_device(input):
        output = empty_output(input, weight, (shape.P, shape.Q))
        if output.numel() == 0:
            return output
        memory_format = conv_memory_format(input, weight)
        x = coalesced(input, memory_format)
        plan = plan_forward(shape, _layout(shape, memory_format, x, output), x.element_size(), _forced)
        launch(
            depthwise_forward,
            plan.programs,
            p_x=x,
            p_taps=_filter_taps(weight),
            p_bias=None if bias is None else bias.contiguous(),
            p_y=output,
            **strides("s_xn s_xc s_xh s_xw", x),
            **strides("s_yn s_yk s_yp s_yq", output),
            ACTIVATION=activation,
            **plan.arguments,
        )
    return output


def backward(grad_output, input, weight, stride, padding, dilation, output_mask):
    """The gradients of `forward` without activation, as (grad_input, grad_weight, grad_bias).

    Args:
        grad_output: [N, C * m, P, Q], any strides.
        input, weight, stride, padding, dilation: as `forward` got them.
        output_mask: which of the three gradients to compute; the others are None.

    Returns:
        grad_input in the memory format of `forward`'s output, grad_weight with the strides of `weight`, and grad_bias.
    """
    shape = _depthwise_shape(input, weight, stride, padding, dilation)
    check_like("grad_output", grad_output, (shape.N, shape.K, shape.P, shape.Q), input)
    with on_device(input):
        grad_input, grad_weight, grad_bias = empty_gradients(input, weight, output_mask)
        if grad_output.numel() == 0:
            return tuple(None if g is None else g.zero_() for g in (grad_input, grad_weight, grad_bias))
        memory_format = conv_memory_format(input, weight)
        gy = coalesced(grad_output, memory_format)
        if grad_input is not None:
            _launch_grad_input(shape, gy, weight, grad_input, memory_format)
        if grad_weight is not None:
            _launch_grad_weight(shape, gy, coalesced(input, memory_format), grad_weight, grad_bias, memory_format)
        elif grad_bias is not None:
            torch.sum(grad_output, (0, 2, 3), out=grad_bias)
    return grad_input, grad_weight, grad_bias


def _launch_grad_input(shape: ConvShape, gy, weight, grad_input, memory_format) -> None:
    plan = plan_grad_input(shape, _layout(shape, memory_format, gy, grad_input), gy.element_size(), _forced)
    launch(
        depthwise_grad_input,
        plan.programs,
        p_gy=gy,
        p_taps=_filter_taps(weight),
        p_gx=grad_input,
        **strides("s_gyn s_gyk s_gyp s_gyq", gy),
        **strides("s_gxn s_gxc s_gxh s_gxw", grad_input),
        **plan.arguments,
    )


def _launch_grad_weight(shape: ConvShape, gy, x, grad_weight, grad_bias, memory_format) -> None:
    plan = plan_grad_weight(shape, _layout(shape, memory_format, gy, x), _forced)
    n_splits = plan.arguments["n_splits"]
    partials = gy.new_empty((n_splits, shape.R * shape.S + 1, shape.K), dtype=torch.float32)
    launch(
        depthwise_grad_weight,
        plan.programs,
        p_gy=gy,
        p_x=x,
        p_partials=partials,
        p_bias_partials=None if grad_bias is None else partials[:, -1],
        **strides("s_gyn s_gyk s_gyp s_gyq", gy),
        **strides("s_xn s_xc s_xh s_xw", x),
        **plan.arguments,
    )
    launch(
        depthwise_grad_weight_reduce,
        cdiv(shape.K, REDUCE_BLOCK_K) * (shape.R * shape.S + (grad_bias is not None)),
        p_partials=partials,
        p_gw=grad_weight,
        p_gbias=grad_bias,
        K=shape.K,
        n_splits=n_splits,
        s_gwk=grad_weight.stride(0),
        s_gwr=grad_weight.stride(2),
        s_gws=grad_weight.stride(3),
        R=shape.R,
        S=shape.S,
        BLOCK_SPLITS=REDUCE_BLOCK_SPLITS,
        BLOCK_K=REDUCE_BLOCK_K,
        num_warps=4,
    )


def _depthwise_shape(input, weight, stride, padding, dilation) -> ConvShape:
    shape = conv_shape(input, weight, stride, padding, dilation)
    if weight.shape[1] != 1 or shape.C == 0 or shape.K % shape.C != 0:
        fail("weight [C * m, 1, R, S]", f"{list(weight.shape)} for {shape.C} channels")
    return shape


def _filter_taps(weight):
    """The filter as [R, S, K] in fp32: with channels contiguous, a tile's weights are wide loads. One small launch."""
    taps = weight.squeeze(1).permute(1, 2, 0)  # [R, S, K]
    return torch.empty(taps.shape, dtype=torch.float32, device=weight.device).copy_(taps)


def _layout(shape: ConvShape, memory_format, *tensors) -> Layout:
    is_channels_last = memory_format == torch.channels_last
    is_grouped = is_channels_last and shape.K == shape.C  # k // m breaks groups up
    # A row, a column or an offset inside a row may leave 32 bits; tiles reach beyond the image by less than 15 images.
    offsets = [(t.shape[1] - 1) * t.stride(1) + (t.shape[3] - 1) * t.stride(3) for t in tensors]
    rows = shape.H + shape.P * shape.stride_h + shape.pad_top + (shape.R + shape.stride_h) * shape.dilation_h
    columns = shape.W + shape.Q * shape.stride_w + shape.pad_left + (shape.S + shape.stride_w) * shape.dilation_w
    return Layout(
        GROUP=group_size(shape.K, *tensors) if is_grouped else 1,
        IS_CHANNELS_LAST=is_channels_last,
        IS_INDEX_64=needs_index_64(*offsets, 16 * rows, 16 * columns, shape.R * shape.S * shape.K),
    )
