"""Memory of one call: its peak beyond what was there before, and what it keeps for backward."""

from __future__ import annotations

import ctypes
import warnings

import torch
from torch.profiler import ProfilerActivity, profile

# How the peak is measured, for the report.
HOW = {
    "cpu": "peak of what PyTorch's CPU allocator handed out during one call, beyond the inputs (torch.profiler)",
    "cuda": "torch.cuda.max_memory_allocated during one call, beyond the inputs",
}


def keep_freed_memory() -> bool:
    """Make the C library keep the memory it is given back; False where it has no such setting (it is glibc's).

    Otherwise it may return a large tensor's pages to the system and get them back, zeroed, page by page, in the next
    call, which takes longer than many kernels. Whether it does depends on the layout of the heap, not on the candidate.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    trim_threshold, mmap_max = -1, -4  # from malloc.h
    return bool(mallopt(trim_threshold, 2**31 - 1) and mallopt(mmap_max, 0))


def peak_bytes(call, device: str) -> int | None:
    """Peak memory of `call` with its results, without its inputs; None where PyTorch does not say."""
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        results = call()
        torch.cuda.synchronize()
        del results
        return torch.cuda.max_memory_allocated() - before
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the profiler's remarks about its own defaults
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            call()
    try:
        events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
        events.sort(key=lambda e: e.start_ns())
    except AttributeError:  # not a public interface
        return None
    peak = now = 0
    for event in events:
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def saved_bytes(call) -> int:
    """Bytes that autograd keeps between forward and backward of `call`; tensors that share storage count once."""
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call()
    return sum(saved.values())
