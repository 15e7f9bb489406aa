"""Targets that are no class: a CPU raises at once, a GPU reports later, as it does for PyTorch's own loss.

PyTorch's kernel stops the device with an assertion, after which the process cannot use it. Here the pixel's loss is
NaN, the target is copied to the host beside the work that follows, and the next loss or backward pass that finds the
copy done raises the IndexError that PyTorch raises on a CPU. Nothing waits for the device.
"""

from __future__ import annotations

from collections import deque

import torch

_reports: deque[tuple[torch.cuda.Event, torch.Tensor, int]] = deque()


def watch(offender: torch.Tensor, ignore_index: int) -> None:
    """Remember to look at `offender`: a target that is no class, or `ignore_index`."""
    if offender.device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return
    copy = torch.empty((), dtype=offender.dtype, pin_memory=True).copy_(offender.detach(), non_blocking=True)
    _reports.append((torch.cuda.current_stream(offender.device).record_event(), copy, ignore_index))


def raise_reported() -> None:
    """Raise IndexError for the first report of a bad target that has arrived."""
    while _reports and not torch.cuda.is_current_stream_capturing() and _reports[0][0].query():
        _, found, ignore_index = _reports.popleft()
        if int(found) != ignore_index:
            raise IndexError(f"Target {int(found)} is out of bounds.")
