"""The operators that put a batch norm in eval mode, and an activation, behind a convolution."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

import fastseg
from fastseg.ops import batch_norm
from fastseg.ops.activation import ACTIVATIONS, apply_activation
from fastseg.ops.batch_norm import batch_norm_activation_, fold_batch_norm, folded_conv2d
from fastseg.testing import STEEPEST_ACTIVATION, assert_within, expected

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
EPS = 1e-3
# Fewer channels than a vector, whole vectors, one over; an image of one pixel, and an odd number of them.
SHAPES = [(2, 3, 5, 7), (1, 32, 4, 4), (2, 33, 3, 5), (3, 17, 1, 1), (0, 8, 4, 4)]


def statistics(channels, dtype, affine=True, biased=True):
    """bias, mean, variance, gamma, beta: [channels]; those of a norm stay float32 beside lower precision."""
    torch.manual_seed(channels)
    kept = torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
    bias = torch.randn(channels).to(dtype) if biased else None
    mean, variance = torch.randn(channels).to(kept), (torch.rand(channels) + 0.5).to(kept)
    gamma, beta = (torch.randn(channels).to(kept), torch.randn(channels).to(kept)) if affine else (None, None)
    return bias, mean, variance, gamma, beta


def exact(y, bias, mean, variance, gamma, beta, activation):
    """Value and element-wise bound, in float64."""
    y, bias, mean, variance, gamma, beta = (
        None if t is None else t.double() for t in (y, bias, mean, variance, gamma, beta)
    )
    z = y if bias is None else y + bias.view(-1, 1, 1)
    value = apply_activation(F.batch_norm(z, mean, variance, gamma, beta, eps=EPS), activation)
    scale = (1 if gamma is None else gamma.abs()) / (variance + EPS).sqrt()
    absolute = (y.abs() + mean.abs().view(-1, 1, 1) + (0 if bias is None else bias.abs().view(-1, 1, 1))) * scale.view(
        -1, 1, 1
    )
    absolute = absolute + (0 if beta is None else beta.abs().view(-1, 1, 1))
    return value, STEEPEST_ACTIVATION * absolute + value.abs()


# The reference rounds before the activation too, which lower precision would show.
KERNELS = [(batch_norm_activation_, dtype) for dtype in DTYPES] + [(batch_norm._apply_, dtype) for dtype in DTYPES[:2]]


@pytest.mark.parametrize(("kernel", "dtype"), KERNELS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_norm_and_activation_in_place(dtype, shape, layout, kernel):
    for activation, affine, biased in itertools.product(ACTIVATIONS, (True, False), (True, False)):
        norm = statistics(shape[1], dtype, affine, biased)
        y = (3 * torch.randn(shape)).to(dtype).contiguous(memory_format=layout)
        value, absolute = exact(y, *norm, activation)
        result = kernel(y, *norm, EPS, activation)
        assert result.data_ptr() == y.data_ptr()
        assert_within(y, expected(value, absolute, 6, dtype), f"{activation}, affine {affine}, bias {biased}")


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_not_finite(value, activation):
    norm = (None, torch.zeros(20), torch.ones(20) - EPS, None, None)
    y = torch.full((1, 20, 2, 3), value)
    wanted = apply_activation(y.clone(), activation)
    torch.testing.assert_close(batch_norm_activation_(y, *norm, EPS, activation), wanted, equal_nan=True)


def test_layout_that_is_neither():
    norm = statistics(4, torch.float32)
    with pytest.raises(RuntimeError, match="contiguous or channels_last"):
        batch_norm_activation_(torch.randn(1, 4, 6, 6)[:, :, ::2, ::2], *norm, EPS, "relu")


def test_norm_of_another_size():
    with pytest.raises(RuntimeError, match=r"expected .* \[4\]"):
        batch_norm_activation_(torch.randn(1, 4, 6, 6), *statistics(5, torch.float32), EPS, "relu")
    with pytest.raises(RuntimeError, match=r"expected .* \[4\]"):
        fold_batch_norm(torch.randn(4, 2, 3, 3), *statistics(5, torch.float32), EPS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("scale_weight", [False, True])
def test_convolution_norm_activation(dtype, groups, activation, scale_weight):
    torch.manual_seed(0)
    x = torch.randn(2, 8, 9, 7, dtype=dtype).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(16, 8 // groups, 3, 3, dtype=dtype)
    norm = statistics(16, dtype)
    geometry = ([2, 1], [1, 2], [1, 2], groups)
    y = F.conv2d(x.double(), weight.double(), None, *geometry)
    value, absolute = exact(y, *norm, activation)
    products = F.conv2d(x.double().abs(), weight.double().abs(), None, *geometry)
    scale = (norm[3].double() / (norm[2].double() + EPS).sqrt()).abs().view(-1, 1, 1)
    wanted = expected(value, absolute + STEEPEST_ACTIVATION * products * scale, weight[0].numel() + 6, dtype)
    for backend in ("native", "cpu") if groups in (1, 8) else ("native",):
        y = folded_conv2d(x, weight, *norm, EPS, *geometry, activation, scale_weight, backend)
        assert_within(y, wanted, f"folded on {backend}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("groups", [1, 8])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_output_is_scaled_after_the_convolution(dtype, groups, activation):
    """Bit for bit: a weight of lower precision must not be rounded again."""
    torch.manual_seed(0)
    x = torch.randn(1, 8, 9, 7).to(dtype).contiguous(memory_format=torch.channels_last)
    weight, norm = torch.randn(8, 8 // groups, 3, 3).to(dtype), statistics(8, dtype)
    backend = "native" if groups == 1 else "cpu"
    y = fastseg.ops.conv2d(x, weight, None, 1, 1, 1, groups, backend=backend)
    wanted = batch_norm_activation_(y, *norm, EPS, activation)
    actual = folded_conv2d(x, weight, *norm, EPS, [1, 1], [1, 1], [1, 1], groups, activation, False, backend)
    assert torch.equal(actual, wanted)
