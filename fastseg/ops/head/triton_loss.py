"""Cross entropy of bilinearly resized logits in Triton: the loss, and its gradient at low resolution.

With y = resize(x) [N, C, P, Q], never in memory, t = target[n, p, q], and a weight w[c] of each class (1 without any):

    own    = (1 - label_smoothing) * w[t]
    spread = label_smoothing / C, for every class; 0 where the pixel is ignored, as is w[t]
    loss   = own * (lse - y[t]) + spread * sum over c of w[c] * (lse - y[c]),    lse = log of sum over c of exp(y[c])
    dy[c]  = exp(y[c] - lse) * (own + spread * sum of w) - own * (c == t) - spread * w[c]
    dx     = the gradient of the resize, of dy

Kernel 1 owns BLOCK columns of up to ROWS output rows between two input rows and loops over the classes, as the argmax
in triton.py does: loads and blends along the columns serve all its rows. Each output keeps a maximum and a sum of
exponentials relative to it, at one exponential a class: of the old and the new maximum's, one is always exp(0).
It stores both (8 bytes a pixel: lse alone would lose the low bits of large scores), and sums of losses and weights of
the program, which kernel 3 adds up in a fixed order.

Kernel 2 goes over input cells. The outputs between input columns w and w + 1, and rows h and h + 1, are those of cell
(h, w); each reads its four corners, and no other:

        x[h, w] --- x[h, w+1]        a thread owns cell column w in CLASSES classes, and walks down the rows h;
           |  outputs  |             it computes every output of its cells once: one exponential an output and class,
           |  of cell  |             and two sums down a column, for corners above and below, then a column's sums go to
        x[h+1,w] -- x[h+1,w+1]       the corners left and right. What is below is carried to the next row in registers;
                                     what is right goes to the neighbouring thread once a row of cells. Scores are
                                     blended as in kernel 1, to the bit, so that the largest is exactly the maximum.

A program is one warp: 32 cell columns, of which the first is computed for its right corners alone, so 3 % are computed
twice; so is the row of cells above a strip. Nothing is stored but x's gradient, in fp32; there are no atomics.

Bytes: every block of classes reads targets and softmax again, from L2. DRAM sees x and targets twice, the softmax once
each way and the gradient once: 0.45 GB for 16x150x128x128 -> 512 in bf16, 0.10 ms of an H200. Logits in channels_last
are copied to planes first, and the gradient from planes last: 0.16 and 0.31 GB more. The limit is instructions (counted
in code for sm_90): 15 an output and class in kernel 1, and in kernel 2 about 21 and a quarter of that for threads that
idle beside wider cells; each has one exponential (16 a clock and multiprocessor). At 128 instructions a clock on each
of 132 multiprocessors that makes 0.9 ms.

The file is long because both kernels follow one formula and agree to the bit: they are to be read side by side.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch._prims_common import suggest_memory_format

from fastseg.ops.head.op import empty_resized
from fastseg.ops.head.triton_plan import (
    BLOCK,
    FEW_REGISTERS,
    LANES,
    MAX_CLASSES,
    NO_SPILLS,
    balanced_block,
    plan_axis,
    plan_strip,
    plan_units,
)
from fastseg.ops.head.triton_planes import as_channels_last, as_planes, last_offset
from fastseg.ops.head.triton_sampling import (
    blend,
    exp2,
    first_output,
    load_between,
    output_rows,
    sample,
    share_of,
)
from fastseg.ops.triton_common import (
    DTYPES,
    cdiv,
    check_like,
    fail,
    launch,
    needs_index_64,
    on_device,
    split_index,
    strides,
    widen,
)

# Arguments that change from image to image and gain nothing from being known when a kernel is compiled.
RUNTIME_SIZES = (
    "C",
    "H",
    "W",
    "P",
    "Q",
    "turns_h",
    "turns_w",
    "block_h",
    "n_columns",
    "n_chunks",
    "ignore_index",
)
# Below every finite score: infinity minus infinity would be NaN.
LOG2_E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-3.4028234663852886e38)
TOTAL_BLOCK = 2048


@triton.jit
def load_targets(p_row, p_weight, C, ignore_index, o_target, m_pixel, HAS_WEIGHT: tl.constexpr):
    """Of a row's pixels: (target, is it a class, is it neither a class nor ignored, w[t] or 0)."""
    b_target = tl.load(p_row + o_target, mask=m_pixel, other=ignore_index)  # [BLOCK]
    m_kept = m_pixel & (b_target != ignore_index)
    m_class = m_kept & (b_target >= 0) & (b_target < C)
    if HAS_WEIGHT:
        b_weight = tl.load(p_weight + b_target, mask=m_class, other=0).to(tl.float32)
    else:
        b_weight = tl.where(m_class, 1.0, 0.0)
    return b_target, m_class, m_kept & ~m_class, b_weight


