"""The benchmark: nothing wrong gets a speed, and records, reports and tables say what was measured."""

from __future__ import annotations

import copy
import json
import re
import sys
from pathlib import Path

import pytest
import torch

import fastseg
from benchmarks import blocks, gpu, head, network, operators, readme, record, report, suite, summary, table, timing
from benchmarks.__main__ import main
from benchmarks.blocks import BlockCase
from benchmarks.cases import CASES, DIRECTIONS, ConvCase, select
from benchmarks.head import HeadCase
from benchmarks.network import NetworkCase
from benchmarks.workload import Candidate, ConvWorkload
from fastseg.ops.library import OVERLOADS

CEILINGS = {"copy_bytes_per_s": 3e10, "float32_flop_per_s": 2e11}
SMALL_HEADS = tuple(HeadCase(f"small-{kind}", "a small head", kind, 5, 7, 19, 2, 2) for kind in head.OPERATORS)
TINY = ConvCase("tiny", "a small layer", 8, (9, 7), dilation=(2, 2))


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    """Timing that takes no time: what is tested here is everything else."""
    monkeypatch.setattr(timing, "WARM_UP_SECONDS", 0.0)
    monkeypatch.setattr(timing, "SAMPLE_SECONDS", 1e-5)
    monkeypatch.setattr(timing, "ceilings", lambda device: CEILINGS)


def candidates(workload: ConvWorkload, function, layout="channels_last") -> list[Candidate]:
    """Native in both layouts, and `function` as the kernel under test."""
    natives = [c for c in workload.candidates() if c.role == "native"]
    return [*natives, Candidate("fastseg", "fastseg", layout, function, "reference", "a test")]


def measure(function=None, direction="forward", layout="channels_last") -> dict:
    workload = ConvWorkload(TINY, torch.float32, "cpu")
    function = function or workload._fastseg("reference")
    return operators.measure(workload, direction, CEILINGS, 0.0, candidates(workload, function, layout))


