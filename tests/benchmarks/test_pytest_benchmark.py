"""`pytest benchmarks --benchmark-only`: every row of the full run, grouped, saved, compared."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from benchmarks import record
from benchmarks.selection import Settings, plan
from benchmarks.test_suite import CANDIDATES, DEVICE, DTYPE

FAST = ("--benchmark-max-time=0.001", "--benchmark-min-rounds=1", "--benchmark-warmup=off", "--benchmark-only")


def run(*options: str) -> str:
    command = [sys.executable, "-m", "pytest", "benchmarks", "-p", "no:cacheprovider", "-q", *options]
    # Nothing is timed in workers of pytest-xdist, and these tests may run in one.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(command, cwd=record.ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def collected(*options: str) -> list[str]:
    return [line for line in run("--collect-only", *options).splitlines() if "::" in line]


@pytest.fixture(scope="module")
def everything() -> list[str]:
    return collected("-m", "benchmark_row")


def test_every_row_of_the_full_run_is_there(everything):
    steps = plan(Settings(device=DEVICE, dtypes=(DTYPE, "autocast"), quick=False))
    expected = {
        f"benchmarks/test_suite.py::test_row[{step.id.replace('/', '-')}-{name}]"
        for step in steps
        for name in CANDIDATES
    }
    assert set(everything) == expected
    assert len(everything) == len(expected)


def test_without_a_selection_little_is_run(everything):
    few = collected()
    assert 20 <= len(few) <= 80
    assert set(few) < set(everything)
    kinds = ("sep-aspp-d18-backward", "head-loss-21", "separable-aspp-inference", "deeplabv3-mobilenet-v3-inference")
    assert all(any(kind in name for name in few) for kind in kinds)


def test_rows_are_selected_by_kind_and_name():
    assert len(collected("-m", "head", "-k", "loss")) == 3 * len(CANDIDATES)


def test_rows_are_grouped_saved_and_compared(tmp_path):
    choice = ("-k", "mobilenet-384 and forward and not backward", f"--benchmark-storage=file://{tmp_path}/saved")
    path = tmp_path / "rows.json"
    run(*choice, *FAST, f"--benchmark-json={path}", "--benchmark-autosave")
    found = json.loads(path.read_text())["benchmarks"]
    assert len(found) == len(CANDIDATES)
    assert {one["group"] for one in found} == {f"mobilenet-384/forward/{DTYPE}"}
    assert all(one["extra_info"]["flops"] > 0 for one in found)
    assert "0001_" in run(*choice, *FAST, "--benchmark-compare=0001")
