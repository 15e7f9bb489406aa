"""Which backend runs a call, and what is said when it cannot."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastseg
from fastseg import dispatch, extension, gpu_choice
from fastseg.counters import native_calls
from fastseg.ops import arguments, convolution

ROOT = Path(__file__).parent.parent
DEPTHWISE = dispatch.Problem("depthwise_conv2d", "cpu", torch.float32)


def depthwise(**options):
    return fastseg.ops.depthwise_conv2d(torch.ones(1, 4, 5, 5), torch.ones(4, 1, 3, 3), **options)


def run_python(program: str, **environment):
    return subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env={"PATH": "/usr/bin:/bin", "FASTSEG_CACHE": os.environ["FASTSEG_CACHE"], **environment},
    )


def test_argument_wins_over_context_over_environment():
    program = """
import torch, fastseg
from fastseg import dispatch
problem = dispatch.Problem("depthwise_conv2d", "cpu", torch.float32)
print(dispatch.choose(problem).backend)
with fastseg.backend("native"):
    print(dispatch.choose(problem).backend)
    print(dispatch.choose(problem, "reference").backend)
print(dispatch.choose(problem).backend)
"""
    result = run_python(program, FASTSEG_BACKEND="reference")
    assert result.stdout.split() == ["reference", "native", "reference", "reference"], result.stderr


def test_unknown_name_in_the_environment_is_refused():
    result = run_python("import fastseg", FASTSEG_BACKEND="fast")
    assert "expected the environment variable FASTSEG_BACKEND to be one of auto, native" in result.stderr
    assert "'fast'" in result.stderr


def test_context_is_left_after_an_exception():
    before = dispatch._requested
    with pytest.raises(KeyError), fastseg.backend("reference"):
        raise KeyError
    assert dispatch._requested == before


@pytest.mark.parametrize(
    ("backend", "dtype", "reason"),
    [
        ("triton", torch.float64, "float32, float16 and bfloat16, not float64"),
        ("triton", torch.float32, "take CUDA tensors, not cpu tensors"),
        ("cuda", torch.float32, "the CUDA C\\+\\+ kernels"),
        ("cpu", torch.complex64, "float32 and float64, not complex64"),
    ],
)
def test_named_backend_says_why_it_cannot_run(backend, dtype, reason):
    problem = DEPTHWISE._replace(dtype=dtype)
    with pytest.raises(fastseg.BackendError, match=f"backend '{backend}' cannot run depthwise_conv2d: .*{reason}"):
        dispatch.choose(problem, backend)
    assert issubclass(fastseg.BackendError, RuntimeError)


def test_auto_takes_the_cpu_kernels_and_counts_what_it_leaves_to_native():
    assert dispatch.choose(DEPTHWISE).backend == "cpu"
    dispatch.native_calls.clear()
    fastseg.ops.conv2d(torch.ones(1, 4, 5, 5), torch.ones(4, 2, 3, 3), groups=2)
    fastseg.ops.conv2d(torch.ones(1, 4, 5, 5), torch.ones(4, 4, 3, 3))
    assert sum(dispatch.native_calls.values()) == 2
    assert {operator for operator, _ in dispatch.native_calls} == {"grouped_conv2d", "dilated_conv2d"}
    assert all(reason for _, reason in dispatch.native_calls)


def dense(channels, outputs, size, kernel=3, dilation=1, channels_last=True, dtype=torch.float32):
    """The problem of a dense convolution of one image with "same" padding."""
    padding = dilation * (kernel - 1) // 2
    geometry = dispatch.Geometry(
        (1, channels, size, size), (outputs, channels, kernel, kernel), (1, 1), (padding,) * 4, (dilation,) * 2,
        (size, size), channels_last,
    )  # fmt: skip
    return dispatch.Problem("dilated_conv2d", "cpu", dtype, geometry)


DENSE = {
    "aspp": (dense(2048, 256, 33, dilation=12), "cpu"),
    "aspp-nchw": (dense(2048, 256, 33, dilation=12, channels_last=False), "cpu"),
    "aspp-low-rate-nchw": (dense(2048, 256, 33, dilation=6, channels_last=False), "cpu"),
    "1x1": (dense(160, 960, 33, kernel=1), "cpu"),
    "1x1-of-many-channels": (dense(2048, 256, 33, kernel=1), "native"),
    "1x1-of-many-channels-and-norm": (dense(2048, 256, 33, kernel=1)._replace(epilogue="norm+relu"), "cpu"),
    "1x1-in-training": (dense(256, 256, 33, kernel=1)._replace(gradient=True), "cpu"),
    "deep-1x1-in-training": (dense(1280, 256, 33, kernel=1)._replace(gradient=True), "cpu"),
    "1x1-and-norm": (dense(160, 960, 33, kernel=1)._replace(epilogue="norm+relu"), "cpu"),
    "small-1x1-in-training": (dense(64, 128, 129, kernel=1)._replace(gradient=True), "native"),
    "1x1-nchw": (dense(160, 960, 33, kernel=1, channels_last=False), "native"),
    "small-1x1-nchw": (dense(80, 200, 33, kernel=1, channels_last=False), "cpu"),
    "one-pixel": (dense(960, 240, 1, kernel=1), "native"),
    "image": (dense(3, 64, 257), "native"),
    "undilated": (dense(256, 256, 65), "cpu"),
    "undilated-few-channels": (dense(24, 24, 65), "native"),
    "undilated-5x5": (dense(256, 256, 65, kernel=5), "native"),
    "thin": (dense(2048, 21, 41, dilation=12), "cpu"),
    "bfloat16": (dense(2048, 256, 33, dilation=12, dtype=torch.bfloat16), "native"),
    "aspp-block": (dispatch.Problem("aspp_branches", "cpu", torch.float32), "cpu"),
    "aspp-block-bfloat16": (dispatch.Problem("aspp_branches", "cpu", torch.bfloat16), "native"),
    "separable-float64": (dispatch.Problem("separable_conv2d", "cpu", torch.float64), "native"),
    "unknown-sizes": (dispatch.Problem("dilated_conv2d", "cpu", torch.float32), "native"),
}


def forget_choices():
    dispatch._choices.clear()
    dispatch.forget_sized_choices()


@pytest.fixture
def chosen_anew():
    """What is chosen inside a test is not remembered, nor is what was remembered looked at."""
    forget_choices()
    yield
    forget_choices()


# What processors without AVX-512 leave to native besides.
SHORT_VECTORS = ("1x1", "1x1-in-training", "small-1x1-nchw")


@pytest.mark.parametrize("short_vectors", [False, True])
@pytest.mark.parametrize("name", DENSE)
def test_auto_takes_dense_kernels_where_records_show_them_faster(name, short_vectors, chosen_anew, monkeypatch):
    monkeypatch.setattr(dispatch, "SLOW_ON_NATIVE", frozenset())
    monkeypatch.setattr(dispatch, "SHORT_VECTORS", short_vectors)
    problem, backend = DENSE[name]
    choice = dispatch.choose(problem)
    assert choice.backend == ("native" if short_vectors and name in SHORT_VECTORS else backend)
    assert choice.reason


WITHOUT_PRODUCTS = {
    "1x1": (dense(256, 256, 33, kernel=1), "cpu"),
    "image": (dense(3, 64, 257), "cpu"),
    "few-channels-nchw": (dense(16, 16, 65, kernel=1, channels_last=False), "cpu"),
    "one-pixel": (dense(256, 256, 1, kernel=1), "native"),
    "small": (dense(8, 8, 9), "native"),
    "unknown-sizes": (dispatch.Problem("dilated_conv2d", "cpu", torch.float32), "cpu"),
    "aspp-block": (dispatch.Problem("aspp_branches", "cpu", torch.float32), "cpu"),
    "separable": (dispatch.Problem("separable_conv2d", "cpu", torch.float32), "cpu"),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("problem", "backend"), WITHOUT_PRODUCTS.values(), ids=WITHOUT_PRODUCTS)
def test_auto_takes_dense_kernels_where_onednn_has_no_products(problem, backend, dtype, chosen_anew, monkeypatch):
    monkeypatch.setattr(dispatch, "SLOW_ON_NATIVE", frozenset({dtype}))
    assert dispatch.choose(problem._replace(dtype=dtype)).backend == backend
    monkeypatch.setattr(dispatch, "SLOW_ON_NATIVE", {torch.bfloat16, torch.float16} - {dtype})
    forget_choices()
    assert dispatch.choose(problem._replace(dtype=dtype)).backend == "native"


def test_what_onednn_lacks_is_what_this_processor_lacks():
    assert (torch.bfloat16 in dispatch.SLOW_ON_NATIVE) == (not torch.ops.mkldnn._is_mkldnn_bf16_supported())
    assert (torch.float16 in dispatch.SLOW_ON_NATIVE) == (not torch.ops.mkldnn._is_mkldnn_fp16_supported())
    assert torch.float32 not in dispatch.SLOW_ON_NATIVE


def on_gpu(problem: dispatch.Problem, **changes) -> dispatch.Problem:
    return problem._replace(device_type="cuda", dtype=torch.bfloat16)._replace(**changes)


ASPP_D12, ASPP_D6, UNDILATED = (dense(2048, 256, 33, dilation=d) for d in (12, 6, 1))
FILTERS = ASPP_D12._replace(operator="depthwise_conv2d")
FILTERS_D1 = UNDILATED._replace(operator="depthwise_conv2d")
ON_GPU = {
    "aspp": (on_gpu(ASPP_D12), ("triton",)),
    "aspp-in-training": (on_gpu(ASPP_D12, gradient=True), ("triton",)),
    "low-rate": (on_gpu(ASPP_D6), ("triton",)),
    "low-rate-in-training": (on_gpu(ASPP_D6, gradient=True), ()),
    "undilated": (on_gpu(UNDILATED), ()),
    "1x1": (on_gpu(dense(256, 256, 33, kernel=1)), ()),
    "thin": (on_gpu(dense(2048, 21, 41, dilation=12)), ()),
    "contiguous": (on_gpu(dense(2048, 256, 33, dilation=12, channels_last=False)), ()),
    "float32": (on_gpu(ASPP_D12, dtype=torch.float32), ()),
    "unknown-sizes": (on_gpu(ASPP_D12, geometry=None), ()),
    "depthwise": (on_gpu(FILTERS), ("cuda", "triton")),
    "undilated-depthwise": (on_gpu(FILTERS_D1), ()),
    "undilated-depthwise-in-training": (on_gpu(FILTERS_D1, gradient=True), ("cuda", "triton")),
    "labels": (on_gpu(dispatch.Problem("upsample_argmax", "cuda", torch.bfloat16)), ("cuda",)),
    "block": (on_gpu(dispatch.Problem("aspp_branches", "cuda", torch.bfloat16)), ()),
}


@pytest.mark.parametrize(("problem", "backends"), ON_GPU.values(), ids=ON_GPU)
def test_auto_on_a_gpu_follows_the_records(problem, backends, monkeypatch):
    monkeypatch.setattr(gpu_choice, "_capability", lambda: 9)
    found, reason = gpu_choice.kernel_on_gpu(problem)
    assert found == backends
    assert reason
    monkeypatch.setattr(gpu_choice, "_capability", lambda: 8)
    assert gpu_choice.kernel_on_gpu(problem)[0] == ()


def test_choices_by_size_do_not_pile_up(monkeypatch):
    monkeypatch.setattr(dispatch, "_sized_choices", {})
    monkeypatch.setattr(dispatch, "_MOST_SIZED_CHOICES", 4)
    for size in range(33, 43):
        dispatch.choose(dense(64, 64, size))
    assert 0 < len(dispatch._sized_choices) <= 4
    monkeypatch.setattr(dispatch, "_calls_left_to_native", {})
    for size in range(33, 43):
        fastseg.ops.conv2d(torch.ones(1, 8, size, size), torch.ones(8, 8, 3, 3))
    assert 0 < len(dispatch._calls_left_to_native) <= 4


def test_a_call_that_went_to_native_goes_there_again_at_once(monkeypatch):
    dispatch.forget_sized_choices()
    worked_out = []
    monkeypatch.setattr(convolution, "normalise", lambda *call: worked_out.append(call) or arguments.normalise(*call))
    x, weight = torch.randn(1, 16, 9, 9), torch.randn(16, 16, 3, 3)
    before = native_calls.total()

    def call(padding=1, **settings):
        return fastseg.ops.conv2d(settings.pop("input", x), weight, padding=padding, **settings)

    assert torch.equal(call(), call())
    assert (len(worked_out), native_calls.total() - before) == (1, 2)
    # Whatever "auto" looks at tells calls apart.
    for settings in (
        {"input": x.to(memory_format=torch.channels_last)}, {"input": x[:, :, 1:]}, {"padding": 2}, {"dilation": 2},
        {"stride": 2}, {"activation": "relu"}, {"backend": "reference"}, {"input": x.clone().requires_grad_()},
    ):  # fmt: skip
        known = len(worked_out)
        call(**settings)
        assert len(worked_out) == known + 1, settings
    known = len(worked_out)
    with fastseg.backend("reference"):
        call()
    assert len(worked_out) == known + 1


def test_calls_that_cannot_be_remembered_run():
    weight = torch.randn(16, 16, 3, 3)
    y = [fastseg.ops.conv2d(torch.ones(1, 16, 9, 9), weight, padding=[1, 1]) for _ in range(2)]
    assert torch.equal(*y)
    for wrong in ({"weight": "filters"}, {"weight": weight, "bias": 3}, {"weight": weight, "padding": {}}):
        with pytest.raises(TypeError):
            fastseg.ops.conv2d(torch.ones(1, 16, 9, 9), **wrong)


def test_auto_runs_what_it_chose():
    x = torch.randn(1, 64, 17, 17).to(memory_format=torch.channels_last)
    weight = torch.randn(64, 64, 3, 3)
    y = fastseg.ops.conv2d(x, weight, padding=12, dilation=12)
    assert torch.equal(y, fastseg.ops.conv2d(x, weight, padding=12, dilation=12, backend="cpu"))
    torch.testing.assert_close(y, torch.nn.functional.conv2d(x, weight, None, 1, 12, 12))


def test_without_the_extension_auto_is_native(monkeypatch):
    monkeypatch.setattr(extension, "EXTENSION", None)
    monkeypatch.setattr(extension, "MISSING", "the extension is not built")
    monkeypatch.setattr(dispatch, "_choices", {})
    choice = dispatch.choose(DEPTHWISE)
    assert choice[:2] == ("native", "the extension is not built")
    assert torch.equal(depthwise(), torch.full((1, 4, 3, 3), 9.0))
    with pytest.raises(fastseg.BackendError, match="the extension is not built"):
        depthwise(backend="cpu")


@pytest.mark.parametrize("activation", ["relu", "relu6", "hardswish", "silu"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
def test_native_fuses_the_activation_or_applies_it(activation, layout):
    """oneDNN's fused convolution (no gradient) and ATen's separate one (gradient) agree, in values and in layout."""
    x = torch.randn(2, 4, 9, 9).contiguous(memory_format=layout)
    weight, bias = torch.randn(6, 4, 3, 3), torch.randn(6)
    for padding in (1, "same"):
        plain = fastseg.ops.conv2d(x, weight, bias, padding=padding)
        wanted = getattr(torch.nn.functional, activation)(plain)
        fused = fastseg.ops.conv2d(x, weight, bias, padding=padding, activation=activation)
        torch.testing.assert_close(fused, wanted)
        assert fused.stride() == plain.stride()
    leaf = weight.clone().requires_grad_()
    fastseg.ops.conv2d(x, leaf, bias, activation=activation).sum().backward()
    assert leaf.grad is not None
