"""Times on this machine: the median of a few runs, and the two rates that bound every layer."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable

import torch

# A few runs, more of them when they are short, and no more than this many seconds.
_RUNS, _BUDGET = (3, 20), 0.1
# Bytes copied and rows of the matrices, by device type: far beyond the caches, and enough to fill the device.
_COPIED = {"cpu": 2**27, "cuda": 2**30}
_MATRIX = {"cpu": 1024, "cuda": 8192}


def median_ms(run: Callable[[], object], device: torch.device) -> float:
    """The median time of `run` in milliseconds, after one call to warm up."""
    run()
    times: list[float] = []
    while len(times) < _RUNS[0] or (len(times) < _RUNS[1] and sum(times) < _BUDGET):
        _wait(device)
        start = time.perf_counter()
        run()
        _wait(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e3


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@functools.cache
def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second, read plus written, of copying memory."""
    size = _COPIED.get(device.type, _COPIED["cpu"])
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / (median_ms(lambda: target.copy_(source), device) * 1e-3)


@functools.cache
def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second of a square matrix product in `dtype`."""
    size = _MATRIX.get(device.type, _MATRIX["cpu"])
    a = torch.randn(size, size, device=device).to(dtype)
    b = torch.randn(size, size, device=device).to(dtype)
    return 2 * size**3 / (median_ms(lambda: a @ b, device) * 1e-3)
