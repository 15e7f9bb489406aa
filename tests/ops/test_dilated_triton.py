"""What only the Triton kernels of the dense convolutions have: tile shapes, boxes, splits, rounding to TF32, tables."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

import fastseg
from fastseg.ops.dilated import reference, triton_plan
from fastseg.ops.dilated import triton as operator
from fastseg.ops.dilated.triton_plan import (
    BOX_CONFIGS,
    CONFIGS,
    GRAD_BOX_CONFIGS,
    IEEE_CONFIGS,
    NARROW_CONFIGS,
    SHARED,
    WIDE_CONFIGS,
    BoxConfig,
    Config,
    Device,
    GradBoxConfig,
)
from fastseg.ops.triton_common import DeviceTable, conv_shape
from fastseg.testing import assert_within, expected_conv, integer_tensor, random_tensor
from tests.conftest import RUNG, SLOW_RUNG
from tests.families import DILATED_CASES

SAME_D2 = ([1, 1], [2, 2, 2, 2], [2, 2])
ROWS_D2 = ([1, 1], [2, 2, 0, 0], [2, 1])  # of a 3x1 filter: three rectangles
POINTWISE = ([1, 1], [0] * 4, [1, 1])
SMALL_BOX = BoxConfig(2, 4, 8, 128, 64, 4, 4)
NAMES = ("output", "grad_input", "grad_weight", "grad_bias")
A100 = Device(108, 163 * 1024, 8)
H200 = Device(132, 227 * 1024, 9)


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
    launches, launch = [], operator.launch

    def record(kernel, programs, **arguments):
        launches.append((kernel, arguments))
        launch(kernel, programs, **arguments)

    monkeypatch.setattr(operator, "launch", record)
    return launches


def check(x, weight, bias, geometry, tf32=False):
    """Forward and every gradient within the bound of their dtype."""
    y = operator.forward(x, weight, bias, *geometry, "none")
    grad_output = random_tensor(tuple(y.shape), x.dtype, seed=9, device=x.device)
    grads = operator.backward(grad_output, x, weight, *geometry, (True, True, True))
    wanted = expected_conv(x, weight, bias, *geometry, "none", grad_output, tf32=tf32)
    for name, result, bound in zip(NAMES, (y, *grads), wanted, strict=True):
        assert_within(result, bound, name)


def tensors(
    device, dtype, images=1, channels=24, outputs=24, size=(5, 6), kernel=(3, 3), maker=random_tensor
):  # fmt: skip
    x = maker((images, channels, *size), dtype, seed=1, device=device).contiguous(memory_format=torch.channels_last)
    weight = maker((outputs, channels, *kernel), dtype, seed=2, device=device)
    return x, weight, maker((outputs,), dtype, seed=3, device=device)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["float16", "tf32"])
@pytest.mark.parametrize("config", CONFIGS, ids=config_id)
def test_every_tile_shape(config, dtype, device, tf32):
    with operator.forced_config(config):
        check(*tensors(device, dtype, kernel=(3, 1)), ROWS_D2, tf32=dtype == torch.float32)


@pytest.mark.parametrize("config", WIDE_CONFIGS, ids=config_id)
def test_every_wide_tile_shape(config, device):
    with operator.forced_config(config):
        check(*tensors(device, torch.float16, kernel=(3, 1)), ROWS_D2)


@pytest.mark.parametrize("channels", [3, 36])
@pytest.mark.parametrize("config", NARROW_CONFIGS, ids=config_id)
def test_every_narrow_tile_shape(config, channels, device):
    with operator.forced_config(config):
        check(*tensors(device, torch.float16, channels=channels, outputs=21, kernel=(3, 1)), ROWS_D2)


@pytest.mark.parametrize("channels", [16, 35])
@pytest.mark.parametrize("config", IEEE_CONFIGS, ids=config_id)
def test_every_ieee_tile_shape(config, channels, device):
    with operator.forced_config(config):
        check(*tensors(device, torch.float32, channels=channels, kernel=(3, 1)), ROWS_D2)


def test_more_than_one_tile_each_way(device):
    """Pixels over several images, output channels and input channels all end inside a tile."""
    with operator.forced_config(Config(16, 16, 16, 1, 3)):
        check(*tensors(device, torch.float16, images=3, outputs=40, kernel=(3, 1)), ROWS_D2)


def test_outputs_that_see_padding_alone(device):
    """No tap is live anywhere: the output is the bias, and every gradient of a product is zero."""
    check(*tensors(device, torch.float16, images=2, size=(1, 2), kernel=(1, 1)), ([3, 1], [1, 1, 0, 0], [1, 1]))


def test_splits_of_the_weight_gradient(device):
    """The second stage adds what several programs have summed up, always in the same order."""
    config = Config(16, 16, 16, 1, 3)
    x, weight, bias = tensors(device, torch.float16, images=2, channels=8, outputs=8, size=(13, 20), kernel=(1, 2))
    geometry = ([1, 1], [0, 0, 0, 1], [1, 1])
    shape = conv_shape(x, weight, *geometry)
    layout = triton_plan.GradWeightLayout(8, 8, False, "ieee")
    plan, rows = triton_plan.plan_grad_weight((shape,), (0,), 2, layout, False, H200, config)
    assert plan.programs > 2, "more programs than two taps have tiles"
    assert rows == 8 * plan.programs
    with operator.forced_config(config):
        check(x, weight, bias, geometry)
        grad_output = random_tensor((2, 8, 13, 20), torch.float16, seed=4, device=device)
        first, second = (
            operator.backward(grad_output, x, weight, *geometry, (False, True, False))[1] for _ in range(2)
        )
    assert torch.equal(first, second)


@pytest.mark.parametrize("bias", ["none", "one", "of each image"])
@pytest.mark.parametrize("splits", [3] if SLOW_RUNG else [2, 5])
@pytest.mark.parametrize("config", [Config(16, 16, 16, 1, 3), SMALL_BOX], ids=["pointers", "descriptors"])
def test_splits_of_a_product(config, splits, bias, device):
    """Several programs share the sum of a tile, some without a step; a second stage adds theirs in order."""
    x, weight, vector = tensors(device, torch.float16, images=2, channels=40, kernel=(3, 1))
    images = random_tensor((2, 24), torch.float16, seed=5, device=device)
    given = {"none": None, "one": vector, "of each image": images}[bias]
    with operator.forced_config(config, splits):
        grad_output = random_tensor((2, 24, 5, 6), torch.float16, seed=9, device=device)
        grad_input = operator.backward(grad_output, x, weight, *ROWS_D2, (True, False, False))[0]
        y = operator.forward(x, weight, given, *ROWS_D2, "relu")
        assert torch.equal(y, operator.forward(x, weight, given, *ROWS_D2, "relu"))
    assert_within(grad_input, expected_conv(x, weight, None, *ROWS_D2, "none", grad_output).grad_input, "grad_input")
    for image in range(2):
        own = images[image] if bias == "of each image" else given
        wanted = expected_conv(x[image : image + 1], weight, own, *ROWS_D2, "relu").output
        assert_within(y[image : image + 1], wanted, f"image {image}")


# With one program each finishes what it begins; with many, several add up the sum of one tile.
@pytest.mark.parametrize("programs", [1, 3, 20] if SLOW_RUNG else [1, 2, 3, 7, 20, 132])
@pytest.mark.parametrize("bias", ["none", "one", "of each image"])
def test_products_whose_work_is_shared(bias, programs, device, launched, monkeypatch, poison):
    """Shares begin and end inside tiles, of which each has rectangles of two and of three taps."""
    limits = operator.device_limits(torch.device(device))._replace(multiprocessors=programs)
    monkeypatch.setattr(operator, "device_limits", lambda _: limits)
    x, weight, vector = tensors(device, torch.float16, images=2, channels=40, outputs=24, kernel=(3, 1))
    images = random_tensor((2, 24), torch.float16, seed=5, device=device)
    given = {"none": None, "one": vector, "of each image": images}[bias]
    grad_output = random_tensor((2, 24, 5, 6), torch.float16, seed=9, device=device)
    with operator.forced_config(Config(16, 16, 16, 1, 3), SHARED):
        y = operator.forward(x, weight, given, *ROWS_D2, "relu")
        assert torch.equal(y, operator.forward(x, weight, given, *ROWS_D2, "relu"))
        grad_input = operator.backward(grad_output, x, weight, *ROWS_D2, (True, False, False))[0]
    assert all(kernel is operator.dilated_product_shared for kernel, _ in launched)
    assert all(len(arguments["p_ready"]) <= programs for _, arguments in launched)
    assert_within(grad_input, expected_conv(x, weight, None, *ROWS_D2, "none", grad_output).grad_input, "grad_input")
    for image in range(2):
        own = images[image] if bias == "of each image" else given
        wanted = expected_conv(x[image : image + 1], weight, own, *ROWS_D2, "relu").output
        assert_within(y[image : image + 1], wanted, f"image {image}")


def test_shared_work_of_nine_rectangles_is_exact(device, monkeypatch):
    """Small integers: whoever adds up what, not a bit differs."""
    limits = operator.device_limits(torch.device(device))._replace(multiprocessors=5)
    monkeypatch.setattr(operator, "device_limits", lambda _: limits)
    x, weight, _ = tensors(device, torch.float16, 2, 24, 40, (7, 9), maker=integer_tensor)
    geometry = ([1, 1], [3] * 4, [3, 3])
    with operator.forced_config(Config(16, 16, 16, 1, 3), SHARED):
        y = operator.forward(x, weight, None, *geometry, "none")
    assert torch.equal(y, reference.forward(x, weight, None, *geometry, "none"))


GRAD_BOXES = [
    *{(c.BLOCK_M, c.BLOCK_N): c for c in GRAD_BOX_CONFIGS}.values(),
    *{c[:3]: c for c in GRAD_BOX_CONFIGS}.values(),
]


@pytest.mark.parametrize("config", dict.fromkeys(GRAD_BOXES), ids=config_id)
def test_every_box_of_the_weight_gradient(config, device, launched):
    """Boxes reach beyond a tap's live outputs, into the image on one side or the other."""
    x, weight, bias = tensors(device, torch.float16, images=3, channels=16, kernel=(3, 1))
    with operator.forced_config(config):
        check(x, weight, bias, ROWS_D2)
    if operator.device_limits(x.device).capability >= 9:
        assert any(kernel is operator.dilated_grad_weight_boxes for kernel, _ in launched)


