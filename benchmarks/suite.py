"""A whole run: ceilings, networks, operators, overhead, in the order of value, kept in a record as it grows."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

from benchmarks import blocks, head, memory, operators, record, table, timing
from benchmarks.cases import DIRECTIONS, QUICK_DIRECTIONS, select
from benchmarks.network import NETWORKS
from benchmarks.network import measure as measure_network
from benchmarks.workload import Candidate, ConvWorkload

# In the quick run torch.compile is left out once compiling operators has taken this long; networks, and the training of
# blocks, are not compiled.
QUICK_COMPILE_SECONDS = 30.0
# Shares of the time budget.
NETWORK_SHARE, BLOCK_SHARE, OVERHEAD_SHARE = 0.06, 0.012, 0.01
LONGEST_ROW_SECONDS = 5.0


@dataclass(frozen=True)
class Settings:
    """What to run. `budget` is seconds for everything; rows that do not fit are skipped and listed."""

    device: str = "cpu"
    dtypes: tuple[str, ...] = ("float32",)
    cases: str = "*"
    quick: bool = True
    budget: float = 150.0
    networks: bool = True
    blocks: bool = True  # whole blocks and heads
    compiles: bool = True  # whether torch.compile is among the candidates
    threads: int | None = None


def run(settings: Settings, say: Callable[[str], None], keep: Callable[[dict], None]) -> dict:
    """Run everything in `settings`; `say` shows progress, `keep` is given the record after each step."""
    if settings.threads:
        torch.set_num_threads(settings.threads)
    if settings.device == "cuda":
        torch.backends.cudnn.benchmark = True  # native gets its own choice of kernels
    end = time.perf_counter() + settings.budget
    found = record.start({**asdict(settings), "freed_memory_kept": memory.keep_freed_memory()})
    say(table.machine_line(found))
    found["ceilings"] = timing.ceilings(settings.device)
    say(table.ceilings_line(found))
    keep(found)
    if settings.networks:
        _run_networks(settings, found, end, say, keep)
    if settings.blocks:
        _run_blocks(settings, found, end, say, keep)
    _run_operators(settings, found, end, say, keep)
    found["overhead"] = operators.overhead(settings.device, settings.budget * OVERHEAD_SHARE)
    say(table.overhead_line(found))
    record.finish(found)
    keep(found)
    return found


def _run_networks(settings, found, end, say, keep):
    for dtype in settings.dtypes:
        for case in NETWORKS:
            if settings.device not in case.devices or (settings.quick and not case.quick):
                continue
            identity = f"{case.id}/inference/{dtype}"
            if time.perf_counter() > end:
                found["skipped"].append({"id": identity, "reason": "the time budget was spent"})
                continue
            reason = "compiling a network takes too long for the quick run" if settings.quick else None
            say(f"{identity}: checking that native and accelerated agree, then timing ...")
            seconds = settings.budget * NETWORK_SHARE
            try:
                row = measure_network(case, settings.device, getattr(torch, dtype), seconds, reason)
            except torch.OutOfMemoryError as error:
                found["skipped"].append({"id": identity, "reason": str(error).splitlines()[0]})
                continue
            finally:
                torch._dynamo.reset()
            found["networks"].append(row)
            say(table.network_lines(row))
            keep(found)


def _run_blocks(settings, found, end, say, keep):
    """The rows of heads, then those of blocks."""
    full, quick_compile = settings.compiles and not settings.quick, settings.compiles and QUICK_COMPILE_SECONDS > 0
    plan = [
        (head, case, direction, dtype, full or (quick_compile and settings.device == "cuda" and case.kind == "loss"))
        for dtype in settings.dtypes
        for case in head.HEADS
        for direction in head.DIRECTIONS[case.kind]
    ]
    plan += [
        (blocks, case, direction, dtype, full or (direction == "inference" and quick_compile))
        for dtype in settings.dtypes
        for case in blocks.BLOCKS
        for direction in blocks.DIRECTIONS
    ]
    for family, case, direction, dtype, compiles in plan:
        identity = f"{case.id}/{direction}/{dtype}"
        if time.perf_counter() > end:
            found["skipped"].append({"id": identity, "reason": "the time budget was spent"})
            continue
        seconds = settings.budget * BLOCK_SHARE
        try:
            row = family.measure(case, direction, settings.device, getattr(torch, dtype), seconds, compiles)
        except torch.OutOfMemoryError as error:
            found["skipped"].append({"id": identity, "reason": str(error).splitlines()[0]})
            continue
        finally:
            torch._dynamo.reset()
        found["blocks"].append(row)
        say(table.block_line(row))
        keep(found)


def _run_operators(settings, found, end, say, keep):
    plan = _plan(settings)
    if plan:
        say(table.HEADER)
    most = QUICK_COMPILE_SECONDS if settings.quick else float("inf")
    compiling = _CompileTime(most if settings.compiles else 0.0)
    workload = None
    for done, (case, dtype, direction) in enumerate(plan):
        identity = f"{case.id}/{direction}/{dtype}"
        left = end - time.perf_counter()
        if left <= 0:
            found["skipped"].append({"id": identity, "reason": "the time budget was spent"})
            continue
        if workload is None or (workload.case, workload.dtype) != (case, getattr(torch, dtype)):
            torch._dynamo.reset()
            workload = ConvWorkload(case, getattr(torch, dtype), settings.device)
        # Half of a row's share goes into timing; gates, warm-up and memory take the rest.
        seconds = min(LONGEST_ROW_SECONDS, 0.5 * left / (len(plan) - done))
        # A depthwise kernel in NCHW is shown by the full run alone; a dense one is what converts tensors in passing.
        both = case.outputs is not None or not settings.quick
        try:
            candidates = workload.candidates(("channels_last", "NCHW") if both else ("channels_last",))
            row = operators.measure(workload, direction, found["ceilings"], seconds, candidates, compiling.reason)
        except torch.OutOfMemoryError as error:
            found["skipped"].append({"id": identity, "reason": str(error).splitlines()[0]})
            continue
        compiling.add(row)
        found["operators"].append(row)
        left = max(0, round(end - time.perf_counter()))
        say(f"{table.row_line(row)}  [{done + 1}/{len(plan)}, {left} s left]")
        keep(found)


def _plan(settings: Settings) -> list:
    """(case, dtype, direction), most valuable first: the quick directions of every case, then the others."""
    later = () if settings.quick else tuple(d for d in DIRECTIONS if d not in QUICK_DIRECTIONS)
    return [
        (case, dtype, direction)
        for directions in (QUICK_DIRECTIONS, later)
        for dtype in settings.dtypes
        for case in select(settings.cases, settings.device, settings.quick and settings.device == "cpu")
        for direction in directions
    ]


class _CompileTime:
    """Leaves torch.compile out once compiling has taken `most` seconds in all."""

    def __init__(self, most: float):
        self.most = most
        self.spent = 0.0

    def reason(self, candidate: Candidate) -> str | None:
        if candidate.role == "compile" and self.spent >= self.most:
            return f"the quick run spends at most {self.most:.0f} s on compiling"
        return None

    def add(self, row: dict) -> None:
        self.spent += sum(c.get("prepare_seconds", 0.0) for c in row["candidates"] if c["role"] == "compile")
