"""A run: progress, memory that runs short, the budget, and going on after an interruption."""

from __future__ import annotations

import io
import itertools
import json

import pytest
import torch

from benchmarks import blocks, memory, overhead, progress, record, resume, row, timing
from benchmarks.__main__ import main
from benchmarks.network import NetworkWorkload
from benchmarks.progress import Bar
from tests.benchmarks.conftest import BLOCK, UNET, run

pytestmark = pytest.mark.usefixtures("small")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch):
    """Time passes when the list is added to."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: sum(now))
    return now


# Progress


def test_a_terminal_shows_a_bar_with_the_time_left(clock):
    out = Terminal()
    bar = Bar([1.0, 1.0, 2.0], budget=100.0, stream=out)
    bar.begin("one")
    clock.append(10.0)
    bar.end("the line of one")
    bar.begin("two")
    shown = out.getvalue().split("\r")
    assert "[........................] 0/3: one" in shown[1]
    assert "the line of one\n" in shown[-2] + shown[-3] + shown[-1] or "the line of one\n" in out.getvalue()
    assert "[########................] 1/3, 30 s left: two" in shown[-1]


def test_elsewhere_progress_is_plain_lines(clock):
    out = io.StringIO()
    bar = Bar([1.0, 1.0, 2.0], budget=100.0, stream=out)
    for line in ("one", "two"):
        bar.begin(line)
        clock.append(10.0)
        bar.end(line)
    assert out.getvalue() == "one  [1/3, 30 s left]\ntwo  [2/3, 20 s left]\n"


def test_the_time_left_is_no_longer_than_the_budget(clock):
    bar = Bar([1.0] * 100, budget=25.0, stream=io.StringIO())
    assert bar.left() is None
    clock.append(10.0)
    bar.end(None)
    assert bar.left() == 15.0


def test_rows_that_were_skipped_say_nothing_about_the_time_left(clock):
    bar = Bar([1.0] * 4, budget=1000.0, stream=io.StringIO())
    clock.append(8.0)
    bar.end(None)
    bar.end(None, measured=False)
    assert bar.left() == 16.0


def test_a_run_says_what_it_does(tmp_path):
    out = io.StringIO()
    found = run(out)
    lines = out.getvalue().splitlines()
    assert "measured ceilings" in lines[1]
    assert any(line.startswith("tiny") and "[2/7" in line for line in lines)
    assert len(record.rows(found)) == 7
    assert found["finished"]


# Memory


def test_a_case_that_does_not_fit_is_skipped_with_the_reason(monkeypatch):
    monkeypatch.setattr(memory, "available_bytes", lambda device: 10_000)
    out = io.StringIO()
    found = run(out)
    assert record.rows(found) == []
    assert len(found["skipped"]) == 7
    assert all("GB of memory, and 0.0 GB are free" in skipped["reason"] for skipped in found["skipped"])
    assert "tiny/forward/float32: skipped, it takes about" in out.getvalue()


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory.\nMore"), RuntimeError("DefaultCPUAllocator: can't allocate memory")],
    ids=["gpu", "cpu"],
)
def test_a_case_that_runs_out_of_memory_is_skipped(error, monkeypatch):
    def measure(*given):
        raise error

    monkeypatch.setattr(row, "measure", measure)
    found = run()
    assert record.rows(found) == []
    assert {skipped["reason"] for skipped in found["skipped"]} == {str(error).splitlines()[0]}


def test_other_errors_are_not_hidden(monkeypatch):
    def measure(*given):
        raise RuntimeError("a mistake")

    monkeypatch.setattr(row, "measure", measure)
    with pytest.raises(RuntimeError, match="a mistake"):
        run()


@pytest.mark.parametrize("direction", blocks.DIRECTIONS)
def test_the_peak_is_told_without_computing(direction):
    """Within what allocators round and workspaces add."""
    work = blocks.BlockWorkload(BLOCK, torch.float32, "cpu")
    call = work.call(work.native(direction), work.inputs(direction), direction)
    told = memory.peak_without_data(
        work.native(direction), work.inputs(direction), lambda m, x: work.call(m, x, direction)()
    )
    call()
    assert 0.5 * memory.peak_bytes(call, "cpu") <= told <= 3 * memory.peak_bytes(call, "cpu")


def test_the_peak_of_a_network_grows_with_training():
    work = NetworkWorkload(UNET, torch.float32, "cpu")
    assert 0 < work.memory_needed("inference") < work.memory_needed("training")


def test_a_gpu_has_what_is_free_and_what_the_allocator_keeps(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1000, 9000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 500)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 200)
    assert memory.available_bytes("cuda") == 1300
    assert memory.shortage(1000, "cuda") is None
    assert memory.shortage(1200, "cuda") == "it takes about 0.0 GB of memory, and 0.0 GB are free"


def test_a_container_leaves_what_its_limit_leaves(tmp_path):
    files = {"memory.max": "1000\n", "memory.current": "700\n", "memory.stat": "anon 300\ninactive_file 200\n"}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert memory._free_of_the_group(tmp_path) == 500
    (tmp_path / "memory.max").write_text("max\n")
    assert memory._free_of_the_group(tmp_path) is None


# The budget, interruptions, and going on


def test_rows_beyond_the_budget_are_listed_and_the_run_is_not_finished():
    found = run(budget=0.0)
    assert [skipped["reason"] for skipped in found["skipped"]] == [record.SPENT] * 7
    assert found["finished"] is None


@pytest.fixture
def interrupted(monkeypatch, tmp_path, capsys):
    """The file of a run that Ctrl-C ended in its fourth row."""
    path, real, calls = tmp_path / "record.json", row.measure, itertools.count()

    def measure(*given):
        if next(calls) == 3:
            raise KeyboardInterrupt
        return real(*given)

    monkeypatch.setattr(row, "measure", measure)
    options = ["--device", "cpu", "--dtype", "float32", "--no-compile", "--budget", "600"]
    assert main([*options, "--output", str(path)]) == 130
    monkeypatch.setattr(row, "measure", real)
    return path


def test_an_interrupted_run_leaves_a_valid_record_and_says_how_to_go_on(interrupted, capsys):
    left = record.load(interrupted)
    assert len(record.rows(left)) == 3
    assert left["finished"] is None
    said = capsys.readouterr().out
    assert f"interrupted after 3 of 7 rows; to go on: python -m benchmarks --resume {interrupted}" in said


def test_going_on_measures_only_what_is_missing(interrupted, monkeypatch, capsys):
    before, measured = record.load(interrupted), []
    real = row.measure
    monkeypatch.setattr(row, "measure", lambda *given: measured.append(1) or real(*given))
    assert main(["--resume", str(interrupted)]) == 0
    after = record.load(interrupted)
    assert len(measured) == 4
    assert len(record.rows(after)) == 7
    kept = {found["id"]: found for found in record.rows(after)}
    assert all(kept[found["id"]] == found for found in record.rows(before))
    assert after["finished"]
    assert after["overhead"]
    assert "3 rows are in the record, 4 are to be measured" in capsys.readouterr().out


def test_a_finished_record_is_not_gone_on_with(interrupted, capsys):
    assert main(["--resume", str(interrupted)]) == 0
    assert main(["--resume", str(interrupted)]) == 2
    assert "record.json is finished: there is nothing to go on with" in capsys.readouterr().err


def changed(path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda r: r.update(commit="0" * 40), "the commit was 0000000000 and is now"),
        (lambda r: r.update(sources="other"), "files of fastseg or benchmarks have changed since"),
        (lambda r: r["machine"].update(cpu="abacus"), "cpu was 'abacus' and is now"),
        (lambda r: r["machine"].update(torch="1.0"), "torch was '1.0' and is now"),
        (lambda r: r["settings"].pop("models"), "of another command or version"),
        (lambda r: r.update(schema=0), "expected a benchmark record of schema 1 in record.json, but got 0"),
    ],
    ids=["commit", "sources", "machine", "torch", "command", "schema"],
)
def test_going_on_is_refused_where_rows_would_not_belong_together(interrupted, change, sentence, capsys):
    changed(interrupted, change)
    assert main(["--resume", str(interrupted)]) == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--full"], "quick was True and is now False"),
        (["--cases", "tiny"], "cases was '*' and is now 'tiny'"),
        (["--output", "other.json"], "expected --output to be the file of --resume"),
    ],
    ids=["length", "cases", "output"],
)
def test_going_on_is_refused_with_other_settings(interrupted, options, sentence, capsys):
    assert main(["--resume", str(interrupted), *options]) == 2
    assert sentence in capsys.readouterr().err


def test_going_on_may_have_another_budget(interrupted, capsys):
    options = ["--dtype", "float32", "--budget", "500", "--output", str(interrupted)]
    assert main(["--resume", str(interrupted), *options]) == 0


def test_there_is_nothing_to_go_on_with(tmp_path, capsys):
    assert main(["--resume", str(tmp_path / "none.json")]) == 2
    assert "No such file" in capsys.readouterr().err


def test_an_unfinished_run_is_not_written_over(interrupted, capsys):
    options = ["--device", "cpu", "--dtype", "float32", "--no-compile", "--cases", "tiny", "--output"]
    assert main([*options, str(interrupted)]) == 0
    aside = interrupted.with_name("record.unfinished.json")
    assert len(record.rows(record.load(aside))) == 3
    assert f"--resume {aside} would go on with it" in capsys.readouterr().out
    assert resume.set_aside(interrupted) is None  # that one is finished


def test_an_interrupted_run_without_a_file_says_so(monkeypatch, capsys):
    def measure(*given):
        raise KeyboardInterrupt

    monkeypatch.setattr(row, "measure", measure)
    assert main(["--device", "cpu"]) == 130
    assert "with --output FILE they would have been kept" in capsys.readouterr().out


# Timing


def test_candidates_take_turns():
    order = []
    samplers = {name: lambda name=name: order.append(name) or 1.0 for name in "ABC"}
    samples = timing.interleave(samplers, seconds=0.0)
    assert "".join(order[:9]) == "ABCBCACAB"
    assert {len(values) for values in samples.values()} == {timing.ROUNDS[0]}


def test_ratio_is_taken_pair_by_pair():
    assert timing.ratio([2.0, 4.0, 8.0], [1.0, 2.0, 4.0]) == timing.Spread(2.0, 2.0, 2.0)


@pytest.mark.parametrize(
    ("count", "low", "high", "sure"),
    [(3, 1, 3, 0.75), (6, 1, 6, 0.96875), (9, 2, 8, 0.9609375), (20, 6, 15, 0.95861053)],
)
def test_interval_of_a_median_is_that_of_the_order_statistics(count, low, high, sure):
    found = timing.median_interval(list(range(count, 0, -1)))
    assert (found.low, found.high) == (low, high)
    assert found.confidence == pytest.approx(sure)
    assert found.median == (count + 1) / 2


def test_cost_of_a_call_is_told_of_right_results_only(monkeypatch):
    monkeypatch.setattr(overhead.ConvWorkload, "fastseg", lambda self, backend: lambda x, w: 2 * self._native(x, w))
    assert {found["name"] for found in overhead.measure("cpu", 0.0)} == {"native channels_last"}
