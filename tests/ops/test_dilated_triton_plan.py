"""Which tiles the planner of the dense Triton kernels chooses. Needs no device."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

pytest.importorskip("triton")

from fastseg.ops.dilated import triton as operator
from fastseg.ops.dilated import triton_plan
from fastseg.ops.dilated.triton_plan import (
    BOX_CONFIGS,
    CONFIGS,
    IEEE_CONFIGS,
    NARROW_CONFIGS,
    Device,
)
from fastseg.ops.triton_common import conv_shape, is_interpreted

A100 = Device(108, 163 * 1024, 8)
H200 = Device(132, 227 * 1024, 9)


# Problems (images, channels, outputs, size, itemsize, precision): what a network asks for, and what tests do.
PROBLEMS = [
    (16, 2048, 256, 33, 2, "ieee"),
    (1, 2048, 256, 33, 2, "ieee"),
    (1, 512, 256, 41, 2, "ieee"),
    (16, 2048, 64, 33, 2, "ieee"),
    (10, 2048, 21, 41, 2, "ieee"),
    (1, 2048, 21, 41, 2, "ieee"),
    (1, 512, 64, 9, 2, "ieee"),
    (1, 64, 32, 9, 2, "ieee"),
    (1, 64, 32, 129, 2, "ieee"),
    (1, 16, 16, 4, 2, "ieee"),
    (1, 259, 256, 33, 2, "ieee"),
    (4, 3, 64, 65, 2, "ieee"),
    (1, 67, 19, 9, 2, "ieee"),
    (1, 3, 5, 4, 2, "ieee"),
    (16, 256, 256, 33, 4, "tf32"),
    (16, 256, 256, 33, 4, "ieee"),
    (16, 256, 32, 65, 4, "ieee"),
    (1, 64, 32, 9, 4, "ieee"),
    (1, 16, 16, 4, 4, "ieee"),
]


def chosen(images, channels, outputs, size, itemsize, precision, device=A100) -> triton_plan.Plan:
    x = torch.empty(images, channels, size, size, device="meta")
    shape = conv_shape(x, torch.empty(outputs, channels, 3, 3, device="meta"), [1, 1], [2] * 4, [2, 2])
    group = 8 if channels % 8 == 0 else 1
    layout = triton_plan.Layout(group, group, 8 if outputs % 8 == 0 else 1, False, precision)
    return triton_plan.plan_product("outputs", shape, (2,) * 4, itemsize, layout, True, device, None, 1)


@pytest.mark.skipif(is_interpreted(), reason="the interpreter chooses other tiles than a GPU")
def test_no_tile_shape_is_dead():
    """Each is the choice for some problem."""
    found = set()
    for problem in PROBLEMS:
        arguments = chosen(*problem).arguments
        table = triton_plan.configs_for(*problem[4:], 8 if problem[1] % 8 == 0 else 1, 8)
        tile = arguments["BLOCK_M"], arguments["BLOCK_N"], arguments["BLOCK_D"]
        found |= {c for c in table if (c.BLOCK_M, c.BLOCK_N, c.depth(problem[4])) == tile}
    assert found == {*CONFIGS, *NARROW_CONFIGS, *IEEE_CONFIGS}


@pytest.mark.skipif(is_interpreted(), reason="the interpreter chooses other tiles than a GPU")
def test_no_box_is_dead(monkeypatch):
    """Each is the choice for small or large images, one or many, few channels or many; a row for a 1x1 filter."""
    launched = []
    monkeypatch.setattr(operator, "launch", lambda _, programs, **arguments: launched.append(arguments))
    monkeypatch.setattr(operator, "device_limits", lambda _: H200)
    for images, size, (channels, outputs), kernel in itertools.product(
        (1, 2, 4, 8, 16, 32), (7, 9, 18, 24, 33, 64, 130, 258), ((64, 64), (512, 512), (2048, 256)), (1, 3)
    ):
        x = torch.empty(images, channels, size, size, dtype=torch.float16, device="meta")
        weight = torch.empty(outputs, channels, kernel, kernel, dtype=torch.float16, device="meta")
        x = x.contiguous(memory_format=torch.channels_last)
        operator.forward(x, weight, None, [1, 1], [kernel - 1] * 4, [2, 2], "none")
    names = "BOX_N", "BOX_H", "BOX_W", "BLOCK_N"
    found = {tuple(arguments[name] for name in names) for arguments in launched if "BOX_N" in arguments}
    assert {box[:3] for box in found} == {config[:3] for config in BOX_CONFIGS}
    tiles = {(config.BLOCK_M, config.BLOCK_N) for config in BOX_CONFIGS}
    assert {(math.prod(box[:3]), box[3]) for box in found} == tiles


@pytest.mark.skipif(is_interpreted(), reason="the interpreter chooses other tiles than a GPU")
def test_boxes_are_chosen_where_they_fit():
    """Not for the few channels of a classifier."""
    assert chosen(8, 512, 512, 64, 2, "ieee", H200).has_boxes
    assert not chosen(10, 2048, 21, 41, 2, "ieee", H200).has_boxes


@pytest.mark.skipif(is_interpreted(), reason="the interpreter chooses other tiles than a GPU")
def test_one_image_still_fills_the_device():
    assert chosen(1, 2048, 256, 33, 2, "ieee", H200).programs >= H200.multiprocessors


def planned(targets, outputs=256, rate=6, can_describe=True, has_epilogue=False) -> triton_plan.Plan:
    """The launch of an ASPP branch, 16 images of 2048 channels, on a large GPU."""
    x = torch.empty(16, 2048, 33, 33, device="meta")
    weight = torch.empty(outputs, 2048, 3, 3, device="meta")
    shape = conv_shape(x, weight, [1, 1], [rate] * 4, [rate] * 2)
    layout = triton_plan.Layout(8, 8, 8, False, "ieee")
    padding, flags = (rate,) * 4, {"has_epilogue": has_epilogue}
    return triton_plan.plan_product(targets, shape, padding, 2, layout, can_describe, H200, None, 1, **flags)


@pytest.mark.skipif(is_interpreted(), reason="the interpreter chooses other tiles than a GPU")
def test_work_is_shared_where_few_tiles_are_of_unequal_length():
    """Where there are many, whoever is free takes the next; and weights have to come by descriptors."""
    plan = planned("outputs")
    assert plan.splits == triton_plan.SHARED
    assert plan.programs == H200.multiprocessors
    steps = plan.arguments["n_steps"]
    assert (plan.programs - 1) * plan.arguments["n_share"] < steps <= plan.programs * plan.arguments["n_share"]
    rows = plan.table.on(torch.device("cpu")).tolist()
    assert [row[1] for row in rows] == sorted(row[1] for row in rows)
    assert planned("outputs", has_epilogue=True).splits == triton_plan.SHARED
    assert planned("inputs").splits == planned("outputs", outputs=4096).splits == 1
    assert planned("outputs", can_describe=False).splits == 1


def test_a_product_of_very_many_steps_has_a_table():
    """Its entries have 32 bits, and steps are counted where they are shared alone."""
    x = torch.empty(4096, 2048, 513, 513, device="meta")
    shape = conv_shape(x, torch.empty(256, 2048, 3, 3, device="meta"), [1, 1], [6] * 4, [6] * 2)
    layout = triton_plan.Layout(8, 8, 8, True, "ieee")
    plan = triton_plan.plan_product("outputs", shape, (6,) * 4, 2, layout, True, H200, None, 1)
    assert plan.splits == 1
    assert len(plan.table.on(torch.device("cpu"))) == 9


def test_tiles_fit_the_shared_memory():
    """A consumer's GPU has less than half of what a large one has."""
    small = Device(82, 100 * 1024, 8)
    arguments = chosen(16, 2048, 256, 33, 2, "ieee", small).arguments
    rows = arguments["BLOCK_M"] + arguments["BLOCK_N"]
    assert arguments["num_stages"] * rows * arguments["BLOCK_D"] * 2 <= small.shared_memory


