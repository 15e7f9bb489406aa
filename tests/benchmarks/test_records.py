"""Records, and what is made of them without a browser: pages, tables, the list of kernels no GPU has run."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from benchmarks import markdown, plots, readme, record, report, summary, table, targets
from benchmarks.__main__ import main
from tests.benchmarks.conftest import run


def test_record_round_trip(found, tmp_path):
    path = tmp_path / "record.json"
    record.save(found, path)
    assert record.load(path) == json.loads(json.dumps(found))
    assert [p.name for p in tmp_path.iterdir()] == ["record.json"]
    text = path.read_text()
    assert str(record.ROOT) not in text
    assert str(Path.home()) not in text
    assert {"commit", "dirty", "kernels", "sources", "machine", "ceilings"} <= found.keys()
    assert all(len(digest) == 64 for digest in found["kernels"].values())


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ('{"schema": 99}', r"expected a benchmark record of schema 1 in other\.json, but got 99"),
        ("[]", r"expected a benchmark record of schema 1 in other\.json, but got list"),
        ('{"schema": 1', r"other\.json is no JSON"),
    ],
    ids=["schema", "list", "cut-off"],
)
def test_a_file_that_is_no_record_is_refused(content, sentence, tmp_path, capsys):
    path = tmp_path / "other.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=sentence):
        record.load(path)
    assert main(["report", str(path)]) == 2
    assert re.search(sentence, capsys.readouterr().err)


@pytest.mark.parametrize("path", sorted(record.RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_committed_records_can_be_read_and_shown(path):
    found = record.load(path)
    assert found["finished"] or found["skipped"] or found.get("stages")  # a GPU run may end early
    for row in record.rows(found):
        entry = summary.shown(row)
        assert row["baseline"] is None or entry is None or "ratio" in entry
    assert "<article>" in report.render([found])
    assert len(markdown.markdown(found).splitlines()) > 3
    assert "gates:" in table.terminal(found)


def test_the_page_needs_nothing_beside_it(found):
    page = report.render([found])
    assert not re.search(r"https?://|<link|@import|<script src", page)
    assert all(source.startswith("data:image/") for source in re.findall(r'src="([^"]*)"', page))
    assert len(re.findall(r'<figure><img src="data:image/(?:jpeg|png)', page)) == 4
    assert "prefers-color-scheme: dark" in page
    assert 'name="viewport"' in page
    for tag in ("table", "div", "svg", "details", "tr", "section", "article", "figure"):
        assert page.count(f"<{tag}>") + page.count(f"<{tag} ") == page.count(f"</{tag}>")


def test_the_page_has_a_row_of_everything_measured(found):
    page = report.render([found])
    for row in record.rows(found):
        entry = summary.shown(row)
        assert f"<td>{row['case']}</td>" in page
        assert table.seconds(entry["seconds"]["median"]) in page
        assert table.kernel(entry) in page
    assert page.count("roofline") >= 1
    assert "Kept for the backward pass" in page


def test_report_command_renders_from_records(found, tmp_path, capsys):
    path, page, tables = tmp_path / "record.json", tmp_path / "page.html", tmp_path / "tables.md"
    record.save(found, path)
    assert main(["report", str(path), "--html", str(page), "--markdown", str(tables)]) == 0
    assert page.read_text() == report.render([record.load(path)])
    assert tables.read_text() == markdown.markdown(record.load(path)) + "\n"
    assert "tiny " in capsys.readouterr().out


def test_report_command_shows_records_side_by_side(found, tmp_path, capsys):
    """The same rows of another commit, once more without the network, and with another batch.

    They took a thousandth of the time: a factor that no ratio to native, which stands beside it, has by chance.
    """
    other = json.loads(json.dumps(found))
    other |= {"commit": "f" * 40, "networks": []}
    for row in record.rows(other):
        for entry in row["candidates"]:
            if entry["name"] == "fastseg":
                entry["seconds"] = {name: value / 1000 for name, value in entry["seconds"].items()}
    other["blocks"][0]["shape"][0] += 1
    for name, content in (("a", found), ("b", other)):
        record.save(content, tmp_path / f"{name}.json")
    paths = [str(tmp_path / f"{name}.json") for name in "ab"]
    page, tables = tmp_path / "page.html", tmp_path / "tables.md"
    assert main(["report", *paths, "--html", str(page), "--markdown", str(tables)]) == 0
    titles = markdown.titles([found, other])
    assert titles[1].endswith("commit ffffffffff")
    section = page.read_text().split("Side by side")[1].split("</section>")[0]
    assert all(title in section for title in titles)
    faster = sum(summary.shown(row)["name"] == "fastseg" for row in record.rows(other)[1:])
    assert section.count(">1000.00x<") == faster
    first = tables.read_text().splitlines()
    assert first[0].count("|") == 4
    assert any(line.startswith("| small-unet/inference/float32 |") and line.endswith("| - |") for line in first)


def test_records_of_different_machines_are_told_apart(found):
    gpu = {**found, "machine": {**found["machine"], "gpu": "a GPU"}}
    assert markdown.titles([found, gpu]) == [found["machine"]["cpu"], "a GPU"]


# The summary


def ratio(median: float, p20: float, p80: float) -> dict:
    return {"median": median, "p20": p20, "p80": p80}


@pytest.mark.parametrize(
    ("pairs", "slower"),
    [(ratio(0.9, 0.8, 0.95), True), (ratio(0.9, 0.8, 1.05), False), (ratio(1.2, 1.1, 1.3), False)],
    ids=["slower", "noise", "faster"],
)
def test_rows_that_are_slower_beyond_noise_are_told(found, pairs, slower):
    for row in record.rows(found):
        entry = summary.candidate(row, "fastseg")
        entry["ratio"] = pairs if row["case"] == "tiny" else ratio(2.0, 1.9, 2.1)
    rows, told = summary.never_slower(found)
    tiny = [row["id"] for row in found["operators"]]
    assert rows == len(record.rows(found))
    assert sorted(identity for identity, _ in told) == (sorted(tiny) if slower else [])
    page = report.render([found])
    assert (f"{len(tiny)} of {rows}" if slower else f"never, in {rows} rows") in page
    assert ("SLOWER" in table.never_slower_line(found)) is slower


def test_summaries_are_geometric_means_by_kind_and_direction(found):
    (row,) = (row for row in found["operators"] if row["direction"] == "forward")
    row["candidates"] = [c for c in row["candidates"] if c["name"] != "fastseg cpu"]
    other = json.loads(json.dumps(row)) | {"case": "other", "id": "other/forward/float32"}
    for planted, median in ((row, 8.0), (other, 2.0)):
        summary.candidate(planted, "fastseg")["ratio"] = ratio(median, median, median)
    found["operators"].append(other)
    told = next(s for s in summary.summaries(found) if s.title == "operators, forward float32")
    assert (told.rows, told.geometric_mean) == (2, pytest.approx(4.0))
    assert (told.best, told.worst) == ((8.0, "tiny"), (2.0, "other"))


def test_memory_of_a_head_is_compared_with_natives():
    row = {"id": "small", "candidates": [
        {"name": "native NCHW", "role": "native", "peak_bytes": 30}, {"name": "native channels_last", "role": "native"},
        {"name": "fastseg", "role": "fastseg", "peak_bytes": 3, "gate": {"green": True}},
    ]}  # fmt: skip
    found = {"operators": [], "networks": [], "blocks": [row]}
    assert targets._memory_share("small", 0.2)(found) == ("0.100 of 0 MB", True)
    assert targets._memory_share("small", 0.05)(found)[1] is False
    assert targets._memory_share("another", 0.2)(found) is None


# Plots


@pytest.mark.parametrize(
    ("size", "rate", "taps"), [(33, 6, 6.95), (33, 12, 5.17), (33, 18, 3.64), (65, 36, 3.58), (33, 36, 1.0)]
)
def test_pictures_of_live_taps_show_their_mean(size, rate, taps):
    picture = plots.live_taps(size, rate)
    assert f"{size} x {size}, rate {rate}: {taps:.2f} of 9 taps" in picture
    assert picture.count("<rect") == (1 if rate >= size else 9)


def test_bars_of_memory_are_shares_of_natives():
    entry = {"name": "fastseg", "role": "fastseg", "seconds": {}, "peak_bytes": 3_000_000}
    native = {"name": "native NCHW", "role": "native", "peak_bytes": 6_000_000}
    row = {"case": "a", "direction": "forward", "dtype": "float32", "baseline": "native NCHW"}
    bars = plots.memory_bars([row | {"candidates": [native, entry]}])
    assert "width:50.00%" in bars
    assert "3.0 of 6.0" in bars
    more = plots.memory_bars([row | {"candidates": [native, entry | {"peak_bytes": 12_000_000}]}])
    assert 'class="bar loss"' in more
    assert "left:50.00%" in more


# READMEs


def test_readme_without_records(tmp_path):
    assert readme.block("gpu-table", tmp_path) == "no record yet"


def test_readme_is_filled_from_the_newest_record(found, tmp_path):
    record.save({**found, "created": "2020-01-01T00:00:00+00:00", "operators": []}, tmp_path / "old.json")
    record.save(found, tmp_path / "new.json")
    text = "# fastseg\n<!-- cpu-table -->\nold\n<!-- /cpu-table -->\n<!-- gpu-table -->\n<!-- /gpu-table -->\nend\n"
    filled = readme.filled(text, tmp_path)
    assert "| tiny | 1x8x9x7 float32 | forward |" in filled
    assert "<!-- gpu-table -->\nno record yet\n<!-- /gpu-table -->\nend\n" in filled
    assert "\nold\n" not in filled
    assert readme.filled(filled, tmp_path) == filled


def test_readme_without_marks_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match="expected one block from <!-- cpu-table --> to <!-- /cpu-table -->, but got 0"
    ):
        readme.filled("# fastseg\n", tmp_path)


# Kernels and GPUs


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


@pytest.mark.usefixtures("small")
def test_rows_that_were_left_out_are_listed_on_the_page():
    assert "7 rows were not run" in report.render([run(budget=0.0)])