@triton.jit
def load_weight(p_weight, i_c, m_c, HAS_WEIGHT: tl.constexpr):
    """w[c] in fp32, a scalar."""
    if HAS_WEIGHT:
        weight = tl.load(p_weight + i_c, mask=m_c, other=0).to(tl.float32)
    else:
        weight = 1.0
    return weight


@triton.jit
def total_of_weights(p_weight_sum, C, HAS_WEIGHT: tl.constexpr):
    if HAS_WEIGHT:
        total = tl.load(p_weight_sum)
    else:
        total = tl.cast(C, tl.float32)
    return total


# fmt: off
@triton.heuristics({
    "HAS_WEIGHT": lambda args: args["p_weight"] is not None,
    "HAS_SMOOTHING": lambda args: args["label_smoothing"] != 0,
    "HAS_LOSSES": lambda args: args["p_losses"] is not None,
})
@triton.jit(do_not_specialize=RUNTIME_SIZES)
def cross_entropy_forward(
    p_x,  # [N, C, H, W], contiguous along W
    p_target,  # [N, P, Q] int64
    p_weight,  # [C] or None
    p_weight_sum,  # scalar fp32: the sum of p_weight; None without it, or without smoothing
    p_max,  # [N, P, Q] fp32: the largest score
    p_log,  # [N, P, Q] fp32: log2 of the sum of exp(score - max)
    p_losses,  # [N, P, Q] fp32 or None
    p_sums,  # [2, programs] fp32: losses, weights
    p_wrong,  # [programs] int64: a target that is no class, or 0
    C, H, W, P, Q, n_columns, n_chunks, turns_h,
    step_h, step_w, ignore_index, label_smoothing,
    s_xn, s_xc, s_xh,
    s_tn, s_tp, s_tq,
    s_ln, s_lp,  # of p_max, p_log and p_losses
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, HAS_SMOOTHING: tl.constexpr, HAS_LOSSES: tl.constexpr,
    IS_ALIGNED: tl.constexpr, IS_BETWEEN_ROWS: tl.constexpr, IS_INDEX_64: tl.constexpr,
):
    # fmt: on
    i_block, i_unit = split_index(tl.program_id(0), tl.cdiv(n_columns, BLOCK))
    i_top, i_bottom, i_p, i_end = output_rows(
        i_unit, n_chunks, step_h, H, P, turns_h, ROWS, IS_ALIGNED, IS_BETWEEN_ROWS
    )
    o_column = widen(i_block, IS_INDEX_64) * BLOCK + tl.arange(0, BLOCK)
    m_column = o_column < n_columns
    o_q, o_n = split_index(o_column, Q)
    o_left, o_right, b_share = sample(o_q, step_w, W, IS_ALIGNED)
    o_left = o_n * s_xn + o_left
    o_right = o_n * s_xn + o_right
    o_target = o_n * s_tn + o_q * s_tq
    o_pixel = o_n * s_ln + o_q
    p_top = p_x + i_top.to(tl.int64) * s_xh
    p_bottom = p_x + i_bottom.to(tl.int64) * s_xh

    b_zero = tl.zeros([BLOCK], tl.float32)
    b_sum_losses, b_sum_weights = b_zero, b_zero  # [BLOCK]
    b_wrong = tl.zeros([BLOCK], tl.int64)
    b_kept, b_own, b_spread, b_score, b_centre = (), (), (), (), ()  # ROWS x [BLOCK]
    for i in tl.static_range(ROWS):
        m_pixel = m_column & (i_p + i < i_end)
        p_row = p_target + (i_p + i).to(tl.int64) * s_tp
        b_target, m_class, m_wrong, b_weight = load_targets(
            p_row, p_weight, C, ignore_index, o_target, m_pixel, HAS_WEIGHT
        )
        o_class = b_target * s_xc
        b_above, b_below = load_between(p_top, p_bottom, o_left + o_class, o_right + o_class, b_share, m_class)
        share = share_of(i_p + i, step_h, H, IS_ALIGNED)
        b_y = blend(b_above, b_below, share)
        b_sum_weights += b_weight
        b_wrong = tl.where(m_wrong, b_target, b_wrong)
        b_kept = b_kept + (m_class | m_wrong,)
        # A target that is no class has no loss.
        b_own = b_own + (tl.where(m_wrong, float("nan"), b_weight * (1 - label_smoothing)),)
        b_spread = b_spread + (tl.where(m_class, label_smoothing / C, 0.0),)
        b_score = b_score + (b_y,)
        # Sums of differences to some score of the pixel keep what large scores have in common out of the rounding.
        b_centre = b_centre + (tl.where(tl.abs(b_y) < float("inf"), b_y, 0.0),)

    b_max = (tl.full([BLOCK], LOWEST, tl.float32),) * ROWS  # ROWS x [BLOCK]
    b_sum = (b_zero,) * ROWS  # ROWS x [BLOCK]: of exp(y - max)
    b_scores = (b_zero,) * ROWS  # ROWS x [BLOCK]: of w * (y - centre)
    for i_c in tl.range(0, tl.where(i_p < i_end, C, 0), loop_unroll_factor=2):
        i_class = widen(i_c, IS_INDEX_64) * s_xc
        b_above, b_below = load_between(p_top, p_bottom, o_left + i_class, o_right + i_class, b_share, m_column)
        maxima, sums, scores = (), (), ()
        for i in tl.static_range(ROWS):
            share = share_of(i_p + i, step_h, H, IS_ALIGNED)
            b_y = blend(b_above, b_below, share)
            b_ratio = exp2(tl.abs(b_y - b_max[i]) * -LOG2_E)
            is_larger = b_y > b_max[i]
            sums = sums + (tl.where(is_larger, b_sum[i] * b_ratio + 1, b_sum[i] + b_ratio),)
            maxima = maxima + (tl.maximum(b_max[i], b_y),)
            if HAS_SMOOTHING:
                weight = load_weight(p_weight, i_c, True, HAS_WEIGHT)
                b_term = tl.where(weight == 0, 0.0, weight * (b_y - b_centre[i]))
                scores = scores + (b_scores[i] + b_term,)
            else:
                scores = scores + (b_scores[i],)
        b_max, b_sum, b_scores = maxima, sums, scores

    for i in tl.static_range(ROWS):
        m_pixel = m_column & (i_p + i < i_end)
        # An infinite score has no softmax.
        b_log = tl.where(b_max[i] == float("inf"), float("nan"), tl.log(b_sum[i]))
        b_loss = tl.where(b_own[i] == 0, 0.0, b_own[i] * ((b_max[i] - b_score[i]) + b_log))
        if HAS_SMOOTHING:
            total = total_of_weights(p_weight_sum, C, HAS_WEIGHT)
            b_all = tl.where(total == 0, 0.0, total * ((b_max[i] - b_centre[i]) + b_log)) - b_scores[i]
            b_loss += tl.where(b_spread[i] == 0, 0.0, b_spread[i] * b_all)
        b_loss = tl.where(m_pixel & b_kept[i], b_loss, 0.0)
        b_sum_losses += b_loss
        i_line = (i_p + i).to(tl.int64) * s_lp
        tl.store(p_max + i_line + o_pixel, b_max[i], mask=m_pixel)  # [BLOCK]
        tl.store(p_log + i_line + o_pixel, b_log * LOG2_E, mask=m_pixel)  # [BLOCK]
        if HAS_LOSSES:
            tl.store(p_losses + i_line + o_pixel, b_loss, mask=m_pixel)  # [BLOCK]

    i_program = tl.program_id(0)
    tl.store(p_sums + i_program, tl.sum(b_sum_losses, 0))
    tl.store(p_sums + tl.num_programs(0) + i_program, tl.sum(b_sum_weights, 0))
    wrong = tl.max(b_wrong, 0)
    tl.store(p_wrong + i_program, tl.where(wrong > 0, wrong, tl.min(b_wrong, 0)))


