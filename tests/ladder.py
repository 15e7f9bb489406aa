"""Climbs the test ladder's rungs 0 to 4, cheapest first, and prints what each took. `--rung N` climbs one alone.

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
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.record import not_yet_run_on_a_gpu
from csrc.host.build import sanitizer_environment

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
    beside: bool = False  # runs at the same time as the step before it; each keeps one core busy


def steps() -> list[Step]:
    # Steps that run beside another: more threads would only wait for each other.
    one_core = {"OMP_NUM_THREADS": "1"}
    interpreter = one_core | {"FASTSEG_RUNG": "interpreter", "TRITON_INTERPRET": "1"}
    host = one_core | {"FASTSEG_RUNG": "host"}
    sanitized = host | {"FASTSEG_SANITIZE": "1"}
    return [
        Step(0, "lint", [sys.executable, "tests/lint.py"]),
        Step(0, "examples in docstrings and README", [*PYTEST, "tests/test_examples.py"]),
        Step(1, "reference, C++ CPU kernels, operator stack, drop-in", [
            *PYTEST, *SPREAD, "tests", "--ignore=tests/host", "--ignore=tests/offline",
            "--ignore=tests/test_examples.py",
        ]),
        *(
            Step(
                1, f"C++ CPU kernels, {best} at most", [*PYTEST, *CPU_KERNELS, "-k", "not reference"],
                one_core | environment, beside,
            )
            for best, beside, environment in (
                ("avx2", False, {"FASTSEG_CPU_CAPABILITY": "avx2"}),
                ("plain", True, {"FASTSEG_CPU_CAPABILITY": "plain"}),
            )
        ),
        Step(2, "Triton kernels in the interpreter", [*PYTEST, *SPREAD, *CONTRACT], interpreter),
        Step(3, "CUDA kernels on the CPU", [*PYTEST, *CONTRACT], host),
        Step(3, "CUDA kernels with planted bugs", [*PYTEST, "tests/host/test_mutations.py"], host, True),
        Step(3, "CUDA kernels on the CPU, sanitized", [*PYTEST, "tests/test_contract.py", "-k", SANITIZED], sanitized),
        Step(3, "the executor of CUDA kernels on the CPU", [
            *PYTEST, "tests/host/test_host_executor.py", "tests/host/test_load_matrices.py",
        ], one_core, True),
        Step(4, "offline compilation and its table of resources", [*PYTEST, "tests/offline"]),
    ]  # fmt: skip


def run(together: list[Step]) -> list[tuple[Step, int, float]]:
    """Run steps at the same time; (step, exit status, seconds) of each. What they print comes one after the other."""
    start, running, done = time.monotonic(), [], []
    with contextlib.ExitStack() as files:
        for step in together:
            environment = os.environ | step.environment
            if "FASTSEG_SANITIZE" in environment:
                environment |= sanitizer_environment()
            output = files.enter_context(tempfile.TemporaryFile()) if step.beside else None
            process = subprocess.Popen(step.command, cwd=ROOT, env=environment, stdout=output, stderr=output)
            running.append((step, process, output))
        for step, process, output in running:
            code = process.wait()
            done.append((step, code, time.monotonic() - start))
            if output is not None:
                print(f"\n== rung {step.rung}: {step.name}, beside the one before", flush=True)
                output.seek(0)
                shutil.copyfileobj(output, sys.stdout.buffer)
                sys.stdout.flush()
    return done


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rung", type=int, choices=range(5), action="append")
    chosen = parser.parse_args().rung or list(range(5))
    groups: list[list[Step]] = []
    for step in steps():
        if step.rung in chosen and step.beside:
            groups[-1].append(step)
        elif step.rung in chosen:
            groups.append([step])
    rows, failed = [], False
    for together in groups:
        print(f"\n== rung {together[0].rung}: {together[0].name}", flush=True)
        for step, code, seconds in run(together):
            failed |= code != 0
            rows.append(f"rung {step.rung}  {'passed' if code == 0 else 'FAILED'}  {seconds:6.0f} s  {step.name}")
    for name in not_yet_run_on_a_gpu():
        print(f"not yet run on a GPU: {name}")
    print("\n" + "\n".join(rows), flush=True)
    failures = sum("FAILED" in row for row in rows)
    print(f"{len(rows) - failures} passed, {failures} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
