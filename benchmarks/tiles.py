"""python -m benchmarks.tiles: times every tile shape of the depthwise and dense kernels on the field's cases, on a GPU.

The planners choose tiles by a model of their cost. This prints what each tile takes, beside native and the planner's
choice, so that the model can be compared with a GPU. Kernels are compiled by many processes first; results are checked
by `python -m benchmarks` and the tests, not here.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

import fastseg
from benchmarks import timing
from benchmarks.cases import ConvCase, select
from benchmarks.row import Candidate
from benchmarks.workload import ConvWorkload, direction_call

DIRECTIONS = ("forward", "grad_input", "grad_weight")
ROUNDS = 5
# The tiles of csrc/dilated/dilated_plan.h.
CUDA_TILES = ("128x256", "128x128", "128x64", "128x32", "64x64", "32x32")
# What the compiling processes run: the same kernels as the cases, on as little as reaches them.
SMALL = {
    "dilated_conv2d": ConvCase("small", "", 512, (33, 33), dilation=(12, 12), batch_gpu=2, outputs=256),
    "depthwise_conv2d": ConvCase("small", "", 512, (33, 33), dilation=(12, 12), batch_gpu=2),
}


class Tile(NamedTuple):
    """One way to run a kernel; `forced` is a configuration of the Triton kernels, or a tile of the CUDA C++ ones."""

    backend: str
    forced: object = None
    shared: bool = False  # whether programs share the work of a dense product evenly

    @property
    def name(self) -> str:
        shape = "x".join(map(str, self.forced)) if isinstance(self.forced, tuple) else self.forced
        return f"{self.backend} {shape or 'as planned'}{' shared' if self.shared else ''}"


def tiles(operator: str) -> list[Tile]:
    from fastseg.ops.depthwise import triton as depthwise
    from fastseg.ops.dilated import triton as dilated

    if operator == "depthwise_conv2d":
        return [Tile("triton"), *(Tile("triton", c) for c in depthwise.CONFIGS), Tile("cuda")]
    shapes = (*dilated.BOX_CONFIGS, *dilated.WIDE_CONFIGS, *dilated.CONFIGS)
    return [
        *(Tile("triton"), *(Tile("triton", c) for c in shapes if c.area >= 64 * 64)),
        Tile("triton", dilated.SHARED_CONFIG, shared=True),
        *(Tile("cuda"), *(Tile("cuda", tile) for tile in CUDA_TILES)),
    ]


@contextlib.contextmanager
def forcing(operator: str, tile: Tile) -> Iterator[None]:
    """Run the kernels of `operator` with `tile`."""
    if tile.forced is None:
        yield
    elif tile.backend == "cuda":
        os.environ["FASTSEG_FORCE_TILE"] = tile.forced
        try:
            yield
        finally:
            del os.environ["FASTSEG_FORCE_TILE"]
    else:
        from fastseg.ops.depthwise import triton as depthwise
        from fastseg.ops.dilated import triton as dilated

        is_depthwise, splits = operator == "depthwise_conv2d", dilated.SHARED if tile.shared else 1
        with depthwise.forced_config(tile.forced) if is_depthwise else dilated.forced_config(tile.forced, splits):
            yield


def prepared_calls(workload: ConvWorkload, direction: str, tile: Tile | None, sets: list[dict]) -> list:
    """One call of `direction` for each set of tensors; native in channels_last without a tile."""
    backend = "native" if tile is None else tile.backend
    case = workload.case

    def run(x, weight):
        geometry = (None, case.stride, case.padding, case.dilation, case.groups)
        return fastseg.ops.conv2d(x, weight, *geometry, backend=backend)

    candidate = Candidate(backend, "fastseg", "channels_last", run, backend)
    return [direction_call(candidate, workload, direction, tensors) for tensors in sets]


def compile_all(share: tuple[int, int], operator: str, dtype: torch.dtype) -> None:
    """Compile this process's share of the Triton kernels of `operator`."""
    first, step = share
    for tile in [tile for tile in tiles(operator) if tile.backend == "triton"][first::step]:
        for direction in DIRECTIONS:
            with forcing(operator, tile), contextlib.suppress(Exception):  # the timing shows what fails
                workload = ConvWorkload(SMALL[operator], dtype, "cuda")
                prepared_calls(workload, direction, tile, [workload.tensors(0)])[0]()
    torch.cuda.synchronize()


