"""One process of `python -m benchmarks compare`: reads a job from standard input, prints one line of JSON.

It runs in a folder where `fastseg` may be of an older revision, so it asks of it no more than the cases need.
"""

from __future__ import annotations

import importlib
import json
import sys

import torch

from benchmarks import memory, row, timing

# family -> module, name of its cases, name of its workload.
FAMILIES = {
    "operator": ("workload", "cases.CASES", "ConvWorkload"),
    "head": ("head", "head.HEADS", "HeadWorkload"),
    "block": ("blocks", "blocks.BLOCKS", "BlockWorkload"),
    "network": ("network", "network.NETWORKS", "NetworkWorkload"),
}


def measure(family: str, identity: str, direction: str, dtype: str, job: dict) -> dict:
    """{"fastseg", "native"} in seconds a call, or {"refused": why there is no speed}."""
    try:
        module, cases, workload = FAMILIES[family]
        home, name = cases.split(".")
        case = next(c for c in getattr(importlib.import_module(f"benchmarks.{home}"), name) if c.id == identity)
        kind = getattr(importlib.import_module(f"benchmarks.{module}"), workload)
        work = kind(case, row.dtype_of(dtype), job["device"])
        shortage = memory.shortage(work.memory_needed(direction), job["device"])
        if shortage:
            return {"refused": shortage}
        with timing.measuring_stream(job["device"]):
            return _timed(work, direction, job)
    except (ImportError, AttributeError, RuntimeError, TypeError) as error:
        return {"refused": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"}


def _timed(work: row.Workload, direction: str, job: dict) -> dict:
    own, (_, native) = work.under_auto(), work.natives()
    calls = {"fastseg": work.calls(own, direction), "native": work.calls(native, direction)}
    if job["check"]:
        gate = work.gate(calls["fastseg"][0](), direction, "fastseg", [calls["native"][0]()])
        if not gate["green"]:
            return {"refused": f"wrong result, {gate['message']}"}
    samplers, _ = timing.samplers_for(calls, job["device"])
    samples = timing.interleave(samplers, job["seconds"])
    return {name: timing.spread(taken).median for name, taken in samples.items()}


def main() -> None:
    job = json.load(sys.stdin)
    if job["threads"]:
        torch.set_num_threads(job["threads"])
    if job["device"] == "cuda":
        torch.backends.cudnn.benchmark = True
    memory.keep_freed_memory()
    found = {row.identity(step[1], *step[2:]): measure(*step, job) for step in job["steps"]}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
