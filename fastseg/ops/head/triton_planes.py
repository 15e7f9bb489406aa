"""Tensors as planes, contiguous along W: what the argmax and the loss read and write, one thread a column.

A copy to or from channels_last owns tiles of columns x channels, loads along one and stores along the other (the
compiler exchanges them in shared memory), and moves each element once in and once out.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastseg.ops.triton_common import cdiv, launch, needs_index_64, split_index, strides, widen

COPY_BLOCK_W, COPY_BLOCK_C = 64, 32


# fmt: off
@triton.jit(do_not_specialize=("H", "W"))
def copy_image(
    p_x,  # [N, C, H, W]
    p_y,  # [N, C, H, W]
    C, H, W,
    s_xn, s_xc, s_xh, s_xw,
    s_yn, s_yc, s_yh, s_yw,
    BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr, IS_INDEX_64: tl.constexpr,
):
    # fmt: on
    i_c, i_rest = split_index(tl.program_id(0), tl.cdiv(C, BLOCK_C))
    i_w, i_rest = split_index(i_rest, tl.cdiv(W, BLOCK_W))
    i_h, i_n = split_index(i_rest, H)
    o_c = widen(i_c * BLOCK_C + tl.arange(0, BLOCK_C)[:, None], IS_INDEX_64)
    o_w = widen(i_w * BLOCK_W + tl.arange(0, BLOCK_W)[None, :], IS_INDEX_64)
    m_x = (o_c < C) & (o_w < W)
    p_x += i_n.to(tl.int64) * s_xn + i_h.to(tl.int64) * s_xh
    p_y += i_n.to(tl.int64) * s_yn + i_h.to(tl.int64) * s_yh
    b_x = tl.load(p_x + o_c * s_xc + o_w * s_xw, mask=m_x)  # [BLOCK_C, BLOCK_W]
    tl.store(p_y + o_c * s_yc + o_w * s_yw, b_x, mask=m_x)  # [BLOCK_C, BLOCK_W]


def as_planes(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` itself where it is contiguous along W, else a contiguous copy."""
    if tensor.stride(3) == 1 or tensor.shape[3] == 1:
        return tensor
    return _copy(tensor, tensor.new_empty(tensor.shape))


def as_channels_last(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of planes in channels_last."""
    memory_format = torch.channels_last
    return _copy(
        tensor, torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device, memory_format=memory_format)
    )


def last_offset(tensor: torch.Tensor) -> int:
    """The offset of a tensor's last element."""
    return sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _copy(source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    N, C, H, W = source.shape
    offsets = [(C - 1) * t.stride(1) + (W - 1) * t.stride(3) for t in (source, target)]
    launch(
        copy_image,
        N * H * cdiv(W, COPY_BLOCK_W) * cdiv(C, COPY_BLOCK_C),
        p_x=source,
        p_y=target,
        C=C,
        H=H,
        W=W,
        **strides("s_xn s_xc s_xh s_xw", source),
        **strides("s_yn s_yc s_yh s_yw", target),
        BLOCK_W=COPY_BLOCK_W,
        BLOCK_C=COPY_BLOCK_C,
        IS_INDEX_64=needs_index_64(*offsets, W + COPY_BLOCK_W, C + COPY_BLOCK_C),
        num_warps=4,
    )
    return target