def measure(case: ConvCase, dtype: torch.dtype, direction: str) -> dict:
    """The row of one case and direction: seconds of native and of every tile, or why a tile did not run."""
    workload = ConvWorkload(case, dtype, "cuda")
    count = timing.buffer_sets(workload.cost(direction).bytes, "cuda")
    sets = [workload.tensors(seed) for seed in range(count)]
    row = {"id": f"{case.id}/{direction}", "flops": workload.cost(direction).flops, "tiles": {}}
    for tile in (None, *tiles(workload.operator)):
        name = tile.name if tile else "native channels_last"
        try:
            with forcing(workload.operator, tile or Tile("native")):
                sampler = timing.graph_sampler(prepared_calls(workload, direction, tile, sets))
            row["tiles"][name] = timing.spread([sampler() for _ in range(ROUNDS)]).median
        except Exception as error:  # a tile that cannot run is a line of the table
            row["tiles"][name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:160]
    return row


def line(row: dict) -> str:
    """Native, what the planners chose, and the fastest five."""
    took = {name: seconds for name, seconds in row["tiles"].items() if not isinstance(seconds, str)}
    shown = [name for name in ("native channels_last", "triton as planned", "cuda as planned") if name in took]
    shown += [name for name in sorted(took, key=took.get) if name not in shown][:5]
    parts = (f"{name} {1e6 * took[name]:.1f} us {row['flops'] / took[name] / 1e12:.0f}T" for name in shown)
    return f"{row['id']}: " + " | ".join(parts)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tiles", description=__doc__)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--cases", nargs="+", default=["aspp-*", "resnet-*", "largefov*", "sep-aspp-*", "xception-*"])
    parser.add_argument("--directions", nargs="+", default=DIRECTIONS, choices=DIRECTIONS)
    parser.add_argument("--budget", type=float, default=120.0, metavar="SECONDS")
    parser.add_argument("--jobs", type=int, default=min(14, os.cpu_count() or 1), help="compiling processes")
    parser.add_argument("--output", type=Path, help="write the JSON here")
    parsed = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("PyTorch sees no CUDA device on this machine, so there is nothing to time.", file=sys.stderr)
        return 2
    end = time.perf_counter() + parsed.budget
    dtype = getattr(torch, parsed.dtype)
    cases = list(dict.fromkeys(case for pattern in parsed.cases for case in select(pattern, "cuda")))
    context = multiprocessing.get_context("spawn")
    with context.Pool(parsed.jobs) as pool:
        shares = [
            ((i, parsed.jobs), operator, dtype)
            for operator in sorted({ConvWorkload(case, dtype, "cuda").operator for case in cases})
            for i in range(parsed.jobs)
        ]
        pool.starmap(compile_all, shares, chunksize=1)
    print(f"compiled with {end - time.perf_counter():.0f} s left", flush=True)
    torch.backends.cudnn.benchmark = True
    timing.WARM_UP_SECONDS, timing.SAMPLE_SECONDS = 5e-3, 5e-4  # many tiles, of which only large differences matter
    rows = []
    with timing.measuring_stream("cuda"):
        for case in cases:
            for direction in parsed.directions:
                if time.perf_counter() > end:
                    continue
                rows.append(measure(case, dtype, direction))
                print(line(rows[-1]), flush=True)
                if parsed.output:
                    found = {"gpu": torch.cuda.get_device_name(), "dtype": parsed.dtype, "rows": rows}
                    parsed.output.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