@pytest.mark.parametrize("value", [torch.nan] if SLOW_RUNG else [torch.inf, torch.nan], ids=str)
@pytest.mark.parametrize("geometry", [SAME_D2, ([2, 1], [1, 1, 3, 0], [1, 2])], ids=["same", "strided"])
def test_boxes_of_the_weight_gradient_see_live_outputs_alone(geometry, value, device):
    """A value that is not finite, in a corner of one tensor, reaches the taps that multiply it and no other."""
    x, weight, _ = tensors(device, torch.float16, channels=8, outputs=8)
    grad_output = torch.ones_like(operator.forward(x, weight, None, *geometry, "none"))
    for struck in (x, grad_output):
        for corner in (0, -1):
            kept = struck[0, :, corner, corner].clone()
            struck[0, :, corner, corner] = value
            with operator.forced_config(GradBoxConfig(1, 8, 8, 64, 64, 4, 4)):
                grad_weight = operator.backward(grad_output, x, weight, *geometry, (False, True, False))[1]
            wanted = expected_conv(x, weight, None, *geometry, "none", grad_output).grad_weight.value
            assert torch.equal(grad_weight.isfinite(), wanted.isfinite())
            struck[0, :, corner, corner] = kept


def test_tf32_rounds_to_nearest(device, tf32):
    """A tensor core drops the bits that TF32 has not: 1 + 2^-11 would become 1, and NaN may never become a number."""
    x = torch.tensor([1 + 2**-11, 1 + 2**-12, -1 - 3 * 2**-11, 1 + 2**-10, torch.inf], device=device)
    wanted = torch.tensor([1 + 2**-10, 1, -1 - 2**-9, 1 + 2**-10, torch.inf], device=device)
    x = torch.cat([x, torch.tensor([0x7FFFFFFF], dtype=torch.int32, device=device).view(torch.float32)])
    y = operator.forward(x.view(1, 1, 1, 6), torch.ones(1, 1, 1, 1, device=device), None, *POINTWISE, "none")
    assert torch.equal(y.flatten()[:5], wanted)
    assert y.flatten()[5].isnan()


