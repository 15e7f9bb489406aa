"""The CUDA kernels of depthwise convolutions for short phases: every tile, and what only looks like one."""

from __future__ import annotations

import itertools

import pytest
import torch

from fastseg.ops.geometry import output_size
from fastseg.ops.library import OVERLOADS
from fastseg.testing import assert_within, expected_conv, random_tensor

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
ACTIVATIONS = ("none", "relu", "relu6", "hardswish", "silu")
DILATION = (5, 4)
# How many positions the longest phase of rows and of columns has: up to 2 and up to 3 take a tile of that size.
POSITIONS = list(itertools.product((1, 2, 3), repeat=2))
# Rows and columns that the last position lacks: 0 where all phases are equally long.
LACKING = {"even": (0, 0), "uneven": (2, 3)}
# One vector, lanes that leave threads of a block over, two slabs of which the second is not full.
CHANNELS = (4, 40, 136)
MASKS = [mask for mask in itertools.product((False, True), repeat=3) if any(mask)]
GRADIENTS = ("grad_input", "grad_weight", "grad_bias")

every_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
every_size = pytest.mark.parametrize(
    "size",
    [
        pytest.param(
            tuple(n * d - lack for n, d, lack in zip(positions, DILATION, lacking, strict=True)),
            id=f"{positions[0]}x{positions[1]}-{name}",
        )
        for positions in POSITIONS
        for name, lacking in LACKING.items()
    ],
)


@pytest.fixture(autouse=True)
def only_cuda(request):
    if request.getfixturevalue("target").backend != "cuda":
        pytest.skip("about the CUDA kernels")


def same(dilation=DILATION):
    """Stride, padding and dilation of a 3x3 convolution that leaves the image's size alone."""
    return [1, 1], [dilation[0], dilation[0], dilation[1], dilation[1]], list(dilation)


def problem(dtype, device, size, channels=40, batch=2, geometry=None, kernel=(3, 3)):
    """x, weight, bias and grad_output in channels_last."""
    outputs = output_size(size, kernel, *(geometry or same()))
    options = {"device": device, "memory_format": torch.channels_last}
    x = random_tensor((batch, channels, *size), dtype, seed=1, **options)
    weight = random_tensor((channels, 1, *kernel), dtype, seed=2, device=device)
    bias = random_tensor((channels,), dtype, seed=3, device=device)
    return x, weight, bias, random_tensor((batch, channels, *outputs), dtype, seed=4, **options)


def forward(x, weight, bias, activation="none", geometry=None, backend="cuda"):
    return OVERLOADS["depthwise_conv2d"][backend](x, weight, bias, *(geometry or same()), activation)


def backward(x, weight, grad_output, mask=(True, True, True), geometry=None, backend="cuda"):
    operator = OVERLOADS["depthwise_conv2d_backward"][backend]
    return operator(grad_output, x, weight, *(geometry or same()), list(mask))


def assert_right(x, weight, bias, grad_output, geometry=None):
    """Output and gradients are within their bounds."""
    wanted = expected_conv(x, weight, bias, *(geometry or same()), grad_output=grad_output)
    results = forward(x, weight, bias, geometry=geometry), *backward(x, weight, grad_output, geometry=geometry)
    for result, bound, name in zip(results, wanted, ("output", *GRADIENTS), strict=True):
        assert_within(result, bound, name)


@every_dtype
@every_size
def test_every_tile_is_within_bound(size, dtype, target, poison):
    assert_right(*problem(dtype, target.device, size))


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("size", [(9, 7), (14, 10)], ids=["tile-2", "tile-3"])
@every_dtype
def test_channels_that_do_not_fill_the_last_block(dtype, size, channels, batch, target, poison):
    assert_right(*problem(dtype, target.device, size, channels, batch))


@every_size
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("has_bias", [False, True], ids=["no-bias", "bias"])
def test_output_has_the_bits_of_a_walk(has_bias, activation, size, target):
    """Contiguous tensors are walked. Sums take the same inputs in the same order, then bias and activation."""
    for dtype in DTYPES.values():
        x, weight, bias, _ = problem(dtype, target.device, size)
        arguments = weight, bias if has_bias else None, activation
        assert torch.equal(forward(x, *arguments), forward(x.contiguous(), *arguments)), dtype


