"""PyTorch's own sample and error inputs for conv2d and for bilinear interpolate, run on every backend."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.testing._internal.common_methods_invocations import op_db

import fastseg
from fastseg.ops.conv2d import operator_of
from fastseg.testing import assert_within, expected_conv, expected_upsample

CONV2D = next(op for op in op_db if op.name == "nn.functional.conv2d" and not op.variant_test_name)
INTERPOLATE = next(op for op in op_db if op.name == "nn.functional.interpolate" and op.variant_test_name == "bilinear")
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64, torch.int64]


def samples(dtype, device):
    generator = CONV2D.sample_inputs_func(CONV2D, device, dtype, requires_grad=False)
    return [sample for sample in generator if isinstance(sample.input, torch.Tensor)]


def operator(sample) -> str:
    return operator_of(sample.input.shape[-3], sample.kwargs.get("groups", 1))


def depthwise_samples(device):
    """PyTorch's samples, and the same with every channel a group: its own list has few of those."""
    for sample in samples(torch.float32, device):
        if operator(sample) == "depthwise_conv2d":
            yield sample
        elif sample.input.dim() == 4:
            weight, *rest = sample.args
            channels = sample.input.shape[1]
            bias = rest[0][:1].repeat(channels) if rest and rest[0] is not None else None
            sample.args = (weight[:1, :1].repeat(channels, 1, 1, 1), bias)
            sample.kwargs = sample.kwargs | {"groups": channels}
            if channels > 1:
                yield sample


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_auto_runs_every_sample(dtype, target):
    """Under "auto" everything PyTorch can compute is computed, in every dtype it takes."""
    count = 0
    for sample in samples(dtype, target.device):
        try:
            native = CONV2D.op(sample.input, *sample.args, **sample.kwargs)
        except RuntimeError as error:
            with pytest.raises(type(error)):
                fastseg.ops.conv2d(sample.input, *sample.args, **sample.kwargs)
            continue
        y = fastseg.ops.conv2d(sample.input, *sample.args, **sample.kwargs)
        count += 1
        assert y.shape == native.shape
        assert y.dtype == native.dtype
        if operator(sample) == "grouped_conv2d":
            assert torch.equal(y, native)
    if dtype == torch.float32:
        assert count > 20


def dilated_samples(device):
    """PyTorch's samples with one group."""
    return [sample for sample in samples(torch.float32, device) if operator(sample) == "dilated_conv2d"]


@pytest.mark.parametrize("samples_of", [depthwise_samples, dilated_samples], ids=["depthwise", "dilated"])
def test_named_backend_runs_every_sample(samples_of, target):
    count = 0
    for sample in samples_of(target.device):
        y = fastseg.ops.conv2d(sample.input, *sample.args, **sample.kwargs, backend=target.backend)
        native = CONV2D.op(sample.input, *sample.args, **sample.kwargs)
        assert y.shape == native.shape
        double = [t.double() if isinstance(t, torch.Tensor) else t for t in sample.args]
        exact = CONV2D.op(sample.input.double(), *double, **sample.kwargs)
        absolute = [t.double().abs() if isinstance(t, torch.Tensor) else t for t in sample.args]
        size = CONV2D.op(sample.input.double().abs(), *absolute, **sample.kwargs)
        taps = sample.args[0][0].numel()
        assert_within(y, fastseg.testing.expected(exact, size, taps + 1, y.dtype), str(sample.kwargs))
        count += 1
    assert count > 10


def test_named_backend_refuses_what_it_has_no_kernel_for(target):
    refused = 0
    for sample in samples(torch.float32, target.device):
        if operator(sample) == "grouped_conv2d":
            with pytest.raises(fastseg.BackendError, match="cannot run"):
                fastseg.ops.conv2d(sample.input, *sample.args, **sample.kwargs, backend=target.backend)
            refused += 1
    assert refused > 3


@pytest.mark.parametrize("backend", ["named", "auto"])
def test_errors_are_pytorchs(backend, target):
    """Each of PyTorch's error inputs raises the exception type and the message that PyTorch raises."""
    count = 0
    for case in CONV2D.error_inputs_func(CONV2D, target.device):
        sample = case.sample_input
        with pytest.raises(case.error_type) as ours:
            name = target.backend if backend == "named" else None
            fastseg.ops.conv2d(sample.input, *sample.args, **sample.kwargs, backend=name)
        with pytest.raises(case.error_type) as theirs:
            CONV2D.op(sample.input, *sample.args, **sample.kwargs)
        assert str(ours.value) == str(theirs.value)
        count += 1
    assert count > 5


