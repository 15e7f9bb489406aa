"""Which tile shape each Triton kernel of the family gets, how many programs, and its table of rectangles.

The file is long because all plans share the tables of tiles and the model of what they cost.

Plain integers and one small table, no tensors of a call. A plan is cached: a network calls the same few problems over
and over. Which taps are live where is live_taps.py's knowledge; here rectangles become tiles of a matrix product.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch

from fastseg.ops.geometry import live_outputs
from fastseg.ops.live_taps import Rectangle, Tap, rectangles
from fastseg.ops.triton_common import ConvShape, DeviceTable, cdiv, is_interpreted


class Config(NamedTuple):
    """A tile of the product: BLOCK_M x BLOCK_N results, and BLOCK_D of the sum at a time (half of it in fp32).

    forward and grad_input: pixels x target channels, over source channels. grad_weight: output channels x input
    channels, over pixels.
    """

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_D: int
    num_warps: int
    num_stages: int

    @property
    def area(self) -> int:
        return self.BLOCK_M * self.BLOCK_N

    @property
    def results_per_thread(self) -> int:
        return self.area // (32 * self.num_warps)

    def depth(self, itemsize: int) -> int:
        """Terms of the sum in one step, which moves the same bytes in every dtype."""
        return max(16, self.BLOCK_D * 2 // itemsize)

    def shared_memory(self, itemsize: int) -> int:
        return self.num_stages * (self.BLOCK_M + self.BLOCK_N) * self.depth(itemsize) * itemsize

    def tiles(self, images: int, rows: int, columns: int) -> int:
        """How many tiles hold the pixels of a rectangle in all images."""
        return cdiv(images * rows * columns, self.BLOCK_M)


class BoxConfig(NamedTuple):
    """A tile of the product whose pixels are a box: images x rows x columns, as tensor descriptors load them."""

    BOX_N: int
    BOX_H: int
    BOX_W: int
    BLOCK_N: int
    BLOCK_D: int
    num_warps: int
    num_stages: int

    @property
    def BLOCK_M(self) -> int:
        return self.BOX_N * self.BOX_H * self.BOX_W

    area = Config.area
    results_per_thread = Config.results_per_thread
    depth = Config.depth
    shared_memory = Config.shared_memory

    def tiles(self, images: int, rows: int, columns: int) -> int:
        return cdiv(images, self.BOX_N) * cdiv(rows, self.BOX_H) * cdiv(columns, self.BOX_W)


class GradBoxConfig(NamedTuple):
    """A tile of grad_weight, BLOCK_M output channels x BLOCK_N input channels, over a box of pixels at a time."""

    BOX_N: int
    BOX_H: int
    BOX_W: int
    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    num_stages: int

    area = Config.area
    results_per_thread = Config.results_per_thread
    shared_memory = Config.shared_memory

    def depth(self, itemsize: int) -> int:
        return self.BOX_N * self.BOX_H * self.BOX_W

    def boxes(self, images: int, rows: int, columns: int) -> int:
        """How many boxes hold the pixels of a tap."""
        return cdiv(images, self.BOX_N) * cdiv(rows, self.BOX_H) * cdiv(columns, self.BOX_W)


# choose_config takes the cheapest for a problem. Large tiles reuse what they load; small ones leave no multiprocessor
# idle where there are few pixels; thin ones serve the few channels of a classifier.
CONFIGS = (
    Config(128, 128, 64, 8, 3),
    Config(128, 64, 64, 8, 4),
    Config(64, 64, 64, 4, 4),
    Config(128, 32, 64, 8, 4),
    Config(64, 32, 64, 4, 4),
    Config(32, 32, 64, 4, 4),
    Config(16, 16, 16, 1, 3),
)
# Twice the results a thread: for plain whole sums with 32-bit offsets on capability 9, which has the registers. The
# first one leaves none for an epilogue.
WIDE_CONFIGS = (Config(128, 256, 64, 8, 3), Config(128, 128, 64, 4, 3))
SHARED_CONFIG = WIDE_CONFIGS[0]
# Where channels do not come in aligned groups of 16 bytes, each element or pair of a tile takes an address and a mask
# in registers: tiles are smaller, and shallower for images of few channels.
NARROW_CONFIGS = (
    Config(64, 64, 32, 4, 3),
    Config(64, 64, 16, 4, 3),
    Config(32, 32, 32, 4, 3),
    Config(16, 16, 16, 1, 3),
)
MAX_NARROW = 32  # results of a thread, where each store takes an address of its own
# IEEE fp32 has no matrix unit. A thread multiplies what it holds in registers, so tiles are small too. A step is one
# chain of additions: longer ones are less accurate than PyTorch's, but in the interpreter, where they save time.
_IEEE_BLOCK_D = 64 if is_interpreted() else 32
IEEE_CONFIGS = (
    Config(64, 64, _IEEE_BLOCK_D, 4, 3),
    Config(64, 32, _IEEE_BLOCK_D, 4, 3),
    Config(32, 32, _IEEE_BLOCK_D, 4, 3),
    Config(16, 16, _IEEE_BLOCK_D, 1, 3),
)
# Descriptors take no registers for addresses, so one tile is larger. Flat boxes are for large images, deep ones for
# batches of small ones, and a row is for 1x1 filters, whose pixels need no shape.
_BOXES = {
    128: ((1, 1, 128), (1, 8, 16), (2, 8, 8), (4, 4, 8), (8, 4, 4), (16, 2, 4)),
    64: ((1, 1, 64), (1, 8, 8), (2, 4, 8), (4, 4, 4), (8, 2, 4), (16, 2, 2)),
}
BOX_CONFIGS = tuple(
    BoxConfig(*box, *rest)
    for pixels, *rest in (
        (128, 256, 64, 8, 4),
        (128, 128, 64, 4, 3),
        (128, 128, 64, 8, 3),
        (128, 64, 64, 4, 4),
        (64, 128, 64, 4, 4),
    )
    for box in _BOXES[pixels]
)
GRAD_BOX_CONFIGS = tuple(
    GradBoxConfig(*box, *rest)
    for rest in ((128, 256, 8, 4), (128, 128, 8, 4), (64, 128, 4, 4), (64, 64, 4, 4))
    for box in ((1, 1, 64), (1, 4, 16), (1, 8, 8), (2, 4, 8), (4, 4, 4), (8, 2, 4), (16, 2, 2))
)
MAX_RESULT_BYTES = 256  # of a thread's results in the dtype: TF32 is rounded in registers, which leaves half as many
MAX_IMAGE_BIAS = 64  # results of a thread that boxes leave beside the image of each pixel, of which a bias is taken
# ptxas spills a register or two where that fits one more block on a multiprocessor, with addresses for every element.
NO_SPILLS = {"maxnreg": 255}
SMALL_AREA = 32 * 32  # of a tile of grad_weight for which it does that, too

# The model behind the choice, in multiply-adds of 16-bit data. A multiprocessor does about 2000 a cycle and loads about
# 64 bytes from L2: a tile of 128 x 256 is where loads no longer count.
LOAD_COST = 72  # of one row or column of a tile, for each term of the sum
STEP_LATENCY = 800_000  # the least a step takes when nothing else runs beside it
TILE_COST = 2_000_000  # filling the pipeline, finding the rectangle, storing the results
SPLIT_COST = 8_000_000  # a second launch
MAX_STEPS = 2**30  # that are shared: programs count them in 32 bits
SHARED_COST = 26_000_000  # the same where one program has its tiles one after the other, and hands sums on
PARTIAL_COST = 4  # of a partial sum, written and read by all multiprocessors together
BOX_GAIN = 10  # one part in so many of a step by pointers goes to an address and a copy for every 16 bytes
LONE_LOSS = 8  # with nobody beside it, a program waits for DRAM for one part in so many of a step
L2_BYTES = 32 * 2**20  # what stays in the cache, of a source that is read once for each tap
REGISTERS, OTHER_REGISTERS = 65536, 48  # of a multiprocessor; of a thread, besides its results
RESERVED_SHARED_MEMORY = 2048  # barriers, and what the system takes of each block

SPLITS = (1, 2, 3, 4, 6, 8)  # of a product's sums
SHARED = 0  # instead of a split: the steps of all sums are shared evenly by one program on each multiprocessor
FINISH_BLOCK_M, FINISH_BLOCK_N = 8, 128  # tile of their second stage

# grad_weight: no more programs than a large GPU holds in two rounds, and so little for the second stage to read. The
# number does not depend on the device, so neither do the splits.
TARGET_PROGRAMS = 512
MIN_STEPS = 12  # of one program: a split costs 4 bytes for each weight, written and read
# Tile of the second stage: so many splits at once, for each turn waits for memory, and partial sums in all.
MAX_REDUCE_SPLITS, REDUCE_BLOCK = 16, 65536 if is_interpreted() else 2048


class Device(NamedTuple):
    """What a choice depends on besides the problem."""

    multiprocessors: int
    shared_memory: int  # bytes that one block may take
    capability: int  # its major number; 9 and newer have tensor descriptors


class Layout(NamedTuple):
    """The compile-time facts that strides, sizes and settings decide, for forward and grad_input."""

    GROUP_SOURCE: int  # neighbouring channels that make one aligned access (group_size), for each tensor
    GROUP_WEIGHT: int
    GROUP_TARGET: int
    IS_INDEX_64: bool
    PRECISION: str  # of fp32 products: "tf32" or "ieee"


class GradWeightLayout(NamedTuple):
    """The same for dilated_grad_weight."""

    GROUP_GY: int
    GROUP_X: int
    IS_INDEX_64: bool
    PRECISION: str


class Plan(NamedTuple):
    """A launch without its tensors."""

    programs: int
    table: DeviceTable
    arguments: dict[str, int | bool | str]  # of the kernel, and Triton's own
    has_boxes: bool = False  # whether the kernel is the one that loads by descriptors
    splits: int = 1  # of each sum of a product; several leave partial sums for a second stage; or SHARED


# Columns of the kernels' tables, as triton.py reads them.
# rectangles: first tile, first step, then for rows and columns: index, count, taps, source, its jump, weight, its jump
# taps of grad_weight: first program, first row of partial sums, first output channel, output channels,
#     then for rows and columns: first output, outputs, first input
SPAN_FIELDS = 7
RECTANGLE_FIELDS = 2 + 2 * SPAN_FIELDS
TAP_FIELDS = 4 + 2 * 3


@functools.lru_cache(maxsize=64)
def device_limits(device: torch.device) -> Device:
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return Device(properties.multi_processor_count, properties.shared_memory_per_block_optin, properties.major)
    if is_interpreted():
        return Device(1, 1 << 30, 9)
    return Device(132, 160 * 1024, 9)  # meta tensors stand for a large GPU


def is_narrow(itemsize: int, *groups: int) -> bool:
    """Whether some access of a tile takes less than 16 bytes."""
    return min(groups) * itemsize < 16


def configs_for(itemsize: int, precision: str, loads: int, stores: int) -> tuple[Config, ...]:
    """The configurations for a dtype, and for the smallest group of channels that one load, and one store, takes."""
    if itemsize == 4 and precision == "ieee":
        return IEEE_CONFIGS
    if is_narrow(itemsize, loads):
        return NARROW_CONFIGS
    return tuple(c for c in CONFIGS if c.results_per_thread <= MAX_NARROW) if is_narrow(itemsize, stores) else CONFIGS


def wide_configs_for(
    configs: tuple[Config, ...], itemsize: int, layout: Layout, device: Device, has_epilogue: bool
) -> tuple[Config, ...]:
    """The tiles that a device has registers for besides `configs`, which are those of configs_for."""
    has_room = device.capability == 9 and itemsize == 2 and not layout.IS_INDEX_64
    return WIDE_CONFIGS[1 if has_epilogue else 0 :] if has_room and configs is CONFIGS else ()


def boxes_for(itemsize: int, layout: Layout, device: Device) -> tuple[BoxConfig, ...]:
    """The boxes that a device loads by descriptors: none before capability 9, and none of channels it cannot align.

    Nor for IEEE fp32: what limits it is arithmetic, and boxes only add to that.
    """
    is_ieee = itemsize == 4 and layout.PRECISION == "ieee"
    if device.capability < 9 or is_ieee or is_narrow(itemsize, layout.GROUP_SOURCE, layout.GROUP_WEIGHT):
        return ()
    return tuple(c for c in BOX_CONFIGS if c.results_per_thread * itemsize <= MAX_RESULT_BYTES)


def choose_config(
    configs,
    device: Device,
    itemsize: int,
    tiles,
    columns: int,
    steps,
    splits: Sequence[int] = (1,),
    is_streamed: bool = False,
    may_share: bool = False,
) -> tuple[Config | BoxConfig | GradBoxConfig, int]:
    """The fastest configuration that fits the device, and into how many of `splits` its sums are cut; of equals the one
    with less work, then the smallest, then the first.

    `tiles(config)` lists how many row blocks there are of each depth, `steps(config)` the steps of each; `columns` is
    the width of the product. `is_streamed`: whether the source comes from DRAM; `may_share`: whether programs may share
    the work evenly. Multiprocessors take the longest programs first. One program that has a multiprocessor to itself
    takes the latency of its loads at least.
    """

    def step_cost(config):
        step = max(config.area, LOAD_COST * (config.BLOCK_M + config.BLOCK_N)) * config.depth(itemsize) * itemsize // 2
        if isinstance(config, (BoxConfig, GradBoxConfig)):
            step -= step // BOX_GAIN
        is_lone = is_streamed and _resident_programs(config, device, itemsize) == 1
        return step + step // LONE_LOSS if is_lone else step

    def shared_costs(config):
        rows, depths = tiles(config), steps(config)
        blocks = cdiv(columns, config.BLOCK_N)
        programs = blocks * sum(rows)
        total = blocks * sum(n * s for n, s in zip(rows, depths, strict=True))
        if programs > device.multiprocessors and min(depths) > 0 and total <= MAX_STEPS:
            time = cdiv(total, device.multiprocessors) * step_cost(config)
            time += SHARED_COST * (programs + device.multiprocessors) // device.multiprocessors
            yield (time, device.multiprocessors * time, config.area, config.depth(itemsize)), config, SHARED

    def costs(config):
        step = step_cost(config)
        resident = _resident_programs(config, device, itemsize)
        rows, depths = tiles(config), steps(config)
        blocks = cdiv(columns, config.BLOCK_N)
        programs = blocks * sum(rows)
        for n_splits in splits:
            if n_splits > 1 and (programs >= 2 * device.multiprocessors or config in WIDE_CONFIGS):
                break
            at_once = 1 if is_interpreted() else min(resident, max(1, programs * n_splits // device.multiprocessors))
            shared = max(step, STEP_LATENCY // at_once)
            turns = [cdiv(s, n_splits) for s in depths]
            classes = [(TILE_COST + s * shared, n * blocks * n_splits) for s, n in zip(turns, rows, strict=True)]
            time = _makespan(sorted(classes, reverse=True), device.multiprocessors)
            time = max(time, TILE_COST + max(turns) * max(step, STEP_LATENCY))
            if n_splits > 1:
                time += SPLIT_COST + PARTIAL_COST * n_splits * sum(rows) * config.BLOCK_M * columns
            work = sum(length * n for length, n in classes)
            yield (time, work, config.area, config.depth(itemsize)), config, n_splits

    def fitting(configs):
        return [c for c in configs if c.shared_memory(itemsize) <= device.shared_memory]

    found = [row for c in fitting(configs) for row in costs(c)]
    found += [row for c in fitting([SHARED_CONFIG] if may_share else []) for row in shared_costs(c)]
    _, config, n_splits = min(found, key=lambda row: row[0])
    return config, n_splits


def _resident_programs(config, device: Device, itemsize: int) -> int:
    """How many programs a multiprocessor holds, by shared memory and by registers."""
    threads = 32 * config.num_warps
    registers = threads * (config.results_per_thread + OTHER_REGISTERS)
    by_memory = device.shared_memory // (config.shared_memory(itemsize) + RESERVED_SHARED_MEMORY)
    return max(1, min(by_memory, REGISTERS // registers))


def _makespan(classes: list[tuple[int, int]], machines: int) -> int:
    """When the last of so many jobs of each length is done, if whoever is free takes the next; longest jobs first."""
    levels = [(0, machines)]  # when machines are free, and how many
    for length, jobs in classes:
        while jobs > 0:
            levels.sort()
            free, count = levels.pop(0)
            rounds = max(1, jobs // count) if not levels else 1
            taken = min(count, jobs)
            if taken < count:
                levels.append((free, count - taken))
            levels.append((free + rounds * length, taken))
            jobs -= rounds * taken
    return max(free for free, _ in levels)


@functools.lru_cache(maxsize=1024)
def plan_product(
    targets: str,
    shape: ConvShape,
    padding: tuple[int, int, int, int],
    itemsize: int,
    layout: Layout,
    can_describe: bool,
    device: Device,
    forced: Config | BoxConfig | GradBoxConfig | None,
    forced_splits: int,
    has_image_bias: bool = False,
    has_epilogue: bool = False,
) -> Plan:
    """The launch of dilated_product, or of dilated_product_boxes, for `targets` "outputs" (forward) or "inputs"
    (grad_input).

    `can_describe`: whether descriptors can hold the source and the weight. `forced` replaces the choice of tile shape,
    except boxes where there can be none.
    """
    depth, columns = (shape.C, shape.K) if targets == "outputs" else (shape.K, shape.C)
    found = sorted(
        rectangles(
            targets,
            (shape.H, shape.W),
            (shape.R, shape.S),
            (shape.stride_h, shape.stride_w),
            padding,
            (shape.dilation_h, shape.dilation_w),
        ),
        key=lambda rectangle: -rectangle.taps,  # the longest programs start first
    )

    def tiles(c: Config | BoxConfig) -> list[int]:
        return [c.tiles(shape.N, r.rows.count, r.columns.count) for r in found]

    def steps(c: Config | BoxConfig) -> list[int]:
        return [r.taps * cdiv(depth, c.depth(itemsize)) for r in found]

    loads = min(layout.GROUP_SOURCE, layout.GROUP_WEIGHT)
    configs = configs_for(itemsize, layout.PRECISION, loads, layout.GROUP_TARGET)
    spacing = _steps_of(found[0])
    has_neighbours = set(spacing.values()) == {1}  # a box of targets reads boxes of the source
    boxes = boxes_for(itemsize, layout, device) if can_describe and has_neighbours else ()
    if has_image_bias:
        boxes = tuple(c for c in boxes if c.results_per_thread <= MAX_IMAGE_BIAS)
    if isinstance(forced, GradBoxConfig) or (isinstance(forced, BoxConfig) and forced not in boxes):
        forced = None
    if has_neighbours and not has_image_bias:
        configs = (*wide_configs_for(configs, itemsize, layout, device, has_epilogue), *configs)
    config, splits = forced, forced_splits
    if config is None:
        pixels = shape.H * shape.W if targets == "outputs" else shape.P * shape.Q
        is_streamed = shape.N * pixels * depth * itemsize > L2_BYTES
        may_share = can_describe and WIDE_CONFIGS[1] in configs
        config, splits = choose_config(
            (*configs, *boxes), device, itemsize, tiles, columns, steps, SPLITS, is_streamed, may_share
        )
    n_blocks = cdiv(columns, config.BLOCK_N)
    rows, first, first_step = [], 0, 0
    for rectangle, count, n_steps in zip(found, tiles(config), steps(config), strict=True):
        spans = rectangle.rows, rectangle.columns
        rows.append((first, first_step, *(field for s in spans for field in (s.index, s.count, *tap_fields(s.taps)))))
        if splits == SHARED:
            count *= n_blocks
            first_step += count * n_steps
        first += count
    arguments = {
        "N": shape.N,
        "n_columns": columns,
        "n_rectangles": len(rows),
        "n_blocks": n_blocks,
        "BLOCK_RECTANGLES": power_of_two(len(rows)),
        "IS_GRAD_INPUT": targets == "inputs",
        **tile_arguments(config, itemsize, layout.PRECISION, loads, layout.GROUP_TARGET),
    }
    has_boxes = isinstance(config, BoxConfig)
    if has_boxes:
        arguments |= {name: getattr(layout, name) for name in ("GROUP_TARGET", "IS_INDEX_64", "PRECISION")}
        arguments["n_steps"] = cdiv(depth, config.depth(itemsize))
    else:
        is_whole = depth % config.depth(itemsize) == 0
        arguments |= {"n_depth": depth, "IS_DEPTH_WHOLE": is_whole, **spacing, **layout._asdict()}
    if splits == SHARED:
        del arguments["IS_INDEX_64"], arguments["GROUP_WEIGHT"]
        programs = min(device.multiprocessors, first_step)
        arguments |= {"n_share": cdiv(first_step, programs), "n_steps": first_step}
        return Plan(cdiv(first_step, arguments["n_share"]), DeviceTable(rows), arguments, False, splits)
    has_steps = all((splits - 1) * cdiv(n_steps, splits) < n_steps for n_steps in steps(config))
    arguments |= {"n_splits": splits, "IS_SPLIT": splits > 1, "HAS_STEPS": has_steps}
    return Plan(first * n_blocks * splits, DeviceTable(rows), arguments, has_boxes, splits)


def tap_fields(taps: Sequence[Tap]) -> tuple[int, ...]:
    """Live taps are equally spaced along the source and along the filter: first and jump describe them."""
    first = taps[0] if taps else (0, 0)
    second = taps[1] if len(taps) > 1 else first
    return len(taps), first[0], second[0] - first[0], first[1], second[1] - first[1]


def _steps_of(rectangle: Rectangle) -> dict[str, int]:
    """From one target to the next, and from its source to the next one's: the same in every rectangle."""
    return {
        "period_h": rectangle.rows.period,
        "period_w": rectangle.columns.period,
        "step_h": rectangle.rows.step,
        "step_w": rectangle.columns.step,
    }


