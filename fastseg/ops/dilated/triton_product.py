"""The product of forward and grad_input, two kernels: pixels in any order by pointers, or in boxes by descriptors.

dilated_product takes the pixels of a tile from a rectangle flattened over the batch. Every 16 bytes it loads cost a
thread an address and a copy. It runs on every device, with every stride, and computes no pixel in vain but at the end
of a rectangle.

dilated_product_boxes leaves copying to the engine that devices of capability 9 and newer have (TMA). One thread asks
for a whole box of the source, at coordinates that a tap shifts, and the engine reads zeros outside the tensor:

    box 1 x 4 x 8 in a rectangle of 6 x 12     pixels 0..31 of the tile, w fastest, then h, then n
        0 0 0 0 0 0 0 0 1 1 1 1 . . . .        source of tap (r, s): the same box at (i_sh + r * jump_sh,
        0 0 0 0 0 0 0 0 1 1 1 1 . . . .            i_sw + s * jump_sw)
        0 0 0 0 0 0 0 0 1 1 1 1 . . . .        dots: pixels of another rectangle, or of none. They are read and
        0 0 0 0 0 0 0 0 1 1 1 1 . . . .        multiplied, and their rows of the product are not stored
        2 2 2 2 2 2 2 2 3 3 3 3 . . . .
        2 2 2 2 2 2 2 2 3 3 3 3 . . . .
        . . . . . . . . . . . . . . . .
        . . . . . . . . . . . . . . . .

The plan picks the cheapest box, and weighs its pixels in vain against cheaper steps. Boxes need neighbours to
have neighbours as sources (no stride), aligned channels, and a matrix unit (16-bit or TF32).

The second product is turned around, acc[channels, pixels] = w x^T: Triton keeps the right operand in shared memory
through a change of shape, where the matrix unit reads it, but sends a reshaped left one through registers. The tile
of weights has leading axes of one entry, which vanish in the load itself. The letter of a descriptor is d_.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from fastseg.ops.dilated.triton_plan import RECTANGLE_FIELDS, SPAN_FIELDS
from fastseg.ops.triton_common import activate, in_groups, multiply_add, split_index, store_tile, tile_pointers, widen

# Arguments that change from layer to layer and gain nothing from being known when a kernel is compiled: alignment is
# told by GROUP_*.
PRODUCT_SIZES = (
    *("N", "n_depth", "n_columns", "n_rectangles", "n_blocks", "period_h", "period_w", "step_h", "step_w"),
    *("n_row", "n_splits", "s_sn", "s_sh", "s_sw", "s_wk", "s_wr", "s_ws", "s_tn", "s_th", "s_tw", "s_split"),
)
BOX_SIZES = (
    *("N", "n_columns", "n_rectangles", "n_steps", "n_blocks", "n_row", "n_splits"),
    *("s_tn", "s_th", "s_tw", "s_split"),
)
FINISH_SIZES = ("n_pixels", "n_columns", "n_blocks", "n_h", "n_w", "n_row", "n_splits", "s_tn", "s_th", "s_tw")
_RECTANGLE_FIELDS = tl.constexpr(RECTANGLE_FIELDS)
_SPAN_FIELDS = tl.constexpr(SPAN_FIELDS)

MAX_DESCRIPTOR_STRIDE = 2**40  # bytes
MAX_DESCRIPTOR_SIZE = 2**30  # of an axis: a box that ends beyond it still has coordinates of 32 bits


@triton.jit
def find_row(p_table, i_flat, n_rows, FIELDS: tl.constexpr, BLOCK_ROWS: tl.constexpr):
    """The last row that begins (field 0) at or before `i_flat`. Rows ascend; those without entries are passed over."""
    o_row = tl.arange(0, BLOCK_ROWS)
    b_first = tl.load(p_table + o_row * FIELDS, mask=o_row < n_rows, other=2147483647)  # [BLOCK_ROWS]
    return p_table + (tl.sum((b_first <= i_flat).to(tl.int32)) - 1) * FIELDS


@triton.jit
def load_span(p_span, INDEX: tl.constexpr):
    """index, count, number of taps, first source, its jump, first weight, its jump (triton_plan.py); four as INDEX."""
    i_source = tl.load(p_span + 3).to(INDEX)
    i_source_jump = tl.load(p_span + 4).to(INDEX)
    i_weight = tl.load(p_span + 5).to(INDEX)
    i_weight_jump = tl.load(p_span + 6).to(INDEX)
    return (
        tl.load(p_span), tl.load(p_span + 1), tl.load(p_span + 2), i_source, i_source_jump, i_weight, i_weight_jump
    )  # fmt: skip


@triton.jit
def share_steps(n_steps, i_split, n_splits, IS_SPLIT: tl.constexpr):
    """The first step of a program's share of a sum of `n_steps`, and how many it has."""
    i_step = 0
    if IS_SPLIT:
        n_share = tl.cdiv(n_steps, n_splits)
        i_step = i_split * n_share
        n_steps = tl.maximum(tl.minimum(n_share, n_steps - i_step), 0)
    return i_step, n_steps