@every_dtype
@every_size
def test_each_gradient_has_the_same_bits_alone(size, dtype, target, poison):
    """grad_input alone is a forward convolution with the filter turned around."""
    x, weight, _, grad_output = problem(dtype, target.device, size)
    together = backward(x, weight, grad_output)
    for mask in MASKS:
        alone = backward(x, weight, grad_output, mask)
        for wanted, one, name, asked in zip(together, alone, GRADIENTS, mask, strict=True):
            assert torch.equal(one, wanted) if asked else one is None or one.numel() == 0, (name, mask)
    walked = backward(x.contiguous(), weight, grad_output.contiguous())
    assert torch.equal(together[0], walked[0])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("size", [(9, 7), (14, 10), (5, 3), (3, 11)], ids=["2x2", "3x3", "1x1", "1x3"])
@every_dtype
def test_non_finite_values_reach_what_their_windows_contain(dtype, size, value, target):
    """Of each tensor in turn: pixels of every kind of phase, and every tap; a tap that looks at padding is skipped."""
    tensors = problem(dtype, target.device, size, channels=8, batch=1)
    pixels = [(0, 0, p, q) for p in (0, size[0] // 2, size[0] - 1) for q in (0, size[1] // 2, size[1] - 1)]
    taps = [(0, 0, r, s) for r in range(3) for s in range(3)]
    for changed, places in ((0, pixels), (1, taps), (3, pixels)):
        for place in places:
            x, weight, bias, grad_output = (
                t.clone().index_put_([torch.tensor(i) for i in place], torch.tensor(value, dtype=dtype))
                if i == changed
                else t
                for i, t in enumerate(tensors)
            )
            results, wanted = (
                (forward(x, weight, bias, backend=backend), *backward(x, weight, grad_output, backend=backend))
                for backend in ("cuda", "reference")
            )
            for result, exact, name in zip(results, wanted, ("output", *GRADIENTS), strict=True):
                assert torch.equal(result.isfinite(), exact.isfinite()), (name, changed, place)


@every_dtype
@pytest.mark.parametrize("size", [(9, 7), (14, 10)], ids=["tile-2", "tile-3"])
@pytest.mark.parametrize("shift", [8, 3], ids=["vectors", "no-vectors"])
def test_slices_of_larger_tensors(shift, size, dtype, target):
    """Strides that no tensor of this size has; from an odd channel on there are no vectors, and walks take over."""
    x, weight, bias, grad_output = problem(dtype, target.device, size)

    def sliced(t):
        wide = t.new_full((t.shape[0] + 1, t.shape[1] + 24, size[0] + 2, size[1] + 3), float("nan"))
        wide = wide.contiguous(memory_format=torch.channels_last)
        return wide[1:, shift : shift + t.shape[1], 1:-1, 2:-1].copy_(t)

    assert_right(sliced(x), weight, bias, sliced(grad_output))


# size, kernel, stride, padding, dilation
OTHERS = {
    "four-rows": ((16, 8), (3, 3), *same()),
    "four-columns": ((10, 13), (3, 3), *same()),
    "less-padding-below": ((9, 7), (3, 3), [1, 1], [5, 3, 4, 4], [5, 4]),
    "more-padding-right": ((9, 7), (3, 3), [1, 1], [5, 5, 4, 6], [5, 4]),
    "padding-shifted": ((9, 7), (3, 3), [1, 1], [4, 6, 5, 3], [5, 4]),
    "no-padding": ((12, 11), (3, 3), [1, 1], [0, 0, 0, 0], [5, 4]),
    "strided": ((9, 7), (3, 3), [2, 2], [1, 1, 1, 1], [1, 1]),
    "5x5": ((9, 7), (5, 5), [1, 1], [10, 10, 8, 8], [5, 4]),
    "one-pixel": ((1, 1), (3, 3), *same((1, 1))),
    "three-pixels": ((3, 3), (3, 3), *same((1, 1))),
    "dilation-over-size": ((4, 3), (3, 3), *same((7, 40))),
}


@every_dtype
@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_what_only_looks_like_short_phases(other, dtype, target, poison):
    size, kernel, *geometry = other
    assert_right(*problem(dtype, target.device, size, geometry=geometry, kernel=kernel), geometry=geometry)


@every_dtype
@pytest.mark.parametrize("size", [(9, 7), (14, 10)], ids=["tile-2", "tile-3"])
def test_huge_sizes_take_the_generic_kernels(size, dtype, target, monkeypatch):
    monkeypatch.setenv("FASTSEG_FORCE_INDEX64", "1")
    assert_right(*problem(dtype, target.device, size))
