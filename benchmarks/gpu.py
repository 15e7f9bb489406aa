"""python -m benchmarks.gpu: everything that only a GPU can show, in one command of less than ten minutes.

Stages, most valuable first, each a process of its own with a time limit: build, smoke, exactness, the contract tests
and beside them tests/test_gpu.py and compute-sanitizer, compiling what is timed, then times. The record is written
after every stage, so an interrupted run leaves what it has. It goes to $OUT when that is set, else to
benchmarks/results/. `--dry-run` walks the same way on a CPU.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import itertools
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

import fastseg
from benchmarks import record, selection, table, timing
from fastseg import dispatch
from fastseg.ops.depthwise import reference as depthwise
from fastseg.ops.dilated import reference as dilated
from fastseg.testing import assert_within, expected_conv, integer_tensor, random_tensor

BUDGET_SECONDS = 570
GRACE_SECONDS = 8.0  # for a stage that its limit interrupts
LEAST_SECONDS = 1.0  # a stage with less time left is not started
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# (size, kernel, stride, dilation): the three kernel sizes with code of their own, a stride, a dilation over the tile.
GEOMETRIES = (((17, 19), 3, 1, 1), ((17, 19), 3, 1, 6), ((16, 13), 3, 2, 1), ((12, 11), 5, 1, 2), ((12, 11), 7, 1, 1))

CHANNELS = 24
# Filters of each operator, without their size: [K, C / groups].
FILTERS = {"depthwise": (CHANNELS, 1), "dense": (40, CHANNELS)}


def kernels(device: str) -> list[str]:
    """The backends to test on `device`; the reference stands in on a machine that has none."""
    problem = dispatch.Problem("depthwise_conv2d", device, torch.float32)
    candidates = ("triton", "cuda") if device == "cuda" else ("cpu",)
    reasons = {backend: dispatch.reason_not(backend, problem) for backend in candidates}
    for backend, reason in reasons.items():
        print(f"{backend}: {reason or 'can run'}")
    found = [backend for backend, reason in reasons.items() if reason is None]
    return found or (["reference"] if device == "cpu" else [])


def _calls(device: str, backends: Sequence[str] = ()):
    """Every operator, backend, dtype, layout and geometry of the smoke and exactness stages: (name, backend, ...)."""
    layouts = (torch.channels_last, torch.contiguous_format)
    for operator, backend, dtype, layout, geometry in itertools.product(
        FILTERS, backends or kernels(device), DTYPES, layouts, GEOMETRIES
    ):
        size, kernel, stride, dilation = geometry
        padding = dilation * (kernel // 2)
        name = f"{operator} {backend} {dtype} {layout} {size[0]}x{size[1]} k{kernel} s{stride} d{dilation}"
        filter = (*FILTERS[operator], kernel, kernel)
        yield name, backend, dtype, layout, size, filter, ([stride] * 2, [padding] * 4, [dilation] * 2)


def _gradients(backend, x, weight, geometry, make_grad):
    """(y, grad_y, grad_x, grad_weight) of one convolution."""
    x.requires_grad_()
    weight.requires_grad_()
    stride, padding, dilation = geometry
    groups = CHANNELS // weight.shape[1]
    y = fastseg.ops.conv2d(x, weight, None, tuple(stride), padding[0], tuple(dilation), groups, backend=backend)
    grad_y = make_grad(y.shape).contiguous(memory_format=torch.channels_last)
    return y, grad_y, *torch.autograd.grad(y, (x, weight), grad_y)


def _in_parallel(work, device: str) -> list:
    """What `work(device, first, step)` returns for each share of the calls; each compiles on a core of its own."""
    jobs = 1 if device == "cpu" else min(12, os.cpu_count() or 1)
    shares = [(device, first, jobs) for first in range(jobs)]
    if jobs == 1:
        return [work(*shares[0])]
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:
        return pool.starmap(work, shares, chunksize=1)


def smoke(device: str) -> int:
    """Forward and both gradients of small tensors, inside the error bound; float32 is IEEE float32 here."""
    done = sum(_in_parallel(_smoke, device))
    print(f"{done} calls inside the bound")
    return 0 if done else 1


@torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
def _smoke(device: str, first: int = 0, step: int = 1, compare: bool = True, backends: Sequence[str] = ()) -> int:
    done, calls = 0, itertools.islice(_calls(device, backends), first, None, step)
    for name, backend, dtype, layout, size, filter, geometry in calls:
        x = random_tensor((2, CHANNELS, *size), dtype, seed=1, device=device).contiguous(memory_format=layout)
        weight = random_tensor(filter, dtype, seed=2, device=device)
        y, grad_y, *grads = _gradients(
            backend, x, weight, geometry, lambda s, dtype=dtype: random_tensor(s, dtype, seed=3, device=device)
        )
        done += 1
        if compare:
            wanted = expected_conv(x, weight, None, *geometry, grad_output=grad_y)
            for what, actual, expected in zip(("y", "grad_x", "grad_weight"), (y, *grads), wanted[:3], strict=True):
                assert_within(actual.detach(), expected, f"{name}: {what}")
    return done


def touch(device: str) -> int:
    """The calls of `smoke` without their checks, for compute-sanitizer to watch: it slows every launch down.

    Of the hand-written C++ alone: of Triton's kernels most of the time would be their compilation.
    """
    done = _smoke(device, compare=False, backends=("cuda",) if device == "cuda" else ())
    print(f"{done} calls made")
    return 0 if done else 1


def exactness(device: str) -> int:
    """Small integers, whose sums are exact: results must equal the exact ones, rounded once, bit for bit."""
    shares = _in_parallel(_exactness, device)
    done, wrong = sum(share[0] for share in shares), [name for share in shares for name in share[1]]
    print(f"{done - len(wrong)} of {done} results exact", *wrong, sep="\n")
    return 1 if wrong or not done else 0


def _exactness(device: str, first: int, step: int) -> tuple[int, list[str]]:
    done, wrong = 0, []
    for name, backend, dtype, layout, size, filter, geometry in itertools.islice(_calls(device), first, None, step):
        x = integer_tensor((2, CHANNELS, *size), dtype, seed=1, device=device).contiguous(memory_format=layout)
        weight = integer_tensor(filter, dtype, seed=2, device=device)
        y, grad_y, *grads = _gradients(
            backend, x, weight, geometry, lambda s, dtype=dtype: integer_tensor(s, dtype, seed=3, device=device)
        )
        exact_x, exact_weight, exact_grad = (t.detach().double() for t in (x, weight, grad_y))
        reference = depthwise if weight.shape[1] == 1 else dilated
        exact = [reference.forward(exact_x, exact_weight, None, *geometry, "none")]
        exact += reference.backward(exact_grad, exact_x, exact_weight, *geometry, (True, True, False))[:2]
        for what, actual, value in zip(("y", "grad_x", "grad_weight"), (y, *grads), exact, strict=True):
            done += 1
            if not torch.equal(actual.detach(), value.to(dtype)):
                wrong.append(f"{name}: {what}")
    return done, wrong


def compile_timed(device: str) -> int:
    """Compiles, on all cores, the Triton kernels that the times of operators, blocks and heads will call."""
    print(f"{sum(_in_parallel(_compile_timed, device))} calls made")
    return 0


def _compile_timed(device: str, first: int, step: int) -> int:
    steps = selection.plan(selection.Settings(device=device, dtypes=("bfloat16",), networks=False))
    done = 0
    with timing.measuring_stream(device):
        for one in steps[first::step]:
            work = selection.workload(one, device)
            for candidate in work.candidates():
                if candidate.role == "fastseg" and candidate.backend in ("triton", ""):
                    with contextlib.suppress(RuntimeError):  # the times show what fails
                        work.calls(candidate, one.direction, 1)[0]()
                        done += 1
        if device == "cuda":
            torch.cuda.synchronize()
    return done


class Run:
    """The stages, and the record that is written after each."""

    def __init__(self, output: Path, device: str, budget: float):
        self.output, self.device = output, device
        self.lock = threading.Lock()  # of the record: some stages run beside others
        self.end = time.perf_counter() + budget
        self.record = record.start({"device": device, "budget": budget, "command": "gpu"})
        self.record |= {"stages": [], "promises": {}, "failures": []}
        record.save(self.record, output)

    def stage(self, name: str, command: list[str], limit: float, **environment: str) -> str:
        """Run `command` for at most `limit` seconds; what it printed last is kept. Returns its status."""
        limit = min(limit, self.end - time.perf_counter())
        if limit < LEAST_SECONDS:
            return self.skip(name, record.SPENT)
        print(f"\n== {name}, at most {limit:.0f} s", flush=True)
        start = time.perf_counter()
        status, detail = _run_printing(command, limit, {**os.environ, **environment})
        return self._add(name, status, time.perf_counter() - start, detail)

    def skip(self, name: str, reason: str) -> str:
        return self._add(name, "skipped", 0.0, reason)

    def _add(self, name: str, status: str, seconds: float, detail: str) -> str:
        print(f"== {name}: {status}", flush=True)
        # Folders are nobody's business.
        detail = detail.replace(f"{record.ROOT}/", "").replace(tempfile.gettempdir(), "")
        detail = re.sub(r"(/[\w.+-]+){2,}/", "", detail)
        stage = {"name": name, "status": status, "seconds": round(seconds, 1), "detail": detail}
        with self.lock:
            self.record["stages"].append(stage)
            record.save(self.record, self.output)
        return status

    def measure(self, name: str, limit: float, *options: str) -> None:
        """`python -m benchmarks` with `options`; its rows join the record, also when it was interrupted."""
        limit = min(limit, self.end - time.perf_counter())
        with tempfile.TemporaryDirectory() as folder:
            part = Path(folder) / "part.json"
            command = [*_python("benchmarks"), "--device", self.device, "--output", str(part), *options]
            self.stage(name, [*command, "--budget", f"{max(1, 0.9 * limit - 10):.0f}"], limit)
            if part.exists():
                found = record.load(part)
                for key in ("operators", "networks", "blocks", "skipped"):
                    self.record[key] += found[key]
                for key in ("ceilings", "overhead"):
                    self.record[key] = self.record[key] or found[key]
        record.save(self.record, self.output)

    def test(self, files: str, limit: float, jobs: int = 1, select: str = "") -> None:
        """The tests of some files that `select` names; how many passed and failed goes into the record, by promise.

        With pytest-xdist they are shared by `jobs` processes.
        """
        rung = "gpu" if self.device == "cuda" else "cpu"
        with tempfile.TemporaryDirectory() as folder:
            results = Path(folder) / "results.xml"
            options = ["-q", "--tb=line", "-p", "no:cacheprovider", f"--junitxml={results}"]
            if select:
                options += ["-k", select]
            if jobs > 1 and importlib.util.find_spec("xdist"):  # Triton's compiler keeps one core busy
                options += ["-n", str(jobs), "--dist", "worksteal"]
            name = f"{files} -k '{select}'" if select else files
            self.stage(name, [*_python("pytest"), *files.split(), *options], limit, FASTSEG_RUNG=rung)
            try:
                counted, failures = _count_tests(results), _failures(results)
            except (OSError, ElementTree.ParseError):  # pytest was killed
                counted, failures = {}, [f"{name}: no results"]
        with self.lock:
            for test, counts in counted.items():
                earlier = self.record["promises"].get(test, {})
                kinds = earlier.keys() | counts.keys()
                self.record["promises"][test] = {k: earlier.get(k, 0) + counts.get(k, 0) for k in sorted(kinds)}
            self.record["failures"] += failures
            record.save(self.record, self.output)


def _python(module: str) -> list[str]:
    return [sys.executable, "-m", module]


def _count_tests(junit: Path) -> dict[str, dict[str, int]]:
    """Test function -> how many of its cases passed, failed and were skipped."""
    found: dict[str, Counter] = {}
    for case in ElementTree.parse(junit).iter("testcase"):
        kinds = {child.tag for child in case}
        status = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        name = case.get("name") or "interrupted"  # pytest had not come to its name yet
        found.setdefault(name.split("[")[0], Counter())[status] += 1
    return {name: dict(counts) for name, counts in found.items()}


def _failures(junit: Path, most: int = 100) -> list[str]:
    """The first failures, each with the first line of what it says."""
    found = []
    for case in ElementTree.parse(junit).iter("testcase"):
        for child in case:
            if child.tag in ("failure", "error"):
                found.append(f"{case.get('name')}: {(child.get('message') or '').splitlines()[0][:200]}")
    return found[:most]


def _run_printing(command: list[str], limit: float, environment: dict[str, str]) -> tuple[str, str]:
    """Run `command`, passing its output on. Returns "passed", "failed" or "timed out", and its last lines."""
    process = subprocess.Popen(
        command, cwd=record.ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    # pytest writes what it has when it is interrupted; whoever does not end then is ended.
    timers = [
        threading.Timer(limit, process.send_signal, (signal.SIGINT,)),
        threading.Timer(limit + GRACE_SECONDS, process.kill),
    ]
    for timer in timers:
        timer.start()
    lines = []
    for line in process.stdout:
        print(line, end="", flush=True)
        lines = [*lines[-7:], line.rstrip()[:200]]
    code = process.wait()
    late = not timers[0].is_alive()
    for timer in timers:
        timer.cancel()
    status = "passed" if code == 0 else "timed out" if late else "failed"
    return status, "\n".join(lines)


def run_all(output: Path, device: str, budget: float, built: bool = False, without: Sequence[str] = ()) -> dict:
    """Every stage in its order, but those in `without`; the record. `built`: the extension is there already."""
    run = Run(output, device, budget)
    own = [*_python("benchmarks.gpu"), "--device", device, "--stage"]
    if device == "cuda" and not built:
        run.stage("build", [sys.executable, "setup.py", "build_ext", "--inplace"], 240)
    else:
        run.skip("build", "what was built before is used")
    for check in ("smoke", "exactness"):
        if check in without:
            run.skip(check, "left out")
        else:
            run.stage(check, [*own, check], 60)
    # The largest tensors take most of the memory: their tests are not for many processes.
    large, jobs = "2_to_the_31", os.cpu_count() or 1
    sanitizer = shutil.which("compute-sanitizer")

    def check_beside():
        """What leaves most cores free, while Triton's compiler keeps them busy."""
        if device == "cuda":
            run.test("tests/test_gpu.py tests/ops", 120, select=f"test_gpu or {large}")
        for tool in ("memcheck", "racecheck"):
            if tool in without:
                run.skip(tool, "left out")
            elif device == "cuda" and sanitizer:
                command = [sanitizer, "--tool", tool, "--error-exitcode", "9", *own, "touch"]
                # Without PyTorch's caching allocator every tensor has bounds that the sanitizer can see.
                run.stage(tool, command, 60, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
            else:
                run.skip(tool, "compute-sanitizer is not installed" if device == "cuda" else "a dry run has no GPU")

    with ThreadPoolExecutor(1) as beside:
        checks = beside.submit(check_beside)
        run.test("tests/test_contract.py tests/test_identities.py tests/ops", 190, jobs, select=f"not {large}")
        checks.result()
    if device == "cuda":
        run.stage("compile", [*own, "compile"], 45)
        left = run.end - time.perf_counter()
        operators, low = ("--no-networks", "--no-blocks", "--no-compile"), ("--dtype", "bfloat16")
        run.measure("times, bfloat16", 0.35 * left, *low, *operators)
        run.measure("blocks and heads", 0.45 * left, *low, "--no-networks", "--no-operators")
        run.measure("networks", 0.2 * left, *low, "--no-blocks", "--no-operators")
        run.measure("times, float32", left, "--dtype", "float32", *operators)
    else:
        options = ("--no-networks", "--no-blocks", "--cases", "mobilenet-384")
        run.measure("times, float32", run.end - time.perf_counter(), "--dtype", "float32", *options)
    record.finish(run.record)
    record.save(run.record, output)
    return run.record


STAGES = {"smoke": smoke, "exactness": exactness, "touch": touch, "compile": compile_timed}


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--output", type=Path, help="where the record goes")
    parser.add_argument("--budget", type=float, default=BUDGET_SECONDS, metavar="SECONDS")
    parser.add_argument("--dry-run", action="store_true", help="every stage that can run on the CPU; nothing to commit")
    parser.add_argument("--without", default="", metavar="STAGES", help="comma-separated: smoke, exactness, ...")
    parser.add_argument("--built", action="store_true", help="use the extension that is there")
    parser.add_argument("--stage", choices=tuple(STAGES), help="only this, in this process")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda", help="for --stage")
    parsed = parser.parse_args(arguments)
    device = "cpu" if parsed.dry_run else parsed.device
    if device == "cuda" and not torch.cuda.is_available():
        print("PyTorch sees no CUDA device on this machine, so there is nothing to run here.", file=sys.stderr)
        return 2
    if parsed.stage:
        return STAGES[parsed.stage](device)
    if parsed.dry_run:
        output = record.ROOT / "build" / "gpu-dry-run.json"
    else:
        name = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
        output = Path(os.environ.get("OUT") or record.RESULTS) / f"{name}.json"
    output = parsed.output or output
    found = run_all(output, device, parsed.budget, parsed.built, parsed.without.split(","))
    print(f"\n{table.terminal(found)}" if found["operators"] else "")
    for stage in found["stages"]:
        print(f"{stage['status']:<10} {stage['name']} ({stage['seconds']:.0f} s)")
    print(f"record: {output.name}")
    return 0 if all(stage["status"] in ("passed", "skipped") for stage in found["stages"]) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
