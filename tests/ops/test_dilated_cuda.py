"""The variants of the CUDA kernels of dense convolutions: every tile, and what takes more than one launch."""

from __future__ import annotations

import re

import pytest
import torch

from fastseg.ops.geometry import output_size
from fastseg.ops.library import OVERLOADS
from fastseg.testing import assert_within, expected_conv, integer_tensor, random_tensor

GATHER = {
    "float16": ("128x256", "128x128", "128x64", "128x32", "64x64", "32x32"),
    "bfloat16": ("128x256", "128x128", "128x64", "128x32", "64x64", "32x32"),
    "tf32": ("128x128", "128x64", "128x32", "64x64", "32x32"),
    "float32": ("128x64", "64x64", "32x32"),
    "float64": ("64x64", "32x32"),
}
GRAD_WEIGHT = {
    "float16": ("128x128", "64x64", "32x32"),
    "bfloat16": ("128x128", "64x64", "32x32"),
    "tf32": ("128x128", "64x64", "32x32"),
    "float32": ("64x64", "32x32"),
    "float64": ("32x32",),
}
# Where channels do not come in chunks of 16 bytes.
SMALL = ("64x64", "32x32")
TILES = {"forward": GATHER, "grad_input": GATHER, "grad_weight": GRAD_WEIGHT}
# (input channels, output channels): more than one tile of 128 columns, or fewer than one of 32; in chunks or not.
CHANNELS = {"in chunks": (24, 136), "thin": (136, 8), "odd": (21, 67), "odd input": (3, 40), "odd output": (40, 19)}


def tiles(direction: str, operand: str, channels: str) -> list[str]:
    listed = TILES[direction][operand]
    return [tile for tile in listed if not channels.startswith("odd") or tile in SMALL]


VARIANTS = [
    pytest.param(direction, operand, channels, tile, id=f"{direction}-{operand}-{channels}-{tile}")
    for direction in TILES
    for operand in GATHER
    for channels in CHANNELS
    for tile in tiles(direction, operand, channels)
]


@pytest.fixture(autouse=True)
def only_cuda(request):
    if request.getfixturevalue("target").backend != "cuda":
        pytest.skip("about the CUDA kernels")


def dtype_of(operand: str) -> torch.dtype:
    return torch.float32 if operand == "tf32" else getattr(torch, operand)


def problem(dtype, device, channels, size=(9, 8), batch=2, kernel=(3, 3), stride=(1, 1), padding=2, dilation=(2, 2)):
    """x, weight, grad_output and the geometry, all in channels_last."""
    options = {"device": device, "memory_format": torch.channels_last}
    x = random_tensor((batch, channels[0], *size), dtype, seed=1, **options)
    weight = random_tensor((channels[1], channels[0], *kernel), dtype, seed=2, **options)
    geometry = (list(stride), [padding] * 4, list(dilation))
    outputs = output_size(size, kernel, *geometry)
    grad_output = random_tensor((batch, channels[1], *outputs), dtype, seed=3, **options)
    return x, weight, grad_output, geometry


def run(direction, x, weight, grad_output, geometry):
    if direction == "forward":
        return OVERLOADS["dilated_conv2d"]["cuda"](x, weight, None, *geometry, "none")
    mask = [direction == "grad_input", direction == "grad_weight", False]
    return OVERLOADS["dilated_conv2d_backward"]["cuda"](grad_output, x, weight, *geometry, mask)[mask.index(True)]


def assert_right(direction, x, weight, grad_output, geometry, **options):
    wanted = expected_conv(x, weight, None, *geometry, grad_output=grad_output, **options)
    index = ("forward", "grad_input", "grad_weight").index(direction)
    assert_within(run(direction, x, weight, grad_output, geometry), wanted[index], direction)


@pytest.mark.parametrize(("direction", "operand", "channels", "tile"), VARIANTS)
def test_every_tile_is_within_bound(direction, operand, channels, tile, target, monkeypatch, request):
    if operand == "tf32":
        request.getfixturevalue("tf32")
    monkeypatch.setenv("FASTSEG_FORCE_TILE", tile)
    arguments = problem(dtype_of(operand), target.device, CHANNELS[channels])
    assert_right(direction, *arguments, tf32=operand == "tf32")


@pytest.mark.parametrize("channels", ["in chunks", "odd"])
@pytest.mark.parametrize("operand", GATHER)
@pytest.mark.parametrize("direction", TILES)
def test_every_tile_is_listed_here(direction, operand, channels, target, monkeypatch, request):
    if operand == "tf32":
        request.getfixturevalue("tf32")
    monkeypatch.setenv("FASTSEG_FORCE_TILE", "1x1")
    with pytest.raises(RuntimeError, match="expected FASTSEG_FORCE_TILE to be one of .* but got 1x1") as error:
        run(direction, *problem(dtype_of(operand), target.device, CHANNELS[channels]))
    assert re.findall(r"\d+x\d+(?= )", str(error.value).split("one of")[1]) == tiles(direction, operand, channels)


