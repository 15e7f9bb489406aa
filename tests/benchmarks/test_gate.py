"""Nothing wrong gets a speed: rows whose result is wrong are red, and show none anywhere."""

from __future__ import annotations

import io
import re

import pytest
import torch

import fastseg
from benchmarks import blocks, head, html, markdown, modules, network, report, row, summary, table, targets
from benchmarks.cases import DIRECTIONS
from benchmarks.record import gates, rows
from benchmarks.row import Candidate
from benchmarks.workload import ConvWorkload, check
from fastseg.ops.library import OVERLOADS
from tests.benchmarks.conftest import BLOCK, CEILINGS, HEADS, TINY, TORCHVISION, UNET, run

# A time, or how many times faster something is.
SPEED = re.compile(r"\d ?(us|ms|s)\b|\d\.\d+x|\dx ")
UNCOMPILED = {"skip": lambda candidate: "not in this test" if candidate.role in ("compile", "runtime") else None}


def candidates(workload: ConvWorkload, function, layout="channels_last") -> list[Candidate]:
    """Native in both layouts, and `function` as the kernel under test."""
    return [*workload.natives(), Candidate("fastseg", "fastseg", layout, function, "reference", "a test")]


def measure(function=None, direction="forward", layout="channels_last") -> dict:
    workload = ConvWorkload(TINY, torch.float32, "cpu")
    function = function or workload.fastseg("reference")
    return row.measure(workload, direction, CEILINGS, 0.0, candidates(workload, function, layout))


def measure_other(workload, direction: str) -> dict:
    return row.measure(workload, direction, CEILINGS, 0.0, **UNCOMPILED)


def shows_everything(entry: dict, keeps: bool) -> None:
    assert entry["seconds"]["p20"] <= entry["seconds"]["median"] <= entry["seconds"]["p80"]
    assert entry["ratio"]["median"] > 0
    assert {"ratio to native NCHW", "ratio to native channels_last"} <= entry.keys()
    assert entry["peak_bytes"] > 0
    assert (entry["saved_bytes"] is not None) == keeps
    assert min(entry["bytes_per_s"], entry["flop_per_s"], entry["share_of_bound"]) > 0
    assert entry["backend"]


@pytest.mark.parametrize("layout", ["channels_last", "NCHW"])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_right_kernel_is_green_and_timed(direction, layout):
    found = measure(direction=direction, layout=layout)
    assert all(c["gate"]["green"] for c in found["candidates"])
    shows_everything(summary.shown(found), keeps=direction != "forward")
    assert summary.shown(found)["gate"]["error"] < 1e-6


def test_a_wrong_kernel_is_red_and_gets_no_speed(monkeypatch):
    right = OVERLOADS["depthwise_conv2d"]["reference"]

    def wrong(*args):
        y = right(*args)
        y[0, 0, -1, -1] += 1e-3  # one border pixel
        return y

    monkeypatch.setitem(OVERLOADS["depthwise_conv2d"], "reference", wrong)
    found = measure()
    entry = summary.candidate(found, "fastseg")
    assert not entry["gate"]["green"]
    assert "1 of 504 elements leave the bound" in entry["gate"]["message"]
    assert "seconds" not in entry
    assert "ratio" not in entry
    assert summary.is_red(found)
    assert summary.shown(found) is None
    assert "RED, no speed" in table.row_line(found)
    assert not SPEED.search(table.row_line(found))


def test_a_kernel_that_raises_is_red():
    def broken(x, weight):
        raise RuntimeError("no such kernel")

    found = measure(broken)
    assert summary.is_red(found)
    assert "no such kernel" in table.row_line(found)


@pytest.mark.parametrize("direction", ["grad_input", "grad_weight"])
def test_a_wrong_gradient_is_red(direction, monkeypatch):
    right = OVERLOADS["depthwise_conv2d_backward"]["reference"]

    def wrong(*args):
        return tuple(None if g is None else g * 1.001 for g in right(*args))

    monkeypatch.setitem(OVERLOADS["depthwise_conv2d_backward"], "reference", wrong)
    assert summary.is_red(measure(direction=direction))


def test_a_wrong_baseline_is_no_baseline():
    workload = ConvWorkload(TINY, torch.float32, "cpu")
    good, _, fast = candidates(workload, workload.fastseg("reference"))
    bad = Candidate(
        "native channels_last", "native", "channels_last", lambda x, w: 2 * workload._native(x, w), "native"
    )
    found = row.measure(workload, "forward", CEILINGS, 0.0, [good, bad, fast])
    assert found["baseline"] == "native NCHW"
    assert "seconds" not in summary.candidate(found, "native channels_last")