def test_float32_is_not_rounded_unless_torch_says_so(device):
    x = torch.tensor([1 + 2**-11, 1 + 2**-23], device=device).view(1, 1, 1, 2)
    assert torch.equal(operator.forward(x, torch.ones(1, 1, 1, 1, device=device), None, *POINTWISE, "none"), x)


def test_a_bias_may_be_float32(device):
    x, weight, bias = tensors(device, torch.float16, channels=8, outputs=8)
    y = operator.forward(x, weight, bias.float(), *SAME_D2, "none")
    assert torch.equal(y, operator.forward(x, weight, bias, *SAME_D2, "none"))
    with pytest.raises(RuntimeError, match="expected bias of shape .* but got .*bfloat16"):
        operator.forward(x, weight, bias.bfloat16(), *SAME_D2, "none")
    with pytest.raises(RuntimeError, match=r"expected scale in torch.float32, but got torch.float16"):
        operator.forward(x, weight, None, *SAME_D2, "none", bias)


def check_image_bias(device, geometry, *, dtype=torch.float16, bias=torch.float32, channels_last=True, **sizes):
    """Forward with a bias of each image and a scale, on integers that leave nothing to round."""
    x, weight, _ = tensors(device, dtype, maker=integer_tensor, **sizes)
    biases = integer_tensor((x.shape[0], weight.shape[0]), bias, seed=3, device=device)
    scale = integer_tensor((weight.shape[0],), torch.float32, seed=4, device=device)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    x, weight = x.contiguous(memory_format=memory_format), weight.contiguous()
    y = operator.forward(x, weight, biases, *geometry, "relu", scale)
    wanted = reference.forward(x, weight, biases, *geometry, "relu", scale)
    assert torch.equal(y, wanted)
    assert y.stride() == wanted.stride()


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["float16", "float32"])
@pytest.mark.parametrize("channels_last", [True, False], ids=["channels_last", "contiguous"])
def test_a_bias_of_each_image(channels_last, dtype, kernel, device):
    """A tile meets several images, also where those of a 1x1 filter are one row of pixels."""
    geometry = POINTWISE if kernel == 1 else SAME_D2
    options = dict(images=3, channels=16, outputs=21, size=(3, 4), kernel=(kernel, kernel))
    check_image_bias(device, geometry, dtype=dtype, bias=dtype, channels_last=channels_last, **options)


