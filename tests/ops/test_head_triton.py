"""What only the head's Triton kernels have: tiles, strips and units of rows, copies of logits, launches."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from fastseg.ops.head import reference, triton_loss, triton_plan, triton_planes
from fastseg.ops.head import triton as operator
from fastseg.testing import random_tensor

MODULES = (operator, triton_loss, triton_planes)


@pytest.fixture
def device(target) -> str:
    if target.backend != "triton":
        pytest.skip("tests the Triton kernels")
    return target.device


@pytest.fixture
def launched(monkeypatch):
    """(kernel's name, arguments) of each launch."""
    launches, launch = [], operator.launch

    def catch(kernel, programs, **arguments):
        name = getattr(kernel, "fn", kernel)  # under triton.heuristics
        launches.append((getattr(name, "fn", name).__name__, arguments))
        launch(kernel, programs, **arguments)

    for module in MODULES:
        monkeypatch.setattr(module, "launch", catch)
    return launches


def logits_and_target(device, classes=3, size=(3, 4), outputs=(8, 11), dtype=torch.float32, **options):
    x = random_tensor((2, classes, *size), dtype, seed=1, device=device, **options)
    target = torch.randint(classes, (2, *outputs), generator=torch.Generator().manual_seed(2)).to(device)
    return x, target


def check_loss(x, target, align_corners=False):
    got = operator.cross_entropy(x, target, None, -100, 0.0, align_corners, "none", True)
    wanted = reference.cross_entropy(x, target, None, -100, 0.0, align_corners, "none", True)
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other)


# (input rows, output rows) and how the rows fall to programs.
UNITS = [
    pytest.param((4, 3), (3, 1, 1, False), id="smaller"),
    pytest.param((3, 4), (4, 1, 1, False), id="a-little-larger"),
    pytest.param((3, 6), (6, 2, 2, True), id="2x"),
    pytest.param((3, 9), (6, 2, 3, True), id="3x"),
    pytest.param((3, 12), (6, 2, 4, True), id="4x"),
    pytest.param((2, 12), (6, 3, 3, True), id="6x"),
    pytest.param((1, 9), (3, 3, 3, True), id="one-row"),
]


@pytest.mark.parametrize(("rows", "units"), UNITS)
def test_every_unit_of_rows(rows, units, device):
    axis = triton_plan.plan_axis(*rows, None, False)
    assert triton_plan.plan_units(axis) == units
    x, target = logits_and_target(device, size=(rows[0], 3), outputs=(rows[1], 5))
    check_loss(x, target)
    labels = operator.argmax(x, target.shape[1:], False, torch.int64)
    assert torch.equal(labels, reference.argmax(x, target.shape[1:], False, torch.int64))


@pytest.mark.parametrize("strip", [1, 2, 5])
def test_every_strip_of_rows(strip, device, monkeypatch):
    for module in (operator, triton_loss):
        monkeypatch.setattr(module, "plan_strip", lambda rows, programs: strip)
    x, target = logits_and_target(device, size=(5, 3), outputs=(11, 7))
    check_loss(x, target)
    y = operator.forward(x, (11, 7), None, False)
    torch.testing.assert_close(y, reference.forward(x, (11, 7), None, False))
    torch.testing.assert_close(operator.backward(y, x.shape, None, False), reference.backward(y, x.shape, None, False))


@pytest.mark.parametrize("align_corners", [False, True], ids=["corners", "aligned"])
@pytest.mark.parametrize("columns", [15, 16, 33])
def test_columns_beyond_one_warp(columns, align_corners, device):
    """Warps of the loss's gradient overlap by a column, and images follow each other without a gap."""
    x, target = logits_and_target(device, classes=2, size=(2, columns), outputs=(2, 2 * columns))
    check_loss(x, target, align_corners)


@pytest.mark.parametrize("classes", [1, 7, 9, 17])
def test_blocks_of_classes(classes, device, launched):
    x, target = logits_and_target(device, classes=classes, size=(2, 2), outputs=(3, 3))
    check_loss(x, target)
    blocks = dict(launched)["cross_entropy_gradient"]["CLASSES"]
    assert blocks == {1: 1, 7: 7, 9: 5, 17: 6}[classes]


TILES = [(1, 300, False), (21, 513, False), (150, 3, False), (150, 512, True), (21, 9, True), (1000, 9, True)]


@pytest.mark.parametrize(("channels", "columns", "is_channels_last"), TILES)
def test_tiles_hold_as_much_as_planned(channels, columns, is_channels_last):
    tile = triton_plan.plan_tile(channels, columns, is_channels_last)
    assert tile["BLOCK_W"] * tile["BLOCK_C"] <= triton_plan.TILE
    assert all(size & (size - 1) == 0 for size in tile.values())


def test_channels_last_is_copied_once_each_way(device, launched):
    x, target = logits_and_target(device, memory_format=torch.channels_last)
    check_loss(x, target)
    assert [name for name, _ in launched] == [
        "copy_image", "cross_entropy_forward", "cross_entropy_total", "cross_entropy_gradient", "copy_image",
    ]  # fmt: skip


def test_contiguous_logits_are_not_copied(device, launched):
    x, target = logits_and_target(device)
    operator.argmax(x, target.shape[1:], False, torch.uint8)
    operator.cross_entropy(x[:, :, ::2], target, None, -100, 0.0, False, "mean", False)
    assert [name for name, _ in launched] == ["upsample_argmax", "cross_entropy_forward", "cross_entropy_total"]


def test_plan_inverts_the_positions():
    axis = triton_plan.plan_axis(128, 512, None, False)
    assert axis[3:] == (10, 6, 10)  # turns, outputs of the widest cell, of the widest input
