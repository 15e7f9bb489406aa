"""Shapes that reach every path of the depthwise kernel for two rows at a time, and every way to store its targets."""

from __future__ import annotations

import pytest
import torch

from fastseg.ops.library import OVERLOADS
from fastseg.testing import assert_within, expected_conv, integer_tensor, random_tensor
from tests.conftest import RUNG, on_threads

pytestmark = pytest.mark.skipif(RUNG != "cpu", reason="the CPU kernels have their own rung")

# channels, size, stride, padding, dilation
SHAPES = {
    "no-padding": (48, (6, 17), 1, 0, 1),
    "no-padding-strided": (48, (7, 18), 2, 0, 1),
    "targets-without-sources": (24, (2, 3), 1, 4, 1),
    "targets-without-sources-strided": (24, (2, 3), 2, 5, 1),
    "two-runs": (40, (7, 27), 1, 2, 2),
    "short-runs": (40, (13, 16), 1, 6, 6),
    "runs-of-one": (40, (5, 5), 1, 9, 9),
    "runs-without-sources": (40, (3, 3), 1, 9, 7),
    "one-vector": (16, (9, 8), 1, 1, 1),
    "several-blocks": (330, (9, 8), 1, 1, 1),
    "several-bands": (64, (67, 65), 1, 1, 1),
    "several-bands-dilated": (64, (67, 65), 1, 3, 3),
    "several-bands-strided": (64, (97, 98), 2, 1, 1),
}
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def forward(x, weight, bias, stride, padding, dilation, activation="none", threads=1):
    geometry = ([stride] * 2, [padding] * 4, [dilation] * 2)
    with on_threads(threads):
        return OVERLOADS["depthwise_conv2d"]["cpu"](x, weight, bias, *geometry, activation)


def check(channels, size, stride, padding, dilation, dtype):
    x = random_tensor((2, channels, *size), dtype, seed=1, memory_format=torch.channels_last)
    weight = random_tensor((channels, 1, 3, 3), dtype, seed=2)
    bias = random_tensor((channels,), dtype, seed=3)
    y = forward(x, weight, bias, stride, padding, dilation, "hardswish")
    geometry = ([stride] * 2, [padding] * 4, [dilation] * 2)
    assert_within(y, expected_conv(x, weight, bias, *geometry, "hardswish").output, "y")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("width", range(1, 15))
def test_rows_of_any_width_are_within_the_bound(width, stride, dtype, poison):
    check(40, (5 * stride, width * stride), stride, 1, 1, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_every_shape_is_within_the_bound(shape, dtype, poison):
    check(*shape, dtype)


# Targets too large for the caches are stored another way, in whole cache lines: as vectors, or in tiles of several.
@pytest.mark.parametrize(("stride", "dilation"), [(1, 1), (2, 1), (1, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("channels", [64, 72])
@pytest.mark.parametrize("width", [None, 7, 8])
def test_large_tensors_are_exact_with_any_number_of_threads(width, channels, dtype, stride, dilation, poison):
    side = {torch.float64: 151, torch.float32: 211, torch.bfloat16: 307}[dtype]
    size = (side, side) if width is None else (side * side // width, width)
    x = integer_tensor((1, channels, *size), dtype).contiguous(memory_format=torch.channels_last)
    weight = integer_tensor((channels, 1, 3, 3), dtype, seed=1)
    threads = (1, 2, 5) if width is None else (2,)
    results = [forward(x, weight, None, stride, dilation, dilation, threads=count) for count in threads]
    wanted = torch.nn.functional.conv2d(x.double(), weight.double(), None, stride, dilation, dilation, channels)
    for y in results:
        assert torch.equal(y, wanted.to(dtype))


def check_gradients(channels, side, kernel, dilation, dtype):
    """Output and gradients of integers, exact with 1, 2 and 5 threads."""
    x, grad_y = (integer_tensor((1, channels, side, side), dtype, seed=seed) for seed in (0, 1))
    x, grad_y = (t.contiguous(memory_format=torch.channels_last) for t in (x, grad_y))
    weight = integer_tensor((channels, 1, kernel, kernel), dtype, seed=2)
    padding = dilation * (kernel // 2)
    geometry = ([1, 1], [padding] * 4, [dilation] * 2)
    results = []
    for threads in (1, 2, 5):
        y = forward(x, weight, None, 1, padding, dilation, threads=threads)
        with on_threads(threads):
            grads = OVERLOADS["depthwise_conv2d_backward"]["cpu"](grad_y, x, weight, *geometry, [True, True, False])
        results.append((y, *grads[:2]))
    x, weight = x.double().requires_grad_(), weight.double().requires_grad_()
    y = torch.nn.functional.conv2d(x, weight, None, 1, padding, dilation, channels)
    wanted = (y, *torch.autograd.grad(y, (x, weight), grad_y.double()))
    for result in results:
        assert all(torch.equal(a, b.to(dtype)) for a, b in zip(result, wanted, strict=True))


# Rows by tiles and by runs are stored that way too, and gradients of the input are.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("channels", [64, 72])
@pytest.mark.parametrize(("kernel", "dilation"), [(3, 1), (3, 2), (3, 40), (5, 2)])
def test_large_gradients_are_exact_with_any_number_of_threads(kernel, dilation, channels, dtype, poison):
    check_gradients(channels, {torch.float64: 81, torch.float32: 113}[dtype], kernel, dilation, dtype)


# Pixels that compete for a few sets of the caches are copied first, where vectors are parts of cache lines.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("channels", [256, 512])
@pytest.mark.parametrize(("kernel", "dilation"), [(3, 1), (3, 2), (3, 7), (5, 2), (7, 1)])
def test_competing_pixels_give_exact_results_with_any_number_of_threads(kernel, dilation, channels, dtype, poison):
    check_gradients(channels, 23, kernel, dilation, dtype)