def test_a_bias_of_each_image_beside_a_stride(device):
    geometry = ([2, 2], [2, 2, 2, 2], [2, 2])
    check_image_bias(device, geometry, images=2, channels=8, outputs=8, size=(5, 7))


@pytest.mark.parametrize("cut", [slice(None), slice(8, 24)], ids=["whole", "slice"])
def test_channels_last_tensors_are_used_in_place(cut, device, launched):
    """Also a slice of channels, as the branches of an ASPP leave it; others are copied once."""
    x, weight, _ = tensors(device, torch.float16, channels=32, outputs=8)
    x = x[:, cut]
    weight = weight[:, cut].contiguous(memory_format=torch.channels_last)
    with operator.forced_config(CONFIGS[-1]):
        y = operator.forward(x, weight, None, *SAME_D2, "none")
        ((_, arguments),) = launched
        assert arguments["p_source"] is x
        assert arguments["p_weight"] is weight
        assert arguments["p_target"] is y
        contiguous = operator.forward(x.contiguous(), weight.contiguous(), None, *SAME_D2, "none")
    assert contiguous.is_contiguous()
    assert torch.equal(contiguous, y)


def check_product(x, weight, bias, geometry, tf32=False):
    """Forward and grad_input within the bound of their dtype."""
    y = operator.forward(x, weight, bias, *geometry, "none")
    grad_output = random_tensor(tuple(y.shape), x.dtype, seed=9, device=x.device)
    grad_output = grad_output.contiguous(memory_format=torch.channels_last)
    grad_input, _, _ = operator.backward(grad_output, x, weight, *geometry, (True, False, False))
    wanted = expected_conv(x, weight, bias, *geometry, "none", grad_output, tf32=tf32)
    for name, result, bound in zip(NAMES[:2], (y, grad_input), wanted[:2], strict=True):
        assert_within(result, bound, name)


