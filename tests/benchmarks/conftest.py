"""Small cases, timing that takes no time, and the record of a short run over all kinds of rows."""

from __future__ import annotations

import copy
import io

import pytest

from benchmarks import blocks, cases, head, network, selection, suite, timing
from benchmarks.blocks import BlockCase
from benchmarks.cases import ConvCase
from benchmarks.head import HeadCase
from benchmarks.network import NetworkCase

CEILINGS = {"copy_bytes_per_s": 3e10, "float32_flop_per_s": 2e11}
TINY = ConvCase("tiny", "a small layer", 8, (9, 7), dilation=(2, 2))
HEADS = tuple(HeadCase(f"small-{kind}", "a small head", kind, 5, 7, 19, 2, 2) for kind in head.OPERATORS)
BLOCK = BlockCase("small-block", "a small block", lambda: blocks._separable(8, 16), 8, 9)
# U-Net has no batch norm here, whose statistics of few pixels would make rounding grow.
UNET = NetworkCase("small-unet", "fastseg:unet:in_channels=1,base_channels=4,depth=2,padding=same", size=33, channels=1)
TORCHVISION = NetworkCase("small-torchvision", "deeplabv3_mobilenet_v3_large", size=65)


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    """Timing that takes no time: what is tested here is everything else."""
    _make_fast(monkeypatch)


def _make_fast(patch) -> None:
    patch.setattr(timing, "WARM_UP_SECONDS", 0.0)
    patch.setattr(timing, "SAMPLE_SECONDS", 1e-5)
    patch.setattr(suite, "TIMING_SHARE", 0.0)
    patch.setattr(timing, "ceilings", lambda device: CEILINGS)


def _only_small(patch) -> None:
    patch.setattr(cases, "CASES", (TINY,))
    patch.setattr(blocks, "BLOCKS", (BLOCK,))
    patch.setattr(head, "HEADS", HEADS[:2])
    patch.setattr(network, "NETWORKS", (UNET,))


@pytest.fixture
def small(monkeypatch):
    """The suite has small cases only."""
    _only_small(monkeypatch)


def run(out=None, keep=lambda found: None, begun=None, **settings) -> dict:
    """A run of few rows that are not compiled."""
    settings = {"budget": 600.0, "compiles": False, "dtypes": ("float32",), **settings}
    return suite.run(selection.Settings(**settings), out or io.StringIO(), keep, begun)


@pytest.fixture(scope="session")
def measured() -> dict:
    with pytest.MonkeyPatch.context() as patch:
        _make_fast(patch)
        _only_small(patch)
        return run(quick=False)


@pytest.fixture
def found(measured) -> dict:
    """The record of a short run: a network, a block, two heads, an operator, in all their directions."""
    return copy.deepcopy(measured)