# fmt: off
@triton.jit(do_not_specialize=("n", "ignore_index"))
def cross_entropy_total(
    p_sums,  # [2, n] fp32: losses, weights
    p_wrong,  # [n] int64
    p_loss,  # scalar fp32
    p_total,  # scalar fp32
    p_offender,  # scalar int64
    n, ignore_index,
    BLOCK: tl.constexpr, IS_MEAN: tl.constexpr,
):
    # fmt: on
    b_losses = tl.zeros([BLOCK], tl.float32)
    b_weights = tl.zeros([BLOCK], tl.float32)
    b_high = tl.zeros([BLOCK], tl.int64)
    b_low = tl.zeros([BLOCK], tl.int64)
    for i in tl.range(0, n, BLOCK):
        o_part = i + tl.arange(0, BLOCK)
        m_part = o_part < n
        b_losses += tl.load(p_sums + o_part, mask=m_part, other=0)  # [BLOCK]
        b_weights += tl.load(p_sums + n + o_part, mask=m_part, other=0)  # [BLOCK]
        b_wrong = tl.load(p_wrong + o_part, mask=m_part, other=0)  # [BLOCK]
        b_high = tl.maximum(b_high, b_wrong)
        b_low = tl.minimum(b_low, b_wrong)
    loss, total = tl.sum(b_losses, 0), tl.sum(b_weights, 0)
    if IS_MEAN:
        loss = loss / total
    high, low = tl.max(b_high, 0), tl.min(b_low, 0)
    wrong = tl.where(high > 0, high, low)  # 0 is a class
    tl.store(p_loss, loss)
    tl.store(p_total, total)
    tl.store(p_offender, tl.where(wrong == 0, ignore_index, wrong))