@pytest.mark.parametrize("spoil", [lambda y: y * torch.nan, lambda y: y[..., 1:]], ids=["nan", "shape"])
@pytest.mark.parametrize("role", ["native", "fastseg"])
def test_a_result_that_cannot_be_compared_is_red(role, spoil):
    workload = ConvWorkload(TINY, torch.float32, "cpu")
    gate = check({"y": spoil(workload.expected("forward")["y"].value)}, workload, "forward", role)
    assert gate["green"] is False
    assert gate["error"] is None


# Heads, blocks and networks

HEAD_ROWS = pytest.mark.parametrize(
    ("case", "direction"),
    [pytest.param(case, d, id=f"{case.kind}-{d}") for case in HEADS for d in head.DIRECTIONS[case.kind]],
)


@HEAD_ROWS
def test_a_right_head_is_green_and_timed(case, direction):
    found = measure_other(head.HeadWorkload(case, torch.float32, "cpu"), direction)
    assert all(c["gate"]["green"] for c in found["candidates"] if not c["skipped"])
    entry = summary.shown(found)
    shows_everything(entry, keeps=direction not in ("forward", "inference"))
    assert table.seconds(entry["seconds"]["median"]) in table.block_line(found)


@HEAD_ROWS
def test_a_wrong_head_is_red_and_gets_no_speed(case, direction, monkeypatch):
    real = head._fastseg(case, "native")

    def wrong(*given):
        y = real(*given)
        return (y + 1) % case.channels if case.kind == "labels" else 1.001 * y

    monkeypatch.setattr(head, "_fastseg", lambda case, backend: wrong)
    found = measure_other(head.HeadWorkload(case, torch.float32, "cpu"), direction)
    assert summary.is_red(found)
    assert "seconds" not in summary.candidate(found, "fastseg")
    assert "seconds" in summary.candidate(found, "native NCHW")


@pytest.mark.parametrize("spoil", [lambda y: y * torch.nan, lambda y: y[..., 1:]], ids=["nan", "shape"])
def test_a_head_that_cannot_be_compared_is_red(spoil):
    workload = head.HeadWorkload(HEADS[2], torch.float32, "cpu")
    gate = workload.gate((spoil(torch.ones(2, 5, 19, 19)),), "forward", "fastseg")
    assert (gate["green"], gate["error"]) == (False, None)


@pytest.mark.parametrize("direction", blocks.DIRECTIONS)
def test_a_right_block_is_green_and_says_which_kernels_ran(direction):
    found = measure_other(blocks.BlockWorkload(BLOCK, torch.float32, "cpu"), direction)
    entry = summary.shown(found)
    shows_everything(entry, keeps=direction == "training")
    assert sum(entry["kernels"].values()) >= 2
    assert 0.5 < found["live_share"] < 1


def test_a_gradient_may_differ_by_what_rounding_does_to_a_relu(monkeypatch):
    work = blocks.BlockWorkload(BLOCK, torch.float32, "cpu")
    y, grad = work.exact("training")
    monkeypatch.setattr(modules, "STEP", 2.0**-9)
    slack = work.slack("training")
    assert all(0 < share < 0.1 for share in slack)
    for times, green in ((0.9, True), (1.1, False)):
        results = (y, grad * (1 + times * slack[1]))
        assert work.gate(results, "training", "fastseg", [(y, grad)])["green"] is green


def spoiled(model, backend="auto"):
    """As fastseg.accelerate, of a broken kernel."""
    parameter = list(model.parameters())[-1]
    parameter.data += 0.05
    return model


@pytest.mark.parametrize("direction", blocks.DIRECTIONS)
def test_a_wrong_block_is_red_and_gets_no_speed(direction, monkeypatch):
    monkeypatch.setattr(fastseg, "accelerate", spoiled)
    found = measure_other(blocks.BlockWorkload(BLOCK, torch.float32, "cpu"), direction)
    assert summary.is_red(found)
    assert "seconds" not in summary.candidate(found, "fastseg")


NETWORK_ROWS = pytest.mark.parametrize(
    ("case", "direction", "dtype"),
    [
        pytest.param(case, direction, dtype, id=f"{case.id}-{direction}-{dtype}")
        for case, direction, dtype in (
            (TORCHVISION, "inference", "float32"),
            (UNET, "inference", "autocast"),
            (UNET, "training", "float32"),
            (UNET, "training", "autocast"),
        )
    ],
)


def network_workload(case, dtype) -> network.NetworkWorkload:
    return network.NetworkWorkload(case, row.dtype_of(dtype), "cpu")


@NETWORK_ROWS
def test_a_right_network_is_green_and_timed(case, direction, dtype):
    found = measure_other(network_workload(case, dtype), direction)
    assert found["id"] == f"{case.id}/{direction}/{dtype}"
    shows_everything(summary.shown(found), keeps=direction == "training")
    assert ("pictures" in found) == (direction == "inference" and dtype == "float32")
    assert "GFLOP/s" in table.network_lines(found)


