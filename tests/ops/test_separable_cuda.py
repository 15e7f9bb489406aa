"""The variants of the CUDA kernel of separable convolutions: every tile, kind of filter and branch; statistics."""

from __future__ import annotations

import re
from functools import partial

import pytest
import torch

from fastseg.ops.geometry import same_padding
from fastseg.ops.library import OVERLOADS
from fastseg.testing import assert_within, expected_separable, integer_tensor, random_tensor

TILES = {
    "float16": ("128x256", "128x128", "128x64", "64x64", "32x32"),
    "bfloat16": ("128x256", "128x128", "128x64", "64x64", "32x32"),
    "tf32": ("128x128", "128x64", "64x64", "32x32"),
    "float32": ("128x64", "64x64", "32x32"),
    "float64": ("64x64", "32x32"),
}
# Where channels do not come in chunks of 16 bytes.
SMALL = ("64x64", "32x32")
# (channels, output channels): several slices and more than one tile of 128 columns, or fewer than one of 32; in chunks
# or not.
CHANNELS = {"in chunks": (136, 264), "thin": (24, 8), "odd": (21, 67), "odd input": (67, 40), "odd output": (40, 19)}
FILTERS = {"3x3": (3, 3), "3x5": (3, 5)}


def tiles(operand: str, channels: str) -> list[str]:
    return [tile for tile in TILES[operand] if channels not in ("odd", "odd input") or tile in SMALL]


VARIANTS = [
    pytest.param(operand, channels, tile, kernel, id=f"{operand}-{channels}-{tile}-{kernel}")
    for operand in TILES
    for channels in CHANNELS
    for tile in tiles(operand, channels)
    for kernel in FILTERS
]


@pytest.fixture(autouse=True)
def only_cuda(request):
    if request.getfixturevalue("target").backend != "cuda":
        pytest.skip("about the CUDA kernels")


@pytest.fixture
def operand(request):
    """A dtype, with TF32 allowed where that is what it is about."""
    if request.param == "tf32":
        request.getfixturevalue("tf32")
    return request.param


def dtype_of(operand: str) -> torch.dtype:
    return torch.float32 if operand == "tf32" else getattr(torch, operand)


def problem(dtype, device, channels, kernel=(3, 3), size=(9, 8), batch=2, multiplier=1):
    """x, the two weights and the geometry of a dilated convolution that keeps the image's size."""
    x = random_tensor((batch, channels[0], *size), dtype, seed=1, device=device, memory_format=torch.channels_last)
    depthwise = random_tensor((channels[0] * multiplier, 1, *kernel), dtype, seed=2, device=device)
    pointwise = random_tensor((channels[1], channels[0] * multiplier, 1, 1), dtype, seed=3, device=device)
    return x, depthwise, pointwise, same_padding(depthwise, 2)


def run(x, depthwise, pointwise, geometry, biases=(None, None), activations=("none", "none"), scales=(None, None)):
    return OVERLOADS["separable_conv2d"]["cuda"](x, depthwise, pointwise, *biases, *geometry, *activations, *scales)


def assert_right(x, depthwise, pointwise, geometry, **options):
    (wanted,) = expected_separable(x, depthwise, pointwise, None, None, *geometry, **options)
    assert_within(run(x, depthwise, pointwise, geometry), wanted, "output")


@pytest.mark.parametrize(("operand", "channels", "tile", "kernel"), VARIANTS, indirect=["operand"])
def test_every_tile_is_within_bound(operand, channels, tile, kernel, target, monkeypatch):
    monkeypatch.setenv("FASTSEG_FORCE_TILE", tile)
    arguments = problem(dtype_of(operand), target.device, CHANNELS[channels], FILTERS[kernel])
    assert_right(*arguments, tf32=operand == "tf32")


@pytest.mark.parametrize("channels", ["in chunks", "odd"])
@pytest.mark.parametrize("operand", TILES, indirect=True)
def test_every_tile_is_listed_here(operand, channels, target, monkeypatch):
    monkeypatch.setenv("FASTSEG_FORCE_TILE", "1x1")
    with pytest.raises(RuntimeError, match="expected FASTSEG_FORCE_TILE to be one of .* but got 1x1") as error:
        run(*problem(dtype_of(operand), target.device, CHANNELS[channels]))
    assert re.findall(r"\d+x\d+(?= )", str(error.value).split("one of")[1]) == tiles(operand, channels)