@triton.jit
def find_step(i_step, n_r, n_s, BLOCK_D: tl.constexpr, IS_SPLIT: tl.constexpr):
    """Depth, row and column of step `i_step` of a sum, which is 0 unless IS_SPLIT."""
    i_depth = 0
    i_row = 0
    i_column = 0
    if IS_SPLIT:
        i_column, i_step = split_index(i_step, tl.maximum(n_s, 1))
        i_row, i_step = split_index(i_step, tl.maximum(n_r, 1))
        i_depth = i_step * BLOCK_D
    return i_depth, i_row, i_column


@triton.jit
def next_step(i_depth, i_row, i_column, n_r, n_s, BLOCK_D: tl.constexpr):
    """The step after this one: taps of a row, then rows of taps, then source channels."""
    i_column += 1
    is_last_column = i_column == n_s
    i_row += is_last_column.to(tl.int32)
    i_column = tl.where(is_last_column, 0, i_column)
    is_last_row = i_row == n_r
    i_depth += tl.where(is_last_row, BLOCK_D, 0)
    i_row = tl.where(is_last_row, 0, i_row)
    return i_depth, i_row, i_column


# fmt: off
@triton.jit
def add_taps(
    acc,  # [BLOCK_M, BLOCK_N]
    p_source,  # the first source channel of the first tap
    p_weight,  # [n_depth or n_columns, of that tap]
    o_source,  # [BLOCK_M]
    o_column,  # [BLOCK_N]
    n_depth, n_columns,
    n_r, n_s,  # live taps of a column and of a row
    jump_sh, jump_sw,  # from one to the next, in the source
    jump_r, jump_s,  # and in the weight
    s_wk,
    i_step, n_steps,  # the first step of the program's share of the sum, 0 unless IS_SPLIT, and how many it has
    BLOCK_D: tl.constexpr, GROUP_SOURCE: tl.constexpr, GROUP_WEIGHT: tl.constexpr, PRECISION: tl.constexpr,
    IS_GRAD_INPUT: tl.constexpr, IS_DEPTH_WHOLE: tl.constexpr, IS_INDEX_64: tl.constexpr, IS_SPLIT: tl.constexpr,
    HAS_STEPS: tl.constexpr,
):
    # fmt: on
    """acc and the product of a tile, over all live taps of its rectangle and all source channels, or a share of them.
    """
    ITEMSIZE: tl.constexpr = p_source.dtype.element_ty.primitive_bitwidth // 8
    o_depth = widen(tl.arange(0, BLOCK_D), IS_INDEX_64)
    o_source = o_source[:, None] + o_depth[None, :]  # [BLOCK_M, BLOCK_D]
    # Beyond the last row of weights a tile reads that one again: loads need no mask.
    if IS_GRAD_INPUT:
        o_weight = o_depth[:, None] * s_wk + o_column[None, :]  # [BLOCK_D, BLOCK_N]
        m_weight = (o_column < in_groups(n_columns, GROUP_WEIGHT))[None, :]
        s_depth = s_wk
    else:
        o_weight = tl.minimum(o_column, n_columns - 1)[:, None] * s_wk + o_depth[None, :]  # [BLOCK_N, BLOCK_D]
        m_weight = True
        s_depth = 1
    if not IS_DEPTH_WHOLE:
        n_source = in_groups(n_depth, GROUP_SOURCE)
        n_weight = n_depth if IS_GRAD_INPUT else in_groups(n_depth, GROUP_WEIGHT)

    i_depth, i_row, i_column = find_step(i_step, n_r, n_s, BLOCK_D, IS_SPLIT)
    # An accumulator that an empty loop would leave at zero is set beside the loop as well, and then ptxas lets the
    # tensor core's products wait for each other (its remark C7515).
    if HAS_STEPS:
        tl.assume(n_steps > 0)
    for _ in tl.range(0, n_steps):
        p_x = p_source + (i_row * jump_sh + i_column * jump_sw + i_depth)
        p_w = p_weight + (i_row * jump_r + i_column * jump_s + tl.cast(i_depth, tl.int64) * s_depth)
        m_x = True
        m_w = m_weight
        if not IS_DEPTH_WHOLE:
            m_x = (i_depth + o_depth < n_source)[None, :]
            m_depth = i_depth + o_depth < n_weight
            m_w = m_weight & (m_depth[:, None] if IS_GRAD_INPUT else m_depth[None, :])
        p_x = tl.multiple_of(p_x + o_source, [1, GROUP_SOURCE * ITEMSIZE])
        p_w = tl.multiple_of(p_w + o_weight, [1, GROUP_WEIGHT * ITEMSIZE])
        b_x = tl.load(p_x, mask=m_x, other=0.0)  # [BLOCK_M, BLOCK_D]
        b_w = tl.load(p_w, mask=m_w, other=0.0)  # [BLOCK_D, BLOCK_N] or [BLOCK_N, BLOCK_D]
        acc = multiply_add(b_x, b_w if IS_GRAD_INPUT else b_w.T, acc, PRECISION)
        i_depth, i_row, i_column = next_step(i_depth, i_row, i_column, n_r, n_s, BLOCK_D)
    return acc


