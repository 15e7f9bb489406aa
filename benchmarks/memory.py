"""Memory of one call: its peak beyond what was there before, what it keeps for backward, whether there is enough."""

from __future__ import annotations

import contextlib
import copy
import ctypes
import gc
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

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


# What a case is expected to take may be this share of what is free: libraries keep workspaces of their own.
MOST = 0.8


def available_bytes(device: str) -> int | None:
    """What new tensors can have, as far as the system says."""
    if device != "cpu":
        free = torch.cuda.mem_get_info()[0]
        return free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    known = [value for value in (_free_of_the_machine(), _free_of_the_group()) if value is not None]
    return min(known, default=None)


def _free_of_the_machine() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError):
        return None


def _free_of_the_group(folder: Path = Path("/sys/fs/cgroup")) -> int | None:
    """What a container's limit leaves; pages of files that it may drop are not counted as used."""
    try:
        limit, used = (int((folder / name).read_text()) for name in ("memory.max", "memory.current"))
        dropped = next(
            int(line.split()[1])
            for line in (folder / "memory.stat").read_text().splitlines()
            if line.startswith("inactive_file ")
        )
    except (OSError, StopIteration, ValueError):  # "max" is no number: no limit
        return None
    return limit - used + dropped


def give_back_freed_memory() -> None:
    """Return to the system what earlier cases have left in pieces (see keep_freed_memory), where the C library can."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def shortage(needed: int, device: str) -> str | None:
    """Why a case that takes `needed` bytes is better not tried, or None."""
    if device == "cpu":
        give_back_freed_memory()
    available = available_bytes(device)
    if available is None or needed <= MOST * available:
        return None
    return f"it takes about {needed / 1e9:.1f} GB of memory, and {available / 1e9:.1f} GB are free"


def ran_out(error: BaseException) -> bool:
    """Whether an allocation failed; on a CPU that is a plain RuntimeError."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


class _Tally(TorchDispatchMode):
    """Adds up the storages that are alive, and keeps the most there was."""

    def __init__(self):
        super().__init__()
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        self.alive = {key: (ref, size) for key, (ref, size) in self.alive.items() if not ref.expired()}
        for tensor in tree_leaves(results):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.alive.setdefault(storage._cdata, (StorageWeakRef(storage), storage.nbytes()))
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return results


def peak_without_data(module: torch.nn.Module, x: torch.Tensor, run: Callable[[torch.nn.Module, torch.Tensor], object]):
    """Peak bytes of `run(module, x)` in float32, found without computing anything; 0 where that cannot be told."""
    with torch.random.fork_rng(devices=[]):
        module = copy.deepcopy(module).to("meta", torch.float32)
        x = torch.empty(x.shape, device="meta")
        try:
            with _Tally() as tally:
                run(module, x)
        except RuntimeError:  # it looks at values
            return 0
    return tally.peak