@pytest.mark.parametrize("multiplier", [2, 3])
@pytest.mark.parametrize("operand", ["float16", "float32"], indirect=True)
def test_channel_multiplier(operand, multiplier, target):
    assert_right(*problem(dtype_of(operand), target.device, (16, 24), multiplier=multiplier))


@pytest.mark.parametrize("operand", ["float16", "float32"], indirect=True)
def test_slices_at_odd_addresses_are_used_in_place(operand, target):
    """Channels that do not begin at a multiple of 16 bytes are fetched one by one, from where they are."""
    x, depthwise, pointwise, geometry = problem(dtype_of(operand), target.device, (24, 16))

    def shifted(t):
        wide = t.new_zeros(t.shape[0], t.shape[1] + 5, *t.shape[2:]).contiguous(memory_format=torch.channels_last)
        return wide[:, 3 : 3 + t.shape[1]].copy_(t)

    views = shifted(x), depthwise, shifted(pointwise), geometry
    assert views[0].stride(1) == 1
    assert views[2].stride(1) == 1
    assert_right(*views)


@pytest.mark.parametrize("wide", [False, True], ids=["bias of the weights' dtype", "float32 bias"])
@pytest.mark.parametrize("channels", ["in chunks", "odd"])
@pytest.mark.parametrize("kernel", FILTERS)
@pytest.mark.parametrize("operand", ["float16", "float32"], indirect=True)
def test_scales_and_biases(operand, channels, kernel, wide, target):
    """A scale of z is a scale of its filters, one of y a scale of the weight: powers of two, which round nothing."""
    dtype, (inner, outer) = dtype_of(operand), CHANNELS[channels]
    x, depthwise, pointwise, geometry = problem(dtype, target.device, CHANNELS[channels], FILTERS[kernel])
    scales = [
        torch.exp2(random_tensor((size,), torch.float32, seed=4 + size, device=target.device).round().clamp(-2, 2))
        for size in (inner, outer)
    ]
    biases = [random_tensor((size,), dtype, seed=6 + size, device=target.device) for size in (inner, outer)]
    activations = ("relu6", "hardswish")
    scaled = [
        weight * scale.to(dtype).view(-1, 1, 1, 1) for weight, scale in zip((depthwise, pointwise), scales, strict=True)
    ]
    (wanted,) = expected_separable(x, *scaled, *biases, *geometry, *activations)
    y = run(x, depthwise, pointwise, geometry, [b.float() if wide else b for b in biases], activations, scales)
    assert_within(y, wanted, "output")


@pytest.mark.parametrize("operand", TILES, indirect=True)
def test_tf32_is_taken_where_it_is_allowed(operand, target):
    """Ones and a bit that TF32 has no room for: z, which is one of them, is rounded to nearest before the product."""
    x, depthwise, pointwise, geometry = problem(dtype_of(operand), target.device, (8, 8), kernel=(1, 1))
    near_2 = 2 - 2.0**-12
    x, depthwise = torch.full_like(x, near_2), torch.ones_like(depthwise)
    y = run(x, depthwise, torch.full_like(pointwise, near_2), geometry)
    rounded = operand not in ("float32", "float64")
    assert torch.equal(y, torch.full_like(y, 8 * (4.0 if rounded else near_2 * near_2)))


TILES_OF_OPERANDS = [
    pytest.param(operand, tile, id=f"{operand}-{tile}") for operand, listed in TILES.items() for tile in listed
]
# Plain, 3x3 and 5x5 branches of unequal widths.
WIDTHS, KERNELS, DILATIONS = (40, 264, 24, 8), (1, 3, 3, 5), [2, 6, 1]


def branches(dtype, device, widths, kernels, maker=random_tensor, channels=24, batch=2, size=(9, 8)):
    """x, depthwise weights, weights, and the two joined biases; a kernel of 1 makes a plain branch."""
    own = [kernel for kernel in kernels if kernel > 1]
    shapes = [(channels, 1, kernel, kernel) for kernel in own] + [(width, channels, 1, 1) for width in widths]
    filters = [maker(shape, dtype, seed=2 + i, device=device) for i, shape in enumerate(shapes)]
    biases = [
        maker((size,), dtype, seed=40 + i, device=device) for i, size in enumerate((channels * len(own), sum(widths)))
    ]
    x = maker((batch, channels, *size), dtype, seed=1, device=device).contiguous(memory_format=torch.channels_last)
    return x, filters[: len(own)], filters[len(own) :], biases


