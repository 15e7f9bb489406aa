"""How far a long command has come: one line that is written over on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from typing import TextIO


class Line:
    """One line that is written over, on a terminal; what is said stands above it and stays."""

    def __init__(self, stream: TextIO):
        self.stream = stream
        self.live = stream.isatty()
        self._shown = 0  # characters of the line that stands on the terminal

    def write(self, line: str) -> None:
        self.stream.write("\r" + line.ljust(self._shown))
        self.stream.flush()
        self._shown = len(line)

    def say(self, sentence: str) -> None:
        """A line of its own, which stays."""
        self.clear()
        print(sentence, file=self.stream, flush=True)

    def clear(self) -> None:
        if self._shown:
            self.stream.write("\r" + " " * self._shown + "\r")
            self.stream.flush()
            self._shown = 0


class Progress(Line):
    """Counts `total` things.

    Args:
        what: what they are, in the plural.
        stream: where the lines go.
    """

    def __init__(self, total: int, what: str, stream: TextIO):
        super().__init__(stream)
        self.total = total
        self.what = what
        self.start = time.monotonic()

    def show(self, done: int) -> None:
        """Say that `done` of them are done."""
        seconds = max(time.monotonic() - self.start, 1e-6)
        line = f"{done}/{self.total} {self.what}, {done / seconds:.3g} a second"
        if 0 < done < self.total:
            line += f", {duration(seconds / done * (self.total - done))} left"
        self.write(line) if self.live else self.say(line)


def duration(seconds: float) -> str:
    """Rounded to what matters: "9 s", "3 min", "2 h 5 min"."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
