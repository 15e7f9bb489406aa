"""What only the fused separable Triton kernel has: tile shapes, branches that share a launch, statistics, vectors."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from fastseg.ops.geometry import same_padding
from fastseg.ops.separable import triton as operator
from fastseg.ops.separable import triton_plan
from fastseg.ops.separable.triton import CONFIGS, IEEE_CONFIGS, NARROW_CONFIGS, Branch, Config
from fastseg.ops.separable_aspp import reference as branches_reference
from fastseg.ops.separable_aspp import triton as branches_operator
from fastseg.ops.triton_common import ConvShape, is_interpreted
from fastseg.testing import assert_within, expected_branches, expected_separable, integer_tensor, random_tensor
from tests.conftest import RUNG

SAME_D2 = ([1, 1], [2, 2, 2, 2], [2, 2])
ROWS_D2 = ([1, 1], [2, 2, 0, 0], [2, 1])  # of a 3x1 filter
SMALLEST = Config(1, 16, 16, 32, 1)


def config_id(config: Config) -> str:
    return "x".join(map(str, config))


@pytest.fixture
def device(target) -> str:
    if target.backend != "triton":
        pytest.skip("tests the Triton kernels")
    return target.device


@pytest.fixture
def launched(monkeypatch):
    """The arguments of each launch."""
    launches, launch = [], operator.launch
    monkeypatch.setattr(
        operator, "launch", lambda *args, **kwargs: (launches.append(kwargs), launch(*args, **kwargs))[1]
    )
    return launches


def tensors(device, dtype, images=1, channels=24, outputs=24, size=(5, 6), kernel=(3, 3), multiplier=1):
    x = random_tensor((images, channels, *size), dtype, seed=1, device=device, memory_format=torch.channels_last)
    depthwise = random_tensor((channels * multiplier, 1, *kernel), dtype, seed=2, device=device)
    pointwise = random_tensor((outputs, channels * multiplier, 1, 1), dtype, seed=3, device=device)
    biases = (random_tensor((n,), dtype, seed=4, device=device) for n in (channels * multiplier, outputs))
    return x, depthwise, pointwise, *biases


def check(arguments, geometry, tf32=False):
    y = operator.forward(*arguments, *geometry, "relu", "none")
    (wanted,) = expected_separable(*arguments, *geometry, "relu", "none", tf32=tf32)
    assert_within(y, wanted, "output")


def branch_tensors(device, dtype, outputs=(24, 40, 8), channels=24, size=(7, 5), maker=random_tensor, **options):
    """x, depthwise weights, weights, depthwise bias, bias: the first branch is plain."""
    own = len(outputs) - 1
    x = maker((2, channels, *size), dtype, seed=1, device=device, **options)
    x = x.contiguous(memory_format=torch.channels_last)
    depthwise = [maker((channels, 1, 3, 3), dtype, seed=2 + b, device=device, **options) for b in range(own)]
    weights = [maker((k, channels, 1, 1), dtype, seed=8 + b, device=device, **options) for b, k in enumerate(outputs)]
    biases = (maker((n,), dtype, seed=14, device=device, **options) for n in (own * channels, sum(outputs)))
    return x, depthwise, weights, *biases


def check_branches(arguments, dilations, tf32=False):
    x, depthwise, weights, depthwise_bias, bias = arguments
    y, sums = branches_operator.forward(*arguments, dilations, "relu", "none", False, None, None)
    assert sums.shape == (0,)
    channels, first = x.shape[1], weights[0].shape[0]
    (wanted,) = expected_branches(x, weights[:1], bias[:first], [1], tf32=tf32)
    assert_within(y[:, :first], wanted, "plain branch")
    for b, (filter, weight, dilation) in enumerate(zip(depthwise, weights[1:], dilations, strict=True)):
        own = slice(first, first + weight.shape[0])
        vectors = depthwise_bias[b * channels : (b + 1) * channels], bias[own]
        geometry = same_padding(filter, dilation)
        (wanted,) = expected_separable(x, filter, weight, *vectors, *geometry, "relu", "none", tf32=tf32)
        assert_within(y[:, own], wanted, f"branch {1 + b}")
        first = own.stop


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["float16", "tf32"])
@pytest.mark.parametrize("config", CONFIGS, ids=config_id)
def test_every_tile_shape(config, dtype, device, tf32):
    with operator.forced_config(config):
        check(tensors(device, dtype, kernel=(3, 1)), ROWS_D2, tf32=dtype == torch.float32)


@pytest.mark.parametrize("channels", [3, 36])
@pytest.mark.parametrize("config", NARROW_CONFIGS, ids=config_id)
def test_every_narrow_tile_shape(config, channels, device):
    with operator.forced_config(config):
        check(tensors(device, torch.float16, channels=channels, outputs=21, kernel=(3, 1)), ROWS_D2)


@pytest.mark.parametrize("channels", [16, 35])
@pytest.mark.parametrize("config", IEEE_CONFIGS, ids=config_id)
def test_every_ieee_tile_shape(config, channels, device):
    with operator.forced_config(config):
        check(tensors(device, torch.float32, channels=channels, kernel=(3, 1)), ROWS_D2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["float16", "tf32"])
@pytest.mark.parametrize("config", CONFIGS, ids=config_id)
def test_every_tile_shape_with_branches(config, dtype, device, tf32):
    with operator.forced_config(config):
        check_branches(branch_tensors(device, dtype), [2, 4], tf32=dtype == torch.float32)


@pytest.mark.parametrize("config", [SMALLEST, CONFIGS[0]], ids=config_id)
@pytest.mark.parametrize(
    ("kernel", "geometry"),
    [
        pytest.param((3, 3), ([1, 1], [2, 2, 2, 2], [2, 2]), id="d2"),
        pytest.param((3, 3), ([2, 1], [1, 0, 0, 2], [1, 1]), id="stride"),
        pytest.param((3, 2), ([2, 3], [4, 3, 1, 1], [3, 2]), id="stride-and-dilation"),
        pytest.param((3, 3), ([1, 1], [9, 9, 9, 9], [9, 9]), id="dilation-over-size"),
        pytest.param((7, 5), ([1, 1], [3, 3, 2, 2], [1, 1]), id="7x5"),
    ],
)
def test_rows_of_a_strip(kernel, geometry, config, device):
    """Pixels, output channels and channels end inside a tile, and strips inside an image."""
    arguments = tensors(device, torch.float16, images=2, channels=40, outputs=24, size=(7, 6), kernel=kernel)
    with operator.forced_config(config):
        check(arguments, geometry)


def test_a_channel_multiplier(device):
    check(tensors(device, torch.float16, channels=24, multiplier=3), SAME_D2)


def test_branches_of_several_tiles(device):
    """Branches have different numbers of tiles, and blocks of output channels end inside them."""
    with operator.forced_config(SMALLEST):
        check_branches(branch_tensors(device, torch.float16, size=(9, 5)), [1, 6])
    with operator.forced_config(CONFIGS[0]):
        check_branches(branch_tensors(device, torch.float16, size=(9, 11)), [1, 6])


def test_vectors_in_float32(device):
    """Scales are powers of two, so that they could be a part of the weights without rounding."""
    x, depthwise, pointwise, depthwise_bias, bias = tensors(device, torch.float16, images=2)
    scales = [torch.tensor([0.5, 2, 1, 4, 0.25, 1, 2, 8], device=device).repeat(3) for _ in range(2)]
    y = operator.forward(
        x, depthwise, pointwise, depthwise_bias.float(), bias.float(), *SAME_D2, "silu", "hardswish", *scales
    )
    folded = [w * s.half().view(-1, 1, 1, 1) for w, s in zip((depthwise, pointwise), scales, strict=True)]
    (wanted,) = expected_separable(x, *folded, depthwise_bias, bias, *SAME_D2, "silu", "hardswish")
    assert_within(y, wanted, "output")
    as_input = operator.forward(x, depthwise, pointwise, depthwise_bias, bias, *SAME_D2, "silu", "hardswish", *scales)
    assert torch.equal(as_input, y)


def test_vectors_of_branches(device):
    x, depthwise, weights, depthwise_bias, bias = branch_tensors(device, torch.float16)
    scales = [2.0 ** (torch.arange(len(b), device=device) % 3 - 1) for b in (depthwise_bias, bias)]
    own = scales[0].half().view(2, -1, 1, 1, 1), scales[1].half().view(-1, 1, 1, 1).split([24, 40, 8])
    folded = (
        [w * s for w, s in zip(depthwise, own[0], strict=True)],
        [w * s for w, s in zip(weights, own[1], strict=True)],
    )
    vectors = depthwise_bias.float(), bias.float(), [2, 4], "relu", "relu", False
    y, _ = branches_operator.forward(x, depthwise, weights, *vectors, *scales)
    wanted, _ = branches_operator.forward(x, *folded, *vectors, None, None)
    assert torch.equal(y, wanted)


def test_vectors_are_checked(device):
    x, depthwise, pointwise, depthwise_bias, bias = tensors(device, torch.float16, channels=8, outputs=16)
    rest = (*SAME_D2, "none", "none")
    with pytest.raises(RuntimeError, match=r"expected bias of shape \[16\], .* but got \[8\], torch.float16"):
        operator.forward(x, depthwise, pointwise, None, depthwise_bias, *rest)
    with pytest.raises(RuntimeError, match=r"expected depthwise bias of .*torch.float16.* but got .*torch.bfloat16"):
        operator.forward(x, depthwise, pointwise, depthwise_bias.bfloat16(), None, *rest)
    with pytest.raises(RuntimeError, match=r"expected scale of shape \[16\], torch.float32 on .* but got .*float16"):
        operator.forward(x, depthwise, pointwise, None, None, *rest, None, bias)


@pytest.mark.parametrize("index_64", ["0", "1"])
@pytest.mark.parametrize("config", [SMALLEST, CONFIGS[0]], ids=config_id)
def test_statistics(config, index_64, device, monkeypatch):
    """Small integers, whose sums are exact in float32."""
    monkeypatch.setenv("FASTSEG_FORCE_INDEX64", index_64)
    arguments = branch_tensors(device, torch.float16, size=(5, 4), maker=integer_tensor, low=-1, high=1)
    rest = ([2, 6], "relu", "none", True)
    scale = 2.0 ** (torch.arange(72, device=device) % 3)
    wanted_y, wanted = branches_reference.forward(*arguments, *rest, None, scale)
    with operator.forced_config(config):
        y, sums = branches_operator.forward(*arguments, *rest, None, scale)
        again = branches_operator.forward(*arguments, *rest, None, scale)[1]
    assert torch.equal(y, wanted_y)
    assert sums.dtype == torch.float64
    assert torch.equal(sums, wanted)
    assert torch.equal(sums, again)


def test_statistics_are_of_the_accumulators(device):
    """2049 is no float16 number: it is rounded in the output, and not in the sums."""
    x = torch.ones(1, 2, 1, 1, dtype=torch.float16, device=device)
    weight = torch.tensor([2048.0, 1.0], device=device).half().view(1, 2, 1, 1)
    y, sums = branches_operator.forward(x, [], [weight], None, None, [], "none", "none", True, None, None)
    assert y.item() == 2048
    assert sums.tolist() == [[2049.0], [2049.0**2]]


def test_statistics_of_no_image(device):
    _, depthwise, weights, depthwise_bias, bias = branch_tensors(device, torch.float16)
    x = torch.empty(0, 24, 5, 5, dtype=torch.float16, device=device)
    y, sums = branches_operator.forward(
        x, depthwise, weights, depthwise_bias, bias, [1, 2], "none", "none", True, None, None
    )
    assert y.shape == (0, 72, 5, 5)
    assert sums.shape == (2, 72)
    assert not sums.any()


def test_branches_share_a_launch(device, launched):
    """Filters of another size take one of their own."""
    arguments = branch_tensors(device, torch.float16, outputs=(8, 8, 8, 8), channels=8)
    check_branches(arguments, [1, 2, 3])
    assert len(launched) == 1
    arguments[1][1] = random_tensor((8, 1, 5, 1), torch.float16, seed=20, device=device)
    for memory_format in (torch.channels_last, torch.contiguous_format):
        launched.clear()
        x = arguments[0].contiguous(memory_format=memory_format)
        check_branches((x, *arguments[1:]), [1, 2, 3])
        assert len(launched) == 2


@pytest.mark.parametrize("cut", [slice(None), slice(8, 24)], ids=["whole", "slice"])
def test_channels_last_tensors_are_used_in_place(cut, device, launched):
    """Also a slice of channels; others are copied once."""
    x, depthwise, pointwise, *_ = tensors(device, torch.float16, channels=32, outputs=8)
    x, depthwise, pointwise = x[:, cut], depthwise[cut], pointwise[:, cut].contiguous()
    y = operator.forward(x, depthwise, pointwise, None, None, *SAME_D2, "none", "none")
    (arguments,) = launched
    assert arguments["p_x"] is x
    assert arguments["p_y"] is y
    assert arguments["p_weight"].data_ptr() == pointwise.data_ptr()
    contiguous = operator.forward(x.contiguous(), depthwise, pointwise, None, None, *SAME_D2, "none", "none")
    assert contiguous.is_contiguous()
    assert torch.equal(contiguous, y)


# Problems (images, channels, outputs, size, dilation, itemsize, precision): what networks ask for, and what tests do.
PROBLEMS = [
    (16, 728, 728, 33, 1, 2, "ieee"),
    (2, 728, 728, 33, 1, 2, "ieee"),
    (1, 728, 728, 33, 1, 2, "ieee"),
    (16, 2048, 256, 33, 12, 2, "ieee"),
    (1, 2048, 256, 33, 12, 2, "ieee"),
    (16, 128, 128, 129, 1, 2, "ieee"),
    (16, 32, 16, 257, 1, 2, "ieee"),
    (1, 16, 16, 4, 1, 2, "ieee"),
    (4, 67, 64, 65, 1, 2, "ieee"),
    (4, 67, 19, 33, 1, 2, "ieee"),
    (1, 3, 5, 4, 1, 2, "ieee"),
    (16, 256, 256, 33, 1, 4, "tf32"),
    (16, 256, 256, 33, 1, 4, "ieee"),
    (4, 256, 32, 33, 1, 4, "ieee"),
    (1, 16, 16, 4, 1, 4, "ieee"),
]


def chosen(images, channels, outputs, size, dilation, itemsize, precision) -> Config:
    shape = ConvShape(images, channels, size, size, channels, size, size, 3, 3, 1, 1, 0, 0, 1, 1)
    branch = Branch(outputs, 0, (dilation, dilation), (dilation, dilation), 0)
    groups = [8 if n % 8 == 0 else 1 for n in (channels, channels, channels, outputs)]
    layout = triton_plan.Layout(*groups, False, precision)
    room = triton_plan.max_results(torch.device("meta"), itemsize, layout, False)
    return triton_plan.choose_config(shape, (branch,), itemsize, layout, room)


@pytest.mark.skipif(is_interpreted(), reason="the interpreter chooses other tiles than a GPU")
def test_no_tile_shape_is_dead():
    """Each is the choice for some problem."""
    assert {chosen(*problem) for problem in PROBLEMS} == {*CONFIGS, *NARROW_CONFIGS, *IEEE_CONFIGS}


@pytest.mark.skipif(is_interpreted(), reason="the interpreter chooses other tiles than a GPU")
def test_wide_outputs_take_wide_tiles():
    """The depthwise half is computed once for each block of output channels."""
    assert chosen(16, 2048, 256, 33, 6, 2, "ieee").BLOCK_N == 256
    assert chosen(16, 64, 128, 129, 1, 2, "ieee").BLOCK_N == 128


def test_statistics_do_not_depend_on_the_device(monkeypatch):
    """Their tiles are what is summed up in float32."""
    monkeypatch.setattr(triton_plan, "is_hopper", lambda device: device == "newer")
    layout = triton_plan.Layout(8, 8, 8, 8, False, "ieee")
    room = {name: [triton_plan.max_results(name, 2, layout, s) for s in (False, True)] for name in ("newer", "older")}
    assert room == {"newer": [128, 64], "older": [64, 64]}


def test_rows_of_the_table():
    """Blocks of output channels count on from branch to branch; the grid has the tiles of the branch with most."""
    shape = ConvShape(2, 16, 9, 7, 16, 9, 7, 3, 3, 1, 1, 0, 0, 1, 1)
    branches = (Branch(40, 0), Branch(16, 40, (2, 2), (2, 2), 0), Branch(8, 56, (4, 4), (4, 4), 16, 144))
    layout = triton_plan.Layout(8, 8, 8, 8, False, "ieee")
    plan = triton_plan.plan_forward(shape, branches, 2, layout, 128, Config(2, 16, 16, 32, 1))
    assert plan.table.on(torch.device("cpu")).tolist() == [
        [0, 0, 40, -1, 0, 1, 5, 1, 1, 0, 0],
        [3, 40, 16, 0, 0, 2, 3, 2, 2, 2, 2],
        [4, 56, 8, 16, 144, 4, 2, 4, 4, 4, 4],
    ]
    assert plan.tiles == 7  # 2 images of 4 phases of 2 row tiles of 7 columns
    assert plan.programs == 7 * 5


gpu_only = pytest.mark.skipif(RUNG != "gpu", reason="rung 5: needs a GPU")


@gpu_only
def test_more_than_2_to_the_31_elements(device):
    """The far end is compared with the same convolution of that end alone."""
    x = torch.randint(-1, 2, (1, 64, 6000, 6000), dtype=torch.float16, device=device)
    x = x.contiguous(memory_format=torch.channels_last)
    assert x.numel() > 2**31
    depthwise = torch.randint(-1, 2, (64, 1, 3, 3), device=device).half()
    pointwise = torch.randint(-1, 2, (64, 64, 1, 1), device=device).half()
    rest = (depthwise, pointwise, None, None, *SAME_D2, "none", "none")
    y = operator.forward(x, *rest)
    end = operator.forward(x[:, :, -20:].contiguous(), *rest)
    assert torch.equal(y[:, :, -10:], end[:, :, -10:])