def run_branches(x, filters, weights, biases, dilations, *, statistics=False, scales=(None, None), backend="cuda"):
    return OVERLOADS["separable_aspp_branches"][backend](
        x, filters, weights, *biases, dilations, "relu", "none", statistics, *scales
    )


def assert_branches_right(y, x, filters, weights, biases, dilations, tf32=False):
    """y, branch by branch; a plain one is a separable one whose filter is a one, with nothing in between."""
    plain, first, channels = len(weights) - len(filters), 0, x.shape[1]
    for i, weight in enumerate(weights):
        part = slice(first, first + weight.shape[0])
        first, b = part.stop, i - plain
        if b < 0:
            depthwise, own_bias, dilation, activation = x.new_ones(channels, 1, 1, 1), None, 1, "none"
        else:
            depthwise, dilation, activation = filters[b], dilations[b], "relu"
            own_bias = biases[0][b * channels : (b + 1) * channels]
        vectors = (own_bias, biases[1][part])
        (wanted,) = expected_separable(
            x, depthwise, weight, *vectors, *same_padding(depthwise, dilation), activation, tf32=tf32
        )
        assert_within(y[:, part], wanted, f"branch {i}")


@pytest.mark.parametrize(("operand", "tile"), TILES_OF_OPERANDS, indirect=["operand"])
def test_branches_of_every_tile_are_within_bound(operand, tile, target, monkeypatch):
    monkeypatch.setenv("FASTSEG_FORCE_TILE", tile)
    arguments = (*branches(dtype_of(operand), target.device, WIDTHS, KERNELS), DILATIONS)
    y, sums = run_branches(*arguments)
    assert_branches_right(y, *arguments, tf32=operand == "tf32")
    assert sums.shape == (0,)
    assert sums.dtype == torch.float64


@pytest.mark.parametrize(
    ("operand", "tile", "channels"),
    [pytest.param(*param.values, 24, id=param.id) for param in TILES_OF_OPERANDS]
    + [
        pytest.param(*param.values, 21, id=f"{param.id}-odd") for param in TILES_OF_OPERANDS if param.values[1] in SMALL
    ],
    indirect=["operand"],
)
def test_statistics_of_every_tile_are_exact(operand, tile, channels, target, monkeypatch):
    """They are sums of what the accumulators hold: of small integers, whatever the output's dtype can hold."""
    monkeypatch.setenv("FASTSEG_FORCE_TILE", tile)
    signs = partial(integer_tensor, low=-1, high=1)
    arguments = (*branches(dtype_of(operand), target.device, WIDTHS, KERNELS, signs, channels), DILATIONS)
    y, sums = run_branches(*arguments, statistics=True)
    exact, exact_sums = run_branches(*arguments, statistics=True, backend="reference")
    assert torch.equal(y, exact)
    assert torch.equal(sums, exact_sums)


def test_statistics_are_of_what_is_scaled(target):
    arguments = (*branches(torch.float32, target.device, (8, 13), (1, 3), integer_tensor), [2])
    scales = [integer_tensor((size,), torch.float32, seed=5, device=target.device) for size in (24, 21)]
    y, sums = run_branches(*arguments, statistics=True, scales=scales)
    exact, exact_sums = run_branches(*arguments, statistics=True, scales=scales, backend="reference")
    assert torch.equal(y, exact)
    assert torch.equal(sums, exact_sums)


def test_statistics_are_repeatable_and_change_no_bit(target):
    arguments = (*branches(torch.float32, target.device, (8, 13), (1, 3)), [2])
    (y, sums), (again, sums_again) = (run_branches(*arguments, statistics=True) for _ in range(2))
    assert torch.equal(y, again)
    assert torch.equal(sums, sums_again)
    assert torch.equal(y, run_branches(*arguments)[0])


def test_more_branches_than_one_launch_takes(target):
    """Ten, of which the plain one ends up in the second launch."""
    x, filters, weights, biases = branches(torch.float32, target.device, (8,) * 10, (1,) + (3,) * 9)
    dilations = list(range(1, 10))
    y, _ = run_branches(x, filters, weights, biases, dilations, statistics=True)
    assert_branches_right(y, x, filters, weights, biases, dilations)


def test_an_empty_batch_has_statistics_of_zero(target):
    arguments = branches(torch.float32, target.device, (8, 8), (1, 3), batch=0)
    y, sums = run_branches(*arguments, [2], statistics=True)
    assert y.shape == (0, 16, 9, 8)
    assert torch.equal(sums, torch.zeros(2, 16, dtype=torch.float64, device=target.device))
