"""The products of grad_weight, two kernels as for forward: pixels by pointers, or in boxes by descriptors.

    partial[tap, split, k, c] = sum over the split's pixels of gy[pixel, k] * x[pixel moved by the tap, c]

dilated_grad_weight takes the pixels of a tap's live outputs flattened over the batch, and finds the next BLOCK_D of
them with two carries. dilated_grad_weight_boxes takes them in boxes of images x rows x columns, which the copy engine
loads. Both its descriptors begin where the tap's live outputs and what they read begin, and end where those end: what a
box has beyond is zero, on both sides, so no value is multiplied that the tap does not see. A program makes its two
descriptors itself, since every tap has its own.

dilated_grad_weight_reduce adds the splits of each tap in order. Bytes: 4 for each weight and split, written and read.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastseg.ops.dilated.triton_plan import TAP_FIELDS
from fastseg.ops.dilated.triton_product import find_row
from fastseg.ops.triton_common import in_groups, multiply_add, split_index, store_tile, widen

# Arguments that change from layer to layer and gain nothing from being known when a kernel is compiled.
GRAD_WEIGHT_SIZES = (
    *("N", "C", "n_taps", "n_steps", "n_blocks_c", "stride_h", "stride_w"),
    *("s_gyn", "s_gyp", "s_gyq", "s_xn", "s_xh", "s_xw"),
)
_TAP_FIELDS = tl.constexpr(TAP_FIELDS)


# fmt: off
@triton.jit(do_not_specialize=GRAD_WEIGHT_SIZES)
def dilated_grad_weight(
    p_gy,  # [N, output channels, P, Q], channels adjacent
    p_x,  # [N, C, H, W], channels adjacent
    p_partials,  # [rows, C] fp32: for each tap [splits, K]
    p_taps,  # [n_taps + 1, TAP_FIELDS]
    N, C, n_taps,
    n_steps,  # of a program
    n_blocks_c,
    stride_h, stride_w,
    s_gyn, s_gyp, s_gyq,
    s_xn, s_xh, s_xw,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_TAPS: tl.constexpr,
    GROUP_GY: tl.constexpr, GROUP_X: tl.constexpr, PRECISION: tl.constexpr, IS_INDEX_64: tl.constexpr,
):
    # fmt: on
    ITEMSIZE: tl.constexpr = p_x.dtype.element_ty.primitive_bitwidth // 8
    p_tap = find_row(p_taps, tl.program_id(0), n_taps, _TAP_FIELDS, BLOCK_TAPS)
    i_channel, K = tl.load(p_tap + 2), tl.load(p_tap + 3)
    i_p, n_p, i_h = tl.load(p_tap + 4).to(tl.int64), tl.load(p_tap + 5), tl.load(p_tap + 6).to(tl.int64)
    i_q, n_q, i_w = tl.load(p_tap + 7).to(tl.int64), tl.load(p_tap + 8), tl.load(p_tap + 9).to(tl.int64)
    i_c, i_part = split_index(tl.program_id(0) - tl.load(p_tap), n_blocks_c)
    i_k, i_part = split_index(i_part, tl.cdiv(K, BLOCK_M))
    p_gy += i_p * s_gyp + i_q * s_gyq + i_channel
    p_x += i_h * s_xh + i_w * s_xw

    i_first = widen(i_part, IS_INDEX_64) * n_steps * BLOCK_D
    o_q, o_image = split_index(i_first + tl.arange(0, BLOCK_D), n_q)
    o_p, o_image = split_index(o_image, n_p)
    o_k = widen(i_k, IS_INDEX_64) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_c = widen(i_c, IS_INDEX_64) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_k = o_k < in_groups(K, GROUP_GY)
    m_c = o_c < in_groups(C, GROUP_X)

    # From one step to the next a pixel moves on by BLOCK_D: so many columns, rows and images, and two carries.
    jump_q, jump_p = split_index(BLOCK_D, n_q)
    jump_p, jump_image = split_index(jump_p, n_p)
    n_left = tl.cdiv(widen(N, IS_INDEX_64) * n_p * n_q - i_first, BLOCK_D)

    n_own = tl.minimum(n_left, n_steps).to(tl.int32)
    tl.assume(n_own > 0)  # see add_taps

    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for _ in tl.range(0, n_own):
        m_pixel = (o_image < N)[:, None]
        o_gy = o_image * s_gyn + o_p * s_gyp + o_q * s_gyq
        o_x = o_image * s_xn + o_p * stride_h * s_xh + o_q * stride_w * s_xw
        p_gy_tile = tl.multiple_of(p_gy + (o_gy[:, None] + o_k[None, :]), [1, GROUP_GY * ITEMSIZE])
        p_x_tile = tl.multiple_of(p_x + (o_x[:, None] + o_c[None, :]), [1, GROUP_X * ITEMSIZE])
        b_gy = tl.load(p_gy_tile, mask=m_pixel & m_k[None, :], other=0.0)  # [BLOCK_D, BLOCK_M]
        b_x = tl.load(p_x_tile, mask=m_pixel & m_c[None, :], other=0.0)  # [BLOCK_D, BLOCK_N]
        acc = multiply_add(b_gy.T, b_x, acc, PRECISION)

        o_q += jump_q
        is_next_row = o_q >= n_q
        o_q = tl.where(is_next_row, o_q - n_q, o_q)
        o_p += jump_p + is_next_row.to(tl.int32)
        is_next_image = o_p >= n_p
        o_p = tl.where(is_next_image, o_p - n_p, o_p)
        o_image += jump_image + is_next_image.to(tl.int32)

    p_partials += (tl.load(p_tap + 1).to(tl.int64) + i_part.to(tl.int64) * K) * C
    o_partials = o_k[:, None] * C + o_c[None, :]
    store_tile(p_partials, o_partials, acc, (o_k < K)[:, None] & m_c[None, :], GROUP_X)  # [BLOCK_M, BLOCK_N]


# fmt: off
@triton.jit(do_not_specialize=GRAD_WEIGHT_SIZES)
def dilated_grad_weight_boxes(
    p_gy,  # [N, output channels, P, Q], channels adjacent
    p_x,  # [N, C, H, W], channels adjacent
    p_partials,  # [rows, C] fp32: for each tap [splits, K]
    p_taps,  # [n_taps + 1, TAP_FIELDS]
    N, C, n_taps,
    n_steps,  # boxes of a program
    n_blocks_c,
    stride_h, stride_w,
    s_gyn, s_gyp, s_gyq,
    s_xn, s_xh, s_xw,
    BOX_N: tl.constexpr, BOX_H: tl.constexpr, BOX_W: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_TAPS: tl.constexpr,
    GROUP_X: tl.constexpr, PRECISION: tl.constexpr, IS_INDEX_64: tl.constexpr,
):
    # fmt: on
    BLOCK_D: tl.constexpr = BOX_N * BOX_H * BOX_W
    p_tap = find_row(p_taps, tl.program_id(0), n_taps, _TAP_FIELDS, BLOCK_TAPS)
    i_channel, K = tl.load(p_tap + 2), tl.load(p_tap + 3)
    i_p, n_p, i_h = tl.load(p_tap + 4).to(tl.int64), tl.load(p_tap + 5), tl.load(p_tap + 6).to(tl.int64)
    i_q, n_q, i_w = tl.load(p_tap + 7).to(tl.int64), tl.load(p_tap + 8), tl.load(p_tap + 9).to(tl.int64)
    i_c, i_part = split_index(tl.program_id(0) - tl.load(p_tap), n_blocks_c)
    i_k, i_part = split_index(i_part, tl.cdiv(K, BLOCK_M))
    d_gy = tl.make_tensor_descriptor(
        p_gy + i_p * s_gyp + i_q * s_gyq + i_channel,
        [N, n_p, n_q, K], [s_gyn, s_gyp, s_gyq, 1], [BOX_N, BOX_H, BOX_W, BLOCK_M],
    )  # fmt: skip
    s_h, s_w = tl.cast(s_xh, tl.int64) * stride_h, tl.cast(s_xw, tl.int64) * stride_w
    d_x = tl.make_tensor_descriptor(
        p_x + i_h * s_xh + i_w * s_xw, [N, n_p, n_q, C], [s_xn, s_h, s_w, 1], [BOX_N, BOX_H, BOX_W, BLOCK_N]
    )
    n_boxes_w, n_boxes_h = tl.cdiv(n_q, BOX_W), tl.cdiv(n_p, BOX_H)
    i_first = i_part * n_steps
    i_last = tl.minimum(i_first + n_steps, tl.cdiv(N, BOX_N) * n_boxes_h * n_boxes_w)
    tl.assume(i_first < i_last)  # see add_taps

    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for i_box in tl.range(i_first, i_last):
        i_bw, i_bn = split_index(i_box, n_boxes_w)
        i_bh, i_bn = split_index(i_bn, n_boxes_h)
        b_gy = d_gy.load([i_bn * BOX_N, i_bh * BOX_H, i_bw * BOX_W, i_k * BLOCK_M]).reshape(BLOCK_D, BLOCK_M)
        b_x = d_x.load([i_bn * BOX_N, i_bh * BOX_H, i_bw * BOX_W, i_c * BLOCK_N]).reshape(BLOCK_D, BLOCK_N)
        acc = multiply_add(b_gy.T, b_x, acc, PRECISION)

    o_k = widen(i_k, IS_INDEX_64) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_c = widen(i_c, IS_INDEX_64) * BLOCK_N + tl.arange(0, BLOCK_N)
    p_partials += (tl.load(p_tap + 1).to(tl.int64) + i_part.to(tl.int64) * K) * C
    m_partials = (o_k < K)[:, None] & (o_c < in_groups(C, GROUP_X))[None, :]
    store_tile(p_partials, o_k[:, None] * C + o_c[None, :], acc, m_partials, GROUP_X)  # [BLOCK_M, BLOCK_N]


# fmt: off
@triton.jit(do_not_specialize=("K", "C", "S", "i_first_tap"))
def dilated_grad_weight_reduce(
    p_partials,  # [rows, C] fp32: for each tap [splits, K]
    p_gw,  # [K, C, R, S]
    p_taps,  # [taps + 1, TAP_FIELDS], R * S of them of this weight
    K, C, S,
    i_first_tap,
    s_gwk, s_gwc, s_gwr, s_gws,
    BLOCK_SPLITS: tl.constexpr, BLOCK: tl.constexpr,
):
    # fmt: on
    i_block, i_tap = split_index(tl.program_id(0), tl.cdiv(tl.cast(K, tl.int64) * C, BLOCK).to(tl.int32))
    p_tap = p_taps + (i_first_tap + i_tap) * _TAP_FIELDS
    i_first = tl.load(p_tap + 1)
    n_splits = (tl.load(p_tap + _TAP_FIELDS + 1) - i_first) // K
    n_weights = tl.cast(K, tl.int64) * C
    p_partials += i_first.to(tl.int64) * C
    o_weight = i_block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    o_split = tl.arange(0, BLOCK_SPLITS)[:, None]
    m_weight = o_weight < n_weights

    acc = tl.zeros([BLOCK_SPLITS, BLOCK], tl.float32)
    for i_split in tl.range(0, n_splits, BLOCK_SPLITS):
        o_partials = (i_split + o_split) * n_weights + o_weight[None, :]
        m_partials = (i_split + o_split < n_splits) & m_weight[None, :]
        acc += tl.load(p_partials + o_partials, mask=m_partials, other=0)  # [BLOCK_SPLITS, BLOCK]
    b_sum = tl.sum(acc, 0)  # [BLOCK]

    o_c, o_k = split_index(o_weight, C)
    i_s, i_r = split_index(i_tap, S)
    o_gw = o_k * s_gwk + o_c * s_gwc + i_r.to(tl.int64) * s_gwr + i_s * s_gws
    tl.store(p_gw + o_gw, b_sum.to(p_gw.dtype.element_ty), mask=m_weight)  # [BLOCK]
