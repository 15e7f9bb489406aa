"""Which rows a run has: every case that the field recognises, and what the options choose."""

from __future__ import annotations

import pytest
import torch

from benchmarks import blocks, cases, command, head, network, selection
from benchmarks.__main__ import main
from benchmarks.cases import CASES, ConvCase, select
from benchmarks.row import AUTOCAST, Candidate
from benchmarks.selection import Compiling, Settings, matches, plan
from benchmarks.workload import ConvWorkload
from fastseg import dispatch
from tests.benchmarks.conftest import TINY

EVERYTHING = [*CASES, *blocks.BLOCKS, *head.HEADS, *network.NETWORKS]


def test_case_ids_are_unique():
    ids = [case.id for case in EVERYTHING]
    assert len(set(ids)) == len(ids)


def test_a_short_run_on_a_gpu_shows_both_families_of_convolutions():
    steps = plan(Settings(device="cuda", dtypes=("bfloat16",), networks=False, blocks=False))
    assert len({step.id for step in steps}) == len(steps) == 2 * len([case for case in CASES if case.batch("cuda")])
    assert {step.case.outputs is None for step in steps[:4]} == {True, False}


# What papers and libraries call them -> shapes [N, C, H, W] on a GPU (outputs behind them), all of which are cases.
FIELD = {
    "aspp-r101-os16": [(16, 2048, 33, 33, 256)] * 3,
    "aspp-r101-os16-n1": [(1, 2048, 33, 33, 256)] * 3,
    "aspp-tv-os8": [(8, 2048, 65, 65, 256)] * 3,
    "aspp-mnv3": [(16, 960, 33, 33, 256)] * 3,
    "aspp-v2": [(10, 2048, 41, 41, 21)] * 4,
    "largefov": [(10, 512, 41, 41, 1024)],
    "resnet-l4": [(8, 512, 65, 65, 512)],
    "resnet-l3": [(8, 256, 65, 65, 256)],
    "xception-middle": [(16, 728, 33, 33, 728)],
    "xception-exit": [(16, 1536, 33, 33, 1536)],
    "sep-aspp": [(16, 2048, 33, 33, 2048)] * 4,  # without dilation, too
    "mobilenet-dw": [(16, 32, 257, 257, 32), (16, 96, 257, 257, 96), (16, 384, 33, 33, 384), (16, 960, 33, 33, 960)],
    "decoder": [(8, 256, 129, 129, 256), (8, 304, 129, 129, 256), (8, 304, 129, 129, 304)],
    "unet-top": [(8, 64, 512, 512, 64), (8, 128, 512, 512, 64)],
}


@pytest.mark.parametrize("name", FIELD)
def test_every_convolution_of_the_field_is_a_case(name):
    chosen = [case for case in CASES if matches(case, name) and case.batch_gpu is not None]
    shapes = [(case.batch_gpu, case.channels, *case.size, case.filter[0]) for case in chosen]
    assert sorted(shapes) == sorted(FIELD[name])


@pytest.mark.parametrize(
    "name",
    ["aspp-r101-os16", "aspp-r101-os16-n1", "aspp-tv-os8", "aspp-mnv3", "aspp-v2", "xception-middle", "sep-aspp",
     "decoder", "unet-top"],
)  # fmt: skip
def test_blocks_of_the_field_are_cases_as_a_whole(name):
    assert any(matches(case, name) for case in blocks.BLOCKS)


@pytest.mark.parametrize("name", ["head-loss", "head-argmax"])
def test_heads_of_the_field_are_cases(name):
    chosen = {(c.batch_gpu, c.channels, c.size, c.image) for c in head.HEADS if matches(c, name)}
    assert chosen == {(8, 21, 129, 513), (16, 150, 128, 512), (4, 19, 193, 769)}