# fmt: off
@triton.jit
def scale_and_shift(
    acc,  # [BLOCK_M, BLOCK_N]
    p_scale, p_bias,
    o_image,  # [BLOCK_M]: which bias each pixel takes, where images have their own
    o_column,  # [BLOCK_N]
    n_columns,
    GROUP_TARGET: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_IMAGE_BIAS: tl.constexpr,
):
    # fmt: on
    """scale * acc + bias. A tile meets few images, and takes their biases one after the other, as vectors."""
    m_column = o_column < in_groups(n_columns, GROUP_TARGET)
    if HAS_SCALE:
        acc *= tl.load(p_scale + o_column, mask=m_column)[None, :]  # [1, BLOCK_N]
    if HAS_IMAGE_BIAS:
        for i_image in tl.range(tl.min(o_image), tl.max(o_image) + 1):
            p_image = p_bias + tl.cast(i_image, tl.int64) * n_columns
            b_bias = tl.load(p_image + o_column, mask=m_column).to(tl.float32)[None, :]  # [1, BLOCK_N]
            acc += tl.where((o_image == i_image)[:, None], b_bias, 0.0)
    elif HAS_BIAS:
        acc += tl.load(p_bias + o_column, mask=m_column).to(tl.float32)[None, :]  # [1, BLOCK_N]
    return acc


# fmt: off
@triton.jit
def store_product(
    acc,  # [BLOCK_M, BLOCK_N]
    p_target,
    o_target, m_pixel,  # [BLOCK_M]
    o_column,  # [BLOCK_N]
    n_columns,
    GROUP_TARGET: tl.constexpr, ACTIVATION: tl.constexpr,
):
    # fmt: on
    """The activation, and the rows and columns of a tile that exist."""
    o_target = o_target[:, None] + o_column[None, :]
    m_target = m_pixel[:, None] & (o_column < in_groups(n_columns, GROUP_TARGET))[None, :]
    store_tile(p_target, o_target, activate(acc, ACTIVATION), m_target, GROUP_TARGET)  # [BLOCK_M, BLOCK_N]


def _product_name(specialization) -> str:
    name = "dilated_grad_input" if specialization.constants["IS_GRAD_INPUT"] else "dilated_forward"
    return name + "_boxes" if "BOX_N" in specialization.constants else name


# The flags that every product derives from its arguments.
has_vectors = triton.heuristics(
    {
        "HAS_SCALE": lambda args: args["p_scale"] is not None,
        "HAS_BIAS": lambda args: args["p_bias"] is not None,
        "HAS_IMAGE_BIAS": lambda args: args["p_bias"] is not None and args["p_bias"].dim() == 2,
    }
)


