"""Which tiles the Triton kernels of the family get, and how many programs: plain integers, no tensors on a device."""

from __future__ import annotations

import ctypes
import functools
from typing import NamedTuple

import torch

from fastseg.ops.head.sampling import samples, source_step
from fastseg.ops.triton_common import cdiv, is_interpreted

# Forward and gradient of the resize: elements of a tile, and the rows that a program walks.
TILE, MAX_BLOCK_C, MAX_BLOCK_H = 1024, 64, 16
# Argmax and loss: output columns of a program, and the rows that share the loads of a class.
BLOCK, MAX_ROWS = 128, 4
# Gradient of the loss: a warp owns LANES columns and up to MAX_CLASSES classes, each with a dozen values in registers.
LANES, MAX_CLASSES = 32, 8
# ptxas spills a register or two where that fits one more block on a multiprocessor.
NO_SPILLS = {"maxnreg": 255}
# Of the loss's gradient in 32 bits: ptxas alone would fill more with early loads, for fewer warps.
FEW_REGISTERS = {"maxnreg": 192}
# Programs of a few warps that fill a large GPU. The interpreter runs one after the other.
MIN_PROGRAMS = 1 if is_interpreted() else 1024


def plan_tile(channels: int, columns: int, is_channels_last: bool) -> dict[str, int]:
    """The tile of forward and gradient: TILE elements, as long in the contiguous dimension as wastes little."""
    if is_channels_last:
        block_c = power_of_two(channels, MAX_BLOCK_C)
        if block_c > 16 and cdiv(channels, block_c // 2) % 2 == 1:  # the last tile would be half empty
            block_c //= 2
        return {"BLOCK_W": TILE // block_c, "BLOCK_C": block_c}
    block_w = power_of_two(columns, 256)
    return {"BLOCK_W": block_w, "BLOCK_C": power_of_two(channels, TILE // block_w)}


class Axis(NamedTuple):
    """One axis of a resize."""

    inputs: int
    outputs: int
    step: float  # what source_step gives, rounded to float32
    turns: int  # of a binary search over the outputs
    most_own: int  # outputs with the same `first`, at most
    most_read: int  # outputs that read one input, at most


@functools.lru_cache(maxsize=1024)
def plan_axis(inputs: int, outputs: int, scale: float | None, align_corners: bool) -> Axis:
    step = ctypes.c_float(source_step(inputs, outputs, scale, align_corners)).value
    first = samples(inputs, outputs, scale, align_corners, torch.float32, "cpu").first
    own = torch.bincount(first, minlength=inputs)
    read = own.clone()
    read[1:] += own[:-1]
    return Axis(inputs, outputs, step, outputs.bit_length(), int(own.max()), int(read.max()))


class Units(NamedTuple):
    """How output rows fall to programs; see output_rows in triton_sampling.py."""

    count: int
    n_chunks: int
    ROWS: int
    IS_BETWEEN_ROWS: bool


def plan_units(rows: Axis) -> Units:
    """Up to MAX_ROWS rows at once between two input rows where there usually are several, else one by one."""
    usual = round(rows.outputs / rows.inputs)
    if usual < 2:
        return Units(rows.outputs, 1, 1, False)
    block = balanced_block(usual, MAX_ROWS)
    n_chunks = cdiv(rows.most_own, block)
    return Units(rows.inputs * n_chunks, n_chunks, block, True)


def plan_strip(rows: int, programs: int) -> int:
    """How many rows a program walks when `programs` programs walk beside each other."""
    wanted = cdiv(MIN_PROGRAMS, programs)  # strips
    return balanced_block(rows, min(MAX_BLOCK_H, max(1, rows // wanted))) if MIN_PROGRAMS > 1 else rows


def balanced_block(size: int, largest: int) -> int:
    """The smallest block with which `size` takes as few turns as with blocks of `largest`."""
    return cdiv(size, cdiv(size, largest))


def power_of_two(size: int, largest: int) -> int:
    """The smallest power of two that holds `size`, or `largest`, itself one."""
    return min(largest, 1 << max(size - 1, 0).bit_length())