@pytest.mark.parametrize(
    ("model", "size"),
    [
        ("fastseg:deeplab_v3:encoder=resnet50", 520),
        ("fastseg:deeplab_v3:encoder=resnet101", 520),
        ("fastseg:deeplab_v3plus:encoder=xception65", 513),
        ("fastseg:deeplab_v3plus:encoder=mobilenet_v2", 513),
        ("fastseg:unet:in_channels=1,num_classes=2", 572),
        ("fastseg:unet:in_channels=3,num_classes=21,padding=same,norm=batch", 512),
    ],
)
def test_networks_of_the_field_are_cases(model, size):
    chosen = [case for case in network.NETWORKS if (case.model, case.size) == (model, size)]
    assert {case.batch for case in chosen} == {1, 16}
    assert any("training" in case.directions for case in chosen)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_full_run_has_every_case_and_direction(device):
    steps = plan(Settings(device=device, dtypes=selection.DTYPES[device], quick=False))
    assert {step.case.id for step in steps} == {case.id for case in EVERYTHING if device in case.devices}
    operators = {step.direction for step in steps if step.kind == "operators"}
    assert operators == set(cases.DIRECTIONS)
    assert {(step.direction, step.dtype) for step in steps if step.kind == "networks"} >= {
        ("inference", "float32"), ("training", "float32"), ("inference", "autocast"), ("training", "autocast"),
    }  # fmt: skip
    assert len({step.id for step in steps}) == len(steps)


def test_the_quick_run_is_a_part_of_the_full_one():
    quick, full = (plan(Settings(quick=quick)) for quick in (True, False))
    assert {step.id for step in quick} < {step.id for step in full}
    assert [step.id for step in quick if step.dtype == "autocast"] == ["deeplabv3-resnet50/inference/autocast"]


def test_a_short_run_has_a_network_and_depthwise_convolutions():
    steps = plan(Settings())
    assert steps[0].case.id == "deeplabv3-mobilenet-v3"
    depthwise = [step for step in steps if step.kind == "operators" and step.case.outputs is None]
    assert steps[1 : 1 + len(depthwise)] == depthwise
    assert [step.kind for step in steps].index("blocks") == 1 + len(depthwise)
    assert steps[-1].kind == "networks"
    on_gpu = plan(Settings(device="cuda", dtypes=("bfloat16",)))
    assert on_gpu[1].kind == "networks"


def test_cases_are_chosen_by_pattern_in_the_order_of_their_value():
    assert [case.id for case in select("sep-aspp*", "cpu")] == [
        "sep-aspp-d18", "sep-aspp-d6", "sep-aspp-d12", "sep-aspp-d1",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("patterns", "id", "fits"),
    [
        ("mobilenet-dw", "mobilenet-384", True),
        ("mobilenet-384", "mobilenet-384", True),
        ("nothing, mobilenet-3*", "mobilenet-384", True),
        ("mobilenet", "mobilenet-384", False),
        ("", "mobilenet-384", False),
    ],
)
def test_patterns_fit_ids_and_the_names_of_the_field(patterns, id, fits):
    assert matches(next(case for case in CASES if case.id == id), patterns) is fits


# Options


def chosen(*options: str) -> Settings:
    import argparse

    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    arguments = parser.parse_args(["--device", "cpu", *options])
    return command._settings({name: getattr(arguments, name) for name in command._FIELDS})


@pytest.mark.parametrize(
    ("options", "kinds"),
    [
        ([], {"networks", "blocks", "operators"}),
        (["--cases", "sep-aspp*"], {"blocks", "operators"}),
        (["--cases", "head-loss*"], {"blocks"}),
        (["--models", "deeplabv3-*"], {"networks"}),
        (["--cases", "largefov*", "--models", "*", "--full"], {"networks", "operators"}),
        (["--no-operators"], {"networks", "blocks"}),
    ],
    ids=["all", "cases", "heads", "models", "both", "without-operators"],
)
def test_options_choose_rows(options, kinds):
    assert {step.kind for step in plan(chosen(*options))} == kinds


def test_options_set_what_they_say():
    found = chosen("--full", "--dtype", "bfloat16,float32", "--budget", "7", "--threads", "1", "--no-compile")
    assert found == Settings(quick=False, dtypes=("bfloat16", "float32"), budget=7.0, threads=1, compiles=False)