@pytest.mark.parametrize("splits", [2, 3, 5])
@pytest.mark.parametrize("operand", ["float16", "float32"])
def test_splits_of_the_pixels_add_up(operand, splits, target, monkeypatch):
    """The last split is shorter, and border taps, which see fewer pixels, have fewer of them."""
    monkeypatch.setenv("FASTSEG_FORCE_SPLITS", str(splits))
    arguments = problem(dtype_of(operand), target.device, (8, 16), size=(15, 14), padding=6, dilation=(6, 6))
    assert_right("grad_weight", *arguments)
    first, second = (run("grad_weight", *arguments) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("direction", TILES)
@pytest.mark.parametrize(
    "geometry",
    [
        dict(size=(20, 6), kernel=(18, 3), padding=9, dilation=(1, 1)),
        dict(size=(6, 21), kernel=(3, 17), padding=8, dilation=(1, 1)),
        dict(size=(19, 19), kernel=(17, 17), padding=8, dilation=(1, 1), batch=1),
        dict(size=(17, 18), kernel=(7, 7), padding=3, dilation=(1, 1), stride=(3, 3)),
    ],
    ids=["tall", "wide", "both", "strided"],
)
def test_more_rectangles_and_taps_than_one_launch_takes(direction, geometry, target):
    assert_right(direction, *problem(torch.float32, target.device, (4, 8), **geometry))


@pytest.mark.parametrize("direction", TILES)
def test_tf32_rounds_to_nearest(direction, target, tf32):
    """Ones and a bit that TF32 has no room for: rounded they are exact, cut off every product would be too small."""
    arguments = problem(torch.float32, target.device, (8, 8))
    near_2 = 2 - 2.0**-12
    x, weight, grad_output = (torch.full_like(t, near_2) for t in arguments[:3])
    exact = run(direction, *(torch.full_like(t, 2.0) for t in (x, weight, grad_output)), arguments[3])
    assert torch.equal(run(direction, x, weight, grad_output, arguments[3]), exact)


@pytest.mark.parametrize("direction", TILES)
@pytest.mark.parametrize("operand", ["float16", "float32"])
def test_a_slice_at_an_odd_address_is_used_in_place(direction, operand, target):
    """Channels that do not begin at a multiple of 16 bytes are fetched one by one, from where they are."""
    x, weight, grad_output, geometry = problem(dtype_of(operand), target.device, (24, 16))

    def shifted(t):
        wide = t.new_zeros(t.shape[0], t.shape[1] + 5, *t.shape[2:]).contiguous(memory_format=torch.channels_last)
        return wide[:, 3 : 3 + t.shape[1]].copy_(t)

    views = shifted(x), shifted(weight), shifted(grad_output), geometry
    assert views[0].stride(1) == 1
    assert_right(direction, *views)


@pytest.mark.parametrize("wide", [False, True], ids=["bias in the weight's dtype", "in the accumulator's"])
@pytest.mark.parametrize(
    ("operand", "channels", "tile"),
    [
        pytest.param(operand, channels, tile, id=f"{operand}-{channels}-{tile}")
        for operand in GATHER
        for channels in ("in chunks", "odd")
        for tile in tiles("forward", operand, channels)
    ],
)
def test_every_tile_adds_each_images_own_bias(operand, channels, tile, wide, target, monkeypatch, request):
    """Small integers, so that the results are exact; a tile of pixels holds more than one image."""
    if operand == "tf32":
        request.getfixturevalue("tf32")
    monkeypatch.setenv("FASTSEG_FORCE_TILE", tile)
    dtype = dtype_of(operand)
    x, weight, _, geometry = problem(dtype, target.device, CHANNELS[channels], size=(5, 4), batch=3)
    x, weight = (
        integer_tensor(t.shape, dtype, low=-1, high=1, seed=i, device=t.device) for i, t in enumerate((x, weight))
    )
    sums = torch.float64 if dtype == torch.float64 else torch.float32
    bias = integer_tensor((3, weight.shape[0]), sums if wide else dtype, high=9, seed=5, device=x.device)
    scale = 2.0 ** integer_tensor((weight.shape[0],), sums, low=-1, high=1, seed=6, device=x.device)
    for options in ((bias, *geometry, "relu"), (bias, *geometry, "none", scale)):
        ours, exact = (OVERLOADS["dilated_conv2d"][name](x, weight, *options) for name in ("cuda", "reference"))
        assert torch.equal(ours, exact)


def test_a_bias_of_other_images_is_refused(target):
    x, weight, _, geometry = problem(torch.float32, target.device, (8, 16))
    with pytest.raises(RuntimeError, match=r"expected bias of size \[16\] or \[2, 16\], .* but got \[3, 16\]"):
        OVERLOADS["dilated_conv2d"]["cuda"](x, weight, weight.new_zeros(3, 16), *geometry, "none")