BOX_CASES = [
    name
    for name, case in DILATED_CASES.items()
    if case.batch > 0 and case.stride == (1, 1) and case.channels % 8 == case.outputs % 8 == 0
]
TF32_BOXES = triton_plan.boxes_for(4, triton_plan.Layout(8, 8, 8, False, "tf32"), H200)


def descriptors(launched) -> list:
    """What each product loaded through, after checking that descriptors were all it used."""
    if operator.device_limits(launched[0][1]["p_target"].device).capability < 9:
        pytest.skip("devices before capability 9 have no tensor descriptors")
    assert all(kernel is operator.dilated_product_boxes for kernel, _ in launched)
    return [(arguments["d_source"], arguments["d_weight"]) for _, arguments in launched]


@pytest.mark.parametrize("config", BOX_CONFIGS, ids=config_id)
def test_every_box(config, device, launched):
    """Images, rows, columns, and channels of both sides end inside a tile, and each but the images has a second one."""
    images, size = 2 if config.BOX_N == 1 else 3, (config.BOX_H + 1, config.BOX_W + 3)
    with operator.forced_config(config):
        check_product(*tensors(device, torch.float16, images, 40, 72, size, (1, 2)), ([1, 1], [0, 0, 0, 2], [1, 2]))
    for source, weight in descriptors(launched):
        assert tuple(source.block_shape) == (*config[:3], 64)
        assert sorted(weight.block_shape) == sorted((1, 1, config.BLOCK_N, 64))


@pytest.mark.parametrize("config", [c for c in TF32_BOXES if c.BOX_W == 8 and c.BOX_N == 2], ids=config_id)
def test_boxes_of_float32(config, device, tf32, launched):
    with operator.forced_config(config):
        check_product(*tensors(device, torch.float32, 3, 40, 72, kernel=(3, 1)), ROWS_D2, tf32=True)
    descriptors(launched)


@pytest.mark.parametrize(("images", "size"), [(1, (3, 7)), (2, (4, 8)), (3, (5, 9)), (1, (12, 20))], ids=str)
def test_boxes_that_end_before_at_and_after_the_image(images, size, device, launched):
    """With two-dimensional taps, at a border, everywhere, and nowhere."""
    with operator.forced_config(SMALL_BOX):
        check_product(*tensors(device, torch.float16, images, 8, 8, size), ([1, 1], [4] * 4, [4, 4]))
    descriptors(launched)


@pytest.mark.parametrize("name", BOX_CASES)
def test_boxes_on_the_cases_of_the_contract(name, device, launched, poison):
    """Which the planner gives to pointers in the interpreter, for they are small."""
    case = DILATED_CASES[name]
    x, weight, bias = tensors(device, torch.float16, case.batch, case.channels, case.outputs, case.size, case.kernel)
    grad_output = None
    with operator.forced_config(SMALL_BOX):
        y = operator.forward(x, weight, bias, *case.geometry, case.activation)
        if case.activation == "none":
            grad_output = random_tensor(tuple(y.shape), x.dtype, seed=9, device=device)
            grad_input, _, _ = operator.backward(grad_output, x, weight, *case.geometry, (True, False, False))
    descriptors(launched)
    wanted = expected_conv(x, weight, bias, *case.geometry, case.activation, grad_output)
    assert_within(y, wanted[0], "output")
    if grad_output is not None:
        assert_within(grad_input, wanted[1], "grad_input")


