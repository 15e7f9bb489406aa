"""What only the Triton kernels of ASPP have: one launch over all branches, its tables, tile shapes, statistics."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from fastseg.ops.aspp import reference, triton_plan
from fastseg.ops.aspp import triton as operator
from fastseg.ops.dilated import triton as dilated
from fastseg.ops.dilated.triton_plan import CONFIGS, IEEE_CONFIGS, NARROW_CONFIGS, Config, Device, Layout
from fastseg.ops.geometry import same_padding
from fastseg.ops.triton_common import conv_shape, is_interpreted
from fastseg.testing import assert_within, expected_branches, integer_tensor, random_tensor

REDUCTIONS = ("concat", "sum")
SMALL = Config(16, 16, 16, 1, 3)
H200 = Device(132, 227 * 1024, 9)
ATROUS = ((1, 3, 3, 3), (1, 6, 12, 18))  # kernels and dilations of DeepLab v3 at output stride 16


def config_id(config: tuple[int, ...]) -> str:
    return "x".join(map(str, config))


@pytest.fixture
def device(target) -> str:
    if target.backend != "triton":
        pytest.skip("tests the Triton kernels")
    return target.device


@pytest.fixture
def launched(monkeypatch) -> list[tuple[object, dict]]:
    """A list that fills with the (kernel, arguments) of every launch."""
    launches = []

    def recorded(launch):
        def record(kernel, programs, **arguments):
            launches.append((kernel, arguments))
            launch(kernel, programs, **arguments)

        return record

    for module in (operator, dilated):
        monkeypatch.setattr(module, "launch", recorded(module.launch))
    return launches


def tensors(
    device, dtype, *, images=1, channels=24, widths=(24, 24), kernels=(1, 3), size=(5, 6), maker=random_tensor
):  # fmt: skip
    x = maker((images, channels, *size), dtype, seed=1, device=device).contiguous(memory_format=torch.channels_last)
    weights = [
        maker((width, channels, kernel, kernel), dtype, seed=2 + i, device=device)
        for i, (width, kernel) in enumerate(zip(widths, kernels, strict=True))
    ]
    return x, weights


def run(x, weights, dilations=(1, 2), reduction="concat", statistics=False, bias=None, scale=None, activation="none"):
    return operator.forward(x, weights, bias, list(dilations), activation, reduction, statistics, scale)


def check(x, weights, dilations, reduction, tf32=False):
    """Forward and every gradient within the bound of their dtype."""
    y, _ = run(x, weights, dilations, reduction)
    grad_output = random_tensor(tuple(y.shape), x.dtype, seed=9, device=x.device)
    grad_input, grad_weights = operator.backward(grad_output, x, weights, dilations, reduction, True, True)
    wanted = expected_branches(x, weights, None, dilations, "none", reduction, grad_output, tf32=tf32)
    results = {"output": y, "grad_input": grad_input}
    results |= {f"grad_weight of branch {i}": grad for i, grad in enumerate(grad_weights)}
    for (name, result), bound in zip(results.items(), wanted, strict=False):
        assert_within(result, bound, name)


@pytest.mark.parametrize(
    ("dtype", "reduction"), [(torch.float16, "concat"), (torch.float32, "sum")], ids=["16", "tf32"]
)
@pytest.mark.parametrize("config", CONFIGS, ids=config_id)
def test_every_tile_shape(config, dtype, reduction, device, tf32):
    with operator.forced_config(config):
        check(*tensors(device, dtype, size=(3, 4)), (1, 2), reduction, tf32=dtype == torch.float32)


@pytest.mark.parametrize("config", NARROW_CONFIGS, ids=config_id)
def test_every_narrow_tile_shape(config, device):
    with operator.forced_config(config):
        check(*tensors(device, torch.float16, channels=35, widths=(21, 21), size=(3, 4)), (1, 2), "concat")


@pytest.mark.parametrize("config", IEEE_CONFIGS, ids=config_id)
def test_every_ieee_tile_shape(config, device):
    with operator.forced_config(config):
        check(*tensors(device, torch.float32, channels=35, size=(3, 4)), (1, 2), "concat")


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_more_than_one_tile_each_way(reduction, device):
    """Pixels over several images, output channels and input channels all end inside a tile."""
    with operator.forced_config(SMALL):
        check(*tensors(device, torch.float16, images=3, channels=40, widths=(40, 40), size=(3, 4)), (1, 2), reduction)


def test_branches_of_different_widths_and_filters(device):
    """Each has blocks of channels, depths and rows of partial sums of its own."""
    with operator.forced_config(SMALL):
        check(*tensors(device, torch.float16, images=2, widths=(24, 8, 16), kernels=(3, 1, 5)), (3, 1, 2), "concat")


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_wide_offsets(reduction, device, launched, monkeypatch):
    monkeypatch.setenv("FASTSEG_FORCE_INDEX64", "1")
    with operator.forced_config(SMALL):
        check(*tensors(device, torch.float16, images=2, channels=20, widths=(12, 12)), (1, 2), reduction)
    assert all(arguments["IS_INDEX_64"] for _, arguments in launched if "IS_INDEX_64" in arguments)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_all_branches_share_a_launch(reduction, device, launched):
    x, weights = tensors(device, torch.float16, channels=8, widths=(8, 8, 8), kernels=(1, 3, 3))
    grad_output = run(x, weights, (1, 2, 3), reduction)[0]
    operator.backward(grad_output, x, weights, (1, 2, 3), reduction, True, True)
    kernels = [kernel for kernel, _ in launched]
    assert kernels == [operator.aspp_product] * 2 + [dilated.dilated_grad_weight] + [
        dilated.dilated_grad_weight_reduce
    ] * len(weights)


def test_only_the_gradients_asked_for_are_computed(device, launched):
    x, weights = tensors(device, torch.float16, channels=8, widths=(8, 8))
    grad_output = run(x, weights)[0]
    launched.clear()
    grad_input, grad_weights = operator.backward(grad_output, x, weights, (1, 2), "concat", True, False)
    assert grad_input.shape == x.shape
    assert grad_weights == []
    assert [kernel for kernel, _ in launched] == [operator.aspp_product]
    grad_input, grad_weights = operator.backward(grad_output, x, weights, (1, 2), "concat", False, True)
    assert grad_input.shape == (0,)
    assert [grad.stride() for grad in grad_weights] == [weight.stride() for weight in weights]


def test_channels_last_tensors_are_used_in_place(device, launched):
    """Also a slice of channels, as a concatenation behind the branches leaves their gradient."""
    x, weights = tensors(device, torch.float16, channels=32, widths=(8, 8))
    x = x[:, 8:24]
    weights = [weight[:, 8:24].contiguous(memory_format=torch.channels_last) for weight in weights]
    y, _ = run(x, weights)
    grad_output = torch.cat([y, y], 1)[:, 16:]
    operator.backward(grad_output, x, weights, (1, 2), "concat", True, True)
    (_, forward), (_, grad_input), (_, grad_weight), *_ = launched
    assert forward["p_source"] is x
    assert all(used is weight for used, weight in zip(forward["p_weights"], weights, strict=True))
    assert forward["p_target"] is y
    assert grad_input["p_source"] is grad_output
    assert grad_weight["p_gy"] is grad_output
    assert grad_weight["p_x"] is x


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("channels", [24, 21])
def test_statistics_come_from_the_accumulator(channels, reduction, device, poison):
    """With scale and bias, on integers that leave nothing to round, in tiles that end inside a rectangle."""
    x, weights = tensors(
        device, torch.float16, images=2, widths=(channels, channels), size=(3, 4), maker=integer_tensor
    )  # fmt: skip
    outputs = channels * (2 if reduction == "concat" else 1)
    scale, bias = (integer_tensor((outputs,), torch.float32, seed=seed, device=device) for seed in (6, 7))
    options = dict(reduction=reduction, scale=scale, bias=bias)
    with operator.forced_config(SMALL):
        y, sums = run(x, weights, statistics=True, **options)
        without, _ = run(x, weights, **options)
    _, wanted = reference.forward(x, weights, bias, [1, 2], "none", reduction, True, scale)
    assert torch.equal(sums, wanted)
    assert torch.equal(without, y)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_statistics_are_repeatable(reduction, device):
    x, weights = tensors(device, torch.float16, channels=8, widths=(8, 8), size=(3, 4))
    first, second = (run(x, weights, reduction=reduction, statistics=True)[1] for _ in range(2))
    assert torch.equal(first, second)


def test_statistics_are_of_what_goes_into_the_activation(device):
    x, weights = tensors(device, torch.float16, channels=8, widths=(8, 8), size=(2, 3))
    y, sums = run(x, weights, statistics=True, activation="relu")
    z, wanted = run(x, weights, statistics=True)
    assert torch.equal(sums, wanted)
    assert torch.equal(y, z.relu())


def test_statistics_of_no_images_are_zero(device):
    x, weights = tensors(device, torch.float16, images=0, channels=8, widths=(8, 8))
    y, sums = run(x, weights, statistics=True)
    assert y.shape == (0, 16, 5, 6)
    assert torch.equal(sums, torch.zeros(2, 16, dtype=torch.float64, device=device))
    assert run(x, weights)[1].shape == (0,)


def test_arguments_that_would_leave_memory_are_refused(device):
    x, weights = tensors(device, torch.float16, channels=8, widths=(8, 8))
    with pytest.raises(RuntimeError, match="expected a dilation of each of one or more weights, but got 2 .* and 1"):
        run(x, weights, (1,))
    with pytest.raises(RuntimeError, match=r"expected weights \[8, 8, R, S\] .* but got \[4, 8, 3, 3\]"):
        run(x, [weights[0], weights[1][:4]], reduction="sum")
    with pytest.raises(RuntimeError, match=r"expected bias of shape \[16\]"):
        run(x, weights, bias=weights[0][:, 0, 0, 0])
    with pytest.raises(RuntimeError, match="expected scale in torch.float32, but got torch.float16"):
        run(x, weights, scale=weights[0].new_ones(16))
    with pytest.raises(RuntimeError, match=r"expected grad_output of shape \[1, 16, 5, 6\]"):
        operator.backward(x, x, weights, (1, 2), "concat", True, True)


def shapes_of(kernels, dilations, *, images=16, channels=2048, width=256, size=33):
    x = torch.empty(images, channels, size, size, device="meta")
    weights = [torch.empty(width, channels, kernel, kernel, device="meta") for kernel in kernels]
    return tuple(
        conv_shape(x, weight, *same_padding(weight, dilation))
        for weight, dilation in zip(weights, dilations, strict=True)
    )


def planned(targets, shapes, is_sum=False, itemsize=2, device=H200) -> triton_plan.Plan:
    layout = Layout(8, 8, 8, False, "ieee")
    return triton_plan.plan_branches(targets, shapes, is_sum, itemsize, layout, device, None)


@pytest.mark.parametrize(("targets", "is_sum"), [("outputs", False), ("outputs", True), ("inputs", False)])
def test_pieces_cover_every_target_once_with_its_live_taps(targets, is_sum):
    """Counted one target and one tap at a time, with dilations below, at and above half of the image."""
    kernels, dilations, size = (1, 3, 5, 3), (1, 2, 3, 9), 9
    shapes = shapes_of(kernels, dilations, channels=8, width=8, size=size)
    found = {}
    for piece in triton_plan.pieces_of(targets, shapes, is_sum):
        for i in range(piece.row, piece.row + piece.rows):
            for j in range(piece.column, piece.column + piece.columns):
                taps = {
                    (s.branch, row.source + i - piece.row, column.source + j - piece.column, row.weight, column.weight)
                    for s in piece.sums
                    for row in s.rows
                    for column in s.columns
                }
                assert found.setdefault((piece.channel, i, j), taps) is taps, "a target of two pieces"
    sign = 1 if targets == "outputs" else -1
    for (channel, i, j), taps in found.items():
        branches = range(4) if targets == "inputs" or is_sum else [channel // 8]
        wanted = {
            (b, i + sign * (r - kernels[b] // 2) * dilations[b], j + sign * (s - kernels[b] // 2) * dilations[b], r, s)
            for b in branches
            for r in range(kernels[b])
            for s in range(kernels[b])
        }
        assert taps == {tap for tap in wanted if 0 <= tap[1] < size and 0 <= tap[2] < size}
    assert len(found) == size * size * (4 if targets == "outputs" and not is_sum else 1)


def test_the_longest_sums_start_first():
    for targets in ("outputs", "inputs"):
        plan = planned(targets, shapes_of(*ATROUS))
        cpu = torch.device("cpu")
        sums = plan.sums.on(cpu)
        lengths = [
            int((sums[first : first + count, 5] * sums[first : first + count, 9]).sum())
            for first, count in plan.pieces.on(cpu)[:, 7:9].tolist()
        ]
        assert lengths == sorted(lengths, reverse=True)
        assert lengths[0] == (9 if targets == "outputs" else 1 + 9 + 9 + 4)


@pytest.mark.skipif(is_interpreted(), reason="the interpreter chooses other tiles than a GPU")
def test_one_image_fills_the_device():
    """Which one branch of it does not."""
    assert planned("outputs", shapes_of(*ATROUS, images=1)).programs >= 2 * H200.multiprocessors
    assert planned("inputs", shapes_of(*ATROUS, images=1)).programs >= 2 * H200.multiprocessors
