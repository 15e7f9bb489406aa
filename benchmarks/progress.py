"""How far a run has come: a bar with the time left on a terminal, plain lines elsewhere."""

from __future__ import annotations

import shutil
import time
from typing import TextIO

from fastseg.progress import Line, duration

_BAR = 24  # characters


class Bar(Line):
    """Steps of known weights; the time left follows from how long the weights took so far.

    Args:
        weights: of the steps, in their order.
        budget: seconds after which no step is started.
        stream: where the lines go.
    """

    def __init__(self, weights: list[float], budget: float, stream: TextIO):
        super().__init__(stream)
        self.weights, self.budget = weights, budget
        self.start = time.monotonic()
        self.done = 0  # steps
        self.measured = 0.0  # weight of those that were measured, not skipped

    def left(self) -> float | None:
        """Seconds, None before the first step is done."""
        spent = time.monotonic() - self.start
        waiting = sum(self.weights[self.done :])
        if not waiting:
            return 0.0
        if not self.measured:
            return None
        return max(0.0, min(self.budget - spent, spent / self.measured * waiting))

    def begin(self, name: str) -> None:
        """Say which step is running."""
        if self.live:
            self._show(name)

    def end(self, line: str | None, measured: bool = True) -> None:
        """Count a step, and print its line, which stays."""
        self.measured += self.weights[self.done] if measured else 0.0
        self.done += 1
        if line is not None:
            self.say(line if self.live else f"{line}  [{self._count()}]")

    def _count(self) -> str:
        left = self.left()
        rest = "" if left is None else f", {duration(left)} left"
        return f"{self.done}/{len(self.weights)}{rest}"

    def _show(self, name: str) -> None:
        full = round(_BAR * self.done / max(1, len(self.weights)))
        line = f"[{'#' * full}{'.' * (_BAR - full)}] {self._count()}: {name}"
        self.write(line[: shutil.get_terminal_size().columns - 1])
