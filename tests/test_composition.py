"""Promise 12: autocast, torch.compile, torch.export, opcheck, deepcopy, pickle, DDP."""

from __future__ import annotations

import copy
import io
import os
import pickle
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import fastseg
from fastseg import dispatch
from fastseg.testing import assert_within, expected_conv, random_tensor

ROOT = Path(__file__).parent.parent
LAYOUTS = pytest.mark.parametrize(
    "layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"]
)


FILTERS = {"depthwise_conv2d": (8, 1, 3, 3), "dilated_conv2d": (8, 8, 3, 3)}
OPERATORS = pytest.mark.parametrize("operator", FILTERS)


def inputs(target, dtype=torch.float32, layout=torch.contiguous_format, size=(9, 10), operator="depthwise_conv2d"):
    x = random_tensor((2, 8, *size), dtype, seed=1, device=target.device, memory_format=layout)
    weight = random_tensor(FILTERS[operator], dtype, seed=2, device=target.device)
    return x, weight, random_tensor((8,), dtype, seed=3, device=target.device)


@LAYOUTS
@OPERATORS
@pytest.mark.parametrize("activation", ["none", "relu", "silu"])
def test_opcheck(layout, operator, activation, target):
    """Schema, fake kernel (strides included), autograd registration and AOT dispatch with dynamic shapes."""
    x, weight, bias = inputs(target, layout=layout, operator=operator)
    geometry = ([1, 2], [2, 1, 0, 3], [2, 1])
    forward = getattr(getattr(torch.ops.fastseg, operator), target.backend)
    torch.library.opcheck(forward, (x.requires_grad_(), weight.requires_grad_(), bias, *geometry, activation))
    y = forward(x, weight, bias, *geometry, activation)
    backward = getattr(getattr(torch.ops.fastseg, f"{operator}_backward"), target.backend)
    for mask in ([True, True, True], [True, False, False], [False, True, True]):
        gradient_inputs = (torch.ones_like(y).detach(), x.detach(), weight.detach())
        torch.library.opcheck(backward, (*gradient_inputs, *geometry, mask))


@LAYOUTS
@OPERATORS
def test_compile_fullgraph_with_dynamic_shapes(layout, operator, target):
    groups = 8 // FILTERS[operator][1]

    def block(x, weight, bias):
        y = fastseg.ops.conv2d(x, weight, bias, 1, 2, 2, groups, activation="relu", backend=target.backend)
        y = fastseg.ops.conv2d(y * 2, weight, padding="same", groups=groups, backend=target.backend)
        return y.sigmoid()

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(block, fullgraph=True, dynamic=True)
    for size in ((9, 10), (12, 7), (15, 15)):
        tensors = [t.requires_grad_() for t in inputs(target, layout=layout, size=size, operator=operator)]
        eager, traced = block(*tensors), compiled(*tensors)
        torch.testing.assert_close(traced, eager)
        assert traced.stride() == eager.stride()
        for ours, theirs in zip(
            torch.autograd.grad(traced.sum(), tensors), torch.autograd.grad(eager.sum(), tensors), strict=True
        ):
            torch.testing.assert_close(ours, theirs)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2


def test_compile_under_auto_keeps_one_graph(monkeypatch):
    monkeypatch.setattr(dispatch, "_choices", {})  # as in a process that has run nothing yet
    layer = fastseg.nn.Conv2d(8, 8, 3, padding=1, groups=8)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True)
    x = torch.randn(1, 8, 9, 9)
    torch.testing.assert_close(compiled(x), layer(x))


def test_export(target):
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = fastseg.nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=8, backend=target.backend)

        def forward(self, x):
            return self.layer(x).relu()

    net, (x, *_) = Net().to(target.device), inputs(target)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(net, (x,), dynamic_shapes=({0: batch},))
    assert "fastseg.depthwise_conv2d" in str(program.graph)
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    loaded = torch.export.load(buffer).module()
    larger = torch.cat([x, x, x])
    torch.testing.assert_close(loaded(larger), net(larger))


