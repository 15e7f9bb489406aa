"""counters: how often "auto" left calls to native and why, and what measuring the first calls of problems has cost."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections import Counter
from collections.abc import Iterator

# (operator, reason) -> number of calls that "auto" left to native.
native_calls: Counter[tuple[str, str]] = Counter()


@dataclasses.dataclass
class FirstCalls:
    """First calls of new problems that were measured, and how long that took."""

    problems: int = 0
    seconds: float = 0.0


first_calls = FirstCalls()


@dataclasses.dataclass
class Counters:
    """What `fastseg.counters` found; str() is a readable text."""

    native: dict[tuple[str, str], int]  # (operator, reason) -> calls
    measured: int  # problems whose first call was measured
    seconds: float  # that measuring took

    def to_json(self) -> str:
        rows = [{"operator": name, "reason": reason, "calls": n} for (name, reason), n in self.native.items()]
        return json.dumps({"native": rows, "measured": self.measured, "seconds": self.seconds}, indent=2)

    def __str__(self) -> str:
        width = len(str(max(self.native.values(), default=0)))
        lines = [f"{calls:{width}} of {name} on native: {reason}" for (name, reason), calls in self.native.items()]
        lines.append(f"{self.measured} first calls were measured, in {self.seconds:.1f} s")
        return "\n".join(lines)


def counters(*, reset: bool = False) -> Counters:
    """How often "auto" left calls to native and why, and what measuring first calls has cost, in this process.

    Calls of a backend asked for by name are not among them, nor are those of `fastseg.tune` and `fastseg.explain`, nor
    what runs inside a graph of torch.compile or torch.export, which Python does not see.

    Args:
        reset: whether to start counting anew.

    Returns:
        A Counters: `print` it; `.native` has the number of calls by (operator, reason), the most frequent first,
        `.measured` the number of first calls that were measured (on a GPU, see `fastseg.tune`) and `.seconds` how long
        that took.

    Example:
        >>> import torch, fastseg
        >>> before = fastseg.counters(reset=True)
        >>> y = fastseg.ops.conv2d(torch.randn(1, 4, 9, 9), torch.randn(4, 2, 3, 3), groups=2)
        >>> fastseg.counters().native
        {('grouped_conv2d', 'there are kernels for groups == 1 and groups == channels only'): 1}
    """
    found = Counters(dict(native_calls.most_common()), first_calls.problems, first_calls.seconds)
    if reset:
        native_calls.clear()
        first_calls.problems, first_calls.seconds = 0, 0.0
    return found


@contextlib.contextmanager
def uncounted() -> Iterator[None]:
    """Calls inside are not counted."""
    before = native_calls.copy()
    try:
        yield
    finally:
        native_calls.clear()
        native_calls.update(before)
