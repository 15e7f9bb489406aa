"""Winners without a real clock: fixtures and small layers that the tests of tuning share."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import nn

import fastseg
from fastseg import dispatch, measuring, winners
from fastseg.ops.library import OVERLOADS
from tests.networks import lively

CHANNELS = 8
PLAIN = dispatch.Problem(
    "depthwise_conv2d", "cpu", torch.float32,
    dispatch.Geometry((1, 8, 9, 9), (8, 1, 3, 3), (1, 1), (1, 1, 1, 1), (1, 1), (9, 9), True),
)  # fmt: skip


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    """A folder of its own, nothing remembered, and nothing that ships with fastseg."""
    monkeypatch.setenv("FASTSEG_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(winners, "SHIPPED", tmp_path / "shipped")
    monkeypatch.setattr(winners, "_sizes_measured", Counter())
    for name, empty in {"_tables": {}, "_consulted": {}, "_said": set()}.items():
        monkeypatch.setattr(winners, name, empty)
    dispatch.forget_sized_choices()
    fastseg.counters(reset=True)
    yield
    dispatch.forget_sized_choices()
    fastseg.counters(reset=True)


@pytest.fixture
def forget(monkeypatch):
    """Lets the process forget everything, as a new one would not know it."""

    def forget():
        for name in ("_tables", "_consulted"):
            monkeypatch.setattr(winners, name, {})
        dispatch.forget_sized_choices()

    return forget


class Clock:
    """Milliseconds that each backend is said to take, and which calls were timed."""

    def __init__(self):
        self.ms = {"native": 1.0, "cpu": 0.5}
        self.timed: list[str] = []

    def let(self, backend: str) -> None:
        """`backend` is the fastest."""
        self.ms = {"native": 1.0, "cpu": 2.0} if backend == "native" else {"native": 1.0, "cpu": 0.5}


@pytest.fixture
def clock(monkeypatch):
    clock, make = Clock(), measuring._call

    def call(attempt, backend, gradient):
        run = make(attempt, backend, gradient)

        def tagged():
            return run()

        tagged.backend = backend
        return tagged

    def timed(call, repeats, device_type):
        clock.timed.append(call.backend)
        return clock.ms[call.backend]

    monkeypatch.setattr(measuring, "_call", call)
    monkeypatch.setattr(measuring, "_timed_ms", timed)
    return clock


@pytest.fixture
def ran(monkeypatch):
    """Counts the calls of C++ kernels, by operator."""
    found: Counter[str] = Counter()
    for operator, overloads in OVERLOADS.items():

        def counted(*args, operator=operator, kernel=overloads["cpu"]):
            found[operator] += 1
            return kernel(*args)

        monkeypatch.setitem(overloads, "cpu", counted)
    return found


def filters(**options) -> nn.Module:
    return fastseg.nn.Conv2d(CHANNELS, CHANNELS, 3, padding=2, dilation=2, groups=CHANNELS, **options)


def image(size=9, batch=1, channels=CHANNELS):
    return torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(0))


class Whole(nn.Module):
    """Every operator that there is, in one network."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, CHANNELS, 3, padding=1), nn.BatchNorm2d(CHANNELS), nn.ReLU())
        self.separable = nn.Sequential(
            nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, groups=CHANNELS), nn.BatchNorm2d(CHANNELS), nn.ReLU(),
            nn.Conv2d(CHANNELS, CHANNELS, 1), nn.BatchNorm2d(CHANNELS), nn.ReLU(),
        )  # fmt: skip
        self.aspp = fastseg.nn.ASPP(CHANNELS, CHANNELS, (2, 4), dropout=0.5)
        self.separable_aspp = fastseg.nn.SeparableASPP(CHANNELS, CHANNELS, (2, 4), dropout=0.5)
        self.up = nn.Upsample(scale_factor=2, mode="bilinear")

    def forward(self, x):
        x = self.up(self.separable_aspp(self.aspp(self.separable(self.stem(x)))))
        return {"out": x, "labels": fastseg.ops.upsample_argmax(x, (21, 21))}


@pytest.fixture
def whole():
    torch.manual_seed(0)
    return lively(Whole())