def test_a_quick_run_has_less_time_than_a_full_one():
    assert chosen().budget == selection.BUDGETS["quick"] <= 600
    assert chosen("--full").budget == selection.BUDGETS["full"]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--cases", "no-such-case"], "no row fits this selection"),
        (["--dtype", "float31"], "expected --dtype to name dtypes of torch, or autocast, but got 'float31'"),
    ],
    ids=["cases", "dtype"],
)
def test_a_selection_that_cannot_be_is_refused(options, sentence, capsys):
    assert main(["--device", "cpu", *options]) == 2
    assert sentence in capsys.readouterr().err


def test_rows_can_be_listed(capsys):
    assert main(["--device", "cpu", "--cases", "mobilenet-384", "--dtype", "float32", "--list"]) == 0
    assert capsys.readouterr().out.split() == ["mobilenet-384/forward/float32", "mobilenet-384/backward/float32"]


@pytest.mark.parametrize("slow", [set(), {torch.bfloat16}])
def test_networks_are_left_out_in_dtypes_that_pytorch_convolves_in_plain_loops(slow, monkeypatch):
    monkeypatch.setattr(dispatch, "SLOW_ON_NATIVE", frozenset(slow))
    steps = plan(Settings(cases="", models="deeplabv3-mobilenet-v3", quick=False))
    left_out = {step.dtype for step in steps if selection.obstacle(step, selection.workload(step, "cpu"), "cpu")}
    assert left_out == ({AUTOCAST} if slow else set())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_said(capsys):
    assert main(["--device", "cuda"]) == 2
    assert "PyTorch sees no CUDA device here" in capsys.readouterr().err


# What is compiled

DEFAULT, LONG = (
    Candidate(name, "compile", "channels_last", lambda x: x, "inductor")
    for name in ("torch.compile", "torch.compile max-autotune")
)


@pytest.mark.parametrize(
    ("settings", "candidate", "runs"),
    [
        (Settings(), DEFAULT, True),
        (Settings(), LONG, False),
        (Settings(quick=False), LONG, True),
        (Settings(device="cuda"), LONG, True),
        (Settings(quick=False, compiles=False), DEFAULT, False),
    ],
    ids=["quick", "quick-autotune", "full-autotune", "gpu-autotune", "without"],
)
def test_max_autotune_is_for_full_runs_and_gpus(settings, candidate, runs):
    (step, *_) = (s for s in plan(settings) if s.kind == "operators")
    assert (Compiling(settings).reason(step, candidate) is None) is runs


def test_a_quick_run_stops_compiling_when_it_took_long():
    (step, *_) = (s for s in plan(Settings()) if s.kind == "operators")
    compiling = Compiling(Settings())
    compiling.add({"candidates": [{"role": "compile", "prepare_seconds": selection.QUICK_COMPILE_SECONDS}]})
    assert "at most 30 s on compiling" in compiling.reason(step, DEFAULT)


# Costs


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


def test_cost_of_a_block_is_that_of_its_convolutions():
    case = blocks.BlockCase("one", "", lambda: torch.nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=8), 8, 9)
    alone = ConvWorkload(ConvCase("one", "", 8, (9, 9), dilation=(2, 2)), torch.float32, "cpu")
    work = blocks.BlockWorkload(case, torch.float32, "cpu")
    assert work.cost("inference").flops == alone.cost("forward").flops
    assert work.cost("inference").bytes == alone.cost("forward").bytes + 4 * 8  # the bias
    assert work.live_share("inference") == pytest.approx(alone.live_taps / 9, abs=1e-4)


def test_cost_of_a_loss_has_no_logits_of_full_size():
    case = head.HeadCase("loss", "", "loss", 5, 7, 19, 2, 2)
    cost = head.HeadWorkload(case, torch.float32, "cpu").cost("forward+backward")
    assert cost.bytes == 2 * (4 * 2 * 5 * 7 * 7) + 8 * 2 * 19 * 19
