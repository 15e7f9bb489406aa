"""Climbs the test ladder's rungs 0 to 4, and prints what each took. `--rung N` climbs one alone.

Rung 0 lint and examples; 1 everything on the CPU; 2 Triton's interpreter; 3 CUDA C++ executed on the CPU, plain and
under sanitizers; 4 offline compilation. Rung 5 needs a GPU: `make gpu`.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from benchmarks.record import not_yet_run_on_a_gpu
from csrc.host.build import sanitizer_environment
from fastseg import extension

ROOT = Path(__file__).parent.parent
PYTEST = [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider"]
# Independent tests, as many at a time as there are cores.
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
SPREAD = ["-n", str(CORES)]
CONTRACT = ["tests/test_contract.py", "tests/test_identities.py", "tests/test_opinfo.py", "tests/ops"]

# Sanitizers slow a test down fivefold: forward and gradients in one dtype reach every kernel.
CPU_KERNELS = ["tests/test_contract.py", "tests/test_identities.py", "tests/test_batch_norm.py", "tests/ops"]
SANITIZED = "within_bound and float32 or any_strides or non_finite and 3x3-s2"


@dataclass(frozen=True)
class Step:
    rung: int
    name: str
    command: list[str]
    environment: dict[str, str] = field(default_factory=dict)
    cores: int = CORES  # that it keeps busy


def narrower_instructions() -> tuple[str, ...]:
    """The instruction sets that this machine has besides its best, which every other step runs with."""
    known = ("plain", "avx2", "avx512")
    best = "plain" if extension.EXTENSION is None else extension.EXTENSION.cpu_capability()
    return known[: known.index(best)]


def steps() -> list[Step]:
    # Steps that run beside another: more threads would only wait for each other.
    one_core = {"OMP_NUM_THREADS": "1"}
    interpreter = one_core | {"FASTSEG_RUNG": "interpreter", "TRITON_INTERPRET": "1"}
    host = one_core | {"FASTSEG_RUNG": "host"}
    return [
        Step(0, "lint", [sys.executable, "tests/lint.py"]),
        Step(0, "examples in docstrings and README", [*PYTEST, "tests/test_examples.py"]),
        Step(1, "reference, C++ CPU kernels, operator stack, drop-in", [
            *PYTEST, *SPREAD, "tests", "--ignore=tests/host", "--ignore=tests/offline",
            "--ignore=tests/test_examples.py",
        ]),
        Step(2, "Triton kernels in the interpreter", [*PYTEST, *SPREAD, *CONTRACT], interpreter),
        Step(4, "offline compilation and its table of resources", [*PYTEST, "tests/offline"]),
        # Whoever finds a free core is next: those that take the longest come first.
        Step(3, "CUDA kernels on the CPU", [*PYTEST, *CONTRACT], host, 1),
        Step(3, "CUDA kernels with planted bugs", [*PYTEST, "tests/host/test_mutations.py"], host, 1),
        Step(3, "CUDA kernels on the CPU, sanitized", [
            *PYTEST, "tests/test_contract.py", "-k", SANITIZED,
        ], host | {"FASTSEG_SANITIZE": "1"}, 1),
        *(
            Step(
                1, f"C++ CPU kernels, {best} at most", [*PYTEST, *CPU_KERNELS, "-k", "not reference"],
                one_core | {"FASTSEG_CPU_CAPABILITY": best}, 1,
            )
            for best in narrower_instructions()
        ),
        Step(3, "the executor of CUDA kernels on the CPU", [
            *PYTEST, "tests/host/test_host_executor.py", "tests/host/test_load_matrices.py",
        ], one_core, 1),
    ]  # fmt: skip


class Running:
    """A step that has begun. What it prints is kept back where others run beside it."""

    def __init__(self, step: Step, output: BinaryIO | None):
        self.step, self.output = step, output
        environment = os.environ | step.environment
        if "FASTSEG_SANITIZE" in environment:
            environment |= sanitizer_environment()
        print(f"\n== rung {step.rung}: {step.name}{'' if self.output is None else ' begins'}", flush=True)
        self.start = time.monotonic()
        self.process = subprocess.Popen(step.command, cwd=ROOT, env=environment, stdout=self.output, stderr=self.output)

    def ended(self) -> tuple[int, float] | None:
        """Exit status and seconds, once it has; then its output is shown."""
        code = self.process.poll()
        if code is None:
            return None
        seconds = time.monotonic() - self.start
        if self.output is not None:
            print(f"\n== rung {self.step.rung}: {self.step.name}", flush=True)
            self.output.seek(0)
            shutil.copyfileobj(self.output, sys.stdout.buffer)
            sys.stdout.flush()
        return code, seconds


def climb(waiting: list[Step]) -> Iterator[tuple[Step, int, float]]:
    """Run the steps in their order, as many at a time as there are cores; (step, exit status, seconds) of each."""
    running: list[Running] = []
    with contextlib.ExitStack() as files:
        while waiting or running:
            free = CORES - sum(one.step.cores for one in running)
            if waiting and waiting[0].cores <= free:
                step = waiting.pop(0)
                output = files.enter_context(tempfile.TemporaryFile()) if step.cores < CORES else None
                running.append(Running(step, output))
                continue
            time.sleep(0.2)
            for one in list(running):
                ended = one.ended()
                if ended is not None:
                    running.remove(one)
                    yield one.step, *ended


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rung", type=int, choices=range(5), action="append")
    chosen = parser.parse_args().rung or list(range(5))
    rows, failures, start = [], 0, time.monotonic()
    for step, code, seconds in climb([step for step in steps() if step.rung in chosen]):
        failures += code != 0
        rows.append(f"rung {step.rung}  {'passed' if code == 0 else 'FAILED'}  {seconds:6.0f} s  {step.name}")
    for name in not_yet_run_on_a_gpu():
        print(f"not yet run on a GPU: {name}")
    print("\n" + "\n".join(sorted(rows)), flush=True)
    print(f"{len(rows) - failures} passed, {failures} failed, in {time.monotonic() - start:.0f} s")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