# fmt: off
@triton.heuristics({
    "HAS_WEIGHT": lambda args: args["p_weight"] is not None,
    "HAS_SMOOTHING": lambda args: args["label_smoothing"] != 0,
    "HAS_GRAD_LOSSES": lambda args: args["p_grad_losses"] is not None,
})
@triton.jit(do_not_specialize=RUNTIME_SIZES)
def cross_entropy_gradient(
    p_x,  # [N, C, H, W], contiguous along W
    p_target,  # [N, P, Q] int64
    p_weight,  # [C] or None
    p_weight_sum,  # scalar fp32: the sum of p_weight; None without it, or without smoothing
    p_max,  # [N, P, Q] fp32: the largest score
    p_log,  # [N, P, Q] fp32: log2 of the sum of exp(score - max)
    p_grad_losses,  # [N, P, Q], or None: 1
    p_gx,  # [N, C, H, W] fp32, contiguous
    C, H, W, P, Q, n_columns, block_h, turns_h, turns_w,
    step_h, step_w, ignore_index, label_smoothing,
    s_xn, s_xc, s_xh,
    s_tn, s_tp, s_tq,
    s_ln, s_lp,
    s_gn, s_gp, s_gq,
    s_gxn, s_gxc, s_gxh,
    CLASSES: tl.constexpr, BLOCK: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, HAS_SMOOTHING: tl.constexpr, HAS_GRAD_LOSSES: tl.constexpr,
    IS_ALIGNED: tl.constexpr, IS_INDEX_64: tl.constexpr,
):
    # fmt: on
    i_c, i_rest = split_index(tl.program_id(0), tl.cdiv(C, CLASSES))
    i_block, i_strip = split_index(i_rest, tl.cdiv(n_columns, BLOCK - 1))
    i_c *= CLASSES
    i_h = i_strip * block_h

    # Cell columns of all images, one after the other; the first is the last of the block before.
    o_lane = tl.arange(0, BLOCK)
    o_column = widen(i_block, IS_INDEX_64) * (BLOCK - 1) - 1 + o_lane
    m_column = (o_column >= 0) & (o_column < n_columns)
    o_w, o_n = split_index(tl.where(m_column, o_column, 0), W)
    m_left = m_column & (o_lane > 0)
    m_edge = o_w == W - 1
    o_before = tl.maximum(o_lane - 1, 0)
    o_first = first_output(o_w, step_w, W, Q, turns_w, IS_ALIGNED)
    o_count = tl.where(m_column, first_output(o_w + 1, step_w, W, Q, turns_w, IS_ALIGNED) - o_first, 0)
    m_cell = o_count > 0
    o_last = o_first + o_count - 1
    n_outputs = tl.max(o_count, 0)  # of a cell in one row
    o_x = o_n * s_xn + o_w
    o_x_right = o_n * s_xn + tl.minimum(o_w + 1, W - 1)

    total = total_of_weights(p_weight_sum, C, HAS_WEIGHT and HAS_SMOOTHING)
    i_above = tl.maximum(i_h - 1, 0)  # its outputs reach the first row of the strip
    b_zero = tl.zeros([BLOCK], tl.float32)
    b_x, b_x_right, weights = (), (), ()  # CLASSES x [BLOCK], the upper corners of cells; CLASSES scalars
    for c in tl.static_range(CLASSES):
        p_above = p_x + i_above.to(tl.int64) * s_xh + (i_c + c).to(tl.int64) * s_xc
        b_x = b_x + (tl.load(p_above + o_x, mask=m_column & (i_c + c < C), other=0).to(tl.float32),)
        b_x_right = b_x_right + (tl.load(p_above + o_x_right, mask=m_column & (i_c + c < C), other=0).to(tl.float32),)
        weights = weights + (load_weight(p_weight, i_c + c, i_c + c < C, HAS_WEIGHT and HAS_SMOOTHING),)
    acc_left, acc_right = (b_zero,) * CLASSES, (b_zero,) * CLASSES  # CLASSES x [BLOCK], of upper corners

    for i_row in range(i_above, tl.minimum(i_h + block_h, H)):
        i_p = first_output(i_row, step_h, H, P, turns_h, IS_ALIGNED)
        i_end = first_output(i_row + 1, step_h, H, P, turns_h, IS_ALIGNED)
        i_below = tl.minimum(i_p * 0 + i_row + 1, H - 1)
        b_below, b_below_right = (), ()  # CLASSES x [BLOCK], the lower corners
        for c in tl.static_range(CLASSES):
            p_below = p_x + i_below.to(tl.int64) * s_xh + (i_c + c).to(tl.int64) * s_xc
            b_below = b_below + (tl.load(p_below + o_x, mask=m_column & (i_c + c < C), other=0).to(tl.float32),)
            b_below_right = b_below_right + (
                tl.load(p_below + o_x_right, mask=m_column & (i_c + c < C), other=0).to(tl.float32),
            )
        acc_below, acc_below_right = (b_zero,) * CLASSES, (b_zero,) * CLASSES  # CLASSES x [BLOCK], of lower corners

        for i in range(n_outputs):
            # A cell with fewer outputs repeats its last one, which then counts nothing.
            o_q = tl.minimum(o_first + i, o_last)
            b_share = share_of(o_q, step_w, W, IS_ALIGNED)
            b_to_left = tl.where(i < o_count, 1 - b_share, 0.0)
            b_to_right = tl.where(i < o_count, b_share, 0.0)
            o_target = o_n * s_tn + o_q * s_tq
            o_pixel = o_n * s_ln + o_q
            b_above, b_under = (), ()  # CLASSES x [BLOCK], blended along the columns
            for c in tl.static_range(CLASSES):
                b_above = b_above + (blend(b_x[c], b_x_right[c], b_share),)
                b_under = b_under + (blend(b_below[c], b_below_right[c], b_share),)
            column, column_below = (b_zero,) * CLASSES, (b_zero,) * CLASSES  # CLASSES x [BLOCK]

            for i_y in range(i_p, i_end):
                share = share_of(i_y, step_h, H, IS_ALIGNED)
                p_row = p_target + tl.cast(i_y, tl.int64) * s_tp
                b_target, m_class, m_wrong, b_weight = load_targets(
                    p_row, p_weight, C, ignore_index, o_target, m_cell, HAS_WEIGHT
                )
                i_line = tl.cast(i_y, tl.int64) * s_lp
                b_max = tl.load(p_max + i_line + o_pixel, mask=m_cell, other=0)  # [BLOCK]
                b_log = tl.load(p_log + i_line + o_pixel, mask=m_cell, other=0)  # [BLOCK]
                b_own = tl.where(m_wrong, float("nan"), b_weight * (1 - label_smoothing))
                b_spread = tl.where(m_class, label_smoothing / C, 0.0)
                if HAS_GRAD_LOSSES:
                    p_grad_row = p_grad_losses + tl.cast(i_y, tl.int64) * s_gp
                    b_grad = tl.load(p_grad_row + (o_n * s_gn + o_q * s_gq), mask=m_cell, other=0)  # [BLOCK]
                    b_own *= b_grad.to(tl.float32)
                    b_spread *= b_grad.to(tl.float32)
                b_to_above, b_to_below = b_zero + (1 - share), b_zero + share
                if HAS_SMOOTHING:
                    b_both = b_own + b_spread * total
                else:  # every term counts `own`
                    b_to_above *= b_own
                    b_to_below *= b_own
                b_wanted = tl.where(m_class, b_target, -1).to(tl.int32) - i_c
                sums, sums_below = (), ()
                for c in tl.static_range(CLASSES):
                    b_y = blend(b_above[c], b_under[c], share)
                    b_grad_y = exp2((b_y - b_max) * LOG2_E - b_log)
                    if HAS_SMOOTHING:
                        b_grad_y = b_grad_y * b_both - b_spread * weights[c]
                        b_grad_y = tl.where(b_wanted == c, b_grad_y - b_own, b_grad_y)
                    else:
                        b_grad_y = tl.where(b_wanted == c, b_grad_y - 1, b_grad_y)
                    sums = sums + (column[c] + b_grad_y * b_to_above,)
                    sums_below = sums_below + (column_below[c] + b_grad_y * b_to_below,)
                column, column_below = sums, sums_below

            uppers, uppers_right, lowers, lowers_right = (), (), (), ()
            for c in tl.static_range(CLASSES):
                uppers = uppers + (acc_left[c] + column[c] * b_to_left,)
                uppers_right = uppers_right + (acc_right[c] + column[c] * b_to_right,)
                lowers = lowers + (acc_below[c] + column_below[c] * b_to_left,)
                lowers_right = lowers_right + (acc_below_right[c] + column_below[c] * b_to_right,)
            acc_left, acc_right = uppers, uppers_right
            acc_below, acc_below_right = lowers, lowers_right

        is_last = i_p * 0 + i_row == H - 1  # below the last row there is only itself
        for c in tl.static_range(CLASSES):
            # A cell column without outputs has summed what is not its own.
            b_left = tl.where(m_cell, acc_left[c] + tl.where(is_last, acc_below[c], 0.0), 0.0)
            b_right = tl.where(m_cell, acc_right[c] + tl.where(is_last, acc_below_right[c], 0.0), 0.0)
            b_gx = b_left + tl.where(o_w > 0, tl.gather(b_right, o_before, 0), 0.0) + tl.where(m_edge, b_right, 0.0)
            p_gx_row = p_gx + tl.cast(i_row, tl.int64) * s_gxh + (i_c + c).to(tl.int64) * s_gxc
            tl.store(p_gx_row + (o_n * s_gxn + o_w), b_gx, mask=m_left & (i_row >= i_h) & (i_c + c < C))  # [BLOCK]
        b_x, b_x_right = b_below, b_below_right
        acc_left, acc_right = acc_below, acc_below_right


