"""Which tile shape the fused separable kernel gets, how many programs, and its table of branches.

Plain integers and one small table, no tensors of a call. A plan is cached: a network calls the same few problems over
and over.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch

from fastseg.ops.triton_common import ConvShape, DeviceTable, cdiv, is_interpreted


class Config(NamedTuple):
    """A tile: BLOCK_P rows of BLOCK_S pixels x BLOCK_N output channels, and BLOCK_D channels at a time (see triton.py).

    BLOCK_D is for 16-bit data, and half as many of fp32.
    """

    BLOCK_P: int
    BLOCK_S: int
    BLOCK_N: int
    BLOCK_D: int
    num_warps: int

    @property
    def results_per_thread(self) -> int:
        return self.BLOCK_P * self.BLOCK_S * self.BLOCK_N // (32 * self.num_warps)

    def depth(self, itemsize: int) -> int:
        """Channels of one step, which moves the same bytes in every dtype."""
        return max(16, self.BLOCK_D * 2 // itemsize)


# choose_config takes the cheapest for a problem. The depthwise half is computed again for each block of output
# channels, so blocks are as wide as registers allow. Two rows share input rows; one row serves images that are hardly
# taller than the dilation. Small tiles leave no multiprocessor idle where there are few pixels.
CONFIGS = (
    Config(2, 64, 256, 32, 8),
    Config(1, 64, 256, 32, 8),
    Config(2, 64, 128, 32, 8),
    Config(1, 64, 128, 32, 8),
    Config(2, 64, 64, 32, 8),
    Config(1, 64, 64, 64, 4),
    Config(1, 32, 32, 64, 4),
    Config(1, 16, 16, 32, 1),
)
# Results that a thread may hold. Most are for 16-bit data on capability 9: its matrix unit reads weights from shared
# memory, and leaves the sums where the epilogue takes few more registers. TF32 is rounded in registers, 64-bit offsets
# and statistics take some too; and the tiles of statistics shall not depend on the device.
MAX_RESULTS, MAX_RESULTS_ELSE = 128, 64
# Where channels do not come in aligned groups of 16 bytes, each element of a tile takes an address of its own in
# registers: tiles are smaller.
NARROW_CONFIGS = (
    Config(1, 64, 64, 32, 8),
    Config(1, 32, 32, 32, 4),
    Config(1, 16, 16, 32, 1),
)
# IEEE fp32 has no matrix unit. A thread multiplies what it holds in registers, so tiles are small too.
IEEE_CONFIGS = (
    Config(1, 64, 64, 64, 8),
    Config(1, 32, 32, 64, 4),
    Config(1, 16, 16, 64, 1),
)

# ptxas spills a few registers where that fits one more block on a multiprocessor, with addresses for every element.
NO_SPILLS = {"maxnreg": 255}

MAX_BLOCK_R = 3  # filter rows held at once; taller filters take several turns

# The model behind the choice, in multiply-adds of 16-bit data. A multiprocessor does about 2000 a cycle on its matrix
# unit, issues an instruction for about 128 elements, and loads about 64 bytes from L2.
INSTRUCTION_COST = 16  # of one instruction on one element
LOAD_INSTRUCTIONS = 3  # for each element of x loaded: a conversion, its share of addresses, of masks and of taps
LOAD_COST = 64  # of one row or column of a tile, for each channel
STEP_LATENCY = 1_500_000  # what a step takes longer when nothing else runs beside it: loads and barriers are waited for
TILE_COST = 2_000_000  # finding pixels and branch, storing the results
MULTIPROCESSORS = 1 if is_interpreted() else 132


class Branch(NamedTuple):
    """One separable convolution of the image, or a plain 1x1 convolution, of those that share a launch."""

    outputs: int  # channels
    first_output: int  # among those of all branches
    dilation: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)  # top and left
    first_channel: int | None = None  # of its depthwise vectors; None: no depthwise half
    first_tap: int = 0  # of its depthwise filter among those of all branches


class Layout(NamedTuple):
    """The compile-time facts that strides, sizes and settings decide."""

    GROUP_X: int  # neighbouring channels that make one aligned access (group_size), for each tensor
    GROUP_DEPTH: int
    GROUP_WEIGHT: int
    GROUP_Y: int
    IS_INDEX_64: bool
    PRECISION: str  # of fp32 products: "tf32" or "ieee"


class Plan(NamedTuple):
    """A launch without its tensors."""

    programs: int
    tiles: int
    table: DeviceTable
    arguments: dict[str, int | bool | str]  # of the kernel, and Triton's own


# Columns of the kernel's table, a row for each branch: first block of output channels, first output, outputs, first
# channel of the depthwise vectors or -1, first tap, phases, row tiles of a phase, then dilation and padding, each of
# rows and columns.
BRANCH_FIELDS = 11


@functools.lru_cache(maxsize=1024)
def plan_forward(
    shape: ConvShape,
    branches: tuple[Branch, ...],
    itemsize: int,
    layout: Layout,
    max_results: int,
    forced: Config | None,
) -> Plan:
    """The launch of separable_forward.

    `shape` is that of a depthwise convolution of C channels to K, whose dilation and padding are the branches' own.
    `forced` replaces the choice of tile shape.
    """
    config = forced or choose_config(shape, branches, itemsize, layout, max_results)
    depth = config.depth(itemsize)
    rows, first_block = [], 0
    for branch in branches:
        has_depthwise = branch.first_channel is not None
        rows.append(
            (
                first_block,
                branch.first_output,
                branch.outputs,
                branch.first_channel if has_depthwise else -1,
                branch.first_tap,
                _phases(shape, branch, config),
                _row_tiles(shape, branch, config),
                *branch.dilation,
                *branch.padding,
            )
        )
        first_block += cdiv(branch.outputs, config.BLOCK_N)
    tiles = max(_tiles(shape, branch, config) for branch in branches)
    arguments = {
        "N": shape.N,
        "n_depth": shape.K,
        "H": shape.H,
        "W": shape.W,
        "P": shape.P,
        "Q": shape.Q,
        "n_branches": len(branches),
        "n_blocks": first_block,
        "R": shape.R,
        "S": shape.S,
        "STRIDE_H": shape.stride_h,
        "STRIDE_W": shape.stride_w,
        "JUMP": _jump(shape, branches[-1]),
        "MULTIPLIER": shape.K // shape.C,
        "BLOCK_R": _balanced_block(shape.R, MAX_BLOCK_R),
        "BLOCK_BRANCHES": max(8, 1 << (len(branches) - 1).bit_length()),
        "HAS_PLAIN": any(branch.first_channel is None for branch in branches),
        "IS_DEPTH_WHOLE": shape.K % depth == 0,
        **layout._asdict(),
        **config._asdict(),
        "BLOCK_D": depth,
        "num_stages": 1,
        **(NO_SPILLS if configs_for(itemsize, layout, max_results) in (NARROW_CONFIGS, IEEE_CONFIGS) else {}),
    }
    return Plan(tiles * first_block, tiles, DeviceTable(rows), arguments)


@functools.lru_cache(maxsize=64)
def is_hopper(device: torch.device) -> bool:
    """Whether a device has capability 9; meta tensors and the interpreter stand for one that has."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device)[0] == 9


