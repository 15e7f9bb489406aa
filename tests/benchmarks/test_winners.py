# ruff: noqa: F401 -- imported fixtures
"""The winners that come with fastseg are what the committed records say, under the keys that calls ask for."""

from __future__ import annotations

import argparse
import dataclasses
import json

import pytest
import torch
from torch import nn

import fastseg
from benchmarks import record, row
from benchmarks import winners as shipping
from benchmarks.head import HeadWorkload
from benchmarks.workload import ConvWorkload
from fastseg import dispatch, winners
from tests.benchmarks.conftest import HEADS, TINY
from tests.tuning import fresh

DENSE = dataclasses.replace(TINY, id="tiny-dense", outputs=6)


def options(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    shipping.add_arguments(parser)
    return parser.parse_args(arguments)


def test_what_ships_is_what_the_committed_records_say():
    assert shipping.stale(shipping.tables()) == [], "run `python -m benchmarks winners --write`"


@pytest.mark.parametrize("path", sorted(shipping.SHIPPED.glob("*.json")), ids=lambda path: path.stem)
def test_what_ships_can_be_read_and_names_its_device(path):
    content = winners._read(path)
    assert winners.file_name(content["made_for"]["device"]) == path.name
    assert content["winners"]


WORKLOADS = {"depthwise": (ConvWorkload, TINY), "dense": (ConvWorkload, DENSE)} | {
    case.kind: (HeadWorkload, case) for case in HEADS
}


@pytest.mark.parametrize("layout", row.LAYOUTS)
@pytest.mark.parametrize(("family", "case"), WORKLOADS.values(), ids=WORKLOADS)
def test_a_row_has_the_keys_that_its_calls_ask_for(family, case, layout):
    work = family(case, torch.float32, "cpu")
    (candidate,) = (c for c in work.candidates() if c.name == "fastseg")
    candidate = dataclasses.replace(candidate, layout=layout)
    directions = {"loss": ["forward+backward"], "labels": ["inference"]}.get(getattr(case, "kind", ""))
    for direction in directions or ("forward", "backward"):
        described = work.describe(direction) | {"direction": direction}
        with winners.session(lambda problem, best: None) as found:
            work.calls(candidate, direction)[0]()
        gradient = "backward" in direction
        assert [name for _, name in found] == [winners.key(shipping.problem(described, layout, gradient))]


def entry(name, role, backend, seconds, ratio=None, layout="channels_last", green=True):
    found = {"name": name, "role": role, "backend": backend, "layout": layout, "gate": {"green": green}}
    found["seconds"] = {"median": seconds, "p20": 0.95 * seconds, "p80": 1.05 * seconds}
    if ratio is not None:
        found["ratio to native channels_last"] = {"median": ratio, "p20": 0.97 * ratio}
    return found


def record_of(direction, *candidates, **machine) -> dict:
    described = ConvWorkload(DENSE, torch.float32, "cpu").describe()
    one = described | {"direction": direction, "candidates": [*candidates]}
    return {
        "schema": record.SCHEMA,
        "created": "2026-01-01",
        "machine": {"cpu": "A processor", "isa": "AVX2", "threads": 3, **machine},
        "settings": {"device": "cpu"},
        "operators": [one],
        "networks": [],
        "blocks": [],
        "skipped": [],
    }


NATIVE = entry("native channels_last", "native", "native", 1.0)
KERNEL = entry("fastseg cpu", "fastseg", "cpu", 0.5, 2.0)


def backends(one) -> list[str]:
    return [best.backend for best in shipping.winners_of(one).values()]


def test_a_kernel_wins_by_the_rule_of_tuning():
    assert backends(record_of("forward", NATIVE, KERNEL)) == ["cpu"]
    assert backends(record_of("forward", NATIVE, entry("fastseg cpu", "fastseg", "cpu", 0.99, 1.01))) == ["native"]
    assert backends(record_of("forward", NATIVE, entry("fastseg cpu", "fastseg", "cpu", 0.98, 1.025))) == ["native"]
    assert backends(record_of("forward", NATIVE, entry("fastseg cpu", "fastseg", "cpu", 2.0, 0.5))) == ["native"]


@pytest.mark.parametrize(
    "candidates",
    [
        [NATIVE],
        [KERNEL],
        [NATIVE, entry("fastseg cpu", "fastseg", "cpu", 0.5, 2.0, green=False)],
        [entry("native channels_last", "native", "native", 1.0, green=False), KERNEL],
        [NATIVE, entry("fastseg", "fastseg", "native", 0.5, 2.0)],
        [NATIVE, entry("fastseg NCHW", "fastseg", "cpu", 0.5, 2.0, layout="NCHW")],
    ],
    ids=["native-alone", "kernel-alone", "red-kernel", "red-native", "auto-took-native", "another-layout"],
)
def test_rows_that_tell_no_winner(candidates):
    assert backends(record_of("forward", *candidates)) == []


def test_forward_and_backward_together_tell_the_winner_of_training():
    one, other = record_of("forward", NATIVE, KERNEL), record_of("backward", NATIVE, KERNEL)
    assert [key.split()[2] for key in shipping.winners_of(one)] == ["inference"]
    assert shipping.winners_of(other) == {}
    one["operators"] += other["operators"]
    found = {key.split()[2]: best for key, best in shipping.winners_of(one).items()}
    assert found["training"].ms == {"native": 2000.0, "cpu": 1000.0}


def test_what_auto_ran_is_believed_where_it_cannot_be_something_else():
    auto = entry("fastseg", "fastseg", "cpu", 0.5, 2.0)
    assert backends(record_of("forward", NATIVE, auto)) == ["cpu"]
    assert backends(record_of("forward+backward", NATIVE, auto)) == ["cpu"]
    assert backends(record_of("forward+backward", NATIVE, auto, device="with tables")) == []
    assert backends(record_of("forward+backward", NATIVE, KERNEL, device="with tables")) == ["cpu"]


def test_devices_of_records_are_those_of_tables(monkeypatch):
    machine = record.machine("cpu")
    assert machine["device"] == winners.device_name("cpu")
    earlier = {key: value for key, value in machine.items() if key != "device"}
    assert shipping.device_of({"machine": earlier}) == winners.device_name("cpu")
    assert shipping.device_of({"machine": earlier | {"gpu": "A GPU"}}) == "A GPU"


def test_what_a_kernel_lost_before_it_changed_is_left_out(tmp_path):
    path = "csrc/dilated/dilated_cpu.cpp"
    lost = record_of("forward", NATIVE, entry("fastseg cpu", "fastseg", "cpu", 2.0, 0.5)) | {"created": "2026-02-01"}

    def shipped():
        ((_, text),) = shipping.tables(tmp_path).items()
        return [one["backend"] for one in json.loads(text)["winners"].values()]

    (tmp_path / "lost.json").write_text(json.dumps(lost | {"kernels": record.kernel_hashes()}))
    assert shipped() == ["native"]
    (tmp_path / "lost.json").write_text(json.dumps(lost | {"kernels": record.kernel_hashes() | {path: "another"}}))
    assert shipped() == []
    # What it won even earlier says no more.
    (tmp_path / "won.json").write_text(json.dumps(record_of("forward", NATIVE, KERNEL)))
    assert shipped() == []
    (tmp_path / "lost.json").write_text(
        json.dumps(lost | {"kernels": record.kernel_hashes() | {"csrc/head/a.cu": "b"}})
    )
    assert shipped() == ["native"]


def test_the_newest_record_is_right_and_earlier_ones_fill_in(tmp_path):
    old = record_of("forward", NATIVE, KERNEL)
    new = record_of("forward", NATIVE, entry("fastseg cpu", "fastseg", "cpu", 2.0, 0.5)) | {"created": "2026-02-01"}
    old["operators"].append(old["operators"][0] | {"shape": [2, 8, 9, 7]})
    for name, one in (("old", old), ("new", new)):
        (tmp_path / f"{name}.json").write_text(json.dumps(one))
    ((name, text),) = shipping.tables(tmp_path).items()
    assert name == "a-processor-avx2-3-threads.json"
    content = json.loads(text)
    assert content["made_for"] == {"device": "A processor, avx2, 3 threads", "records": ["new.json", "old.json"]}
    by_batch = {key.split("input=(")[1][0]: found["backend"] for key, found in content["winners"].items()}
    assert by_batch == {"1": "native", "2": "cpu"}


def test_command_writes_and_removes_and_says_what_is_stale(tmp_path, monkeypatch, capsys):
    results, shipped = tmp_path / "results", tmp_path / "shipped"
    results.mkdir()
    (results / "one.json").write_text(json.dumps(record_of("forward", NATIVE, KERNEL)))
    tables, stale = shipping.tables, shipping.stale
    monkeypatch.setattr(shipping, "tables", lambda: tables(results))
    monkeypatch.setattr(shipping, "stale", lambda made: stale(made, shipped))
    monkeypatch.setattr(shipping, "SHIPPED", shipped)
    assert shipping.main(options()) == 1
    assert "is not as the records tell it" in capsys.readouterr().out
    assert shipping.main(options("--write")) == 0
    (shipped / "forgotten.json").write_text("{}")
    assert shipping.main(options()) == 1
    assert shipping.main(options("--write")) == 0
    assert [path.name for path in shipped.glob("*")] == ["a-processor-avx2-3-threads.json"]
    assert shipping.main(options()) == 0


@pytest.fixture
def on_a_recorded_cpu(monkeypatch):
    """A CPU that winners ship for; this one is not asked."""
    path = next(iter(sorted(shipping.SHIPPED.glob("*threads.json"))), None)
    if path is None:
        pytest.skip("no record of a CPU tells a winner")
    content = winners._read(path)
    monkeypatch.setattr(winners, "SHIPPED", shipping.SHIPPED)
    monkeypatch.setattr(winners, "device_name", lambda device_type: content["made_for"]["device"])
    for name in ("_tables", "_consulted"):
        monkeypatch.setattr(winners, name, {})
    dispatch.forget_sized_choices()
    yield content["winners"]
    dispatch.forget_sized_choices()


def test_auto_takes_what_ships_and_explain_shows_it(on_a_recorded_cpu):
    layer = nn.Conv2d(384, 384, 3, padding=1, groups=384, bias=False)
    x = torch.randn(1, 384, 33, 33).contiguous(memory_format=torch.channels_last)
    (found,) = (
        found
        for key, found in on_a_recorded_cpu.items()
        if key.startswith("depthwise_conv2d float32 inference input=(1,384,33,33) weight=(384,1,3,3)")
        and "channels_last=True" in key
    )
    (shown,) = fastseg.explain(fastseg.accelerate(layer), x).rows
    assert (shown.kernel, shown.reason) == (found["backend"], "measured on such a device")
    times = found["ms"]
    assert shown.margin == pytest.approx(max(times.values()) / min(times.values()))
