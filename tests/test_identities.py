"""Promise 3: identities of convolution that need no reference, over the convolutions of every backend."""

from __future__ import annotations

import pytest
import torch

import fastseg
from fastseg.testing import integer_tensor
from tests.conftest import SLOW_RUNG

# Integers make both sides exact, so that each identity is an equality.
GEOMETRIES = {
    "3x3": dict(padding=(1, 1)),
    "3x3-d3": dict(padding=(3, 3), dilation=(3, 3)),
    "3x3-d2x4-s2": dict(padding=(2, 4), dilation=(2, 4), stride=(2, 2)),
}


FILTERS = {"depthwise": (8, 1, 3, 3), "dense": (6, 8, 3, 3)}


def convolve(target, x, weight, bias=None, **geometry):
    groups = x.shape[1] // weight.shape[1]
    return fastseg.ops.conv2d(x, weight, bias, groups=groups, backend=target.backend, **geometry)


@pytest.fixture(params=[torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
def image(request, target):
    x = integer_tensor((2, 8, 9, 11), torch.float32, seed=1, device=target.device)
    return x.contiguous(memory_format=request.param)


@pytest.fixture(params=FILTERS.values(), ids=FILTERS)
def tensors(request, image, target):
    return image, integer_tensor(request.param, torch.float32, seed=2, device=target.device)


@pytest.mark.parametrize("rate", [2, 3] if SLOW_RUNG else [2, 3, 6])
def test_dilation_is_a_zero_stuffed_kernel(rate, tensors, target):
    x, weight = tensors
    stuffed = weight.new_zeros(*weight.shape[:2], 2 * rate + 1, 2 * rate + 1)
    stuffed[:, :, ::rate, ::rate] = weight
    dilated = convolve(target, x, weight, padding=rate, dilation=rate)
    assert torch.equal(dilated, convolve(target, x, stuffed, padding=rate))


@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
def test_channels_are_independent(geometry, image, target):
    weight = integer_tensor(FILTERS["depthwise"], torch.float32, seed=2, device=target.device)
    parts = [convolve(target, image[:, i:j], weight[i:j], **geometry) for i, j in ((0, 3), (3, 8))]
    assert torch.equal(convolve(target, image, weight, **geometry), torch.cat(parts, 1))


@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
def test_output_channels_are_independent_and_input_channels_add_up(geometry, image, target):
    weight = integer_tensor(FILTERS["dense"], torch.float32, seed=2, device=target.device)
    y = convolve(target, image, weight, **geometry)
    assert torch.equal(
        y, torch.cat([convolve(target, image, part, **geometry) for part in (weight[:2], weight[2:])], 1)
    )
    parts = [convolve(target, image[:, i:j], weight[:, i:j], **geometry) for i, j in ((0, 3), (3, 8))]
    assert torch.equal(y, parts[0] + parts[1])


@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
def test_images_are_independent(geometry, tensors, target):
    x, weight = tensors
    parts = [convolve(target, x[i : i + 1], weight, **geometry) for i in range(2)]
    assert torch.equal(convolve(target, x, weight, **geometry), torch.cat(parts))


@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
def test_linear_in_the_image_and_in_the_filter(geometry, tensors, target):
    x, weight = tensors
    other = integer_tensor(tuple(x.shape), x.dtype, seed=3, device=target.device)
    filters = integer_tensor(tuple(weight.shape), x.dtype, seed=4, device=target.device)
    y = convolve(target, x, weight, **geometry)
    assert torch.equal(
        convolve(target, 2 * x + other, weight, **geometry), 2 * y + convolve(target, other, weight, **geometry)
    )
    assert torch.equal(convolve(target, x, weight - filters, **geometry), y - convolve(target, x, filters, **geometry))


@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
def test_gradients_are_adjoint(geometry, tensors, target):
    """<conv(x, w), g> = <x, conv^T(g, w)> = <w, grad_weight(x, g)>."""
    x, weight = (t.detach().requires_grad_() for t in tensors)
    y = convolve(target, x, weight, **geometry)
    g = integer_tensor(tuple(y.shape), y.dtype, seed=5, device=target.device)
    y.backward(g)
    product = (y * g).sum()
    assert product == (x * x.grad).sum()
    assert product == (weight * weight.grad).sum()


@pytest.mark.parametrize("filter", FILTERS.values(), ids=FILTERS)
def test_a_shifted_image_gives_a_shifted_result(filter, target):
    x = integer_tensor((1, 8, 12, 12), torch.float32, seed=6, device=target.device)
    weight = integer_tensor(filter, torch.float32, seed=7, device=target.device)
    y = convolve(target, x, weight)
    shifted = convolve(target, x.roll((2, 3), (2, 3)), weight)
    assert torch.equal(shifted[:, :, 2:, 3:], y[:, :, :-2, :-3])