def test_the_longest_sums_start_first():
    plan = chosen(16, 2048, 256, 33, 2, "ieee")
    rows = plan.table.on(torch.device("cpu")).tolist()
    taps = [row[4] * row[4 + triton_plan.SPAN_FIELDS] for row in rows]
    assert taps == sorted(taps, reverse=True)
    assert taps[0] == 9
    assert taps[-1] == 4
    assert rows[0][0] == 0


def test_programs_take_the_longest_sums_first():
    """Jobs of 3, 3, 2, 2 and 2 on two machines: 3 + 2 and 3 + 2 + 2."""
    assert triton_plan._makespan([(3, 2), (2, 3)], 2) == 7
    assert triton_plan._makespan([(5, 1000)], 10) == 500
    assert triton_plan._makespan([(4, 1), (1, 3)], 4) == 4


@pytest.mark.skipif(is_interpreted(), reason="the interpreter chooses other tiles than a GPU")
def test_sums_are_split_where_tiles_are_few():
    """One image leaves most of a large GPU idle, sixteen do not."""
    assert chosen(1, 2048, 256, 33, 2, "ieee", H200).splits > 1
    assert chosen(16, 2048, 256, 33, 2, "ieee", H200).splits <= 1


@pytest.mark.skipif(is_interpreted(), reason="the interpreter chooses other tiles than a GPU")
def test_gradients_of_weights_come_in_boxes_where_descriptors_hold_the_tensors():
    x, weight = torch.empty(16, 512, 33, 33, device="meta"), torch.empty(256, 512, 3, 3, device="meta")
    shape = conv_shape(x, weight, [1, 1], [6] * 4, [6, 6])
    layout = triton_plan.GradWeightLayout(8, 8, False, "ieee")

    def has_boxes(itemsize=2, describable=True, device=H200):
        return triton_plan.plan_grad_weight((shape,), (0,), itemsize, layout, describable, device, None)[0].has_boxes

    assert has_boxes()
    assert not has_boxes(itemsize=4)
    assert not has_boxes(describable=False)
    assert not has_boxes(device=A100)
