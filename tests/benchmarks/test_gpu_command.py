"""`make gpu` on a machine without a GPU: its stages, its order of value, what an interruption leaves."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import gpu, record, report


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_command_without_a_gpu(capsys):
    assert gpu.main([]) == 2
    assert capsys.readouterr().err == "PyTorch sees no CUDA device on this machine, so there is nothing to run here.\n"


@pytest.mark.parametrize("stage", [gpu.smoke, gpu.exactness, gpu.touch], ids=["smoke", "exactness", "touch"])
def test_gpu_stage_on_the_cpu(stage, monkeypatch):
    monkeypatch.setattr(gpu, "kernels", lambda device: ["reference"])
    assert stage("cpu") == 0


def test_a_share_of_what_is_timed_is_compiled(monkeypatch):
    """By calling it once; what cannot run does not keep the rest from it."""
    called = []

    class Work:
        def candidates(self):
            return [SimpleNamespace(role=r, backend=b) for r, b in (("native", "native"), ("fastseg", "triton"))]

        def calls(self, candidate, direction, most):
            assert (candidate.backend, most) == ("triton", 1)
            if direction == "fails":
                raise RuntimeError("no such tile")
            return [lambda: called.append(direction)]

    steps = [SimpleNamespace(direction=name) for name in ("one", "two", "fails", "four", "five")]
    monkeypatch.setattr(gpu.selection, "plan", lambda settings: steps)
    monkeypatch.setattr(gpu.selection, "workload", lambda step, device: Work())
    assert gpu._compile_timed("cpu", 0, 2) == 2
    assert called == ["one", "five"]


@pytest.mark.parametrize("written", [None, "<testsuite><testcase na"], ids=["nothing", "cut-off"])
def test_results_of_tests_that_were_killed_are_missed(written, tmp_path, monkeypatch):
    def run_printing(command, limit, environment):
        if written is not None:
            (option,) = (word for word in command if word.startswith("--junitxml="))
            Path(option.removeprefix("--junitxml=")).write_text(written)
        return "timed out", ""

    monkeypatch.setattr(gpu, "_run_printing", run_printing)
    run = gpu.Run(tmp_path / "record.json", "cpu", budget=30)
    run.test("tests/test_gpu.py", 20)
    left = record.load(tmp_path / "record.json")
    assert left["failures"] == ["tests/test_gpu.py: no results"]
    assert left["promises"] == {}


def test_an_interrupted_test_without_a_name_is_counted(tmp_path):
    results = tmp_path / "results.xml"
    results.write_text('<testsuite><testcase name="test_a[1]"/><testcase name="test_a[2]"/><testcase/></testsuite>')
    assert gpu._count_tests(results) == {"test_a": {"passed": 2}, "interrupted": {"passed": 1}}


def test_gpu_stage_without_kernels_fails(monkeypatch):
    monkeypatch.setattr(gpu, "kernels", lambda device: [])
    assert gpu.smoke("cpu") == 1


@pytest.mark.parametrize(
    ("script", "limit", "status"),
    [
        ("print('/some/folder/file.py:3')", 20, "passed"),
        ("raise SystemExit(3)", 20, "failed"),
        ("import time; time.sleep(30)", 0.5, "timed out"),
    ],
    ids=["passed", "failed", "timed-out"],
)
def test_gpu_stages_are_recorded_as_they_end(script, limit, status, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "LEAST_SECONDS", 0.0)
    run = gpu.Run(tmp_path / "record.json", "cpu", budget=30)
    assert run.stage("a stage", [sys.executable, "-c", script], limit) == status
    (stage,) = record.load(tmp_path / "record.json")["stages"]
    assert stage["status"] == status
    assert "/some" not in stage["detail"]
    assert "a stage" in report.render([run.record])


def test_gpu_command_leaves_its_record_after_each_stage(tmp_path, monkeypatch):
    """The order of value, and what an interruption after the second stage leaves."""
    order = []

    def run_printing(command, limit, environment):
        if len(order) == 2:
            raise KeyboardInterrupt
        order.append(command[-1])
        return "passed", ""

    monkeypatch.setattr(gpu, "_run_printing", run_printing)
    with pytest.raises(KeyboardInterrupt):
        gpu.run_all(tmp_path / "record.json", "cpu", budget=30)
    assert order == ["smoke", "exactness"]
    left = record.load(tmp_path / "record.json")
    names = [stage["name"] for stage in left["stages"]]
    assert names[:3] == ["build", "smoke", "exactness"]
    assert set(names[3:]) <= {"memcheck", "racecheck"}  # which run beside the tests
