"""Timing that can be trusted: candidates interleaved in one process, medians with spread, ceilings of the same run.

Candidates take turns (A B C, B C A, C A B, ...), so that a change of clock or load hits all of them. A ratio is the
median of the ratios of pairs from one round, with the spread of those. A sample of a short call is many calls, after an
untimed one that refills the caches. On a CPU freed memory stays with the process (benchmarks/memory.py).

On a GPU every sample is a CUDA graph of one call per buffer set, with enough sets to exceed the L2 cache, so neither
launch overhead nor a warm L2 is measured. If one candidate cannot be captured, all are timed without graphs. Data are
random: zeros draw less power and run too fast.
"""

from __future__ import annotations

import contextlib
import functools
import math
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

SAMPLE_SECONDS = 2e-3
ROUNDS = 5, 40  # fewest and most
WARM_UP_SECONDS = 5e-2


class Spread(NamedTuple):
    """The median of some values and the range of their middle 60 %."""

    median: float
    p20: float
    p80: float


def spread(values: Sequence[float]) -> Spread:
    shares = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    p20, median, p80 = torch.tensor(values, dtype=torch.float64).quantile(shares).tolist()
    return Spread(median, p20, p80)


def ratio(baseline: Sequence[float], candidate: Sequence[float]) -> Spread:
    """How many times faster `candidate` is, over the pairs of one round each."""
    return spread([b / c for b, c in zip(baseline, candidate, strict=True)])


class Interval(NamedTuple):
    """Where a median lies, and how sure that is."""

    median: float
    low: float
    high: float
    confidence: float


def median_interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """The median's narrowest interval between two of the values, with `confidence` if there are enough of them.

    Distribution-free: each value lies below the median with probability one half.
    """
    ordered, count = sorted(values), len(values)
    beyond = 0.0  # the probability that fewer than `cut` + 1 values lie on one side of the median
    cut, sure = 0, 1 - 2 * 0.5**count
    while cut + 1 <= (count - 1) // 2:
        beyond += math.comb(count, cut) / 2**count
        wider = 1 - 2 * (beyond + math.comb(count, cut + 1) / 2**count)
        if wider < confidence:
            break
        cut, sure = cut + 1, wider
    return Interval(spread(values).median, ordered[cut], ordered[count - 1 - cut], sure)


def interleave(
    samplers: dict[str, Callable[[], float]], seconds: float, rounds: tuple[int, int] | None = None
) -> dict[str, list[float]]:
    """Samples of every candidate, taken in turns for about `seconds`; `rounds` are the fewest and most, else ROUNDS."""
    fewest, most = rounds or ROUNDS
    names = list(samplers)
    samples: dict[str, list[float]] = {name: [] for name in names}
    start = time.perf_counter()
    for done in range(most):
        if done >= fewest and time.perf_counter() - start > seconds:
            break
        first = done % len(names)
        for name in names[first:] + names[:first]:
            samples[name].append(samplers[name]())
    return samples


def cpu_sampler(call: Callable[[], object]) -> Callable[[], float]:
    """Warms `call` up and returns a function that gives one sample: seconds a call."""
    fastest, start = math.inf, time.perf_counter()
    while time.perf_counter() - start < WARM_UP_SECONDS or fastest is math.inf:
        fastest = min(fastest, _timed(call, 1))
    calls = max(1, math.ceil(SAMPLE_SECONDS / fastest))

    def sample() -> float:
        if calls > 1:
            call()
        return _timed(call, calls)

    return sample


def _timed(call, calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - start) / calls


@functools.cache
def side_stream():
    """The stream everything is measured on, since graphs cannot be captured on the default stream."""
    return torch.cuda.Stream()


def measuring_stream(device: str) -> contextlib.AbstractContextManager:
    """What to measure in: on a GPU the side stream is the current one."""
    return contextlib.nullcontext() if device == "cpu" else torch.cuda.stream(side_stream())


class CaptureError(RuntimeError):
    """A candidate cannot be captured in a CUDA graph."""


