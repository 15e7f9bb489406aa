"""The progress that a long command shows."""

from __future__ import annotations

import io

import pytest

from fastseg import progress


class Stream(io.StringIO):
    def __init__(self, terminal):
        super().__init__()
        self.terminal = terminal

    def isatty(self):
        return self.terminal


@pytest.fixture
def clock(monkeypatch):
    """A clock that goes two seconds a look."""
    now = iter(range(0, 1000, 2))
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(now))


class TestProgress:
    def test_plain_lines(self, clock):
        stream = Stream(terminal=False)
        shown = progress.Progress(4, "pictures", stream)
        for done in (1, 3, 4):
            shown.show(done)
        assert stream.getvalue().splitlines() == [
            "1/4 pictures, 0.5 a second, 6 s left",
            "3/4 pictures, 0.75 a second, 1 s left",
            "4/4 pictures, 0.667 a second",
        ]

    def test_one_line_on_a_terminal(self, clock):
        stream = Stream(terminal=True)
        shown = progress.Progress(2, "pictures", stream)
        shown.show(1)
        shown.say("fastseg: a sentence")
        shown.show(2)
        shown.clear()
        first = "1/2 pictures, 0.5 a second, 2 s left"
        second = "2/2 pictures, 0.5 a second"
        assert stream.getvalue() == (
            f"\r{first}\r{' ' * len(first)}\rfastseg: a sentence\n\r{second}\r{' ' * len(second)}\r"
        )

    def test_a_shorter_line_leaves_nothing_of_a_longer_one(self, clock):
        stream = Stream(terminal=True)
        shown = progress.Progress(2, "pictures", stream)
        shown.show(1)
        shown.show(2)
        last = stream.getvalue().split("\r")[-1]
        assert last.rstrip() == "2/2 pictures, 0.5 a second"
        assert len(last) == len("1/2 pictures, 0.5 a second, 2 s left")

    @pytest.mark.parametrize(
        ("seconds", "said"),
        [(0, "0 s"), (99, "99 s"), (100, "2 min"), (3569, "59 min"), (3600, "1 h 0 min"), (9000, "2 h 30 min")],
    )
    def test_durations(self, seconds, said):
        assert progress.duration(seconds) == said
