"""`pytest benchmarks --benchmark-only`: every row of the full run through pytest-benchmark, one group a row.

Results are checked before they are timed. Here candidates run one after the other; for ratios measured in turns, and
everything else of a row, use `python -m benchmarks`. Save with --benchmark-json or --benchmark-autosave, and compare
with --benchmark-compare.
"""

from __future__ import annotations

import functools

import pytest
import torch

from benchmarks import selection
from benchmarks.selection import Settings, Step, matches, plan

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = "float32" if DEVICE == "cpu" else "bfloat16"
CANDIDATES = ("native NCHW", "native channels_last", "fastseg")
# Cases that run where nothing else is asked for: one of each kind, in the directions of the quick run.
SMALL = (
    "sep-aspp-d18, sep-aspp-d1, xception-middle-d2, aspp-r101-os16-d18, aspp-1x1, head-argmax-21, head-loss-21, "
    "separable-64-128, separable-aspp, deeplabv3-mobilenet-v3"
)


def _rows() -> list:
    return [
        pytest.param(step, id=step.id.replace("/", "-"))
        for step in plan(Settings(device=DEVICE, dtypes=(DTYPE, "autocast"), quick=False))
    ]


def is_small(step: Step) -> bool:
    """Whether a row runs where nothing else is asked for."""
    quick = step.direction in ("inference", "forward", "backward", "forward+backward") and step.dtype == DTYPE
    return quick and matches(step.case, SMALL) and (step.family, step.direction) != ("operator", "forward+backward")


@functools.lru_cache(maxsize=1)
def _workload(step: Step) -> selection.Workload:
    """One after the other, since candidates of a row come together."""
    return selection.workload(step, DEVICE)


@functools.lru_cache(maxsize=1)
def _natives(step: Step) -> list:
    work = _workload(step)
    return [work.calls(candidate, step.direction)[0]() for candidate in work.natives()]


@pytest.mark.parametrize("name", CANDIDATES)
@pytest.mark.parametrize("step", _rows())
def test_row(benchmark, step, name):
    work = _workload(step)
    reason = selection.obstacle(step, work, DEVICE)
    if reason:
        pytest.skip(reason)
    candidate = next(c for c in (*work.natives(), work.under_auto()) if c.name == name)
    call = work.calls(candidate, step.direction)[0]
    gate = work.gate(call(), step.direction, candidate.role, _natives(step))
    assert gate["green"], gate["message"]

    def synchronised():
        call()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.group = step.id
    cost = work.cost(step.direction)
    benchmark.extra_info.update(work.describe(step.direction), error=gate["error"], bytes=cost.bytes, flops=cost.flops)
    benchmark(synchronised)