@LAYOUTS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=lambda d: str(d).removeprefix("torch."))
def test_autocast(dtype, layout, target):
    x, weight, bias = inputs(target, layout=layout)
    with torch.autocast(target.device, dtype):
        y = fastseg.ops.depthwise_conv2d(x, weight.requires_grad_(), bias, backend=target.backend)
        native = F.conv2d(x, weight, bias, groups=8)
    assert y.dtype == native.dtype == dtype
    low = [t.detach().to(dtype) for t in (x, weight, bias)]
    wanted = expected_conv(*low, (1, 1), (0, 0, 0, 0), (1, 1), roundoff=target.roundoff(dtype))
    assert_within(y, wanted.output, "output")
    y.float().sum().backward()
    assert weight.grad.dtype == torch.float32


def test_autocast_leaves_float64_alone(target):
    if not target.takes(torch.float64):
        pytest.skip(f"{target} has no kernels for float64")
    x, weight, _ = inputs(target, torch.float64)
    with torch.autocast(target.device):
        assert fastseg.ops.depthwise_conv2d(x, weight, backend=target.backend).dtype == torch.float64


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_module_copies(clone, target):
    layer = fastseg.nn.Conv2d(8, 16, 3, padding=1, groups=8, activation="relu6", backend=target.backend)
    layer = layer.to(target.device)
    twin, (x, *_) = clone(layer), inputs(target)
    assert torch.equal(twin(x), layer(x))
    assert repr(twin) == repr(layer)


@pytest.mark.parametrize("padding_mode", ["zeros", "reflect", "replicate", "circular"])
def test_module_equals_torch(padding_mode, target):
    x, *_ = inputs(target)
    options = dict(padding=(1, 2), groups=8, padding_mode=padding_mode)
    ours = fastseg.nn.Conv2d(8, 16, (3, 5), backend=target.backend, **options).to(target.device)
    native = torch.nn.Conv2d(8, 16, (3, 5), **options).to(target.device)
    native.load_state_dict(ours.state_dict(), strict=True)
    exact = copy.deepcopy(native).double()(x.double())
    torch.testing.assert_close(ours(x).double(), exact, rtol=1e-5, atol=1e-5)


def test_inference_mode_and_vmap_free_functional_call(target):
    x, weight, bias = inputs(target)
    with torch.inference_mode():
        y = fastseg.ops.depthwise_conv2d(x.clone(), weight.clone(), bias, backend=target.backend)
    assert torch.equal(y, fastseg.ops.depthwise_conv2d(x, weight, bias, backend=target.backend))
    layer = fastseg.nn.Conv2d(8, 8, 3, groups=8, backend=target.backend).to(target.device)
    called = torch.func.functional_call(layer, {"weight": weight, "bias": bias}, (x,))
    assert torch.equal(called, fastseg.ops.depthwise_conv2d(x, weight, bias, backend=target.backend))


_DDP = """
import sys, torch, torch.distributed as dist
import fastseg
rank, port = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
torch.manual_seed(0)
net = torch.nn.Sequential(
    fastseg.nn.Conv2d(4, 8, 3, padding=2, dilation=2, groups=4, backend="BACKEND"), torch.nn.Conv2d(8, 2, 1)
).to(memory_format=torch.channels_last)
x = torch.randn(4, 4, 9, 9)
alone = torch.autograd.grad(net(x).square().mean(), list(net.parameters()))
ddp = torch.nn.parallel.DistributedDataParallel(net)
ddp(x[2 * rank : 2 * rank + 2]).square().mean().backward()
for ours, single in zip(net.parameters(), alone):
    torch.testing.assert_close(ours.grad, single)
    assert ours.grad.stride() == ours.stride()
dist.destroy_process_group()
print("gradients agree")
"""


def test_ddp_over_gloo(target):
    if target.device != "cpu" or os.environ.get("FASTSEG_RUNG") == "host":
        pytest.skip("gloo runs on the CPU, with operators that a fresh process loads by itself")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    program = _DDP.replace("BACKEND", target.backend)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(rank), port],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        for rank in range(2)
    ]
    for process in processes:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        assert "gradients agree" in out