def cross_entropy(logits, target, weight, ignore_index, label_smoothing, align_corners, reduction, with_gradient):
    """(loss, sum of the targets' weights, gradient of the sum of losses or an empty tensor, a wrong target).

    All but the last in float32. Where every target is a class or ignored, the last is `ignore_index`.
    """
    _check(logits, target, weight)
    with on_device(logits):
        options = (target, weight, ignore_index, label_smoothing, align_corners)
        fp32 = {"dtype": torch.float32, "device": logits.device}
        loss, total = torch.empty((), **fp32), torch.empty((), **fp32)
        losses = torch.empty(target.shape, **fp32) if reduction == "none" else None
        offender = torch.empty((), dtype=torch.int64, device=logits.device)
        if target.numel() == 0:
            gradient = _empty_gradient(logits) if with_gradient else torch.empty(0, **fp32)
            loss.fill_(float("nan") if reduction == "mean" else 0)
            return loss if losses is None else losses, total.zero_(), gradient, offender.fill_(ignore_index)
        x = as_planes(logits)
        softmax, sums, wrong = _launch_forward(x, *options, losses)
        launch(
            cross_entropy_total,
            1,
            p_sums=sums,
            p_wrong=wrong,
            p_loss=loss,
            p_total=total,
            p_offender=offender,
            n=wrong.numel(),
            ignore_index=ignore_index,
            BLOCK=TOTAL_BLOCK,
            IS_MEAN=reduction == "mean",
            num_warps=8,
        )
        gradient = torch.empty(0, **fp32)
        if with_gradient:
            gradient = _like_resized(_launch_gradient(x, *options, softmax, None), logits)
    return loss if losses is None else losses, total, gradient, offender


