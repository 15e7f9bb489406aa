"""python -m benchmarks compare REV: this tree against another revision, in turns.

REV is checked out into a throw-away git worktree and built there; where its kernels are those of this tree, the
extension that is here is used. Processes of both take turns, each on the same cases with this tree's benchmark: a ratio
is one of a pair of processes, and the interval is the median's over the pairs. Nothing is left behind.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

import torch

from benchmarks import record, table, timing
from benchmarks.progress import Bar
from benchmarks.selection import Settings, Step, plan

ROUNDS = 6
BUDGET_SECONDS = 300.0
# Without it a ratio has no verdict; five rounds give it.
LEAST_SURE = 0.9
BUILT = ("_C*.so", "_build.json")
OLD, NEW = "old", "new"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("revision", metavar="REV", help="anything that git knows as a commit")
    parser.add_argument("--cases", default="*", help="shell patterns of operators, blocks and heads, comma-separated")
    parser.add_argument("--models", default="", help="shell patterns of networks; default none")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default=None, help="default float32, bfloat16 on a GPU")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="pairs of processes (default %(default)s)")
    parser.add_argument("--budget", type=float, default=BUDGET_SECONDS, metavar="SECONDS", help="default %(default)s")
    parser.add_argument("--threads", type=int, help="CPU threads")


def main(arguments: argparse.Namespace) -> int:
    settings = Settings(
        device=arguments.device,
        dtypes=(arguments.dtype or ("float32" if arguments.device == "cpu" else "bfloat16"),),
        cases=arguments.cases,
        models=arguments.models,
        networks=bool(arguments.models),
        blocks=bool(arguments.cases),
        operators=bool(arguments.cases),
        budget=arguments.budget,
        threads=arguments.threads,
    )
    steps = plan(settings)
    if not steps or arguments.rounds < 1:
        print("nothing to compare: no row fits this selection, or there are no rounds", file=sys.stderr)
        return 2
    try:
        commit = _git("rev-parse", "--verify", "--quiet", f"{arguments.revision}^{{commit}}")
    except subprocess.CalledProcessError:
        print(f"git knows no revision {arguments.revision!r}", file=sys.stderr)
        return 2
    try:
        with _terminated_as_interrupted(), trees(commit, lambda tree: build(tree, settings.device)) as folders:
            pairs = measure(folders, steps, settings, arguments.rounds, sys.stdout)
    except KeyboardInterrupt:
        print("\ninterrupted: the worktree is removed")
        return 130
    except (RuntimeError, subprocess.CalledProcessError) as error:
        print(error, file=sys.stderr)
        return 1
    print("\n".join(lines(pairs, steps, arguments.revision)))
    return 0


@contextlib.contextmanager
def trees(commit: str, builder: Callable[[Path], None]) -> Iterator[dict[str, Path]]:
    """Folders to run `python -m benchmarks...` in, with the old and the new fastseg and this tree's benchmark."""
    home = Path(tempfile.mkdtemp(prefix="fastseg-compare-"))
    tree = home / "tree"
    try:
        _git("worktree", "add", "--detach", "--quiet", str(tree), commit)
        builder(tree)
        folders = {}
        for side, package in ((OLD, tree / "fastseg"), (NEW, record.ROOT / "fastseg")):
            folders[side] = home / side
            folders[side].mkdir()
            (folders[side] / "fastseg").symlink_to(package)
            (folders[side] / "benchmarks").symlink_to(record.ROOT / "benchmarks")
        yield folders
    finally:
        with _deaf_to_interrupts():
            shutil.rmtree(home, ignore_errors=True)
            _git("worktree", "prune")  # git forgets the tree that is gone


def build(tree: Path, device: str) -> None:
    """Raises RuntimeError with the end of what the compiler said."""
    built = [path for pattern in BUILT for path in (record.ROOT / "fastseg").glob(pattern)]
    if built and compiled_from(tree) == compiled_from(record.ROOT):
        for path in built:
            shutil.copy2(path, tree / "fastseg" / path.name)
        return
    print("building the revision's kernels ...", flush=True)
    # On a CPU the CUDA kernels, which take longest, are not needed.
    environment = dict(os.environ) | ({"FASTSEG_CUDA": "0"} if device == "cpu" else {})
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    code, output, errors = _run(command, tree, environment)
    if code:
        raise RuntimeError("the revision does not build:\n" + "\n".join((output + errors).splitlines()[-15:]))


def _run(command: list[str], folder: Path, environment: dict[str, str], given: str = "") -> tuple[int, str, str]:
    """Exit status, output and errors of a process, which is ended with all that it started where this one is ended."""
    process = subprocess.Popen(
        command, cwd=folder, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, start_new_session=True,
    )  # fmt: skip
    try:
        output, errors = process.communicate(given)
    except BaseException:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise
    return process.returncode, output, errors


