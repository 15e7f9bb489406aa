"""Where outputs look at the input, in Triton: sampling.py inside kernels, and its inverse by binary search.

`first` never decreases from one output to the next, so the outputs of one input pixel are neighbours, and a search for
where they begin needs no inverse of the step, no margin and no special case for clamped ends.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastseg.ops.triton_common import INTERPRETED, split_index


@triton.jit
def sample(o_out, step, inputs, IS_ALIGNED: tl.constexpr):
    """(first, second, share) of outputs along one axis: y = (1 - share) * x[first] + share * x[second]."""
    if IS_ALIGNED:  # a fused multiply-add, lest the compiler makes one with the subtraction below
        position = tl.fma(tl.cast(o_out, tl.float32), step, 0.0)
    elif INTERPRETED:  # its fused multiply-add rounds twice
        centre = tl.cast(o_out, tl.float64) + 0.5
        position = tl.maximum(tl.cast(tl.cast(step, tl.float32), tl.float64) * centre - 0.5, 0.0).to(tl.float32)
    else:
        position = tl.maximum(tl.fma(tl.cast(o_out, tl.float32) + 0.5, step, -0.5), 0.0)
    o_first = tl.minimum(position.to(tl.int32), inputs - 1)
    share = tl.minimum(tl.maximum(position - o_first.to(tl.float32), 0.0), 1.0)
    return o_first, tl.minimum(o_first + 1, inputs - 1), share


@triton.jit
def share_of(o_out, step, inputs, IS_ALIGNED: tl.constexpr):
    """The last of what `sample` gives."""
    _, _, share = sample(o_out, step, inputs, IS_ALIGNED)
    return share


@triton.jit
def first_output(o_in, step, inputs, outputs, turns, IS_ALIGNED: tl.constexpr):
    """The smallest output whose `first` is at least `o_in`, or `outputs`. `turns` is the bit length of `outputs`.

    Every search begins anew: Triton 3.6 takes a value for constant that a loop carries and an inner loop like this one
    starts from.
    """
    o_low, o_high = o_in * 0, o_in * 0 + outputs
    for _ in range(turns):
        o_middle = (o_low + o_high) // 2
        o_first, _, _ = sample(o_middle, step, inputs, IS_ALIGNED)
        is_found = (o_first >= o_in) | (o_low >= o_high)
        o_low = tl.where(is_found, o_low, o_middle + 1)
        o_high = tl.where(is_found, o_middle, o_high)
    return o_low


@triton.jit
def exp2(b_x):
    """2 ** b_x, in one instruction: results below the normal numbers are zero."""
    if INTERPRETED:  # it knows no assembly
        b_y = tl.exp2(b_x)
    else:
        b_y = tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=r,r", [b_x], dtype=tl.float32, is_pure=True, pack=1
        )
    return b_y


@triton.jit
def blend(b_first, b_second, share):
    """Between two pixels. Both always count: nothing times NaN is NaN. An infinite pixel stays infinite.

    Kernels that blend the same pixels in the same order get the same bits: where to fuse is not left to the compiler.
    """
    if INTERPRETED:
        b_y = b_first * (1 - share) + b_second * share
    else:
        b_y = tl.fma(b_first, 1 - share, b_second * share)
    return b_y


@triton.jit
def output_rows(
    i_unit, n_chunks, step, H, P, turns,
    ROWS: tl.constexpr, IS_ALIGNED: tl.constexpr, IS_BETWEEN_ROWS: tl.constexpr,
):  # fmt: skip
    """Output rows [i_p, i_end), at most ROWS, that lie between the same two input rows; these two come first.

    Units are chunks of the outputs between two neighbouring input rows, some of them empty, or lone output rows.
    """
    if IS_BETWEEN_ROWS:
        i_chunk, i_top = split_index(i_unit, n_chunks)
        i_p = first_output(i_top, step, H, P, turns, IS_ALIGNED) + i_chunk * ROWS
        i_end = first_output(i_top + 1, step, H, P, turns, IS_ALIGNED)
    else:
        i_p = i_unit
        i_top, _, _ = sample(i_unit, step, H, IS_ALIGNED)
        i_end = i_unit + 1
    return i_top, tl.minimum(i_top + 1, H - 1), i_p, tl.minimum(i_end, i_p + ROWS)


@triton.jit
def load_between(p_top, p_bottom, o_left, o_right, b_share, m_column):
    """One class of two input rows in fp32, blended along the columns: what output rows between them are made of."""
    b_top = blend(
        tl.load(p_top + o_left, mask=m_column, other=0).to(tl.float32),  # [BLOCK]
        tl.load(p_top + o_right, mask=m_column, other=0).to(tl.float32),  # [BLOCK]
        b_share,
    )
    b_bottom = blend(
        tl.load(p_bottom + o_left, mask=m_column, other=0).to(tl.float32),  # [BLOCK]
        tl.load(p_bottom + o_right, mask=m_column, other=0).to(tl.float32),  # [BLOCK]
        b_share,
    )
    return b_top, b_bottom
