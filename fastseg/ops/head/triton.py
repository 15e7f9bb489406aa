"""Bilinear resize in Triton: forward, its gradient, and the label of each pixel on top. The loss is in triton_loss.py.

    y[n, c, p, q] = blend over rows (p) of blend over columns (q) of x[n, c, first or second (p), first or second (q)]

Forward and gradient own tiles of columns x channels, with threads along whichever of the two is contiguous, and walk
down rows. Forward holds two input rows, blended along the columns, until an output row needs others: at 4x
that is one load and a few instructions an output, and the one coalesced write (2 bytes of 16-bit data) is the limit.

        p:   . . . . | . . . . | . . . .        the outputs between input rows h and h + 1 share both rows
        h:   0       1         2

The gradient gathers: a program owns input columns, reads each output row once, sums for every column the outputs that
read it (2 s of them at scale s; neighbours overlap in L1), and adds the sum to the two input rows that the output row
lies between, which are carried down in registers. grad_y is read once from DRAM, which is the limit; there are no
atomics, so the bits are the same every time.

The argmax never has y in memory. A program owns BLOCK columns of up to ROWS output rows between two input rows, and
loops over the classes: four loads of the small tensor (from L1: neighbouring threads read the same pixels) and two
blends along the columns serve all its rows; each then takes one blend and four instructions for the running maximum.
These instructions, about 12 an output and class at 4x, are the limit; memory is idle. Threads are the columns of all
images in one sequence, so that no width leaves some idle. Logits in channels_last are first copied with columns
contiguous: at 4x that is a sixteenth of y.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch._prims_common import suggest_memory_format

from fastseg.ops.head.op import empty_resized
from fastseg.ops.head.triton_loss import cross_entropy, cross_entropy_backward
from fastseg.ops.head.triton_plan import (
    BLOCK,
    NO_SPILLS,
    plan_axis,
    plan_strip,
    plan_tile,
    plan_units,
)
from fastseg.ops.head.triton_planes import as_planes, last_offset
from fastseg.ops.head.triton_sampling import (
    blend,
    first_output,
    load_between,
    output_rows,
    sample,
    share_of,
)
from fastseg.ops.triton_common import (
    DTYPES,
    MAX_GROUP,
    can_run,
    cdiv,
    coalesced,
    fail,
    group_size,
    in_groups,
    launch,
    load_tile,
    needs_index_64,
    on_device,
    split_index,
    store_tile,
    strides,
    widen,
)

__all__ = ["argmax", "backward", "can_run", "cross_entropy", "cross_entropy_backward", "forward"]

# Arguments that change from image to image and gain nothing from being known when a kernel is compiled.
RUNTIME_SIZES = (
    "H",
    "W",
    "P",
    "Q",
    "turns_h",
    "turns_w",
    "block_h",
    "most_read",
    "n_columns",
    "n_chunks",
)


# fmt: off
@triton.jit(do_not_specialize=RUNTIME_SIZES)
def upsample_forward(
    p_x,  # [N, C, H, W]
    p_y,  # [N, C, P, Q]
    C, H, W, P, Q, block_h,
    step_h, step_w,
    s_xn, s_xc, s_xh, s_xw,
    s_yn, s_yc, s_yp, s_yq,
    BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr, GROUP: tl.constexpr,
    GROUP_Q: tl.constexpr,  # columns that are stored at once when they are contiguous
    IS_ALIGNED: tl.constexpr, IS_INDEX_64: tl.constexpr,
):
    # fmt: on
    i_c, i_rest = split_index(tl.program_id(0), tl.cdiv(C, BLOCK_C))
    i_q, i_rest = split_index(i_rest, tl.cdiv(Q, BLOCK_W))
    i_strip, i_n = split_index(i_rest, tl.cdiv(P, block_h))
    i_p = i_strip * block_h

    # The compiler makes columns neighbouring threads, unless channels are contiguous.
    o_q = i_q * BLOCK_W + tl.arange(0, BLOCK_W)[:, None]
    o_c = i_c * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    o_left, o_right, b_share = sample(o_q, step_w, W, IS_ALIGNED)
    o_c = widen(o_c, IS_INDEX_64)
    o_left = widen(o_left, IS_INDEX_64) * s_xw + o_c * s_xc
    o_right = widen(o_right, IS_INDEX_64) * s_xw + o_c * s_xc
    o_y = widen(o_q, IS_INDEX_64) * s_yq + o_c * s_yc
    m_y = (o_q < in_groups(Q, GROUP_Q)) & (o_c < in_groups(C, GROUP))
    p_x += i_n.to(tl.int64) * s_xn
    p_y += i_n.to(tl.int64) * s_yn

    i_held = i_p * 0 - 1
    b_top = tl.zeros_like(o_y).to(tl.float32)  # [tile]
    b_bottom = b_top  # [tile]
    for i_row in range(i_p, tl.minimum(i_p + block_h, P)):
        i_top, i_bottom, share = sample(i_row, step_h, H, IS_ALIGNED)
        if i_top != i_held:
            p_top = p_x + i_top.to(tl.int64) * s_xh
            p_bottom = p_x + i_bottom.to(tl.int64) * s_xh
            b_top = blend(
                load_tile(p_top, o_left, m_y, GROUP), load_tile(p_top, o_right, m_y, GROUP), b_share
            )  # [tile]
            b_bottom = blend(
                load_tile(p_bottom, o_left, m_y, GROUP), load_tile(p_bottom, o_right, m_y, GROUP), b_share
            )  # [tile]
            i_held = i_top
        b_y = blend(b_top, b_bottom, share)  # [tile]
        store_tile(p_y + tl.cast(i_row, tl.int64) * s_yp, o_y, b_y, m_y, GROUP)


# fmt: off
@triton.jit(do_not_specialize=(*RUNTIME_SIZES, "s_gxw"))  # wide stores would not suit the gathered loads
def upsample_backward(
    p_gy,  # [N, C, P, Q]
    p_gx,  # [N, C, H, W]
    C, H, W, P, Q, block_h, turns_h, turns_w, most_read,
    step_h, step_w,
    s_gyn, s_gyc, s_gyp, s_gyq,
    s_gxn, s_gxc, s_gxh, s_gxw,
    BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr, GROUP: tl.constexpr,
    IS_ALIGNED: tl.constexpr, IS_INDEX_64: tl.constexpr,
):
    # fmt: on
    i_c, i_rest = split_index(tl.program_id(0), tl.cdiv(C, BLOCK_C))
    i_w, i_rest = split_index(i_rest, tl.cdiv(W, BLOCK_W))
    i_strip, i_n = split_index(i_rest, tl.cdiv(H, block_h))
    i_h = i_strip * block_h

    o_w = i_w * BLOCK_W + tl.arange(0, BLOCK_W)[:, None]
    o_c = i_c * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    o_first = first_output(o_w - 1, step_w, W, Q, turns_w, IS_ALIGNED)  # [columns of the tile]
    m_c = o_c < in_groups(C, GROUP)
    m_gx = (o_w < W) & m_c
    o_c = widen(o_c, IS_INDEX_64)
    o_gx = widen(o_w, IS_INDEX_64) * s_gxw + o_c * s_gxc
    p_gy += i_n.to(tl.int64) * s_gyn
    p_gx += i_n.to(tl.int64) * s_gxn

    i_above = tl.maximum(i_h - 1, 0)  # its outputs reach the first row of the strip
    b_zero = tl.zeros_like(o_gx).to(tl.float32)
    acc, acc_below = b_zero, b_zero  # [tile] of an input row, and of the next
    for i_row in range(i_above, tl.minimum(i_h + block_h, H)):
        i_p = first_output(i_row, step_h, H, P, turns_h, IS_ALIGNED)
        i_end = first_output(i_row + 1, step_h, H, P, turns_h, IS_ALIGNED)
        for i_gy in range(i_p, i_end):
            share_h = share_of(i_gy, step_h, H, IS_ALIGNED)
            p_row = p_gy + tl.cast(i_gy, tl.int64) * s_gyp
            b_row = b_zero
            for i in range(most_read):
                o_q = o_first + i
                o_left, o_right, b_share = sample(o_q, step_w, W, IS_ALIGNED)
                m_gy = (o_q < Q) & ((o_left == o_w) | (o_right == o_w)) & m_c
                b_weight = tl.where(o_left == o_w, 1 - b_share, 0.0) + tl.where(o_right == o_w, b_share, 0.0)
                o_gy = widen(o_q, IS_INDEX_64) * s_gyq + o_c * s_gyc
                b_gy = load_tile(p_row, o_gy, m_gy, GROUP)  # [tile]
                b_row = tl.where(m_gy, b_row + b_gy * b_weight, b_row)
            acc += b_row * (1 - share_h)
            acc_below += b_row * share_h
        acc = tl.where(tl.cast(i_row, tl.int32) == H - 1, acc + acc_below, acc)
        store_tile(p_gx + tl.cast(i_row, tl.int64) * s_gxh, o_gx, acc, m_gx & (i_row >= i_h), GROUP)  # [tile]
        acc, acc_below = acc_below, b_zero


# fmt: off
@triton.jit(do_not_specialize=RUNTIME_SIZES)
def upsample_argmax(
    p_x,  # [N, C, H, W], contiguous along W
    p_labels,  # [N, P, Q]
    C, H, W, P, Q, n_columns, n_chunks, turns_h,
    step_h, step_w,
    s_xn, s_xc, s_xh,
    s_yn, s_yp,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
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

    p_top = p_x + i_top.to(tl.int64) * s_xh
    p_bottom = p_x + i_bottom.to(tl.int64) * s_xh

    b_best = (tl.full([BLOCK], float("-inf"), tl.float32),) * ROWS  # ROWS x [BLOCK]
    b_label = (tl.zeros([BLOCK], tl.int32),) * ROWS  # ROWS x [BLOCK]
    for i_c in tl.range(0, tl.where(i_p < i_end, C, 0), loop_unroll_factor=2):
        o_class = widen(i_c, IS_INDEX_64) * s_xc
        b_top, b_bottom = load_between(p_top, p_bottom, o_left + o_class, o_right + o_class, b_share, m_column)
        bests, labels = (), ()
        for i in tl.static_range(ROWS):
            share = share_of(i_p + i, step_h, H, IS_ALIGNED)
            b_y = blend(b_top, b_bottom, share)
            # NaN compares false: it is taken, and nothing is taken after it.
            is_larger = ~(b_y <= b_best[i]) & (b_best[i] == b_best[i])
            bests = bests + (tl.where(is_larger, b_y, b_best[i]),)
            labels = labels + (tl.where(is_larger, i_c, b_label[i]),)
        b_best, b_label = bests, labels

    for i in tl.static_range(ROWS):
        p_row = p_labels + (i_p + i).to(tl.int64) * s_yp
        b_y = b_label[i].to(p_labels.dtype.element_ty)
        tl.store(p_row + o_n * s_yn + o_q, b_y, mask=m_column & (i_p + i < i_end))  # [BLOCK]


def forward(input, size, scales, align_corners):
    """Bilinear resize of `input` [N, C, H, W] to [N, C, *size]; `scales` are the scale factors asked for, or None."""
    _check(input)
    with on_device(input):
        output = empty_resized(input, size)
        if output.numel() == 0:
            return output
        x = coalesced(input, suggest_memory_format(output))
        (N, C, H, W), (P, Q) = x.shape, size
        rows, columns = _axes(x.shape, size, scales, align_corners)
        layout = _layout(Q, x, output)
        programs = N * cdiv(C, layout["BLOCK_C"]) * cdiv(Q, layout["BLOCK_W"])
        block_h = plan_strip(P, programs)
        launch(
            upsample_forward,
            programs * cdiv(P, block_h),
            p_x=x,
            p_y=output,
            C=C, H=H, W=W, P=P, Q=Q, block_h=block_h,
            step_h=rows.step,
            step_w=columns.step,
            **strides("s_xn s_xc s_xh s_xw", x),
            **strides("s_yn s_yc s_yp s_yq", output),
            **layout,
            GROUP_Q=math.gcd(MAX_GROUP, Q),
            IS_ALIGNED=align_corners,
            num_warps=4,
        )  # fmt: skip
    return output


def backward(grad_output, input_size, scales, align_corners):
    """The gradient of `forward`'s input, of shape `input_size`, from `grad_output`, any strides."""
    _check(grad_output)
    with on_device(grad_output):
        grad_input = empty_resized(grad_output, input_size[2:])
        if grad_output.numel() == 0 or grad_input.numel() == 0:
            return grad_input.zero_()
        gy = coalesced(grad_output, suggest_memory_format(grad_input))
        (N, C, H, W), (P, Q) = grad_input.shape, gy.shape[2:]
        rows, columns = _axes(input_size, (P, Q), scales, align_corners)
        layout = _layout(W, gy, grad_input)
        programs = N * cdiv(C, layout["BLOCK_C"]) * cdiv(W, layout["BLOCK_W"])
        block_h = plan_strip(H, programs)
        launch(
            upsample_backward,
            programs * cdiv(H, block_h),
            p_gy=gy,
            p_gx=grad_input,
            C=C, H=H, W=W, P=P, Q=Q, block_h=block_h,
            turns_h=rows.turns,
            turns_w=columns.turns,
            most_read=columns.most_read,
            step_h=rows.step,
            step_w=columns.step,
            **strides("s_gyn s_gyc s_gyp s_gyq", gy),
            **strides("s_gxn s_gxc s_gxh s_gxw", grad_input),
            **layout,
            IS_ALIGNED=align_corners,
            num_warps=4,
            **NO_SPILLS,
        )  # fmt: skip
    return grad_input


