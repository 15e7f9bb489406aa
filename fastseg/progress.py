"""How far a long command has come: one line that is written over on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from typing import TextIO


class Progress:
    """Counts `total` things.

    Args:
        what: what they are, in the plural.
        stream: where the lines go.
    """

    def __init__(self, total: int, what: str, stream: TextIO):
        self.total = total
        self.what = what
        self.stream = stream
        self.live = stream.isatty()
        self.start = time.monotonic()
        self.shown = 0  # characters of the line that stands on the terminal

    def show(self, done: int) -> None:
        """Say that `done` of them are done."""
        seconds = max(time.monotonic() - self.start, 1e-6)
        line = f"{done}/{self.total} {self.what}, {done / seconds:.3g} a second"
        if 0 < done < self.total:
            line += f", {duration(seconds / done * (self.total - done))} left"
        if not self.live:
            print(line, file=self.stream, flush=True)
            return
        self.stream.write("\r" + line.ljust(self.shown))
        self.stream.flush()
        self.shown = len(line)

    def say(self, sentence: str) -> None:
        """A line of its own, which stays."""
        self.clear()
        print(sentence, file=self.stream, flush=True)

    def clear(self) -> None:
        if self.shown:
            self.stream.write("\r" + " " * self.shown + "\r")
            self.stream.flush()
            self.shown = 0


def duration(seconds: float) -> str:
    """Rounded to what matters: "9 s", "3 min", "2 h 5 min"."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