def test_a_crop_of_channels_and_pixels_is_described_in_place(device, launched):
    """What lies around it is not zero, and is not read."""
    x, weight, bias = tensors(device, torch.float16, 3, 48, 40, (9, 12))
    x = x.mul(100)[1:, 8:32, 2:-1, 3:-2]
    weight = weight.contiguous(memory_format=torch.channels_last)[:32, 8:32]
    with operator.forced_config(SMALL_BOX):
        check_product(x, weight, bias[:32], SAME_D2)
    forward, grad_input = descriptors(launched)
    assert forward[0].base is x
    assert forward[1].base is weight
    assert grad_input[1].base is weight


@pytest.mark.parametrize("kernel", [1, 3])
def test_boxes_take_a_bias_of_each_image(kernel, device, launched):
    """Boxes reach beyond the last image and beyond the last row, which have no bias."""
    row = next(c for c in BOX_CONFIGS if c[:4] == (1, 1, 64, 128))
    with operator.forced_config(row if kernel == 1 else SMALL_BOX):
        options = dict(images=3, channels=16, outputs=24, size=(5, 6), kernel=(kernel, kernel))
        check_image_bias(device, POINTWISE if kernel == 1 else SAME_D2, **options)
    descriptors(launched)


def test_a_bias_of_each_image_has_a_row_of_each(device):
    x, weight, bias = tensors(device, torch.float16, images=2, channels=8, outputs=8)
    with pytest.raises(RuntimeError, match=r"expected bias of shape \[2, 8\]"):
        operator.forward(x, weight, bias.expand(3, 8), *SAME_D2, "none")


def test_axes_of_one_entry_have_any_stride(device, launched):
    x, weight, bias = tensors(device, torch.float16, images=1, channels=8, outputs=8, size=(1, 9), kernel=(1, 3))
    x = x.as_strided(x.shape, (3, 1, 5, 8))
    weight = weight.as_strided((8, 8, 1, 3), (24, 1, 7, 8))
    with operator.forced_config(SMALL_BOX):
        check_product(x, weight, bias, ([1, 1], [0, 0, 1, 1], [1, 1]))
    assert descriptors(launched)[0][0].base is x


def test_boxes_with_wide_offsets(device, launched, monkeypatch):
    monkeypatch.setenv("FASTSEG_FORCE_INDEX64", "1")
    with operator.forced_config(SMALL_BOX):
        check_product(*tensors(device, torch.float16, images=3), SAME_D2)
    descriptors(launched)
    assert all(arguments["IS_INDEX_64"] for _, arguments in launched)


def test_boxes_keep_infinity_and_nan_where_they_belong(device, launched):
    """Zeros read outside the image meet weights that are not finite, in rows of a tile that are never stored."""
    x, weight, _ = tensors(device, torch.float16, 3, 8, 8, (7, 9))
    x[1, 3, 2, 5] = torch.nan
    weight[2, :, 0, 0] = torch.inf
    with operator.forced_config(SMALL_BOX):
        y = operator.forward(x, weight, None, *SAME_D2, "none")
    descriptors(launched)
    wanted = fastseg.ops.conv2d(x.float(), weight.float(), padding=2, dilation=2, backend="reference")
    assert torch.equal(y.isfinite(), wanted.isfinite())
    assert torch.equal(y.isnan(), wanted.isnan())


def test_pixels_of_a_1x1_filter_are_one_row(device, launched):
    """Of all images, also those of a slice of channels; a crop keeps its shape."""
    row = next(c for c in BOX_CONFIGS if c[:4] == (1, 1, 64, 128))
    x, weight, bias = tensors(device, torch.float16, 3, 48, 16, kernel=(1, 1))
    with operator.forced_config(row):
        check_product(x[:, 8:32], weight[:, 8:32], bias, POINTWISE)
        check_product(x[:, :, 1:], weight, bias, POINTWISE)
    shapes = [source.shape for source, _ in descriptors(launched)]
    assert shapes == [[1, 1, 90, 24], [1, 1, 90, 16], [3, 4, 6, 48], [1, 1, 72, 16]]


