"""One row: every candidate of a case and direction, checked first, then timed in turns.

A candidate whose result is wrong is red and gets no speed. How results are judged is a workload's own; the kernels
under test have to be as exact as their operator promises, baselines may use TF32 or round intermediate results and have
to be recognisably right.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

import fastseg
from benchmarks import kernels_called, memory, timing

LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
# A baseline's largest error, relative to the largest value. TF32 and bfloat16 stay far below, a wrong result far above.
BASELINE_ERROR = 2.0**-5
# The modes of torch.compile. CUDA graphs are made by the timing, for every candidate alike.
COMPILERS = {"torch.compile": None, "torch.compile max-autotune": "max-autotune-no-cudagraphs"}
# float32 parameters, and bfloat16 wherever torch.autocast takes it: a dtype of networks.
AUTOCAST = "autocast"
NATIVES = tuple(f"native {layout}" for layout in LAYOUTS)


@dataclass(frozen=True)
class Candidate:
    """One way to compute the same.

    role: "native" (eager, a baseline), "compile" (torch.compile) and "runtime" (another inference engine), shown beside
    them, or "fastseg" (under test).
    function: what is called with the workload's tensors; of blocks and networks, what makes the module to call.
    backend: that of an operator's kernel; empty where many operators run.
    """

    name: str
    role: str
    layout: str  # a key of LAYOUTS
    function: Callable
    backend: str
    reason: str = ""


class Cost(NamedTuple):
    """What the case cannot do without: each tensor moved once, each product whose input lies in the image."""

    bytes: int
    flops: int


class Skip(Exception):
    """A candidate cannot run here; the message says why."""


class Workload(Protocol):
    """A case in a dtype on a device, as a family gives it. Directions are the family's own."""

    device: str
    dtype: torch.dtype

    def describe(self, direction: str) -> dict:
        """For the row: case, layer, shape, dtype, device, and live_taps of taps or live_share where it has them."""

    def cost(self, direction: str) -> Cost: ...

    def memory_needed(self, direction: str) -> int:
        """About how many bytes measuring the row takes."""

    def keeps_for_backward(self, direction: str) -> bool: ...

    def natives(self) -> list[Candidate]:
        """Native in both layouts."""

    def under_auto(self) -> Candidate:
        """fastseg as users call it."""

    def candidates(self) -> list[Candidate]:
        """Everything that is compared, native first."""

    def calls(self, candidate: Candidate, direction: str, most: int | None = None) -> list[Callable[[], object]]:
        """What is timed, once per set of buffers (of `most` at most), prepared as far as is not timed.

        Raises:
            Skip: the candidate cannot run here.
        """

    def gate(self, results, direction: str, role: str, natives: Sequence) -> dict:
        """{"green", "error", "message"} of what a call gave; `natives` is what native gave."""

    def extras(self, results: dict[str, object]) -> dict:
        """More for the row, from the results by candidate."""


def dtype_of(name: str) -> torch.dtype | str:
    """What a workload takes: the dtype of torch, or AUTOCAST."""
    return name if name == AUTOCAST else getattr(torch, name)


def compiled(function: Callable, mode: str | None) -> Callable:
    """`function` in one of COMPILERS' modes, from its first call on: making it takes seconds, and it may be skipped."""
    made: list[Callable] = []

    def call(*tensors):
        if not made:
            made.append(torch.compile(function, dynamic=False, mode=mode))
        return made[0](*tensors)

    return call


def identity(case: str, direction: str, dtype: str) -> str:
    return f"{case}/{direction}/{dtype}"


def measure(
    workload: Workload,
    direction: str,
    ceilings: dict[str, float],
    seconds: float,
    candidates: Sequence[Candidate] | None = None,
    skip: Callable[[Candidate], str | None] = lambda candidate: None,
) -> dict:
    """The row of the record for one case and direction; timing takes about `seconds`.

    `skip` gives a reason to leave a candidate out, or None.
    """
    with timing.measuring_stream(workload.device):
        return _measure(workload, direction, ceilings, seconds, candidates, skip)