def graph_sampler(calls: Sequence[Callable[[], object]]) -> Callable[[], float]:
    """Captures `calls`, one per buffer set, in a CUDA graph; a sample is seconds a call.

    Runs on the side stream, as everything must have done that the calls rely on, such as a kept forward pass.
    """
    for _ in range(2):  # the second finds everything on the device
        for call in calls:
            call()
        torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=side_stream()):
            results = [call() for call in calls]  # kept until the end, so that every call writes memory of its own
            del results
    except RuntimeError as error:
        torch.cuda.synchronize()
        raise CaptureError(str(error).splitlines()[0]) from error
    return _event_sampler(graph.replay, len(calls))


def eager_gpu_sampler(calls: Sequence[Callable[[], object]]) -> Callable[[], float]:
    """As graph_sampler without a graph, for calls that cannot be captured: launch overhead is included."""

    def run_all():
        for call in calls:
            call()

    return _event_sampler(run_all, len(calls))


def _event_sampler(run: Callable[[], object], calls: int) -> Callable[[], float]:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def timed(repeats: int) -> float:
        start.record()
        for _ in range(repeats):
            run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / repeats

    fastest, begun = math.inf, time.perf_counter()
    while time.perf_counter() - begun < WARM_UP_SECONDS or fastest is math.inf:
        fastest = min(fastest, timed(1))
    repeats = max(1, math.ceil(SAMPLE_SECONDS / fastest))
    return lambda: timed(repeats) / calls


def buffer_sets(bytes_a_call: int, device: str) -> int:
    """How many sets of buffers to rotate so that a GPU's L2 cache is cold for each; 1 on a CPU."""
    if device == "cpu":
        return 1
    return min(64, max(1, math.ceil(2 * torch.cuda.get_device_properties(device).L2_cache_size / bytes_a_call)))


def samplers_for(calls: dict[str, Sequence[Callable[[], object]]], device: str) -> tuple[dict, str]:
    """A sampler per candidate, and in words how they time."""
    if device == "cpu":
        return {name: cpu_sampler(sets[0]) for name, sets in calls.items()}, "interleaved calls"
    sets = len(next(iter(calls.values())))
    try:
        graphs = {name: graph_sampler(c) for name, c in calls.items()}
        return graphs, f"interleaved CUDA graphs over {sets} buffer sets"
    except CaptureError as error:
        eager = {name: eager_gpu_sampler(c) for name, c in calls.items()}
        return eager, f"interleaved calls with launch overhead over {sets} buffer sets (no graph: {error})"


def copy_bandwidth(device: str) -> float:
    """Bytes a second, read plus written, of copying a buffer far larger than any cache; the best of several."""
    numel = 2**26 if device == "cpu" else 2**30
    source = torch.rand(numel, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _best(lambda: target.copy_(source), device)


def matrix_rate(device: str, dtype: torch.dtype) -> float:
    """FLOP/s of a large square matrix product on random data, as torch is set; the best of several."""
    size = 2048 if device == "cpu" else 8192
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / _best(lambda: torch.mm(a, b), device)


def _best(call, device: str, times: int = 7) -> float:
    call()
    if device == "cpu":
        return min(_timed(call, 1) for _ in range(times))
    sampler = _event_sampler(call, 1)
    return min(sampler() for _ in range(times))


def ceilings(device: str) -> dict[str, float]:
    """What this machine reaches today: bytes a second and FLOP/s."""
    found = {"copy_bytes_per_s": copy_bandwidth(device), "float32_flop_per_s": matrix_rate(device, torch.float32)}
    if device != "cpu":
        found["bfloat16_flop_per_s"] = matrix_rate(device, torch.bfloat16)
    return found


def matrix_ceiling(ceilings: dict[str, float], dtype: torch.dtype) -> float:
    """The measured FLOP/s for products of `dtype`; 16-bit dtypes share a rate, and on a CPU all do."""
    name = "float32_flop_per_s" if dtype == torch.float32 else "bfloat16_flop_per_s"
    return ceilings.get(name, ceilings["float32_flop_per_s"])
