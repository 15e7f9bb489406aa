"""Times a call on several backends in turns, and judges who is the fastest: a kernel wins beyond doubt, or native does.

What is timed is the call as a program makes it, with the time that Python needs for it: the longer of that and the
device's time, as when calls follow each other. "native" is what runs without the kernel in question: of a convolution
ATen's, of a block that kernels can run as a whole its modules one by one, each on its own fastest backend.
"""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch.autograd import forward_ad

from fastseg.counters import uncounted

if TYPE_CHECKING:
    from fastseg.dispatch import Problem

# A measurement takes about this many seconds for each candidate, in rounds of about a millisecond each.
_SECONDS, _ROUNDS, _ROUND_MS = 0.25, (7, 41), 1.0
# A kernel has to beat native by this much in the median, and in four rounds of five, to win.
MARGIN = 1.02


class Attempt(NamedTuple):
    """A call that can be made on any backend, and the tensors whose gradients it may have."""

    run: Callable[[str], torch.Tensor]
    tensors: tuple[torch.Tensor | None, ...]
    repeatable: bool = True  # whether a call more leaves no trace, such as running statistics or random numbers drawn


class Measured(NamedTuple):
    """The fastest backend, and the median time of each that ran, in milliseconds."""

    backend: str
    ms: dict[str, float]
    failures: dict[str, Exception]  # why the others did not run


def can_be_repeated(problem: Problem, attempt: Attempt) -> bool:
    """Whether nobody is looking who would take the calls of a measurement for those of the program."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return False
    if forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active():
        return False
    if problem.device_type == "cuda" and torch.cuda.is_current_stream_capturing():
        return False
    tensors = [tensor for tensor in attempt.tensors if tensor is not None]
    if not all(type(tensor) in (torch.Tensor, torch.nn.Parameter) for tensor in tensors):
        return False
    return not problem.gradient or _has_a_plain_backward_pass(tensors)


def _has_a_plain_backward_pass(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether gradients can be had without anybody's hook running: a tensor's, or activation checkpointing's."""
    if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
        return False
    wanted = [tensor for tensor in tensors if tensor.requires_grad]
    return bool(wanted) and not any(tensor._backward_hooks or tensor.retains_grad for tensor in wanted)


def measure(problem: Problem, candidates: Sequence[str], attempt: Attempt) -> Measured:
    """Time `attempt` on each of `candidates`, native among them, with its backward pass if the problem has one.

    A candidate that fails cannot win.

    Raises:
        Whatever native raises, where every candidate fails.
    """
    with uncounted(), _native_at_its_best(problem.device_type):
        calls, failures = {}, {}
        for backend in candidates:
            call = _call(attempt, backend, problem.gradient)
            try:
                call()  # compiles, loads, allocates
            except Exception as error:  # Triton's compiler raises what it likes
                failures[backend] = error
            else:
                calls[backend] = call
        if not calls:
            raise failures["native"]
        return Measured(*judged(_rounds(calls, problem.device_type)), failures)


def _rounds(calls: dict[str, Callable[[], object]], device_type: str) -> dict[str, list[float]]:
    """Milliseconds of each candidate, one in every round."""
    repeats = {
        backend: max(1, math.ceil(_ROUND_MS / max(_timed_ms(call, 1, device_type), 1e-3)))
        for backend, call in calls.items()
    }
    least, most = _ROUNDS if len(calls) > 1 else (1, 1)
    rounds: dict[str, list[float]] = {backend: [] for backend in calls}
    end = time.perf_counter() + _SECONDS * len(calls)
    for done in range(most):
        if done >= least and time.perf_counter() > end:
            break
        for backend in list(calls) if done % 2 else reversed(calls):
            rounds[backend].append(_timed_ms(calls[backend], repeats[backend], device_type))
    return rounds


def judged(rounds: dict[str, list[float]]) -> tuple[str, dict[str, float]]:
    """The winner of `rounds`, and the median time of each."""
    ms = {backend: statistics.median(times) for backend, times in rounds.items()}
    best = min(ms, key=ms.__getitem__)
    if best == "native" or "native" not in rounds:
        return best, ms
    ratios = sorted(native / own for native, own in zip(rounds["native"], rounds[best], strict=True))
    return best if is_sure(statistics.median(ratios), ratios[len(ratios) // 5]) else "native", ms


def is_sure(median: float, p20: float) -> bool:
    """Whether a kernel wins, from how many times faster than native it is: the median and the 20th percentile."""
    return median >= MARGIN and p20 > 1


def _call(attempt: Attempt, backend: str, gradient: bool) -> Callable[[], object]:
    if not gradient:
        return lambda: attempt.run(backend)
    wanted = [tensor for tensor in attempt.tensors if tensor is not None and tensor.requires_grad]

    def forward_and_backward():
        y = attempt.run(backend)
        torch.autograd.grad(y, wanted, y.detach(), allow_unused=True)

    return forward_and_backward


def _timed_ms(call: Callable[[], object], repeats: int, device_type: str) -> float:
    _wait(device_type)
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    _wait(device_type)
    return (time.perf_counter() - start) / repeats * 1e3


def _wait(device_type: str) -> None:
    if device_type == "cuda":
        torch.cuda.current_stream().synchronize()


@contextlib.contextmanager
def _native_at_its_best(device_type: str) -> Iterator[None]:
    """Let cuDNN look for its fastest algorithm: a kernel should win also where the program turns that on later."""
    before = torch.backends.cudnn.benchmark
    if before or device_type != "cuda":
        yield
        return
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = False