@NETWORK_ROWS
def test_a_wrong_network_is_red_and_gets_no_speed(case, direction, dtype, monkeypatch):
    def broken(model, backend="auto"):
        model.register_forward_hook(lambda module, given, result: worse(result))
        return model

    def worse(result):
        if isinstance(result, dict):
            return {name: value.roll(1, -1) for name, value in result.items()}
        return result.roll(1, -1) if result.dim() else 1.5 * result

    monkeypatch.setattr(fastseg, "accelerate", broken)
    found = measure_other(network_workload(case, dtype), direction)
    assert summary.is_red(found)
    assert "seconds" not in summary.candidate(found, "fastseg")
    assert "RED, no speed" in table.network_lines(found)
    assert not SPEED.search(table.network_lines(found))


@pytest.mark.parametrize(
    ("role", "low"),  # nothing says how wrong native may be in low precision
    [("native", False), ("compile", False), ("runtime", False), ("compile", True), ("runtime", True)],
)
def test_a_network_that_is_another_one_is_no_baseline(role, low):
    exact = torch.randn(1, 5, 9, 9, dtype=torch.float64)
    native, other = exact.float(), torch.randn(1, 5, 9, 9)
    assert network.agreement(native, [native], exact, role, low)["green"]
    assert not network.agreement(other, [native], exact, role, low)["green"]


def test_a_gradient_that_is_another_one_is_no_baseline():
    loss = torch.ones(())
    exact, other = ((loss, torch.randn(99).double()) for _ in range(2))
    assert network.agreement_in_training(exact, [], exact, "compile")["green"]
    assert not network.agreement_in_training(other, [exact], exact, "compile")["green"]


# Whole runs


@pytest.mark.usefixtures("small")
def test_a_run_with_wrong_kernels_prints_no_speed_anywhere(monkeypatch):
    """Terminal, Markdown, page: of operator, block, head and network alike."""
    right, right_head = ConvWorkload.fastseg, head._fastseg

    def off(result):
        return 1.5 * result if result.is_floating_point() else 4 - result

    monkeypatch.setattr(ConvWorkload, "fastseg", lambda self, backend: lambda *xs: off(right(self, backend)(*xs)))
    monkeypatch.setattr(head, "_fastseg", lambda case, backend: lambda *xs: off(right_head(case, backend)(*xs)))
    monkeypatch.setattr(fastseg, "accelerate", spoiled)
    out = io.StringIO()
    found = run(out)
    assert len(rows(found)) == 7
    assert all(summary.is_red(found_row) for found_row in rows(found))
    assert found["overhead"] == [o for o in found["overhead"] if o["name"].startswith("native")]
    measured_lines = [line for line in out.getvalue().splitlines() if "RED" in line or "MB" in line]
    texts = {
        "terminal": "\n".join(measured_lines),
        "summary": table.summary_lines(found),
        "markdown": "\n".join(markdown.markdown(found).splitlines()[2:-2]),
        "side by side": "\n".join(markdown.side_by_side([found, found]).splitlines()[2:]),
        "page": _visible(report.render([{**found, "overhead": [], "skipped": []}])),
    }
    for name, text in texts.items():
        clean = re.sub(r"at most 10 us above native|\d+ threads|\[\d+/\d+.*?left\]", "", text)
        assert not SPEED.search(clean), (name, SPEED.search(clean))
    assert texts["markdown"].count("wrong result, no speed") == 7
    assert texts["page"].count("wrong result, no speed") == 7


def _visible(page: str) -> str:
    """The rows of a page's tables, cards and bars, as text."""
    body = page.split("How to read this page")[0].split("Summary")[1]
    return re.sub(r"<[^>]+>", " ", re.sub(r"<svg class=\"taps\".*?</figure>|<p class=\"soft\">.*?</p>", " ", body))


def test_a_red_row_shows_no_speed_where_others_do(found):
    for planted in rows(found):
        entry = summary.candidate(planted, "fastseg")
        entry["gate"] = {**entry["gate"], "green": False, "message": "planted"}
    assert summary.summaries(found) == []
    assert summary.never_slower(found) == (0, [])
    assert targets.targets({**found, "overhead": []}) == []
    assert gates(found)["red"] == len(rows(found))
    page = report.render([found])
    assert page.count("wrong result, no speed: fastseg: planted") == len(rows(found))
    assert 'class="roofline"' not in page
    assert 'class="bars' not in page


def test_text_in_a_cell_is_no_markup():
    assert html.cell("<b>&") == "<td>&lt;b&gt;&amp;</td>"