# fmt: off
@has_vectors
@triton.jit(do_not_specialize=PRODUCT_SIZES, repr=_product_name)
def dilated_product(
    p_source,  # [N, n_depth, source rows, source columns]: x or gy, channels adjacent
    p_weight,  # [K, C, R, S], channels adjacent
    p_scale,  # [n_columns] fp32 or None
    p_bias,  # [n_columns], [images, n_columns] or None
    p_target,  # [N, n_columns, target rows, target columns]: y or gx, channels adjacent
    p_rectangles,  # [n_rectangles, RECTANGLE_FIELDS]
    N, n_depth, n_columns, n_rectangles,
    n_blocks,  # of columns
    n_row,  # targets in a row that are one image's
    n_splits,
    period_h, period_w,  # from one target of a rectangle to the next
    step_h, step_w,  # and from its source to the next one's
    s_sn, s_sh, s_sw,
    s_wk, s_wr, s_ws,
    s_tn, s_th, s_tw, s_split,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_RECTANGLES: tl.constexpr,
    GROUP_SOURCE: tl.constexpr, GROUP_WEIGHT: tl.constexpr, GROUP_TARGET: tl.constexpr,
    ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
    HAS_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_IMAGE_BIAS: tl.constexpr,
    IS_GRAD_INPUT: tl.constexpr, IS_DEPTH_WHOLE: tl.constexpr, IS_INDEX_64: tl.constexpr, IS_SPLIT: tl.constexpr,
    HAS_STEPS: tl.constexpr,  # whether every program has
):
    # fmt: on
    i_block, i_tile = split_index(tl.program_id(0), n_blocks)
    i_split = 0
    if IS_SPLIT:
        i_split, i_tile = split_index(i_tile, n_splits)
        p_target += tl.cast(i_split, tl.int64) * s_split
    p_rectangle = find_row(p_rectangles, i_tile, n_rectangles, _RECTANGLE_FIELDS, BLOCK_RECTANGLES)
    i_tile -= tl.load(p_rectangle)
    i_th, n_h, n_r, i_sh, jump_sh, i_r, jump_r = load_span(p_rectangle + 2, tl.int64)
    i_tw, n_w, n_s, i_sw, jump_sw, i_s, jump_s = load_span(p_rectangle + 2 + _SPAN_FIELDS, tl.int64)

    o_pixel = widen(i_tile, IS_INDEX_64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n_pixels = widen(N, IS_INDEX_64) * n_h * n_w
    m_pixel = o_pixel < n_pixels
    # Beyond the last pixel a tile reads that one again: loads need no mask.
    o_w, o_image = split_index(tl.minimum(o_pixel, n_pixels - 1), n_w)
    o_h, o_image = split_index(o_image, n_h)
    o_source = o_image * s_sn + o_h * step_h * s_sh + o_w * step_w * s_sw
    o_w = i_tw + o_w * period_w
    o_target = o_image * s_tn + (i_th + o_h * period_h) * s_th + o_w * s_tw
    o_column = widen(i_block, IS_INDEX_64) * BLOCK_N + tl.arange(0, BLOCK_N)
    p_source += i_sh * s_sh + i_sw * s_sw
    p_weight += i_r * s_wr + i_s * s_ws

    i_step, n_steps = share_steps(n_r * n_s * tl.cdiv(n_depth, BLOCK_D), i_split, n_splits, IS_SPLIT)
    acc = add_taps(
        tl.zeros([BLOCK_M, BLOCK_N], tl.float32), p_source, p_weight, o_source, o_column, n_depth, n_columns,
        n_r, n_s, jump_sh * s_sh, jump_sw * s_sw, jump_r * s_wr, jump_s * s_ws, s_wk, i_step, n_steps,
        BLOCK_D, GROUP_SOURCE, GROUP_WEIGHT, PRECISION, IS_GRAD_INPUT, IS_DEPTH_WHOLE, IS_INDEX_64, IS_SPLIT,
        HAS_STEPS,
    )  # fmt: skip
    acc = scale_and_shift(
        acc, p_scale, p_bias, o_image + o_w // n_row, o_column, n_columns,
        GROUP_TARGET, HAS_SCALE, HAS_BIAS, HAS_IMAGE_BIAS,
    )  # fmt: skip
    store_product(acc, p_target, o_target, m_pixel, o_column, n_columns, GROUP_TARGET, ACTIVATION)


# fmt: off
@has_vectors
@triton.jit(do_not_specialize=BOX_SIZES, repr=_product_name)
def dilated_product_boxes(
    d_source,  # [N, source rows, source columns, n_depth] in boxes of [BOX_N, BOX_H, BOX_W, BLOCK_D]: x or gy
    d_weight,  # [R, S, K, C] in boxes of [1, 1, BLOCK_N, BLOCK_D], for grad_input of [1, 1, BLOCK_D, BLOCK_N]
    p_scale,  # [n_columns] fp32 or None
    p_bias,  # [n_columns], [images, n_columns] or None
    p_target,  # [N, n_columns, target rows, target columns]: y or gx, channels adjacent
    p_rectangles,  # [n_rectangles, RECTANGLE_FIELDS]
    N, n_columns, n_rectangles,
    n_steps,  # of the sum, for each tap
    n_blocks,  # of columns
    n_row,  # targets in a row that are one image's
    n_splits,
    s_tn, s_th, s_tw, s_split,
    BOX_N: tl.constexpr, BOX_H: tl.constexpr, BOX_W: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_RECTANGLES: tl.constexpr,
    GROUP_TARGET: tl.constexpr,
    ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
    HAS_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_IMAGE_BIAS: tl.constexpr,
    IS_GRAD_INPUT: tl.constexpr, IS_INDEX_64: tl.constexpr, IS_SPLIT: tl.constexpr,
    HAS_STEPS: tl.constexpr,  # whether every program has
):
    # fmt: on
    BLOCK_M: tl.constexpr = BOX_N * BOX_H * BOX_W
    i_block, i_tile = split_index(tl.program_id(0), n_blocks)
    i_split = 0
    if IS_SPLIT:
        i_split, i_tile = split_index(i_tile, n_splits)
        p_target += tl.cast(i_split, tl.int64) * s_split
    p_rectangle = find_row(p_rectangles, i_tile, n_rectangles, _RECTANGLE_FIELDS, BLOCK_RECTANGLES)
    i_tile -= tl.load(p_rectangle)
    i_th, n_h, n_r, i_sh, jump_sh, i_r, jump_r = load_span(p_rectangle + 2, tl.int32)
    i_tw, n_w, n_s, i_sw, jump_sw, i_s, jump_s = load_span(p_rectangle + 2 + _SPAN_FIELDS, tl.int32)

    i_w, i_image = split_index(i_tile, tl.cdiv(n_w, BOX_W))
    i_h, i_image = split_index(i_image, tl.cdiv(n_h, BOX_H))
    i_w, i_h, i_image = i_w * BOX_W, i_h * BOX_H, i_image * BOX_N
    i_sh, i_sw = i_sh + i_h, i_sw + i_w
    i_first = i_block * BLOCK_N

    # Boxes reach beyond the rectangle and the image, where descriptors read zeros: rows that are never stored.
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    i_step, n_turns = share_steps(n_r * n_s * n_steps, i_split, n_splits, IS_SPLIT)
    i_depth, i_row, i_column = find_step(i_step, n_r, n_s, BLOCK_D, IS_SPLIT)
    if HAS_STEPS:
        tl.assume(n_turns > 0)
    for _ in tl.range(0, n_turns):
        b_x = d_source.load([i_image, i_sh + i_row * jump_sh, i_sw + i_column * jump_sw, i_depth])
        b_x = b_x.reshape(BLOCK_M, BLOCK_D)
        i_weight_row, i_weight_column = i_r + i_row * jump_r, i_s + i_column * jump_s
        if IS_GRAD_INPUT:
            b_w = d_weight.load([i_weight_row, i_weight_column, i_depth, i_first]).reshape(BLOCK_D, BLOCK_N).T
        else:
            b_w = d_weight.load([i_weight_row, i_weight_column, i_first, i_depth]).reshape(BLOCK_N, BLOCK_D)
        acc = multiply_add(b_w, b_x.T, acc, PRECISION)
        i_depth, i_row, i_column = next_step(i_depth, i_row, i_column, n_r, n_s, BLOCK_D)

    o_w, o_image = split_index(tl.arange(0, BLOCK_M), BOX_W)
    o_h, o_image = split_index(o_image, BOX_H)
    o_w, o_h, o_image = i_w + o_w, i_h + o_h, i_image + o_image
    m_pixel = (o_image < N) & (o_h < n_h) & (o_w < n_w)
    o_target = widen(o_image, IS_INDEX_64) * s_tn
    o_target += widen(i_th + o_h, IS_INDEX_64) * s_th + widen(i_tw + o_w, IS_INDEX_64) * s_tw
    o_column = widen(i_first, IS_INDEX_64) + tl.arange(0, BLOCK_N)
    # Pixels in vain take the bias of the last one that exists.
    o_image = tl.minimum(o_image, N - 1) + (i_tw + tl.minimum(o_w, n_w - 1)) // n_row
    acc = scale_and_shift(
        acc.T, p_scale, p_bias, o_image, o_column, n_columns, GROUP_TARGET, HAS_SCALE, HAS_BIAS, HAS_IMAGE_BIAS
    )  # fmt: skip
    store_product(acc, p_target, o_target, m_pixel, o_column, n_columns, GROUP_TARGET, ACTIVATION)


# fmt: off
@has_vectors
@triton.jit(do_not_specialize=FINISH_SIZES)
def dilated_product_finish(
    p_partials,  # [n_splits, n_pixels, n_columns] fp32
    p_scale,  # [n_columns] fp32 or None
    p_bias,  # [n_columns], [images, n_columns] or None
    p_target,  # [N, n_columns, n_h, n_w], channels adjacent
    n_pixels, n_columns,
    n_blocks,  # of columns
    n_h, n_w,
    n_row,  # targets in a row that are one image's
    n_splits,
    s_tn, s_th, s_tw,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    GROUP_TARGET: tl.constexpr, ACTIVATION: tl.constexpr,
    HAS_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_IMAGE_BIAS: tl.constexpr,
):
    # fmt: on
    """Adds the splits of a product in their order, then scale, bias and activation."""
    i_block, i_tile = split_index(tl.program_id(0), n_blocks)
    o_pixel = i_tile.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_column = i_block * BLOCK_N + tl.arange(0, BLOCK_N)
    m_pixel = o_pixel < n_pixels
    m_partials = m_pixel[:, None] & (o_column < in_groups(n_columns, GROUP_TARGET))[None, :]
    o_partials = o_pixel[:, None] * n_columns + o_column[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for _ in tl.range(0, n_splits):
        p_tile = tile_pointers(p_partials, o_partials, GROUP_TARGET)
        acc += tl.load(p_tile, mask=m_partials, other=0)  # [BLOCK_M, BLOCK_N]
        p_partials += tl.cast(n_pixels, tl.int64) * n_columns
    o_w, o_image = split_index(o_pixel, n_w)
    o_h, o_image = split_index(o_image, n_h)
    o_target = o_image * s_tn + o_h * s_th + o_w * s_tw
    acc = scale_and_shift(
        acc, p_scale, p_bias, o_image + o_w // n_row, o_column, n_columns,
        GROUP_TARGET, HAS_SCALE, HAS_BIAS, HAS_IMAGE_BIAS,
    )  # fmt: skip
    store_product(acc, p_target, o_target, m_pixel, o_column, n_columns, GROUP_TARGET, ACTIVATION)


def can_describe(tensor) -> bool:
    """Whether a descriptor can hold a channels_last tensor whose channels come in aligned groups of 16 bytes."""
    (N, C, H, W), (s_n, _, s_h, s_w) = tensor.shape, tensor.stride()
    outer = [stride for size, stride in ((N, s_n), (H, s_h), (W, s_w)) if size > 1] or [1]
    return (
        min(N, C, H, W, *outer) > 0  # an expanded tensor has strides of zero
        and max(N, C, H, W) <= MAX_DESCRIPTOR_SIZE
        and max(outer) * tensor.element_size() < MAX_DESCRIPTOR_STRIDE
    )


def describe(tensor, order: str, box: list[int]) -> TensorDescriptor:
    """A descriptor that loads a [N, C, H, W] tensor one `box` at a time, the axes of both in `order`: "NHWC"."""
    sizes = dict(zip("NCHW", tensor.shape, strict=True))
    strides = dict(zip("NHW", outer_spacing(tensor), strict=True))
    return TensorDescriptor(tensor, [sizes[axis] for axis in order], [*(strides[axis] for axis in order[:-1]), 1], box)


def outer_spacing(tensor) -> list[int]:
    """The strides of images, rows and columns. Those of axes of one entry mean nothing, and become ones that fit."""
    return [tensor.stride(axis) if tensor.shape[axis] > 1 else tensor.shape[1] for axis in (0, 2, 3)]