@functools.lru_cache(maxsize=1024)
def plan_grad_weight(
    shapes: tuple[ConvShape, ...],
    channels: tuple[int, ...],
    itemsize: int,
    layout: GradWeightLayout,
    can_describe: bool,
    device: Device,
    forced: Config | BoxConfig | GradBoxConfig | None,
) -> tuple[Plan, int]:
    """The launch of dilated_grad_weight, or of dilated_grad_weight_boxes, and the rows of partial sums [rows, C] that
    it leaves.

    `shapes`: convolutions of one input with one stride; `channels`: the first channel of each one's output in
    grad_output. The table lists the taps of one after those of the other, so each convolution's second stage finds its
    own from some row on. `can_describe`: whether descriptors can hold both tensors.

    The pixels of each tap are split where its live outputs are more than one program should sum up, so all programs
    but the last of a tap are equally long. A tap without live outputs has no split.
    """
    taps = [(i, row, column) for i, s in enumerate(shapes) for row in _tap_rows(s) for column in _tap_columns(s)]
    N, C = shapes[0].N, shapes[0].C

    def blocks(c, i: int) -> int:
        return cdiv(shapes[i].K, c.BLOCK_M) * cdiv(C, c.BLOCK_N)

    @functools.cache
    def tap_steps(c) -> list[int]:
        if isinstance(c, GradBoxConfig):
            return [c.boxes(N, row[1], column[1]) for _, row, column in taps]
        return [cdiv(N * row[1] * column[1], c.depth(itemsize)) for _, row, column in taps]

    def programs(c, steps: int) -> list[int]:
        return [blocks(c, i) * cdiv(n, steps) for (i, *_), n in zip(taps, tap_steps(c), strict=True)]

    @functools.cache
    def steps_of_program(c) -> int:
        longest = max(1, *tap_steps(c))
        allowed = max(TARGET_PROGRAMS, sum(programs(c, longest)))
        steps = max(MIN_STEPS, sum(programs(c, 1)) // allowed)
        while sum(programs(c, steps)) > allowed:  # each tap rounds up
            steps += 1 + steps // 16
        return cdiv(longest, max(1, longest // steps))  # the longest tap is split evenly

    loads = min(layout.GROUP_GY, layout.GROUP_X)
    boxes = GRAD_BOX_CONFIGS if can_describe and itemsize == 2 and device.capability >= 9 else ()
    if is_narrow(itemsize, loads):
        boxes = ()
    if isinstance(forced, BoxConfig) or (isinstance(forced, GradBoxConfig) and forced not in boxes):
        forced = None
    config = forced
    if config is None:
        config, _ = choose_config(
            (*configs_for(itemsize, layout.PRECISION, loads, layout.GROUP_X), *boxes),
            device,
            itemsize,
            tiles=lambda c: [n // cdiv(C, c.BLOCK_N) for n in programs(c, steps_of_program(c))],
            columns=C,
            steps=lambda c: [cdiv(n, max(1, cdiv(n, steps_of_program(c)))) for n in tap_steps(c)],
        )
    steps = steps_of_program(config)
    rows, first, first_partial = [], 0, 0
    for (i, row, column), count in zip(taps, programs(config, steps), strict=True):
        rows.append((first, first_partial, channels[i], shapes[i].K, *row, *column))
        first += count
        first_partial += count // blocks(config, i) * shapes[i].K
    table = DeviceTable([*rows, (first, first_partial) + (0,) * (TAP_FIELDS - 2)])  # the last row ends the last tap
    arguments = {
        "N": N,
        "C": C,
        "n_taps": len(rows),
        "n_steps": steps,
        "n_blocks_c": cdiv(C, config.BLOCK_N),
        "stride_h": shapes[0].stride_h,
        "stride_w": shapes[0].stride_w,
        "BLOCK_TAPS": power_of_two(len(rows)),
        **layout._asdict(),
        **(NO_SPILLS if config.area <= SMALL_AREA else {}),
        **tile_arguments(config, itemsize, layout.PRECISION, loads),
    }
    has_boxes = isinstance(config, GradBoxConfig)
    if has_boxes:
        del arguments["GROUP_GY"], arguments["BLOCK_D"]
    return Plan(first, table, arguments, has_boxes), first_partial


def _tap_rows(shape: ConvShape) -> list[tuple[int, int, int]]:
    return _tap_spans(shape.R, shape.H, shape.P, shape.stride_h, shape.pad_top, shape.dilation_h)


def _tap_columns(shape: ConvShape) -> list[tuple[int, int, int]]:
    return _tap_spans(shape.S, shape.W, shape.Q, shape.stride_w, shape.pad_left, shape.dilation_w)


def _tap_spans(taps: int, size: int, outputs: int, stride: int, pad: int, dilation: int) -> list[tuple[int, int, int]]:
    """First live output, number of live outputs and first input read, of each tap along one axis."""
    spans = []
    for tap in range(taps):
        live, read = live_outputs(size, outputs, stride, pad, tap * dilation)
        spans.append((live.start, live.stop - live.start, read.start))
    return spans


def tile_arguments(config: Config | BoxConfig, itemsize: int, precision: str, *groups: int) -> dict[str, int]:
    is_ieee = itemsize == 4 and precision == "ieee"
    options = NO_SPILLS if is_ieee or is_narrow(itemsize, *groups) else {}
    return {**config._asdict(), "BLOCK_D": config.depth(itemsize), **options}


def power_of_two(count: int, smallest: int = 16) -> int:
    """The power of two that holds `count`, from a few: each compiles a kernel."""
    return max(smallest, 1 << (count - 1).bit_length())