BAD = {
    "float stride": dict(stride=1.5),
    "zero stride": dict(stride=0),
    "negative padding": dict(padding=-1),
    "zero dilation": dict(dilation=0),
    "three strides": dict(stride=(1, 1, 1)),
    "unknown padding": dict(padding="full"),
    "same with stride": dict(padding="same", stride=2),
    "groups that do not divide": dict(groups=3),
    "zero groups": dict(groups=0),
    "kernel over image": dict(dilation=9),
    "bias of the wrong size": dict(bias=torch.zeros(5)),
    "bias of another dtype": dict(bias=torch.zeros(8, dtype=torch.float64)),
    "weight of another dtype": dict(weight=torch.zeros(8, 1, 3, 3, dtype=torch.float64)),
    "weight of three dimensions": dict(weight=torch.zeros(8, 3, 3)),
    "input of two dimensions": dict(input=torch.zeros(8, 9)),
    "input that is a list": dict(input=[1.0]),
    "weight that is None": dict(weight=None),
    "channels that do not match": dict(input=torch.zeros(1, 6, 9, 9)),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_arguments_raise_what_native_raises(bad, target):
    arguments = dict(input=torch.zeros(1, 8, 9, 9), weight=torch.zeros(8, 1, 3, 3), bias=None, groups=8)
    arguments = {
        k: v.to(target.device) if isinstance(v, torch.Tensor) else v for k, v in (arguments | BAD[bad]).items()
    }
    try:
        torch.nn.functional.conv2d(**arguments)
    except Exception as error:
        theirs = error
    else:  # on a GPU PyTorch lets a dilation of zero pass
        fastseg.ops.conv2d(**arguments, backend=target.backend)
        return
    with pytest.raises(type(theirs)) as ours:
        fastseg.ops.conv2d(**arguments, backend=target.backend)
    # A TypeError goes on to list the arguments as they were passed, by name or by position.
    length = len("conv2d() received an invalid combination") if isinstance(theirs, TypeError) else None
    assert str(ours.value)[:length] == str(theirs)[:length]


def test_expected_conv_agrees_with_native(target):
    """The bound's own reference is checked against ATen in float64."""
    for stride, padding, dilation in itertools.product((1, 2), (0, 2), (1, 3)):
        x, w = torch.randn(1, 4, 9, 8, dtype=torch.float64), torch.randn(8, 1, 3, 2, dtype=torch.float64)
        geometry = ((stride,) * 2, (padding,) * 4, (dilation,) * 2)
        depthwise = torch.nn.functional.conv2d(x, w, None, stride, padding, dilation, 4)
        assert_within(depthwise, expected_conv(x, w, None, *geometry).output, "ATen")
        w = torch.randn(5, 4, 3, 2, dtype=torch.float64)
        dense = torch.nn.functional.conv2d(x, w, None, stride, padding, dilation)
        assert_within(dense, expected_conv(x, w, None, *geometry).output, "ATen")


def interpolate_samples(dtype, device):
    """(input, size, scale_factor, align_corners) of PyTorch's samples; recomputing the scale factor is not offered."""
    for sample in INTERPOLATE.sample_inputs_func(INTERPOLATE, device, dtype, requires_grad=False):
        options = sample.kwargs
        if not options.get("recompute_scale_factor"):
            size = sample.args[0] if sample.args else options["size"]
            yield sample.input, size, options["scale_factor"], options["align_corners"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.uint8], ids=str)
def test_interpolate_under_auto(dtype, target):
    for x, *arguments in interpolate_samples(dtype, target.device):
        y = fastseg.ops.upsample_bilinear2d(x, *arguments)
        native = INTERPOLATE.op(x, *arguments[:2], mode="bilinear", align_corners=arguments[2])
        assert (y.shape, y.dtype) == (native.shape, native.dtype)


def test_interpolate_on_a_named_backend(target):
    count = 0
    for x, size, scale_factor, align_corners in interpolate_samples(torch.float32, target.device):
        y = fastseg.ops.upsample_bilinear2d(x, size, scale_factor, align_corners, backend=target.backend)
        scales = None if scale_factor is None else (scale_factor, scale_factor)
        wanted, _ = expected_upsample(x, y.shape[2:], scales, bool(align_corners))
        assert_within(y, wanted, f"{size}, {scale_factor}, {align_corners}")
        count += 1
    assert count > 10