def cross_entropy_backward(grad_losses, logits, target, weight, ignore_index, label_smoothing, align_corners):
    """The logits' gradient in float32, from that of each pixel's loss, [N, H, W], any strides."""
    _check(logits, target, weight)
    with on_device(logits):
        options = (target, weight, ignore_index, label_smoothing, align_corners)
        if target.numel() == 0:
            return _empty_gradient(logits)
        x = as_planes(logits)
        softmax, _, _ = _launch_forward(x, *options, None)
        return _like_resized(_launch_gradient(x, *options, softmax, grad_losses), logits)


def _launch_forward(x, target, weight, ignore_index, label_smoothing, align_corners, losses):
    """(maximum and log2 of the sum of each pixel, sums of the programs, wrong targets of the programs)."""
    (N, P, Q), H = target.shape, x.shape[2]
    rows = plan_axis(H, P, None, align_corners)
    units = plan_units(rows)
    programs = cdiv(N * Q, BLOCK) * units.count
    softmax, sums = (torch.empty(size, dtype=torch.float32, device=x.device) for size in ((2, N, P, Q), (2, programs)))
    wrong = torch.empty(programs, dtype=torch.int64, device=x.device)
    launch(
        cross_entropy_forward,
        programs,
        p_x=x,
        p_max=softmax[0],
        p_log=softmax[1],
        p_losses=losses,
        p_sums=sums,
        p_wrong=wrong,
        n_columns=N * Q,
        n_chunks=units.n_chunks,
        turns_h=rows.turns,
        **_shared_arguments(x, target, weight, ignore_index, label_smoothing, align_corners),
        ROWS=units.ROWS,
        BLOCK=BLOCK,
        IS_BETWEEN_ROWS=units.IS_BETWEEN_ROWS,
        IS_INDEX_64=needs_index_64(N * Q + BLOCK, *(last_offset(t) for t in (x, target, softmax))),
        num_warps=4,
        **NO_SPILLS,
    )
    return softmax, sums, wrong


