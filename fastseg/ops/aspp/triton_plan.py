"""Which tiles the grouped product of parallel convolutions gets: its two tables, and the shape of a tile.

A piece is a rectangle of targets with the same live taps everywhere. Where every branch has targets of its own (forward
with "concat") the pieces of all branches stand side by side in one table. Where branches add up in one target
(grad_input, forward with "sum") the plane is cut wherever a tap of any branch goes in or out, and a piece lists the
live taps of each:

    branch 0, d = 2    aabbbbbbcc        a to c: other taps of the branch
    branch 1, d = 4    ddddeeffff
    pieces             0011223344        piece 1 has taps b of branch 0 and d of branch 1

Plain integers, no tensors of a call; a plan is cached like those of fastseg/ops/dilated/triton_plan.py, whose tile
shapes and cost model these are.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

from fastseg.ops.dilated.triton_plan import (
    BoxConfig,
    Config,
    Device,
    Layout,
    choose_config,
    configs_for,
    power_of_two,
    tap_fields,
    tile_arguments,
    wide_configs_for,
)
from fastseg.ops.live_taps import Rectangle, Span, Tap, rectangles
from fastseg.ops.triton_common import ConvShape, DeviceTable, cdiv

# Columns of the kernel's tables.
# pieces: first program; first row, rows, first column, columns; first target channel, channels; first sum, sums;
#     first tile among those of its channels
# sums: branch, first source channel, source channels, filter taps, first live tap,
#     then for rows and columns: live taps, source, its jump, jump along the filter
PIECE_FIELDS = 10
SUM_FIELDS = 5 + 2 * 4


class Sum(NamedTuple):
    """A product with the live taps of one branch, over all its source channels."""

    branch: int
    channel: int  # the first of the source
    depth: int
    rows: tuple[Tap, ...]
    columns: tuple[Tap, ...]

    def steps(self, depth: int) -> int:
        return len(self.rows) * len(self.columns) * cdiv(self.depth, depth)


class Piece(NamedTuple):
    """Targets [rows, columns] of some channels, and the products that add up to them."""

    row: int
    rows: int
    column: int
    columns: int
    channel: int
    channels: int
    sums: tuple[Sum, ...]

    def steps(self, depth: int) -> int:
        return sum(s.steps(depth) for s in self.sums)


class Plan(NamedTuple):
    """A launch without its tensors."""

    programs: int
    pieces: DeviceTable
    sums: DeviceTable
    tiles: int  # row blocks of the channels that have most: the rows of partial statistics
    arguments: dict[str, int | bool | str]  # of the kernel, and Triton's own


def pieces_of(targets: str, shapes: Sequence[ConvShape], is_sum: bool) -> list[Piece]:
    """The pieces of `targets` "outputs" (forward) or "inputs" (grad_input), for branches of stride 1."""
    first = [0 if is_sum else sum(shape.K for shape in shapes[:i]) for i in range(len(shapes))]
    found = [_rectangles(targets, shape) for shape in shapes]
    if targets == "outputs" and not is_sum:
        return [
            Piece(
                *(r.rows.index, r.rows.count, r.columns.index, r.columns.count, first[i], shapes[i].K),
                (Sum(i, 0, shapes[i].C, r.rows.taps, r.columns.taps),),
            )
            for i, branch in enumerate(found)
            for r in branch
        ]
    channels = shapes[0].C if targets == "inputs" else shapes[0].K
    size = (shapes[0].H, shapes[0].W)
    rows, columns = (
        _common_spans([_spans(branch, axis) for branch in found], end) for axis, end in zip("hw", size, strict=True)
    )
    return [
        Piece(
            *(row, n_rows, column, n_columns, 0, channels),
            tuple(
                Sum(i, *((first[i], shape.K) if targets == "inputs" else (0, shape.C)), row_taps[i], column_taps[i])
                for i, shape in enumerate(shapes)
                if row_taps[i] and column_taps[i]
            ),
        )
        for row, n_rows, row_taps in rows
        for column, n_columns, column_taps in columns
    ]


def _rectangles(targets: str, shape: ConvShape) -> list[Rectangle]:
    padding = (shape.pad_top, shape.pad_top, shape.pad_left, shape.pad_left)
    dilation = (shape.dilation_h, shape.dilation_w)
    return rectangles(targets, (shape.H, shape.W), (shape.R, shape.S), (1, 1), padding, dilation)


def _spans(found: Sequence[Rectangle], axis: str) -> dict[int, Span]:
    """The spans of one axis, by where they begin."""
    spans = [r.rows if axis == "h" else r.columns for r in found]
    return {span.index: span for span in spans}


def _common_spans(branches: Sequence[dict[int, Span]], size: int) -> list[tuple[int, int, list[tuple[Tap, ...]]]]:
    """First target, targets, and the live taps of each branch there, wherever any branch has a span begin."""
    cuts = sorted({index for spans in branches for index in spans})
    found = []
    for cut, end in zip(cuts, [*cuts[1:], size], strict=True):
        inside = [spans[max(index for index in spans if index <= cut)] for spans in branches]
        taps = [tuple(Tap(tap.source + cut - s.index, tap.weight) for tap in s.taps) for s in inside]
        found.append((cut, end - cut, taps))
    return found


@functools.lru_cache(maxsize=1024)
def plan_branches(
    targets: str,
    shapes: tuple[ConvShape, ...],
    is_sum: bool,
    itemsize: int,
    layout: Layout,
    device: Device,
    forced: Config | BoxConfig | None,
    has_epilogue: bool = False,
) -> Plan:
    """The launch of aspp_product. `forced` replaces the choice of tile shape, except by boxes, which it cannot take."""
    # The longest programs start first.
    found = sorted(pieces_of(targets, shapes, is_sum), key=lambda piece: -piece.steps(1))
    depths = {s.depth for piece in found for s in piece.sums}
    images = shapes[0].N

    def tiles(c: Config, piece: Piece) -> int:
        return c.tiles(images, piece.rows, piece.columns)

    def programs(c: Config) -> list[int]:
        return [tiles(c, piece) * cdiv(piece.channels, c.BLOCK_N) for piece in found]

    def steps(c: Config) -> list[int]:
        return [piece.steps(c.depth(itemsize)) for piece in found]

    loads = min(layout.GROUP_SOURCE, layout.GROUP_WEIGHT)
    config = forced if isinstance(forced, Config) else None
    if config is None:
        configs = configs_for(itemsize, layout.PRECISION, loads, layout.GROUP_TARGET)
        configs = (*wide_configs_for(configs, itemsize, layout, device, has_epilogue), *configs)
        config, _ = choose_config(configs, device, itemsize, programs, 1, steps)

    rows, sums, first, first_tile = [], [], 0, {}
    for piece, count in zip(found, programs(config), strict=True):
        tile = first_tile.get(piece.channel, 0)
        rows.append((first, *piece[:6], len(sums), len(piece.sums), tile))
        sums += [_sum_fields(s, shapes[s.branch]) for s in piece.sums]
        first += count
        first_tile[piece.channel] = tile + tiles(config, piece)
    arguments = {
        "N": images,
        "C": shapes[0].C,
        "n_pieces": len(rows),
        "BLOCK_PIECES": power_of_two(len(rows)),
        "IS_GRAD_INPUT": targets == "inputs",
        "IS_DEPTH_WHOLE": all(depth % config.depth(itemsize) == 0 for depth in depths),
        **layout._asdict(),
        **tile_arguments(config, itemsize, layout.PRECISION, loads, layout.GROUP_TARGET),
    }
    return Plan(first, DeviceTable(rows), DeviceTable(sums), max(first_tile.values()), arguments)


def _sum_fields(s: Sum, shape: ConvShape) -> tuple[int, ...]:
    """Taps of the filter are counted row by row, as a channels_last weight holds them."""
    n_r, i_sh, jump_sh, i_r, jump_r = tap_fields(s.rows)
    n_s, i_sw, jump_sw, i_s, jump_s = tap_fields(s.columns)
    return (
        *(s.branch, s.channel, s.depth, shape.R * shape.S, i_r * shape.S + i_s),
        *(n_r, i_sh, jump_sh, jump_r * shape.S),
        *(n_s, i_sw, jump_sw, jump_s),
    )
