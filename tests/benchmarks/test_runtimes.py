"""Other engines as baselines of networks: gated and timed where they are installed, elsewhere skipped with a reason."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from benchmarks import network, row, runtimes, summary, table
from benchmarks.network import NetworkWorkload
from tests.benchmarks.conftest import CEILINGS, UNET

INSTALLED = {
    name: all(importlib.util.find_spec(module) for module in (*runtimes.EXPORTERS, package))
    for name, package in runtimes.ENGINES.items()
}
ENGINES = pytest.mark.parametrize("name", runtimes.ENGINES)


def measure(name: str, direction: str = "inference", dtype=torch.float32) -> dict:
    def skip(candidate):
        return None if candidate.name == name or candidate.role in ("native", "fastseg") else "not in this test"

    return row.measure(NetworkWorkload(UNET, dtype, "cpu"), direction, CEILINGS, 0.0, skip=skip)


def installed(name: str) -> None:
    if not INSTALLED[name]:
        pytest.skip(f"{name} is not installed: the extra runtimes")


@ENGINES
def test_an_engine_is_checked_and_timed_beside_native(name):
    installed(name)
    found = measure(name)
    entry = summary.candidate(found, name)
    assert entry["skipped"] is None
    assert entry["gate"]["green"]
    assert entry["seconds"]["median"] > 0
    assert f"ratio to {name}" in summary.shown(found)
    assert f"x over {name}" in table.network_lines(found)
    assert found["baseline"].startswith("native")


@ENGINES
def test_an_engine_that_is_wrong_gets_no_speed(name, monkeypatch):
    installed(name)
    real = network.agreement

    def judge(logits, natives, exact, role, **options):
        return real(-logits if role == "runtime" else logits, natives, exact, role, **options)

    monkeypatch.setattr(network, "agreement", judge)
    found = measure(name)
    entry = summary.candidate(found, name)
    assert not entry["gate"]["green"]
    assert "seconds" not in entry
    assert not summary.is_red(found)  # which is said of kernels under test


@ENGINES
def test_what_cannot_be_exported_is_skipped_with_the_reason(name, monkeypatch):
    installed(name)

    def export(*given, **options):
        raise ValueError("no such operator\nmore")

    monkeypatch.setattr(torch.onnx, "export", export)
    entry = summary.candidate(measure(name), name)
    assert entry["skipped"] == "torch.onnx cannot export it: no such operator"


@ENGINES
def test_an_engine_that_is_not_installed_is_skipped_with_the_reason(name, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: None)
    entry = summary.candidate(measure(name), name)
    assert entry["skipped"] == "onnx is not installed: pip install fastseg-kernels[runtimes]"


@ENGINES
def test_engines_do_not_train(name):
    entry = summary.candidate(measure(name, "training"), name)
    assert entry["skipped"] == f"{name} does not train"


@pytest.mark.parametrize("dtype", ["bfloat16", "autocast"])
def test_engines_are_compared_in_float32_alone(dtype):
    names = {candidate.name for candidate in NetworkWorkload(UNET, row.dtype_of(dtype), "cpu").candidates()}
    assert not names & set(runtimes.ENGINES)