def argmax(logits, size, align_corners, dtype):
    """The class of the largest resized logit of each pixel, [N, *size] in `dtype`."""
    _check(logits)
    with on_device(logits):
        labels = logits.new_empty((logits.shape[0], *size), dtype=dtype)
        if labels.numel() == 0:
            return labels
        x = as_planes(logits)
        (N, C, H, W), (P, Q) = x.shape, size
        rows, columns = _axes(x.shape, size, None, align_corners)
        units = plan_units(rows)
        launch(
            upsample_argmax,
            cdiv(N * Q, BLOCK) * units.count,
            p_x=x,
            p_labels=labels,
            C=C, H=H, W=W, P=P, Q=Q,
            n_columns=N * Q,
            n_chunks=units.n_chunks,
            turns_h=rows.turns,
            step_h=rows.step,
            step_w=columns.step,
            s_xn=x.stride(0), s_xc=x.stride(1), s_xh=x.stride(2),
            s_yn=labels.stride(0), s_yp=labels.stride(1),
            ROWS=units.ROWS,
            BLOCK=BLOCK,
            IS_ALIGNED=align_corners,
            IS_BETWEEN_ROWS=units.IS_BETWEEN_ROWS,
            IS_INDEX_64=needs_index_64(last_offset(x), labels.numel(), N * Q + BLOCK),
            num_warps=4,
        )  # fmt: skip
    return labels


def _check(tensor) -> None:
    if tensor.dim() != 4 or tensor.dtype not in DTYPES:
        fail("a 4-D tensor of float16, bfloat16 or float32", f"{tensor.dim()}-D of {tensor.dtype}")


def _axes(input_size, size, scales, align_corners):
    scales = (None, None) if scales is None else scales
    return [plan_axis(*axis, align_corners) for axis in zip(input_size[2:], size, scales, strict=True)]


def _layout(columns: int, *tensors) -> dict[str, int | bool]:
    """The tile, and what strides and sizes decide."""
    channels = tensors[0].shape[1]
    is_channels_last = suggest_memory_format(tensors[-1]) == torch.channels_last
    offsets = [(channels - 1) * t.stride(1) + (t.shape[3] - 1) * t.stride(3) for t in tensors]
    return {
        **plan_tile(channels, columns, is_channels_last),
        "GROUP": group_size(channels, *tensors) if is_channels_last else 1,
        "IS_INDEX_64": needs_index_64(*offsets, *(16 * n for t in tensors for n in t.shape[1:])),
    }