def _launch_gradient(x, target, weight, ignore_index, label_smoothing, align_corners, softmax, grad_losses):
    """The gradient of `x` in float32, contiguous."""
    (N, C, H, W), (P, Q) = x.shape, target.shape[1:]
    rows, columns = (plan_axis(*axis, None, align_corners) for axis in ((H, P), (W, Q)))
    gradient = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    classes = balanced_block(C, MAX_CLASSES)
    programs = cdiv(N * W, LANES - 1) * cdiv(C, classes)
    block_h = plan_strip(H, programs)
    per_pixel = (target, softmax) if grad_losses is None else (target, softmax, grad_losses)
    is_wide = needs_index_64(N * W + LANES, *(last_offset(t) for t in (x, gradient, *per_pixel)))
    launch(
        cross_entropy_gradient,
        programs * cdiv(H, block_h),
        p_x=x,
        p_max=softmax[0],
        p_log=softmax[1],
        p_grad_losses=grad_losses,
        p_gx=gradient,
        n_columns=N * W,
        block_h=block_h,
        turns_h=rows.turns,
        turns_w=columns.turns,
        **_shared_arguments(x, target, weight, ignore_index, label_smoothing, align_corners),
        **strides("s_gn s_gp s_gq", target if grad_losses is None else grad_losses),
        **dict(zip(("s_gxn", "s_gxc", "s_gxh"), gradient.stride(), strict=False)),
        CLASSES=classes,
        BLOCK=LANES,
        IS_INDEX_64=is_wide,
        num_warps=1,
        **(NO_SPILLS if is_wide else FEW_REGISTERS),
    )
    return gradient


