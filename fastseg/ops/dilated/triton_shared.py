"""The product of forward and grad_input by programs that share its work evenly, one on each multiprocessor.

Where there are little more tiles than multiprocessors, those that get a second one work alone at the end, and tiles of
few live taps leave theirs idle. Here the steps of all tiles are one row, cut into as many equal shares as there are
programs. A share begins and ends inside a tile:

    tiles     |  9 taps  |  9 taps  |  9 taps  | 6 taps | ...
    shares    |   0    |   1    |   2    |   3    |  4  ...
                       ^ program 1 adds up the end of the first tile, whose beginning is program 0's

Programs take their tiles from the last to the first. So each begins with a sum that it hands on, and ends with one that
it finishes with what programs before it have handed on meanwhile: nobody waits, and sums are added in a fixed order.
Programs wait for those with smaller numbers alone, which devices start first.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastseg.ops.dilated.triton_plan import RECTANGLE_FIELDS, SPAN_FIELDS
from fastseg.ops.dilated.triton_product import (
    PRODUCT_SIZES,
    find_row,
    find_step,
    has_vectors,
    load_span,
    next_step,
    scale_and_shift,
    store_product,
)
from fastseg.ops.triton_common import in_groups, multiply_add, split_index

SHARED_SIZES = (
    *(size for size in PRODUCT_SIZES if size not in ("n_splits", "s_split", "s_wk", "s_wr", "s_ws")),
    "n_share",
    "n_steps",
)
_RECTANGLE_FIELDS = tl.constexpr(RECTANGLE_FIELDS)
_SPAN_FIELDS = tl.constexpr(SPAN_FIELDS)


def _shared_name(specialization) -> str:
    return "dilated_grad_input_shared" if specialization.constants["IS_GRAD_INPUT"] else "dilated_forward_shared"


@triton.jit
def find_tile(p_rectangles, i_step, n_rectangles, n_depth, BLOCK_D: tl.constexpr, BLOCK_RECTANGLES: tl.constexpr):
    """The tile, of all rectangles, whose sum has step `i_step`."""
    p_rectangle = find_row(p_rectangles + 1, i_step, n_rectangles, _RECTANGLE_FIELDS, BLOCK_RECTANGLES) - 1
    n_taps = tl.load(p_rectangle + 4) * tl.load(p_rectangle + 4 + _SPAN_FIELDS)
    return tl.load(p_rectangle) + (i_step - tl.load(p_rectangle + 1)) // (n_taps * tl.cdiv(n_depth, BLOCK_D))


@triton.jit
def halves(b_x):
    """The left and the right half of the columns of a tile."""
    ROWS: tl.constexpr = b_x.shape[0]
    COLUMNS: tl.constexpr = b_x.shape[1]
    return tl.split(b_x.reshape(ROWS, 2, COLUMNS // 2).permute(0, 2, 1))


# fmt: off
@has_vectors
@triton.jit(do_not_specialize=SHARED_SIZES, repr=_shared_name)
def dilated_product_shared(
    p_source,  # [N, n_depth, source rows, source columns]: x or gy, channels adjacent
    d_weight,  # [R, S, K, C] in boxes of [1, 1, BLOCK_N, BLOCK_D], for grad_input of [1, 1, BLOCK_D, BLOCK_N]
    p_scale,  # [n_columns] fp32 or None
    p_bias,  # [n_columns], [images, n_columns] or None
    p_target,  # [N, n_columns, target rows, target columns]: y or gx, channels adjacent
    p_rectangles,  # [n_rectangles, RECTANGLE_FIELDS]
    p_sums,  # [programs, BLOCK_M, BLOCK_N] fp32, what each program hands on
    p_ready,  # [programs], zeros; one where it has
    N, n_depth, n_columns, n_rectangles,
    n_blocks,  # of columns
    n_row,  # targets in a row that are one image's
    n_share, n_steps,  # steps of one program, and of all
    period_h, period_w,  # from one target of a rectangle to the next
    step_h, step_w,  # and from its source to the next one's
    s_sn, s_sh, s_sw,
    s_tn, s_th, s_tw,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_RECTANGLES: tl.constexpr,
    GROUP_SOURCE: tl.constexpr, GROUP_TARGET: tl.constexpr,
    ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
    HAS_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_IMAGE_BIAS: tl.constexpr,
    IS_GRAD_INPUT: tl.constexpr, IS_DEPTH_WHOLE: tl.constexpr,
):
    # fmt: on
    HALF: tl.constexpr = BLOCK_N // 2
    ITEMSIZE: tl.constexpr = p_source.dtype.element_ty.primitive_bitwidth // 8
    i_program = tl.program_id(0)
    i_begin = i_program * n_share
    i_end = tl.minimum(i_begin + n_share, n_steps)
    i_last = find_tile(p_rectangles, i_end - 1, n_rectangles, n_depth, BLOCK_D, BLOCK_RECTANGLES)
    n_tiles = i_last + 1 - find_tile(p_rectangles, i_begin, n_rectangles, n_depth, BLOCK_D, BLOCK_RECTANGLES)
    o_sums = tl.arange(0, BLOCK_M)[:, None] * BLOCK_N + tl.arange(0, HALF)[None, :]  # [BLOCK_M, HALF]
    for i in tl.range(0, n_tiles):
        i_tile = i_last - i
        p_rectangle = find_row(p_rectangles, i_tile, n_rectangles, _RECTANGLE_FIELDS, BLOCK_RECTANGLES)
        i_th, n_h, n_r, i_sh, jump_sh, i_r, jump_r = load_span(p_rectangle + 2, tl.int32)
        i_tw, n_w, n_s, i_sw, jump_sw, i_s, jump_s = load_span(p_rectangle + 2 + _SPAN_FIELDS, tl.int32)
        i_tile -= tl.load(p_rectangle)
        n_sum = n_r * n_s * tl.cdiv(n_depth, BLOCK_D)
        i_sum = tl.load(p_rectangle + 1) + i_tile * n_sum  # its first step
        i_first = tl.maximum(i_begin, i_sum) - i_sum
        n_own = tl.minimum(i_end - i_sum, n_sum) - i_first
        i_block, i_tile = split_index(i_tile, n_blocks)

        o_pixel = i_tile * BLOCK_M + tl.arange(0, BLOCK_M)
        n_pixels = N * n_h * n_w
        # Beyond the last pixel a tile reads that one again: loads need no mask.
        o_w, o_image = split_index(tl.minimum(o_pixel, n_pixels - 1), n_w)
        o_h, o_image = split_index(o_image, n_h)
        o_source = o_image * s_sn + o_h * step_h * s_sh + o_w * step_w * s_sw

        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        i_depth, i_row, i_column = find_step(i_first, n_r, n_s, BLOCK_D, True)
        p_tile = p_source + (i_sh * s_sh + i_sw * s_sw)
        o_depth = tl.arange(0, BLOCK_D)
        o_tile = o_source[:, None] + o_depth[None, :]  # [BLOCK_M, BLOCK_D]
        tl.assume(n_own > 0)  # see add_taps
        for _ in tl.range(0, n_own):
            p_x = p_tile + (i_row * (jump_sh * s_sh) + i_column * (jump_sw * s_sw) + i_depth)
            p_x = tl.multiple_of(p_x + o_tile, [1, GROUP_SOURCE * ITEMSIZE])
            m_x = True if IS_DEPTH_WHOLE else (i_depth + o_depth < in_groups(n_depth, GROUP_SOURCE))[None, :]
            b_x = tl.load(p_x, mask=m_x, other=0.0)  # [BLOCK_M, BLOCK_D]
            i_weight_row, i_weight_column = i_r + i_row * jump_r, i_s + i_column * jump_s
            if IS_GRAD_INPUT:
                b_w = d_weight.load([i_weight_row, i_weight_column, i_depth, i_block * BLOCK_N])
                b_w = b_w.reshape(BLOCK_D, BLOCK_N)
            else:
                b_w = d_weight.load([i_weight_row, i_weight_column, i_block * BLOCK_N, i_depth])
                b_w = b_w.reshape(BLOCK_N, BLOCK_D).T
            acc = multiply_add(b_x, b_w, acc, PRECISION)
            i_depth, i_row, i_column = next_step(i_depth, i_row, i_column, n_r, n_s, BLOCK_D)

        is_finished = i_first + n_own == n_sum
        i_other = i_program
        if is_finished & (i_first > 0):
            i_other = i_sum // n_share
        for i_before in tl.range(i_other, i_program):
            while tl.atomic_add(p_ready + i_before, 0, sem="acquire") == 0:
                pass
        o_pixel = i_tile * BLOCK_M + tl.arange(0, BLOCK_M)
        o_w, o_image = split_index(tl.minimum(o_pixel, n_pixels - 1), n_w)
        o_h, o_image = split_index(o_image, n_h)
        o_w = i_tw + o_w * period_w
        o_target = o_image * s_tn + (i_th + o_h * period_h) * s_th + o_w * s_tw
        o_image += o_w // n_row
        m_pixel = o_pixel < n_pixels
        # In halves, which leave registers for what others have handed on. Some are kept in memory all the same, of
        # which the loop over steps reads one.
        parts = halves(acc)  # 2 x [BLOCK_M, HALF]
        for part in tl.static_range(2):
            b_sum = parts[part]
            p_part = p_sums + part * HALF + o_sums
            if is_finished:
                for i_before in tl.range(i_other, i_program):
                    p_before = p_part + tl.cast(i_before, tl.int64) * BLOCK_M * BLOCK_N
                    b_sum += tl.load(p_before, cache_modifier=".cg")  # [BLOCK_M, HALF]
                o_column = i_block * BLOCK_N + part * HALF + tl.arange(0, HALF)
                b_sum = scale_and_shift(
                    b_sum, p_scale, p_bias, o_image, o_column, n_columns,
                    GROUP_TARGET, HAS_SCALE, HAS_BIAS, HAS_IMAGE_BIAS,
                )  # fmt: skip
                store_product(b_sum, p_target, o_target, m_pixel, o_column, n_columns, GROUP_TARGET, ACTIVATION)
            else:
                tl.store(p_part + tl.cast(i_program, tl.int64) * BLOCK_M * BLOCK_N, b_sum)  # [BLOCK_M, HALF]
        if not is_finished:
            tl.debug_barrier()
            tl.atomic_xchg(p_ready + i_program, 1, sem="release")