@pytest.fixture(scope="module")
def measured() -> dict:
    """The record of a short run with one case and a small network."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing, "ceilings", lambda device: CEILINGS)
        patch.setattr(suite, "NETWORKS", (NetworkCase("small", "deeplabv3_mobilenet_v3_large", size=97),))
        block = BlockCase("small-block", "a small block", lambda: blocks._separable(8, 16), 8, 9)
        patch.setattr(blocks, "BLOCKS", (block,))
        patch.setattr(head, "HEADS", SMALL_HEADS[:1])
        patch.setattr(suite, "QUICK_COMPILE_SECONDS", 0.0)
        settings = suite.Settings(cases="mobilenet-384", budget=60.0)
        return suite.run(settings, say=lambda line: None, keep=lambda found: None)


@pytest.fixture
def found(measured) -> dict:
    return copy.deepcopy(measured)


# The gate


@pytest.mark.parametrize("layout", ["channels_last", "NCHW"])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_right_kernel_is_green_and_timed(direction, layout):
    row = measure(direction=direction, layout=layout)
    assert all(c["gate"]["green"] for c in row["candidates"])
    entry = summary.shown(row)
    assert entry["seconds"]["p20"] <= entry["seconds"]["median"] <= entry["seconds"]["p80"]
    assert entry["ratio"]["median"] > 0
    assert entry["peak_bytes"] > 0
    assert (entry["saved_bytes"] is None) == (direction == "forward")
    assert entry["gate"]["error"] < 1e-6


def test_a_wrong_kernel_is_red_and_gets_no_speed(monkeypatch):
    right = OVERLOADS["depthwise_conv2d"]["reference"]

    def wrong(*args):
        y = right(*args)
        y[0, 0, -1, -1] += 1e-3  # one border pixel
        return y

    monkeypatch.setitem(OVERLOADS["depthwise_conv2d"], "reference", wrong)
    row = measure()
    entry = summary.candidate(row, "fastseg")
    assert not entry["gate"]["green"]
    assert "1 of 504 elements leave the bound" in entry["gate"]["message"]
    assert "seconds" not in entry
    assert "ratio" not in entry
    assert summary.is_red(row)
    assert summary.shown(row) is None
    line = table.row_line(row)
    assert "RED, no speed" in line
    assert not re.search(r"\d (us|ms)\b|\dx", line)


def test_a_red_row_shows_no_speed_anywhere(found):
    for row in (*found["operators"], *found["networks"], *found["blocks"]):
        entry = summary.candidate(row, "fastseg")
        entry["gate"] = {**entry["gate"], "green": False, "message": "planted"}
    assert summary.summaries(found) == []
    assert summary.targets({**found, "overhead": []}) == []
    assert record.gates(found)["red"] == 6
    page = report.render([found])
    assert page.count("wrong result, no speed: fastseg: planted") == 2
    assert "<svg" not in page
    assert 'class="bars"' not in page
    assert table.markdown(found).count("wrong result, no speed") == 6


def test_a_kernel_that_raises_is_red():
    def broken(x, weight):
        raise RuntimeError("no such kernel")

    row = measure(broken)
    assert summary.is_red(row)
    assert "no such kernel" in table.row_line(row)


@pytest.mark.parametrize("direction", ["grad_input", "grad_weight"])
def test_a_wrong_gradient_is_red(direction, monkeypatch):
    right = OVERLOADS["depthwise_conv2d_backward"]["reference"]

    def wrong(*args):
        return tuple(None if g is None else g * 1.001 for g in right(*args))

    monkeypatch.setitem(OVERLOADS["depthwise_conv2d_backward"], "reference", wrong)
    assert summary.is_red(measure(direction=direction))


def test_a_wrong_baseline_is_no_baseline():
    workload = ConvWorkload(TINY, torch.float32, "cpu")
    good, _, fast = candidates(workload, workload._fastseg("reference"))
    bad = Candidate(
        "native channels_last", "native", "channels_last", lambda x, w: 2 * workload._native(x, w), "native"
    )
    row = operators.measure(workload, "forward", CEILINGS, 0.0, [good, bad, fast])
    assert row["baseline"] == "native NCHW"
    assert "seconds" not in summary.candidate(row, "native channels_last")


@pytest.mark.parametrize("spoil", [lambda y: y * torch.nan, lambda y: y[..., 1:]], ids=["nan", "shape"])
@pytest.mark.parametrize("role", ["native", "fastseg"])
def test_a_result_that_cannot_be_compared_is_red(role, spoil):
    workload = ConvWorkload(TINY, torch.float32, "cpu")
    gate = operators.check({"y": spoil(workload.expected("forward")["y"].value)}, workload, "forward", role)
    assert gate["green"] is False
    assert gate["error"] is None


def test_a_wrong_network_is_red_and_gets_no_speed(monkeypatch):
    def accelerate(model):
        model.classifier[-1].bias.data[3] += 0.01
        return model

    monkeypatch.setattr(fastseg, "accelerate", accelerate)
    case = NetworkCase("small", "deeplabv3_mobilenet_v3_large", size=65)
    row = network.measure(case, "cpu", torch.float32, 0.0, "not in this test")
    assert summary.is_red(row)
    assert "seconds" not in summary.candidate(row, "fastseg")
    assert "seconds" in summary.candidate(row, "native NCHW")
    assert "RED, no speed" in table.network_lines(row)


# Heads


HEAD_ROWS = pytest.mark.parametrize(
    ("case", "direction"),
    [pytest.param(case, d, id=f"{case.kind}-{d}") for case in SMALL_HEADS for d in head.DIRECTIONS[case.kind]],
)


@HEAD_ROWS
def test_a_right_head_is_green_and_timed(case, direction):
    row = head.measure(case, direction, "cpu", torch.float32, 0.0, compiles=False)
    assert all(c["gate"]["green"] for c in row["candidates"] if not c["skipped"])
    entry = summary.shown(row)
    assert entry["name"].startswith("fastseg")
    assert entry["peak_bytes"] > 0
    assert {"ratio to native NCHW", "ratio to native channels_last"} <= entry.keys()
    assert entry["name"] in table.block_line(row)


@HEAD_ROWS
def test_a_wrong_head_is_red_and_gets_no_speed(case, direction, monkeypatch):
    real = head._fastseg(case, "native")

    def wrong(*given):
        y = real(*given)
        return (y + 1) % case.channels if case.kind == "labels" else 1.001 * y

    monkeypatch.setattr(head, "_fastseg", lambda case, backend: wrong)
    row = head.measure(case, direction, "cpu", torch.float32, 0.0, compiles=False)
    assert summary.is_red(row)
    assert "seconds" not in summary.candidate(row, "fastseg")
    assert "seconds" in summary.candidate(row, "native NCHW")


def test_memory_of_a_head_is_compared_with_natives():
    row = {"id": "small", "candidates": [
        {"name": "native NCHW", "role": "native", "peak_bytes": 30}, {"name": "native channels_last", "role": "native"},
        {"name": "fastseg", "role": "fastseg", "peak_bytes": 3, "gate": {"green": True}},
    ]}  # fmt: skip
    found = {"operators": [], "networks": [], "blocks": [row]}
    assert summary._memory_share("small", 0.2)(found) == ("0.100 of 0 MB", True)
    assert summary._memory_share("small", 0.05)(found)[1] is False
    assert summary._memory_share("another", 0.2)(found) is None


# Cases and costs


def test_case_ids_are_unique():
    cases = [*CASES, *blocks.BLOCKS, *head.HEADS]
    assert len({case.id for case in cases}) == len(cases)
    assert [case.id for case in select("sep-aspp*", "cpu")] == [
        "sep-aspp-d18",
        "sep-aspp-d6",
        "sep-aspp-d12",
        "sep-aspp-d1",
    ]


@pytest.mark.parametrize(("rate", "taps"), [(1, 8.64), (6, 6.95), (12, 5.17), (18, 3.64)])
def test_live_taps(rate, taps):
    (case,) = select(f"sep-aspp-d{rate}", "cpu")
    workload = ConvWorkload(case, torch.float32, "cpu")
    assert workload.live_taps == pytest.approx(taps, abs=0.006)
    assert workload.output_shape == workload.shape


def test_cost_counts_each_tensor_once():
    workload = ConvWorkload(TINY, torch.bfloat16, "cpu")
    image, weight = 2 * 8 * 9 * 7, 2 * 8 * 9
    assert workload.cost("forward").bytes == 2 * image + weight
    assert workload.cost("backward").bytes == 3 * image + 2 * weight
    assert workload.cost("forward").flops == 2 * workload.live_products


def test_candidates_take_turns():
    order = []
    samplers = {name: lambda name=name: order.append(name) or 1.0 for name in "ABC"}
    samples = timing.interleave(samplers, seconds=0.0)
    assert "".join(order[:9]) == "ABCBCACAB"
    assert {len(values) for values in samples.values()} == {timing.ROUNDS[0]}


def test_ratio_is_taken_pair_by_pair():
    assert timing.ratio([2.0, 4.0, 8.0], [1.0, 2.0, 4.0]) == timing.Spread(2.0, 2.0, 2.0)


# Records, reports, tables


def test_record_round_trip(found, tmp_path):
    path = tmp_path / "record.json"
    record.save(found, path)
    assert record.load(path) == json.loads(json.dumps(found))
    assert [p.name for p in tmp_path.iterdir()] == ["record.json"]
    text = path.read_text()
    assert str(record.ROOT) not in text
    assert str(Path.home()) not in text
    assert {"commit", "dirty", "kernels", "machine", "ceilings"} <= found.keys()
    assert all(len(digest) == 64 for digest in found["kernels"].values())


def test_a_file_that_is_no_record_is_refused(tmp_path):
    path = tmp_path / "other.json"
    path.write_text('{"schema": 99}')
    with pytest.raises(ValueError, match=r"expected a benchmark record of schema 1 in other\.json, but got 99"):
        record.load(path)


def test_report_needs_nothing_beside_it(found):
    page = report.render([found])
    assert not re.search(r"https?://|<link|@import|<script src", page)
    assert all(source.startswith("data:image/") for source in re.findall(r'src="([^"]*)"', page))
    assert len(re.findall(r"<figure>", page)) == 4
    assert "prefers-color-scheme: dark" in page
    assert 'name="viewport"' in page
    for tag in ("table", "div", "svg", "details", "tr"):
        assert page.count(f"<{tag}>") + page.count(f"<{tag} ") == page.count(f"</{tag}>")


def test_report_command_renders_from_records(found, tmp_path, capsys):
    record.save(found, tmp_path / "record.json")
    assert main(["report", str(tmp_path / "record.json"), "--html", str(tmp_path / "page.html")]) == 0
    assert (tmp_path / "page.html").read_text() == report.render([record.load(tmp_path / "record.json")])
    assert "mobilenet-384" in capsys.readouterr().out


def test_skipped_rows_are_listed(found, monkeypatch):
    monkeypatch.setattr(suite, "NETWORKS", ())
    monkeypatch.setattr(blocks, "BLOCKS", ())
    monkeypatch.setattr(head, "HEADS", ())
    late = suite.run(suite.Settings(cases="sep-aspp-d18", budget=0.0), say=lambda line: None, keep=lambda r: None)
    assert [s["reason"] for s in late["skipped"]] == ["the time budget was spent"] * 2
    assert "2 rows were not run" in report.render([late])


def test_readme_without_records(tmp_path):
    assert readme.block("gpu-table", tmp_path) == "no record yet"


def test_readme_is_filled_from_the_newest_record(found, tmp_path):
    record.save({**found, "created": "2020-01-01T00:00:00+00:00", "operators": []}, tmp_path / "old.json")
    record.save(found, tmp_path / "new.json")
    text = "# fastseg\n<!-- cpu-table -->\nold\n<!-- /cpu-table -->\n<!-- gpu-table -->\n<!-- /gpu-table -->\nend\n"
    filled = readme.filled(text, tmp_path)
    assert "| mobilenet-384 | 1x384x33x33 float32 | forward |" in filled
    assert "<!-- gpu-table -->\nno record yet\n<!-- /gpu-table -->\nend\n" in filled
    assert "\nold\n" not in filled
    assert readme.filled(filled, tmp_path) == filled


def test_readme_without_marks_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match="expected one block from <!-- cpu-table --> to <!-- /cpu-table -->, but got 0"
    ):
        readme.filled("# fastseg\n", tmp_path)


def test_kernel_files_not_yet_run_on_a_gpu(found, tmp_path):
    sources = {
        "csrc/depthwise/depthwise.cu": '#include "csrc/common/shape.h"\n',
        "csrc/depthwise/depthwise_cpu.cpp": '#include "csrc/common/simd.h"\n',
        "csrc/common/shape.h": "",
        "csrc/common/simd.h": "",
        "csrc/host/executor.cuh": "",
        "fastseg/ops/depthwise/triton.py": "",
    }
    for name, text in sources.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    results = tmp_path / "results"
    on_gpu = ["csrc/common/shape.h", "csrc/depthwise/depthwise.cu", "fastseg/ops/depthwise/triton.py"]
    assert record.not_yet_run_on_a_gpu(tmp_path, results) == on_gpu
    made = {**found, "settings": {"device": "cuda"}, "kernels": record.kernel_hashes(tmp_path)}
    record.save(made, results / "gpu.json")
    assert record.not_yet_run_on_a_gpu(tmp_path, results) == []
    (tmp_path / "csrc/common/shape.h").write_text("// changed\n")
    assert record.not_yet_run_on_a_gpu(tmp_path, results) == ["csrc/common/shape.h"]


# Rung 5, on a machine without a GPU


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_command_without_a_gpu(capsys):
    assert gpu.main([]) == 2
    assert capsys.readouterr().err == "PyTorch sees no CUDA device on this machine, so there is nothing to run here.\n"


@pytest.mark.parametrize("stage", [gpu.smoke, gpu.exactness, gpu.touch], ids=["smoke", "exactness", "touch"])
def test_gpu_stage_on_the_cpu(stage, monkeypatch):
    monkeypatch.setattr(gpu, "kernels", lambda device: ["reference"])
    assert stage("cpu") == 0


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
    assert [stage["name"] for stage in left["stages"]] == ["build", "smoke", "exactness"]
