"""python -m benchmarks never-slower: under "auto" no case and no network is slower than PyTorch in its better layout.

Native in both layouts and fastseg take turns in one process. Looked at are the pairs of a round each: native's time
over fastseg's, of the layout in which native is the faster one; and of these ratios the interval that holds their
median with a probability of CONFIDENCE, whatever the noise is like. Where all of it is below 1 fastseg is slower. One
row of a few hundred would say so by chance: those that do are measured once more, and fail where they say it again.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from benchmarks import memory, timing
from benchmarks.progress import Bar
from benchmarks.row import Workload
from benchmarks.selection import DTYPES, LONGEST_ROW_SECONDS, WEIGHTS, Settings, Step, obstacle, plan, workload
from fastseg import dispatch, winners

CONFIDENCE = 0.99
ROUNDS = 9, 101  # fewest and most; with 8 and more the confidence can be had
# The share of a row's time that goes into timing; preparation and warm-up take the rest.
TIMING_SHARE = 0.6
Samplers = dict[str, Callable[[], float]]


class Verdict(NamedTuple):
    """How many times faster than `baseline`, the faster native layout, fastseg is; once, or twice where it matters."""

    baseline: str
    intervals: tuple[timing.Interval, ...]

    @property
    def slower(self) -> bool:
        return all(interval.high < 1 for interval in self.intervals)

    def __str__(self) -> str:
        found = " and ".join(f"{i.median:.3f}x ({i.low:.3f} to {i.high:.3f})" for i in self.intervals)
        return f"{'SLOWER' if self.slower else 'ok':6} {found} of {self.baseline}"


def judge(samplers: Samplers, seconds: float) -> Verdict:
    """Sample "fastseg" and what else there is for about `seconds`, and as long again where it seems slower."""
    baseline, interval = _compare(samplers, seconds)
    if interval.high >= 1:
        return Verdict(baseline, (interval,))
    baseline, second = _compare(samplers, seconds)
    return Verdict(baseline, (interval, second))


def _compare(samplers: Samplers, seconds: float) -> tuple[str, timing.Interval]:
    samples = timing.interleave(samplers, seconds, ROUNDS)
    own = samples.pop("fastseg")
    baseline = min(samples, key=lambda name: timing.spread(samples[name]).median)
    ratios = [native / ours for native, ours in zip(samples[baseline], own, strict=True)]
    return baseline, timing.median_interval(ratios, CONFIDENCE)


def samplers_of(work: Workload, direction: str, tune: bool) -> Samplers:
    """A sampler of native in each layout and of fastseg as users call it, tuned before if `tune`."""
    calls = {candidate.name: work.calls(candidate, direction) for candidate in (*work.natives(), work.under_auto())}
    if tune:
        with winners.session(lambda problem, best: None):
            work.calls(work.under_auto(), direction)[0]()
        dispatch.forget_sized_choices()
    for sets in calls.values():
        sets[0]()  # a GPU's first calls are measured here, before anything is captured
    samplers, _ = timing.samplers_for(calls, work.device)
    return samplers


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cases", default="*", help="shell patterns of cases, comma-separated; '' for none")
    parser.add_argument("--models", default="*", help="shell patterns of networks, comma-separated; '' for none")
    parser.add_argument("--full", action="store_true", help="what `run --full` has, not what a quick run has")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", type=lambda text: tuple(text.split(",")), metavar="DTYPES", help="as of a run")
    parser.add_argument("--tune", action="store_true", help="tune each row first, as fastseg.tune would")
    parser.add_argument("--budget", type=float, default=900.0, metavar="SECONDS", help="for everything (900)")


def main(arguments: argparse.Namespace) -> int:
    device = arguments.device
    if device == "cuda":
        if not torch.cuda.is_available():
            print("PyTorch sees no CUDA device here: use --device cpu", file=sys.stderr)
            return 2
        torch.backends.cudnn.benchmark = True  # native gets its own choice of kernels
    memory.keep_freed_memory()
    steps = plan(
        Settings(
            device=device, dtypes=arguments.dtype or DTYPES[device], cases=arguments.cases, models=arguments.models,
            quick=not arguments.full, compiles=False,
        )
    )  # fmt: skip
    verdicts, left_out = check(steps, device, arguments.budget, arguments.tune)
    slower = [identity for identity, verdict in verdicts.items() if verdict.slower]
    print("\n".join([f"{len(verdicts)} rows, {len(slower)} slower than native by more than noise", *slower]))
    if left_out:
        print(f"{len(left_out)} rows were left out: {'; '.join(f'{name}, {why}' for name, why in left_out.items())}")
    return 1 if slower or not verdicts else 0


def check(steps: list[Step], device: str, budget: float, tune: bool) -> tuple[dict[str, Verdict], dict[str, str]]:
    """The verdict on each row by its id, and why there is none on others."""
    verdicts: dict[str, Verdict] = {}
    left_out: dict[str, str] = {}
    bar = Bar([WEIGHTS[step.kind] for step in steps], budget, sys.stdout)
    end = time.perf_counter() + budget
    for number, step in enumerate(steps):
        left = end - time.perf_counter()
        waiting = sum(WEIGHTS[other.kind] for other in steps[number:])
        seconds = min(LONGEST_ROW_SECONDS[step.kind], TIMING_SHARE * left * WEIGHTS[step.kind] / waiting)
        bar.begin(step.id)
        found = _verdict(step, device, seconds, tune) if left > 0 else "the time budget was spent"
        if isinstance(found, Verdict):
            verdicts[step.id] = found
            bar.end(f"{found}  {step.id}")
        else:
            left_out[step.id] = found
            bar.end(None, measured=False)
    bar.clear()
    return verdicts, left_out


def _verdict(step: Step, device: str, seconds: float, tune: bool) -> Verdict | str:
    """The verdict, or why there is none."""
    work = workload(step, device)
    reason = obstacle(step, work, device)
    if reason:
        return reason
    with timing.measuring_stream(device):
        try:
            return judge(samplers_of(work, step.direction, tune), seconds)
        except (RuntimeError, MemoryError) as error:
            if not memory.ran_out(error):
                raise
            return (str(error).splitlines() or ["out of memory"])[0]