def max_results(device: torch.device, itemsize: int, layout: Layout, statistics: bool) -> int:
    """How many results a thread may hold."""
    is_wide = itemsize == 2 and not layout.IS_INDEX_64 and not statistics and is_hopper(device)
    return MAX_RESULTS if is_wide else MAX_RESULTS_ELSE


def configs_for(itemsize: int, layout: Layout, max_results: int) -> tuple[Config, ...]:
    """The configurations for a dtype and its groups of channels."""
    if itemsize == 4 and layout.PRECISION == "ieee":
        return IEEE_CONFIGS
    groups = (layout.GROUP_X, layout.GROUP_DEPTH, layout.GROUP_WEIGHT, layout.GROUP_Y)
    if min(groups) * itemsize < 16:
        return NARROW_CONFIGS
    return tuple(c for c in CONFIGS if c.results_per_thread <= max_results)


def choose_config(
    shape: ConvShape, branches: tuple[Branch, ...], itemsize: int, layout: Layout, max_results: int
) -> Config:
    """The cheapest configuration; of equals the one with less work.

    The time is that of all programs shared out, or of the longest one where those are few. The number of
    multiprocessors is a large GPU's: statistics are summed by tiles, and shall not depend on the device.
    """

    def cost(config: Config):
        depth = config.depth(itemsize)
        steps = cdiv(shape.K, depth)
        pixels = config.BLOCK_P * config.BLOCK_S
        product = pixels * config.BLOCK_N * depth * itemsize // 2
        loads = LOAD_COST * (2 * pixels + config.BLOCK_N) * depth * itemsize // 2
        work, longest = 0, 0
        for branch in branches:
            arithmetic = product
            if branch.first_channel is not None:
                arithmetic += INSTRUCTION_COST * pixels * depth * _instructions(shape, branch, config)
            step = max(arithmetic, loads)
            alone = step + STEP_LATENCY
            programs = _tiles(shape, branch, config) * cdiv(branch.outputs, config.BLOCK_N)
            work += programs * (TILE_COST + steps * (alone if is_interpreted() else step))
            longest = max(longest, TILE_COST + steps * alone)
        return max(work / MULTIPROCESSORS, longest), work

    return min(configs_for(itemsize, layout, max_results), key=cost)


def _instructions(shape: ConvShape, branch: Branch, config: Config) -> int:
    """Of the depthwise half, for one output of it."""
    loads = ((config.BLOCK_P - 1) * _jump(shape, branch) + shape.R) * shape.S
    return shape.R * shape.S + cdiv(LOAD_INSTRUCTIONS * loads, config.BLOCK_P)


def _phases(shape: ConvShape, branch: Branch, config: Config) -> int:
    """Rows of one phase are so far apart that they share input rows. A strip of one row needs none."""
    if branch.first_channel is None or config.BLOCK_P == 1:
        return 1
    dilation = branch.dilation[0]
    return min(dilation // math.gcd(shape.stride_h, dilation), shape.P)


def _row_tiles(shape: ConvShape, branch: Branch, config: Config) -> int:
    return cdiv(cdiv(shape.P, _phases(shape, branch, config)), config.BLOCK_P)


def _tiles(shape: ConvShape, branch: Branch, config: Config) -> int:
    strips = shape.N * _row_tiles(shape, branch, config) * _phases(shape, branch, config) * shape.Q
    return cdiv(strips, config.BLOCK_S)


def _jump(shape: ConvShape, branch: Branch) -> int:
    """Input rows of the phase from one output row of it to the next."""
    return shape.stride_h // math.gcd(shape.stride_h, branch.dilation[0])


def _balanced_block(size: int, largest: int) -> int:
    """The smallest block with which `size` takes as few turns as with blocks of `largest`."""
    return cdiv(size, cdiv(size, largest))