def _shared_arguments(x, target, weight, ignore_index, label_smoothing, align_corners) -> dict:
    (C, H, W), (P, Q) = x.shape[1:], target.shape[1:]
    return {
        "p_target": target,
        "p_weight": None if weight is None else weight.contiguous(),
        "p_weight_sum": None if weight is None or label_smoothing == 0 else weight.sum(dtype=torch.float32),
        "C": C, "H": H, "W": W, "P": P, "Q": Q,
        "step_h": plan_axis(H, P, None, align_corners).step,
        "step_w": plan_axis(W, Q, None, align_corners).step,
        "ignore_index": ignore_index,
        "label_smoothing": label_smoothing,
        "s_xn": x.stride(0), "s_xc": x.stride(1), "s_xh": x.stride(2),
        **strides("s_tn s_tp s_tq", target),
        "s_ln": P * Q, "s_lp": Q,
        "IS_ALIGNED": align_corners,
    }  # fmt: skip


def _check(logits, target, weight) -> None:
    if logits.dim() != 4 or logits.dtype not in DTYPES:
        fail("4-D logits of float16, bfloat16 or float32", f"{logits.dim()}-D of {logits.dtype}")
    if target.dim() != 3 or target.dtype != torch.int64 or target.device != logits.device:
        fail(f"a 3-D target of int64 on {logits.device}", f"{target.dim()}-D of {target.dtype} on {target.device}")
    if target.shape[0] != logits.shape[0]:
        fail(f"a target of {logits.shape[0]} images", f"{target.shape[0]}")
    if weight is not None:
        check_like("weight", weight, logits.shape[1:2], logits)


def _empty_gradient(logits):
    """Of no pixels."""
    return empty_resized(logits, logits.shape[2:]).to(torch.float32).zero_()


def _like_resized(planes, like):
    """Planes in the memory format that torch.nn.functional.interpolate gives to what it makes of `like`."""
    return planes if suggest_memory_format(like) == torch.contiguous_format else as_channels_last(planes)
