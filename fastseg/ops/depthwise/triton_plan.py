"""Which tile shape each Triton kernel of the family gets, and how many programs: plain integers, no tensors.

A problem falls into *walks* (see triton.py). A kernel's plan takes the tile shape that makes them cheapest, by a model
of what a tile load costs, and is cached: a network calls the same few problems over and over.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

from fastseg.ops.triton_common import ConvShape, cdiv, is_interpreted


class Config(NamedTuple):
    """A tile shape, and the warps that work on it."""

    BLOCK_P: int
    BLOCK_Q: int
    BLOCK_C: int
    num_warps: int

    @property
    def elements_per_thread(self) -> int:
        return self.BLOCK_Q * self.BLOCK_C // (32 * self.num_warps)


# choose_config takes the cheapest for a problem. Tiles are wide in channels for many channels, in columns for few; low
# walks serve phases of few rows, as large dilations have, and small problems. A thread owns 8 neighbouring elements of
# a tile (one 16-byte load of 16-bit data), or 4 where registers are short or wider tiles would hang over the edge. A
# tile has fewer channels than threads: only then does the compiler load weights straight into the tile's layout.
CONFIGS = (
    Config(8, 16, 64, 4),
    Config(4, 16, 64, 4),
    Config(4, 32, 32, 4),
    Config(4, 64, 16, 4),
    Config(4, 8, 64, 4),
    Config(4, 16, 32, 4),
    Config(4, 64, 8, 4),
    Config(2, 16, 64, 4),
    Config(2, 64, 16, 4),
    Config(2, 8, 64, 4),
    Config(2, 64, 8, 4),
    Config(1, 16, 64, 4),
    Config(1, 64, 16, 4),
)

MAX_BLOCK_R = 8  # filter rows held at once; taller filters take several turns
MAX_UNROLLED_S = 3  # wider filters loop over their columns
MAX_CHAIN = 25  # taps of fp32 that are added up in one chain; more are a sum of filter columns, as in PyTorch
# Elements that a thread may hold at once, without and with spills in sight: sums, and weights or output gradients. They
# are fewer where each element takes an address and a predicate of its own (GROUP == 1).
MAX_HELD = {"grouped": 100, "single": 72}
MAX_HELD_GRAD_WEIGHT = {"grouped": 136, "single": 72}
# ptxas spills a register or two where that fits one more block on a multiprocessor. Large filters are bound by
# arithmetic and gain nothing from it.
NO_SPILLS = {"maxnreg": 255}
# Programs of the weight gradient: enough to fill a large GPU, few enough to keep the second stage small. The number
# does not depend on the device, so neither do the sums.
TARGET_PROGRAMS = 1024
# Fewer programs than this leave a large GPU partly idle. The interpreter runs one after the other.
MIN_PROGRAMS = 1 if is_interpreted() else 512
# Tile of the weight gradient's second stage: many splits at once, for each turn waits for memory.
REDUCE_BLOCK_SPLITS, REDUCE_BLOCK_K = 128, 32
# What a tile costs besides its elements, in elements: address and mask of each group (counted in compiled code), and of
# each contiguous line one more access and the parts of sectors that it touches and does not need (estimated).
ADDRESS_COST = 4
LINE_COST = 32


class Walks(NamedTuple):
    """The walks of a problem: in each of `images` images, `phases` phases of up to `rows` rows, `phases` rows apart.

    The columns of a row fall into `classes` residue classes of up to `columns` columns.
    """

    images: int
    phases: int
    rows: int
    columns: int
    classes: int = 1

    def tiles(self, config: Config) -> int:
        """Row tiles of one phase."""
        return cdiv(self.rows, config.BLOCK_P)

    def count(self, config: Config) -> int:
        blocks = self.classes * cdiv(self.columns, config.BLOCK_Q)
        return self.images * self.phases * self.tiles(config) * blocks


class Layout(NamedTuple):
    """The compile-time flags that strides and sizes decide."""

    GROUP: int
    IS_CHANNELS_LAST: bool
    IS_INDEX_64: bool


class Plan(NamedTuple):
    """A launch without its tensors."""

    programs: int
    arguments: dict[str, int | bool]  # of the kernel, and Triton's own


def choose_config(walks: Walks, channels: int, layout: Layout, loads, held, max_held) -> Config:
    """The first of the cheapest configurations that fit the registers.

    A tile costs what it takes to load it, edges included, and too few programs cost as much as just enough.
    `loads(config)` is the number of tiles loaded for one walk, `held(config)` the number held in registers at once.
    """

    def cost(config: Config) -> int:
        elements = config.elements_per_thread
        addresses = cdiv(elements, layout.GROUP)
        lines = config.BLOCK_Q if layout.IS_CHANNELS_LAST else config.BLOCK_C
        tile = 32 * config.num_warps * (elements + ADDRESS_COST * addresses) + LINE_COST * lines
        programs = walks.count(config) * cdiv(channels, config.BLOCK_C)
        return max(programs, MIN_PROGRAMS) * loads(config) * tile

    limit = max_held["grouped" if layout.GROUP > 1 else "single"]
    return min((c for c in CONFIGS if c.elements_per_thread * held(c) <= limit), key=cost)


@functools.lru_cache(maxsize=1024)
def plan_forward(shape: ConvShape, layout: Layout, itemsize: int, forced: Config | None) -> Plan:
    """The launch of depthwise_forward; `forced` replaces the choice."""
    walks, jump = _output_walks(shape), _jump(shape)
    block_r = _balanced_block(shape.R, MAX_BLOCK_R)
    by_columns = itemsize == 4 and shape.R * shape.S > MAX_CHAIN
    config = forced or choose_config(
        walks,
        shape.K,
        layout,
        loads=lambda c: ((c.BLOCK_P - 1) * jump + shape.R) * shape.S,
        held=lambda c: (1 + by_columns) * c.BLOCK_P + block_r,
        max_held=MAX_HELD,
    )
    arguments = {
        "JUMP": jump,
        "BLOCK_R": block_r,
        "BY_COLUMNS": by_columns,
        "UNROLL_S": _unroll(shape.S),
        **_shared_arguments(shape, layout, walks, config),
        **(NO_SPILLS if shape.R > MAX_BLOCK_R else {}),
    }
    return Plan(walks.count(config) * cdiv(shape.K, config.BLOCK_C), arguments)


@functools.lru_cache(maxsize=1024)
def plan_grad_input(shape: ConvShape, layout: Layout, itemsize: int, forced: Config | None) -> Plan:
    """The launch of depthwise_grad_input; `forced` replaces the choice."""
    walks = _input_walks(shape)
    step_r = shape.stride_h // math.gcd(shape.stride_h, shape.dilation_h)
    step_s = shape.stride_w // math.gcd(shape.stride_w, shape.dilation_w)
    live_r, live_s = cdiv(shape.R, step_r), cdiv(shape.S, step_s)
    block_r = _balanced_block(live_r, MAX_BLOCK_R)
    by_columns = itemsize == 4 and live_r * live_s > MAX_CHAIN
    config = forced or choose_config(
        walks,
        shape.C,
        layout,
        loads=lambda c: (c.BLOCK_P - 1 + live_r) * live_s,
        held=lambda c: (1 + by_columns) * c.BLOCK_P + block_r,
        max_held=MAX_HELD,
    )
    arguments = {
        "C": shape.C,
        "STEP_R": step_r,
        "STEP_S": step_s,
        "BLOCK_R": block_r,
        "BY_COLUMNS": by_columns,
        "UNROLL_S": _unroll(live_s),
        **_shared_arguments(shape, layout, walks, config),
        **(NO_SPILLS if live_r > MAX_BLOCK_R else {}),
    }
    return Plan(walks.count(config) * cdiv(shape.C, config.BLOCK_C), arguments)


@functools.lru_cache(maxsize=1024)
def plan_grad_weight(shape: ConvShape, layout: Layout, forced: Config | None) -> Plan:
    """The launch of depthwise_grad_weight. Programs share out the taps where their sums would not fit the registers."""
    walks, jump = _output_walks(shape), _jump(shape)
    block_r = _balanced_block(shape.R, MAX_BLOCK_R)
    max_held = MAX_HELD_GRAD_WEIGHT["grouped" if layout.GROUP > 1 else "single"]

    def block_s(c: Config) -> int:
        columns = (max_held // c.elements_per_thread - c.BLOCK_P) // block_r
        return _balanced_block(shape.S, max(1, columns))

    def tap_blocks(c: Config) -> int:
        return cdiv(shape.R, block_r) * cdiv(shape.S, block_s(c))

    config = forced or choose_config(
        walks,
        shape.K,
        layout,
        loads=lambda c: tap_blocks(c) * (c.BLOCK_P + ((c.BLOCK_P - 1) * jump + block_r) * block_s(c)),
        held=lambda c: c.BLOCK_P + block_r * block_s(c),
        max_held=MAX_HELD_GRAD_WEIGHT,
    )
    n_walks = walks.count(config)
    n_blocks = cdiv(shape.K, config.BLOCK_C) * tap_blocks(config)
    n_splits = min(n_walks, cdiv(TARGET_PROGRAMS, n_blocks))
    arguments = {
        "n_walks": n_walks,
        "n_splits": n_splits,
        "JUMP": jump,
        "BLOCK_R": block_r,
        "BLOCK_S": block_s(config),
        **_shared_arguments(shape, layout, walks, config),
        **(NO_SPILLS if shape.R * shape.S > 9 else {}),
    }
    return Plan(n_blocks * n_splits, arguments)


# fmt: off
def _shared_arguments(shape: ConvShape, layout: Layout, walks: Walks, config: Config) -> dict[str, int | bool]:
    return {
        "K": shape.K, "H": shape.H, "W": shape.W, "P": shape.P, "Q": shape.Q, "R": shape.R, "S": shape.S,
        "multiplier": shape.K // shape.C,
        "STRIDE_H": shape.stride_h, "STRIDE_W": shape.stride_w,
        "pad_h": shape.pad_top, "pad_w": shape.pad_left,
        "dilation_h": shape.dilation_h, "dilation_w": shape.dilation_w,
        "n_phases": walks.phases, "n_tiles": walks.tiles(config),
        **config._asdict(),
        **layout._asdict(),
    }
# fmt: on


def _output_walks(shape: ConvShape) -> Walks:
    """Output rows whose input rows lie a multiple of the dilation apart."""
    period = shape.dilation_h // math.gcd(shape.stride_h, shape.dilation_h)
    return Walks(shape.N, min(period, shape.P), cdiv(shape.P, period), shape.Q)


def _input_walks(shape: ConvShape) -> Walks:
    """Input rows that meet the same filter taps, and whose output rows lie a multiple of the dilation apart."""
    period = math.lcm(shape.stride_h, shape.dilation_h)
    columns = cdiv(shape.W, shape.stride_w)
    return Walks(shape.N, min(period, shape.H), cdiv(shape.H, period), columns, shape.stride_w)


def _jump(shape: ConvShape) -> int:
    return shape.stride_h // math.gcd(shape.stride_h, shape.dilation_h)


def _unroll(taps: int) -> int:
    return taps if taps <= MAX_UNROLLED_S else 1


def _balanced_block(size: int, largest: int) -> int:
    """The smallest block with which `size` takes as few turns as with blocks of `largest`."""
    return cdiv(size, cdiv(size, largest))
