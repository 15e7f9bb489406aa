"""Shapes that reach every path of the C++ CPU kernels of dense convolution: blocks, tiles, splits, layouts, threads."""

from __future__ import annotations

import pytest
import torch

from fastseg.ops.library import OVERLOADS
from fastseg.testing import assert_within, expected_conv, random_tensor
from tests.conftest import RUNG, on_threads

pytestmark = pytest.mark.skipif(RUNG != "cpu", reason="the CPU kernels have their own rung")

# batch, channels, size, outputs, kernel, stride, padding, dilation
SHAPES = {
    "several-depths": (1, 1100, (4, 5), 24, 3, 1, 1, 1),
    "several-column-blocks": (1, 520, (3, 3), 300, 1, 1, 0, 1),
    "one-long-row": (2, 24, (9, 10), 40, 1, 1, 0, 1),
    "pitch-of-a-page": (1, 1024, (2, 17), 16, 1, 1, 0, 1),
    "taps-in-one-piece": (1, 48, (6, 33), 32, 3, 1, 1, 1),
    "taps-apart": (1, 48, (9, 20), 32, 3, 1, 2, 2),
    "no-tap-everywhere": (1, 160, (5, 6), 16, 2, 1, 2, 3),
    "one-tap-everywhere": (1, 160, (5, 5), 16, 3, 1, 6, 6),
    "strided-by-tap": (1, 160, (9, 8), 24, 3, 2, 1, 1),
    "many-pixels": (1, 16, (80, 75), 200, 1, 1, 0, 1),
    "few-pixels-many-columns": (1, 600, (2, 2), 900, 1, 1, 0, 1),
    "few-outputs": (2, 260, (7, 9), 21, 3, 1, 2, 2),
    "few-outputs-strided": (1, 260, (7, 9), 5, 3, 2, 1, 1),
    "splits": (3, 16, (40, 40), 24, 3, 1, 1, 1),
}
DTYPES = [torch.float32, torch.float64, torch.bfloat16]
LAYOUTS = [torch.contiguous_format, torch.channels_last]


@pytest.mark.parametrize("threads", [1, 5])
@pytest.mark.parametrize("layout", LAYOUTS, ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_every_path_is_within_the_bound(shape, dtype, layout, threads, poison):
    batch, channels, size, outputs, kernel, stride, padding, dilation = shape
    x = random_tensor((batch, channels, *size), dtype, seed=1, memory_format=layout)
    weight = random_tensor((outputs, channels, kernel, kernel), dtype, seed=2, memory_format=layout)
    bias = random_tensor((outputs,), dtype, seed=3)
    geometry = ([stride] * 2, [padding] * 4, [dilation] * 2)
    with on_threads(threads):
        y = OVERLOADS["dilated_conv2d"]["cpu"](x, weight, bias, *geometry, "relu")
        grad_y = random_tensor(tuple(y.shape), dtype, seed=4, memory_format=layout)
        grads = OVERLOADS["dilated_conv2d_backward"]["cpu"](grad_y, x, weight, *geometry, [True] * 3)
    wanted = expected_conv(x, weight, bias, *geometry, "relu", grad_y)
    for name, result, bound in zip(("y", "grad_x", "grad_weight", "grad_bias"), (y, *grads), wanted, strict=True):
        assert_within(result, bound, name)
