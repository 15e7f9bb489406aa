"""A whole run: ceilings, then row by row in the order of value, kept in a record as it grows."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from typing import TextIO

import torch

from benchmarks import memory, overhead, record, resume, row, table, timing
from benchmarks.progress import Bar
from benchmarks.selection import LONGEST_ROW_SECONDS, WEIGHTS, Compiling, Settings, Step, obstacle, plan, workload

# The share of the budget for the cost of a call. Half of a row's share goes into timing; gates, warm-up and memory take
# the rest.
OVERHEAD_SHARE, TIMING_SHARE = 0.01, 0.5


def run(settings: Settings, out: TextIO, keep: Callable[[dict], None], begun: dict | None = None) -> dict:
    """Run everything in `settings`, or what `begun`, an unfinished record, lacks of it.

    Args:
        out: where progress is shown.
        keep: is given the record after each step.

    Returns the record. When it is interrupted, what was kept last is a valid one.
    """
    end = time.perf_counter() + settings.budget
    if settings.threads:
        torch.set_num_threads(settings.threads)
    if settings.device == "cuda":
        torch.backends.cudnn.benchmark = True  # native gets its own choice of kernels
    freed_memory_kept = memory.keep_freed_memory()
    if begun is None:
        found = record.start({**asdict(settings), "freed_memory_kept": freed_memory_kept})
    else:
        found = {**begun, "skipped": []}
    steps = resume.missing(plan(settings), found)
    print(table.machine_line(found), file=out, flush=True)
    if begun is not None:
        print(
            f"{len(record.rows(found))} rows are in the record, {len(steps)} are to be measured", file=out, flush=True
        )
    if not found["ceilings"]:
        found["ceilings"] = timing.ceilings(settings.device)
    print(table.ceilings_line(found), file=out, flush=True)
    keep(found)
    _run_steps(settings, steps, found, end, out, keep)
    found["overhead"] = overhead.measure(settings.device, settings.budget * OVERHEAD_SHARE)
    print(table.overhead_line(found), file=out, flush=True)
    record.finish(found)
    keep(found)
    return found


def _run_steps(settings, steps, found, end, out, keep):
    bar = Bar([WEIGHTS[step.kind] for step in steps], end - time.perf_counter(), out)
    compiling = Compiling(settings)
    work = previous = None
    headed = False
    for number, step in enumerate(steps):
        left = end - time.perf_counter()
        if left <= 0:
            found["skipped"].append({"id": step.id, "reason": record.SPENT})
            bar.end(None, measured=False)
            continue
        bar.begin(step.id)
        if step.kind != "networks" and not headed:
            bar.say(table.HEADER)
            headed = True
        waiting = sum(WEIGHTS[s.kind] for s in steps[number:])
        seconds = min(LONGEST_ROW_SECONDS[step.kind], TIMING_SHARE * left * WEIGHTS[step.kind] / waiting)
        try:
            if previous is None or step[1:3] + step[4:] != previous[1:3] + previous[4:]:
                work = None  # its tensors go before others come
                torch._dynamo.reset()
                work = workload(step, settings.device)
            previous = step
            measured = _measure(settings, step, work, found["ceilings"], seconds, compiling)
        except (RuntimeError, MemoryError) as error:
            if not memory.ran_out(error):
                bar.clear()
                raise
            work = previous = None
            measured = (str(error).splitlines() or ["out of memory"])[0]
        except BaseException:
            bar.clear()
            raise
        if isinstance(measured, str):
            found["skipped"].append({"id": step.id, "reason": measured})
            bar.end(f"{step.id}: skipped, {measured}", measured=False)
        else:
            compiling.add(measured)
            found[step.kind].append(measured)
            bar.end(_LINES[step.kind](measured))
        keep(found)
    bar.clear()


def _measure(settings, step: Step, work, ceilings, seconds, compiling) -> dict | str:
    """The row, or why there is none."""
    reason = obstacle(step, work, settings.device)
    if reason:
        return reason
    candidates = None
    if step.family == "operator":
        # A depthwise kernel in NCHW is shown by the full run alone; a dense one is what converts tensors in passing.
        both = step.case.outputs is not None or not settings.quick
        candidates = work.candidates(("channels_last", "NCHW") if both else ("channels_last",))
    return row.measure(
        work, step.direction, ceilings, seconds, candidates, lambda candidate: compiling.reason(step, candidate)
    )


_LINES = {"networks": table.network_lines, "blocks": table.block_line, "operators": table.row_line}
