"""What only a GPU can show: promises 9 (more than 2^31 elements) and 11 (streams, devices, CUDA graphs). Rung 5."""

from __future__ import annotations

import os

import pytest
import torch
import torch.nn.functional as F

import fastseg
from fastseg import dispatch, winners
from fastseg.testing import assert_alike, assert_within, expected_conv, integer_tensor, random_tensor

pytestmark = pytest.mark.skipif(os.environ.get("FASTSEG_RUNG") != "gpu", reason="rung 5: needs a GPU")


OPERATORS = pytest.mark.parametrize("depth", [1, 64], ids=["depthwise", "dense"])


def problem(target, depth, size=(33, 33)):
    """An image of 64 channels, and filters that take `depth` of them."""
    layout = torch.channels_last
    x = random_tensor((2, 64, *size), torch.float32, seed=1, device=target.device, memory_format=layout)
    return x, random_tensor((64, depth, 3, 3), torch.float32, seed=2, device=target.device)


def run(target, x, weight, rate=2):
    groups = x.shape[1] // weight.shape[1]
    return fastseg.ops.conv2d(x, weight, padding=rate, dilation=rate, groups=groups, backend=target.backend)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
def test_more_than_2_to_the_31_elements(layout, target):
    """Every plane of the far end is compared with native on that plane alone."""
    channels, side = 64, 6000
    x = torch.randint(-3, 4, (1, channels, side, side), dtype=torch.float16, device=target.device)
    x = x.contiguous(memory_format=layout)
    assert x.numel() > 2**31
    weight = integer_tensor((channels, 1, 3, 3), torch.float16, seed=2, device=target.device)
    y = run(target, x, weight)
    for channel in (0, channels // 2, channels - 1):
        native = F.conv2d(x[:, channel : channel + 1], weight[channel : channel + 1], padding=2, dilation=2)
        assert torch.equal(y[:, channel : channel + 1], native)
    del y
    leaf = weight.clone().requires_grad_()
    image = x.requires_grad_()
    grad_output = torch.zeros_like(x)
    grad_output[..., -1, -1] = 1
    grad_x, grad_weight = torch.autograd.grad(run(target, image, leaf), (image, leaf), grad_output)
    assert torch.equal(grad_weight[:, 0, 1, 1], x[0, :, -1, -1])
    assert torch.equal(grad_x[0, :, -1, -1], weight[:, 0, 1, 1])
    assert torch.equal(grad_x[0, :, -3, -3], weight[:, 0, 0, 0])


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
def test_more_than_2_to_the_31_elements_of_a_dense_convolution(layout, target):
    """The far corner is compared with native on that corner alone."""
    channels, side, corner = 64, 6000, 40
    x = torch.randint(-1, 2, (1, channels, side, side), dtype=torch.float16, device=target.device)
    x = x.contiguous(memory_format=layout)
    weight = integer_tensor((8, channels, 3, 3), torch.float16, low=-1, high=1, seed=2, device=target.device)
    y = run(target, x, weight)[..., -corner:, -corner:]
    padded = F.pad(x[..., -corner - 2 :, -corner - 2 :], (0, 2, 0, 2))
    assert torch.equal(y, F.conv2d(padded, weight, dilation=2))
    leaf, image = weight.clone().requires_grad_(), x.requires_grad_()
    grad_output = torch.zeros(1, 8, side, side, dtype=x.dtype, device=x.device).contiguous(memory_format=layout)
    grad_output[:, 3, -1, -1] = 1
    grad_x, grad_weight = torch.autograd.grad(run(target, image, leaf), (image, leaf), grad_output)
    assert torch.equal(grad_weight[3, :, 1, 1], x[0, :, -1, -1])
    assert torch.equal(grad_x[0, :, -3, -3], weight[3, :, 0, 0])


@OPERATORS
def test_a_side_stream(depth, target):
    x, weight = problem(target, depth)
    wanted = run(target, x, weight)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        y = run(target, x * 1, weight)
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(y, wanted)


@OPERATORS
def test_another_device(depth, target):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    x, weight = problem(target, depth)
    y = run(target, x.to("cuda:1"), weight.to("cuda:1"))
    assert y.device == torch.device("cuda:1")
    assert torch.equal(y.to("cuda:0"), run(target, x, weight))


@OPERATORS
def test_graph_capture_and_replay(depth, target):
    x, weight = problem(target, depth)
    weight.requires_grad_()
    run(target, x, weight).sum().backward()  # compiles before the capture
    weight.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run(target, x, weight)
        (gradient,) = torch.autograd.grad(y.square().sum(), weight)
    x.copy_(random_tensor(tuple(x.shape), x.dtype, seed=7, device=target.device))
    graph.replay()
    fresh = run(target, x, weight)
    assert torch.equal(y, fresh)
    assert torch.equal(gradient, torch.autograd.grad(fresh.square().sum(), weight)[0])


def test_a_first_call_is_measured_once_and_never_while_a_graph_is_captured(monkeypatch, tmp_path):
    monkeypatch.setenv("FASTSEG_TUNE", "1")
    monkeypatch.setenv("FASTSEG_CACHE", str(tmp_path))
    for name in ("_tables", "_consulted"):
        monkeypatch.setattr(winners, name, {})
    dispatch.forget_sized_choices()
    fastseg.counters(reset=True)
    x = random_tensor((2, 64, 33, 33), torch.bfloat16, device="cuda", memory_format=torch.channels_last)
    weight = random_tensor((64, 1, 3, 3), torch.bfloat16, device="cuda")

    def call():
        return fastseg.ops.conv2d(x, weight, padding=2, dilation=2, groups=64)

    with winners.unmeasured():
        wanted = call()  # compiles before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    graph.replay()
    assert torch.equal(captured, wanted)
    assert fastseg.counters().measured == 0
    for _ in range(2):
        assert_alike(call(), wanted)
        assert fastseg.counters().measured == 1
    assert len(winners.table("cuda").own) == 1
    dispatch.forget_sized_choices()


@OPERATORS
def test_nothing_waits_for_the_device(depth, target):
    x, weight = problem(target, depth)
    weight.requires_grad_()
    run(target, x, weight).sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(target, x, weight).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rate", [1, 2, 6, 12, 18])
@pytest.mark.parametrize("filter", [(728, 1, 3, 3), (256, 728, 3, 3)], ids=["depthwise", "dense"])
def test_real_sizes_within_bound(filter, rate, dtype, target):
    """The sizes that networks use, where every tile is full and many blocks run at once."""
    x = random_tensor((2, 728, 33, 33), dtype, seed=1, device=target.device, memory_format=torch.channels_last)
    weight = random_tensor(filter, dtype, seed=2, device=target.device)
    x, weight = x.requires_grad_(), weight.requires_grad_()
    y = run(target, x, weight, rate)
    grad_output = random_tensor(tuple(y.shape), dtype, seed=3, device=target.device)
    geometry = ((1, 1), (rate,) * 4, (rate, rate))
    wanted = expected_conv(x, weight, None, *geometry, "none", grad_output, roundoff=target.roundoff(dtype))
    grads = torch.autograd.grad(y, (x, weight), grad_output)
    for name, result, bound in zip(("output", "grad_input", "grad_weight"), (y.detach(), *grads), wanted, strict=False):
        assert_within(result, bound, name)
