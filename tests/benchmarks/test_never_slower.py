# ruff: noqa: F401 -- imported fixtures
"""The check that nothing is slower than native: its statistics, on samplers whose truth is known, and its command."""

from __future__ import annotations

import itertools
import random

import pytest

from benchmarks import never_slower
from benchmarks.__main__ import main
from tests.tuning import fresh

NOISE = 0.05


def sampler(seconds: float, noise: float = NOISE, seed: int = 0):
    """Log-normal samples around `seconds`, with an outlier now and then."""
    draw = random.Random(seed)
    return lambda: seconds * draw.lognormvariate(0, noise) * (10 if draw.random() < 0.05 else 1)


def judged(**seconds: float) -> never_slower.Verdict:
    names = {"nchw": "native NCHW", "last": "native channels_last", "fastseg": "fastseg"}
    samplers = {names[name]: sampler(value, seed=seed) for seed, (name, value) in enumerate(seconds.items())}
    return never_slower.judge(samplers, seconds=0.01)


@pytest.mark.parametrize(
    ("fastseg", "slower"), [(0.5, False), (1.0, False), (1.3, True), (3.0, True)], ids=["half", "same", "1.3x", "3x"]
)
def test_slower_by_more_than_noise_is_found(fastseg, slower):
    verdict = judged(nchw=2.0, last=1.0, fastseg=fastseg)
    assert verdict.slower == slower
    assert verdict.baseline == "native channels_last"
    assert len(verdict.intervals) == (2 if slower else 1)
    assert all(interval.low <= 1 / fastseg <= interval.high for interval in verdict.intervals)
    assert str(verdict).startswith("SLOWER" if slower else "ok")


def test_the_better_layout_is_what_counts():
    assert judged(nchw=1.0, last=3.0, fastseg=2.0).slower
    assert judged(nchw=1.0, last=3.0, fastseg=2.0).baseline == "native NCHW"


def test_what_seems_slower_once_is_measured_again():
    """A disturbance during the first look."""
    rounds = never_slower.ROUNDS[0]
    slow_first = itertools.chain([2.0] * rounds, itertools.repeat(1.0))
    verdict = never_slower.judge(
        {"native NCHW": lambda: 1.0, "native channels_last": lambda: 1.1, "fastseg": lambda: next(slow_first)}, 0.0
    )
    assert [interval.median for interval in verdict.intervals] == [0.5, 1.0]
    assert not verdict.slower


def test_the_fewest_rounds_give_the_confidence():
    (interval,) = judged(nchw=1.0, last=1.0, fastseg=1.0).intervals
    assert interval.confidence >= never_slower.CONFIDENCE
    assert never_slower.timing.median_interval([1.0] * never_slower.ROUNDS[0], 0.99).confidence >= 0.99


def test_equal_speeds_are_hardly_ever_called_slower():
    found = [
        never_slower.judge(
            {name: sampler(1.0, 0.1, seed=3 * seed + k) for k, name in enumerate(("native NCHW", "native", "fastseg"))},
            0.0,
        ).slower
        for seed in range(300)
    ]
    assert sum(found) <= 3


def test_command_over_all_kinds_of_rows(small, capsys, monkeypatch):
    monkeypatch.setattr(never_slower, "judge", lambda samplers, seconds: _verdict(samplers, slower=False))
    assert main(["never-slower", "--device", "cpu", "--dtype", "float32"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].endswith("rows, 0 slower than native by more than noise")
    assert {"small-block/training/float32", "small-unet/inference/float32", "tiny/backward/float32"} <= {
        line.split("  ")[-2] for line in lines[:-1]
    }


def test_command_fails_where_a_row_is_slower(small, capsys, monkeypatch):
    monkeypatch.setattr(never_slower, "judge", lambda samplers, seconds: _verdict(samplers, slower=True))
    options = ["--device", "cpu", "--dtype", "float32", "--cases", "tiny", "--models", ""]
    assert main(["never-slower", *options]) == 1
    assert "2 rows, 2 slower than native by more than noise\ntiny/forward/float32" in capsys.readouterr().out


def _verdict(samplers, slower: bool) -> never_slower.Verdict:
    assert list(samplers) == ["native NCHW", "native channels_last", "fastseg"]
    assert all(take() > 0 for take in samplers.values())
    interval = never_slower.timing.Interval(1.0, 0.9, 0.95 if slower else 1.1, 0.99)
    return never_slower.Verdict("native NCHW", (interval, interval) if slower else (interval,))


def test_a_spent_budget_leaves_rows_out_aloud(small, capsys):
    assert main(["never-slower", "--device", "cpu", "--dtype", "float32", "--budget", "0"]) == 1
    assert "tiny/forward/float32, the time budget was spent" in capsys.readouterr().out


def test_rows_can_be_tuned_first(small, monkeypatch):
    tuned = []
    monkeypatch.setattr(never_slower.winners, "session", _session(tuned, never_slower.winners.session))
    monkeypatch.setattr(never_slower, "judge", lambda samplers, seconds: _verdict(samplers, slower=False))
    options = ["--device", "cpu", "--dtype", "float32", "--cases", "tiny", "--models", "", "--tune"]
    assert main(["never-slower", *options]) == 0
    assert {problem.split()[2] for problem in tuned} == {"inference", "training"}


def _session(tuned: list, session):
    return lambda report: session(lambda problem, best: tuned.append(problem))