def compiled_from(root: Path) -> dict[str, bytes]:
    """What the extension is made from, by path."""
    files = [path for path in (root / "csrc").rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in [*files, root / "setup.py"]}


def measure(folders: dict[str, Path], steps: list[Step], settings: Settings, rounds: int, out: TextIO) -> dict:
    """step id -> {"old": [result of each round], "new": ...}; results are those of compare_worker.py."""
    seconds = settings.budget / (2 * rounds * len(steps))
    wanted = [[step.family, step.case.id, step.direction, step.dtype] for step in steps]
    found: dict[str, dict[str, list]] = {step.id: {OLD: [], NEW: []} for step in steps}
    bar = Bar([1.0] * (2 * rounds), float("inf"), out)
    for number in range(rounds):
        for side in (OLD, NEW) if number % 2 == 0 else (NEW, OLD):
            bar.begin(f"round {number + 1} of {rounds}, {side}")
            job = {
                "steps": wanted,
                "device": settings.device,
                "seconds": seconds,
                "threads": settings.threads,
                "check": number == 0,  # results are the same in every round
            }
            for identity, result in _worker(folders[side], job).items():
                found[identity][side].append(result)
            bar.end(None)
    bar.clear()
    return found


def _worker(folder: Path, job: dict) -> dict:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-m", "benchmarks.compare_worker"]
    code, output, errors = _run(command, folder, environment, json.dumps(job))
    if code:
        last = (errors.strip().splitlines() or [f"exit status {code}"])[-1]
        raise RuntimeError(f"the {folder.name} revision cannot be measured by this benchmark: {last}")
    return json.loads(output.splitlines()[-1])


def lines(pairs: dict, steps: list[Step], revision: str) -> list[str]:
    """The table: times of both, how many times faster this tree is, and the verdict."""
    found = [f"{'row':<48} {revision[:12]:>10} {'this tree':>10} {'faster by':>9} {'interval':>16}"]
    sure, drifted = 1.0, []
    for step in steps:
        both = pairs[step.id]
        refused = next((f"{s}: {r['refused']}" for s in (OLD, NEW) for r in both[s] if "refused" in r), None)
        if refused:
            found.append(f"{step.id:<48} no speed, {refused}")
            continue
        old, new = ([result["fastseg"] for result in both[side]] for side in (OLD, NEW))
        ratio = timing.median_interval([a / b for a, b in zip(old, new, strict=True)])
        sure = min(sure, ratio.confidence)
        natives = zip(*([result["native"] for result in both[side]] for side in (OLD, NEW)), strict=True)
        control = timing.median_interval([a / b for a, b in natives])
        verdict = _verdict(ratio, control)
        times = " ".join(f"{table.seconds(timing.spread(taken).median):>10}" for taken in (old, new))
        interval = f"{ratio.low:.3f} to {ratio.high:.3f}"
        found.append(f"{step.id:<48} {times} {ratio.median:>8.3f}x {interval:>16} {verdict}".rstrip())
        if not control.low <= 1 <= control.high:
            drifted.append(f"{step.id} {control.median:.3f}x")
    few = "" if sure >= LEAST_SURE else ", too little for a verdict: more --rounds"
    found.append(f"interval: where the median of the pairs lies, {100 * sure:.0f} % sure{few}")
    if drifted:
        found.append(f"native, which is the same on both sides, differs in {len(drifted)} rows: {', '.join(drifted)}")
    return found


def _verdict(ratio: timing.Interval, control: timing.Interval) -> str:
    """Nothing where too few pairs were measured, or native moved as much."""
    if ratio.confidence < LEAST_SURE or ratio.low <= 1 <= ratio.high:
        return ""
    if ratio.low > 1:
        return "faster" if ratio.median > control.high else "as native"
    return "SLOWER" if ratio.median < control.low else "as native"


def _git(*arguments: str) -> str:
    # In a session of its own, so that Ctrl-C on the terminal does not end what cleans up.
    done = subprocess.run(
        ["git", *arguments], cwd=record.ROOT, capture_output=True, text=True, check=True, start_new_session=True
    )
    return done.stdout.strip()


@contextlib.contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """SIGTERM ends the run as Ctrl-C does, with everything cleaned up."""

    def interrupt(signum, frame):
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


@contextlib.contextmanager
def _deaf_to_interrupts() -> Iterator[None]:
    previous = [(number, signal.signal(number, signal.SIG_IGN)) for number in (signal.SIGINT, signal.SIGTERM)]
    try:
        yield
    finally:
        for number, handler in previous:
            signal.signal(number, handler)