def _measure(workload, direction, ceilings, seconds, candidates, skip):
    cost = workload.cost(direction)
    bounds = {
        "memory": cost.bytes / ceilings["copy_bytes_per_s"],
        "compute": cost.flops / timing.matrix_ceiling(ceilings, workload.dtype),
    }
    bound = max(bounds, key=bounds.get)
    described = workload.describe(direction)
    row = {
        "id": identity(described["case"], direction, described["dtype"]),
        **described,
        "direction": direction,
        "bytes": cost.bytes,
        "flops": cost.flops,
        "bound": {"name": bound, "seconds": bounds[bound]},
        "candidates": [],
    }
    calls, results = {}, {}
    for candidate in workload.candidates() if candidates is None else candidates:
        entry = {k: getattr(candidate, k) for k in ("name", "role", "layout", "backend", "reason")}
        row["candidates"].append(entry)
        entry["skipped"] = skip(candidate)
        if entry["skipped"] is None:
            _check(workload, direction, candidate, entry, calls, results)
    row |= workload.extras(results)
    row["baseline"] = None
    if calls:
        samplers, row["timed"] = timing.samplers_for(calls, workload.device)
        _add_speeds(row, timing.interleave(samplers, seconds))
    return row


def _check(workload, direction, candidate, entry, calls, results) -> None:
    """Run the candidate once and fill in its gate; the calls of a green one join `calls`."""
    start = time.perf_counter()
    try:
        prepared = workload.calls(candidate, direction)
        result = results[candidate.name] = prepared[0]()
        entry["prepare_seconds"] = time.perf_counter() - start
        natives = [results[name] for name in NATIVES if name in results]
        # What "auto" leaves to native is judged as native is.
        role = "native" if candidate.backend == "native" else candidate.role
        entry["gate"] = workload.gate(result, direction, role, natives)
        if not entry["gate"]["green"]:
            return
        entry["peak_bytes"] = memory.peak_bytes(prepared[0], workload.device) if candidate.role != "runtime" else None
        entry["saved_bytes"] = None
        if workload.keeps_for_backward(direction):
            entry["saved_bytes"] = memory.saved_bytes(lambda: workload.calls(candidate, direction, 1)[0]())
        if candidate.role == "fastseg" and not candidate.backend:
            entry["kernels"] = kernels_called.count(prepared[0])
            entry["backend"] = kernels_called.in_words(entry["kernels"])
        calls[candidate.name] = prepared
    except (Skip, fastseg.BackendError) as error:
        entry["skipped"] = str(error)
    except RuntimeError as error:
        message = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        if candidate.role == "fastseg" and not memory.ran_out(error):
            entry["gate"] = {"green": False, "error": None, "message": message}
        else:
            entry["skipped"] = message


def _add_speeds(row: dict, samples: dict[str, list[float]]) -> None:
    """Times, ratios to the baselines, rates and shares of the ceilings, of every green candidate."""
    roles = {c["name"]: c["role"] for c in row["candidates"] if c["name"] in samples}
    natives = [name for name, role in roles.items() if role == "native"]
    others = [name for name, role in roles.items() if role in ("compile", "runtime")]
    baseline = min(natives, key=lambda name: timing.spread(samples[name]).median, default=None)
    row["baseline"] = baseline
    for entry in row["candidates"]:
        taken = samples.get(entry["name"])
        if taken is None:
            continue
        seconds = timing.spread(taken)
        entry["seconds"] = seconds._asdict()
        entry["rounds"] = len(taken)
        if baseline is not None:
            entry["ratio"] = timing.ratio(samples[baseline], taken)._asdict()
        for name in [*natives, *others] if entry["role"] == "fastseg" else natives:
            entry[f"ratio to {name}"] = timing.ratio(samples[name], taken)._asdict()
        entry["bytes_per_s"] = row["bytes"] / seconds.median
        entry["flop_per_s"] = row["flops"] / seconds.median
        entry["share_of_bound"] = row["bound"]["seconds"] / seconds.median
