"""Separable convolution and ASPP beyond test_contract.py: projection, statistics, scales, tracing, mistakes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import fastseg
from fastseg.ops.geometry import POINTWISE, same_padding
from fastseg.ops.library import OVERLOADS
from fastseg.testing import (
    assert_alike,
    assert_within,
    expected_branches,
    expected_conv,
    expected_separable,
    random_tensor,
)
from tests.conftest import RUNG

LAYOUTS = pytest.mark.parametrize(
    "layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"]
)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
WIDTHS, KERNELS, RATES = (8, 16, 8), (1, 3, 3), (1, 2, 4)


def tensor(target, seed, *shape, dtype=torch.float32):
    return random_tensor(shape, dtype, seed=seed, device=target.device)


def branches(target, dtype=torch.float32, channels=16):
    """x, dense weights, a bias and a scale of all branches."""
    x = tensor(target, 1, 2, channels, 9, 8, dtype=dtype)
    weights = [
        tensor(target, 2 + i, width, channels, kernel, kernel, dtype=dtype)
        for i, (width, kernel) in enumerate(zip(WIDTHS, KERNELS, strict=True))
    ]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return x, weights, tensor(target, 6, sum(WIDTHS), dtype=wide), tensor(target, 7, sum(WIDTHS), dtype=wide)


def skip_unless_taken(target, dtype):
    if not target.takes(dtype):
        pytest.skip(f"{target} has no kernels for {dtype}")


@DTYPES
@LAYOUTS
def test_a_bias_of_each_image(dtype, layout, target):
    skip_unless_taken(target, dtype)
    x = tensor(target, 1, 3, 24, 7, 6, dtype=dtype).contiguous(memory_format=layout)
    weight = tensor(target, 2, 16, 24, 1, 1, dtype=dtype)
    bias = tensor(target, 3, 3, 16, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    y = OVERLOADS["dilated_conv2d"][target.backend](x, weight, bias, *POINTWISE, "relu")
    for n in range(3):
        options = dict(roundoff=target.roundoff(dtype))
        wanted = expected_conv(x[n : n + 1], weight, bias[n], *POINTWISE, "relu", **options).output
        assert_within(y[n : n + 1], wanted, f"image {n}")


def test_a_bias_of_each_image_has_a_gradient(target):
    x, weight = tensor(target, 1, 3, 8, 5, 4), tensor(target, 2, 6, 8, 1, 1)
    bias = tensor(target, 3, 3, 6).requires_grad_()
    y = OVERLOADS["dilated_conv2d"][target.backend](x, weight, bias, *POINTWISE, "none")
    grad = tensor(target, 4, *y.shape)
    y.backward(grad)
    assert_alike(bias.grad, grad.sum((2, 3)))


@DTYPES
@LAYOUTS
def test_scale_of_branches(dtype, layout, target):
    """act(scale * conv + bias): norms in eval mode, without rounding a scaled weight."""
    skip_unless_taken(target, dtype)
    x, weights, bias, scale = branches(target, dtype)
    x = x.contiguous(memory_format=layout)
    y, _ = OVERLOADS["aspp_branches"][target.backend](x, weights, bias, list(RATES), "relu", "concat", False, scale)
    parts = scale.double().split(WIDTHS)
    scaled = [w.double() * part.view(-1, 1, 1, 1) for w, part in zip(weights, parts, strict=True)]
    wanted = expected_branches(x, scaled, bias, RATES, "relu", roundoff=target.roundoff(dtype))[0]
    assert_within(y, wanted, "output")


@DTYPES
@pytest.mark.parametrize("reduction", ["concat", "sum"])
def test_statistics_of_branches(dtype, reduction, target):
    skip_unless_taken(target, dtype)
    x, weights, bias, _ = branches(target, dtype)
    if reduction == "sum":
        weights = [weight[:8] for weight in weights]
    channels = 8 if reduction == "sum" else sum(WIDTHS)
    args = (x, weights, bias[:channels], list(RATES), "none", reduction)
    y, sums = OVERLOADS["aspp_branches"][target.backend](*args, True, None)
    exact, wanted = OVERLOADS["aspp_branches"]["reference"](*args, True, None)
    assert sums.dtype == torch.float64
    assert sums.shape == (2, channels)
    count = y.numel() // channels
    # A sum of `count` values, each of them off by what the output may be off by.
    bound = expected_branches(x, weights, bias[:channels], RATES, "none", reduction, roundoff=target.roundoff(dtype))[0]
    slack = 1.0 + count * 2.0**-20
    sums_of_bounds = (
        bound.bound.sum((0, 2, 3)),
        (2 * bound.bound * exact.double().abs() + bound.bound**2).sum((0, 2, 3)),
    )
    for own, value, allowed in zip(sums, wanted, sums_of_bounds, strict=True):
        assert bool(((own - value).abs() <= slack * allowed + 1e-6 * value.abs()).all())


@DTYPES
@LAYOUTS
def test_scales_of_a_separable_convolution(dtype, layout, target):
    skip_unless_taken(target, dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x = tensor(target, 1, 2, 16, 9, 8, dtype=dtype).contiguous(memory_format=layout)
    depthwise, pointwise = tensor(target, 2, 16, 1, 3, 3, dtype=dtype), tensor(target, 3, 24, 16, 1, 1, dtype=dtype)
    first_bias, bias, first_scale, scale = (
        tensor(target, 4 + i, 16 if i % 2 == 0 else 24, dtype=wide) for i in range(4)
    )
    geometry = same_padding(depthwise, 2)
    y = OVERLOADS["separable_conv2d"][target.backend](
        x, depthwise, pointwise, first_bias, bias, *geometry, "relu", "relu", first_scale, scale
    )
    scaled = depthwise.double() * first_scale.double().view(-1, 1, 1, 1)
    scaled_pointwise = pointwise.double() * scale.double().view(-1, 1, 1, 1)
    (wanted,) = expected_separable(
        x, scaled, scaled_pointwise, first_bias, bias, *geometry, "relu", "relu", roundoff=target.roundoff(dtype)
    )
    assert_within(y, wanted, "output")


def aspp_operands(target, dtype=torch.float64, pooling="last"):
    x, weights, _, _ = branches(target, dtype)
    biases = [tensor(target, 10 + i, width, dtype=dtype) for i, width in enumerate(WIDTHS)]
    total = sum(WIDTHS) + 8
    pool = tensor(target, 20, 8, 16, 1, 1, dtype=dtype), tensor(target, 21, 8, dtype=dtype)
    return (
        x,
        weights,
        biases,
        (*pool, tensor(target, 22, 12, total, 1, 1, dtype=dtype), tensor(target, 23, 12, dtype=dtype)),
    )


def by_parts(x, weights, biases, tail, pooling):
    pool_weight, pool_bias, project_weight, project_bias = tail
    found = [
        F.relu(F.conv2d(x, w, b, padding=rate * (w.shape[2] // 2), dilation=rate))
        for w, b, rate in zip(weights, biases, RATES, strict=True)
    ]
    pooled = F.relu(F.conv2d(x.mean((2, 3), keepdim=True), pool_weight, pool_bias)).expand(-1, -1, *x.shape[2:])
    found.insert(0 if pooling == "first" else len(found), pooled)
    return F.relu(F.conv2d(torch.cat(found, 1), project_weight, project_bias))


@pytest.mark.parametrize("pooling", ["last", "first"])
@LAYOUTS
def test_pooling_and_projection(pooling, layout, target):
    dtype = torch.float64 if target.takes(torch.float64) else torch.float32
    x, weights, biases, tail = aspp_operands(target, dtype)
    x = x.contiguous(memory_format=layout)
    tensors = [t.requires_grad_() for t in (x, *weights, *biases, *tail)]
    y = fastseg.ops.aspp(x, weights, biases, RATES, *tail, pooling=pooling, backend=target.backend)
    wanted = by_parts(x, weights, biases, tail, pooling)
    grad = random_tensor(tuple(y.shape), dtype, seed=30, device=target.device)
    assert_alike(y, wanted)
    for own, other in zip(
        torch.autograd.grad(y, tensors, grad), torch.autograd.grad(wanted, tensors, grad), strict=True
    ):
        assert_alike(own, other)


@pytest.mark.skipif(RUNG in ("interpreter", "host"), reason="tracing does not depend on the kernel")
@LAYOUTS
def test_opcheck(layout, target):
    x, weights, bias, scale = branches(target)
    x = x.contiguous(memory_format=layout).requires_grad_()
    operators = torch.ops.fastseg.aspp_branches, torch.ops.fastseg.aspp_branches_backward
    forward, backward = (getattr(operator, target.backend) for operator in operators)
    weights = [weight.requires_grad_() for weight in weights]
    torch.library.opcheck(forward, (x, weights, bias, list(RATES), "relu", "concat", False, None))
    detached = [x.detach(), [weight.detach() for weight in weights]]
    torch.library.opcheck(forward, (*detached, bias, list(RATES), "none", "concat", True, scale))
    grad = torch.ones(2, sum(WIDTHS), 9, 8, device=target.device)
    for needs in ((True, True), (True, False), (False, True)):
        torch.library.opcheck(backward, (grad, *detached, list(RATES), "concat", *needs))
    separable = getattr(torch.ops.fastseg.separable_conv2d, target.backend)
    filters = tensor(target, 2, 16, 1, 3, 3).requires_grad_(), tensor(target, 3, 24, 16, 1, 1).requires_grad_()
    torch.library.opcheck(separable, (x, *filters, None, None, [1, 2], [2, 1, 0, 3], [2, 1], "relu", "silu"))
    several = getattr(torch.ops.fastseg.separable_aspp_branches, target.backend)
    pointwise = [tensor(target, 5 + i, width, 16, 1, 1).requires_grad_() for i, width in enumerate(WIDTHS)]
    depthwise = [tensor(target, 9 + i, 16, 1, 3, 3).requires_grad_() for i in range(2)]
    torch.library.opcheck(several, (x, depthwise, pointwise, None, None, [2, 4], "relu", "none", False, None, None))


@pytest.mark.skipif(RUNG in ("interpreter", "host"), reason="tracing does not depend on the kernel")
def test_compile_fullgraph_with_dynamic_shapes(target):
    _, weights, biases, tail = aspp_operands(target, torch.float32)
    depthwise, pointwise = tensor(target, 2, 16, 1, 3, 3), tensor(target, 3, 16, 16, 1, 1)

    def block(x):
        y = fastseg.ops.separable_conv2d(
            x, depthwise, pointwise, padding=2, dilation=2, depthwise_activation="relu", backend=target.backend
        )
        return fastseg.ops.aspp(y, weights, biases, RATES, *tail, backend=target.backend)

    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, dynamic=True)
    for size in ((9, 10), (12, 7)):
        x = tensor(target, 1, 2, 16, *size).requires_grad_()
        eager, traced = block(x), compiled(x)
        assert_alike(traced, eager)
        own, other = (torch.autograd.grad(y.sum(), x)[0] for y in (traced, eager))
        assert_alike(own, other)


def test_autocast(target):
    x, weights, biases, tail = aspp_operands(target, torch.float32)
    with torch.autocast(target.device, torch.bfloat16):
        y = fastseg.ops.aspp(x, weights, biases, RATES, *tail, backend=target.backend)
        z = fastseg.ops.separable_conv2d(
            x, tensor(target, 2, 16, 1, 3, 3), tensor(target, 3, 24, 16, 1, 1), padding=1, backend=target.backend
        )
    assert y.dtype == z.dtype == torch.bfloat16


def test_mistakes_are_told(target):
    x, weights, biases, tail = aspp_operands(target, torch.float32)
    backend = target.backend
    for change, sentence in (
        (lambda: fastseg.ops.aspp(x, weights, biases, RATES[:2], backend=backend), "one weight, bias and dilation"),
        (
            lambda: fastseg.ops.aspp(x, [w[:, :3] for w in weights], None, RATES, backend=backend),
            r"expected weights \[K",
        ),
        (lambda: fastseg.ops.aspp(x, weights, None, (1, 2, 0), backend=backend), "positive ints"),
        (lambda: fastseg.ops.aspp(x, weights, None, RATES, reduction="sum", backend=backend), "branches of one width"),
        (lambda: fastseg.ops.aspp(x, weights, None, RATES, *tail[:2], backend=backend), "project_weight beside"),
        (lambda: fastseg.ops.aspp(x, weights, None, RATES, None, None, tail[2], backend=backend), "project_weight of"),
        (lambda: fastseg.ops.aspp(x.double(), weights, None, RATES, backend=backend), "like the input"),
        (lambda: fastseg.ops.aspp(x[0, 0], weights, None, RATES, backend=backend), r"input \[N, C, H, W\]"),
        (lambda: fastseg.ops.separable_conv2d(x, weights[1][:, :2], weights[0], backend=backend), ""),
    ):
        with pytest.raises(RuntimeError, match=sentence):
            change()
    for change in (dict(reduction="mean"), dict(pooling="middle"), dict(activation="tanh")):
        with pytest.raises(ValueError, match="expected .* to be one of"):
            fastseg.ops.aspp(x, weights, biases, RATES, *tail, backend=backend, **change)