# What descriptors cannot load, and pointers do: (changed arguments of `tensors`, geometry, change of the input).
POINTERS = {
    "stride": ({}, ([2, 2], [2, 2, 2, 2], [2, 2]), None),
    "stride of rows": ({}, ([2, 1], [2, 2, 2, 2], [2, 2]), None),
    "12-channels": (dict(channels=12, outputs=12), SAME_D2, None),
    "unaligned": ({}, SAME_D2, lambda x: torch.cat([x, x], 1)[:, 4:28]),
    "expanded": ({}, SAME_D2, lambda x: x[:1].expand(3, -1, -1, -1)),
    "ieee": (dict(dtype=torch.float32), SAME_D2, None),
}


@pytest.mark.parametrize("case", POINTERS)
def test_pointers_load_what_descriptors_cannot(case, device, launched):
    changed, geometry, change = POINTERS[case]
    x, weight, bias = tensors(device, **dict(dtype=torch.float16, images=3) | changed)
    with operator.forced_config(SMALL_BOX):
        y = operator.forward(change(x) if change else x, weight, bias, *geometry, "none")
    assert launched[0][0] is operator.dilated_product
    assert_within(y, expected_conv(change(x) if change else x, weight, bias, *geometry, "none")[0], case)


def test_pointers_load_on_devices_without_descriptors(device, launched, monkeypatch):
    monkeypatch.setattr(operator, "device_limits", lambda _: A100)
    with operator.forced_config(SMALL_BOX):
        operator.forward(*tensors(device, torch.float16), *SAME_D2, "none")
    assert launched[0][0] is operator.dilated_product


def test_a_table_goes_where_it_is_asked_for():
    table = DeviceTable([(1, 2), (3, 4)])
    assert table.on(torch.device("cpu")).tolist() == [[1, 2], [3, 4]]
    assert table.on(torch.device("meta")).shape == (2, 2)


gpu_only = pytest.mark.skipif(RUNG != "gpu", reason="rung 5: needs a GPU")


either_load = pytest.mark.parametrize("config", [CONFIGS[1], SMALL_BOX], ids=["pointers", "descriptors"])


@gpu_only
@either_load
def test_a_captured_graph_keeps_its_tables(config, device):
    """The plan may leave its cache between capture and replay."""
    x, weight, _ = tensors(device, torch.float16)
    with operator.forced_config(config):
        wanted = operator.forward(x, weight, None, *SAME_D2, "none")  # compiles before the capture
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = operator.forward(x, weight, None, *SAME_D2, "none")
    triton_plan.plan_product.cache_clear()
    torch.cuda.empty_cache()
    graph.replay()
    assert torch.equal(y, wanted)


@gpu_only
def test_a_new_problem_does_not_wait_for_the_device(device):
    x, weight, _ = tensors(device, torch.float16)
    operator.forward(x, weight, None, *SAME_D2, "none")  # compiles
    triton_plan.plan_product.cache_clear()
    torch.cuda.set_sync_debug_mode("error")
    try:
        operator.forward(x, weight, None, *SAME_D2, "none")
    finally:
        torch.cuda.set_sync_debug_mode("default")


@gpu_only
@either_load
def test_more_than_2_to_the_31_elements(config, device):
    """The far end is compared with the same convolution of that end alone."""
    x = torch.randint(-3, 4, (1, 64, 6000, 6000), dtype=torch.float16, device=device)
    x = x.contiguous(memory_format=torch.channels_last)
    assert x.numel() > 2**31
    weight = torch.randint(-1, 2, (64, 64, 3, 3), device=device).half()
    with operator.forced_config(config):
        y = operator.forward(x, weight, None, *SAME_D2, "none")
    end = operator.forward(x[:, :, -20:].contiguous(), weight, None, *SAME_D2, "none")
    assert torch.equal(y[:, :, -10:], end[:, :, -10:])
    grad_output = torch.zeros_like(x)
    grad_output[..., -1, -1] = 1
    with operator.forced_config(config):
        grad_x, grad_weight, _ = operator.backward(grad_output, x, weight, *SAME_D2, (True, True, False))
    assert torch.equal(grad_weight[:, :, 1, 1], x[0, :, -1, -1].expand(64, 64))
    assert torch.equal(grad_x[0, :, -1, -1].float(), weight[:, :, 1, 1].float().sum(0))
