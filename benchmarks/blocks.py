"""Whole blocks of DeepLab, as modules: separable convolutions with their norms, ASPP, separable ASPP.

Native is the module as users have it, eager in both layouts and torch.compile in channels_last; fastseg is the same
module accelerated. "inference" is eval mode without gradients, "training" a forward and a backward pass with batch
statistics. The gate: result and input's gradient are at most TIMES further from float64 than native's own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

import fastseg
from benchmarks import memory, timing

TIMES = 3
DIRECTIONS = ("inference", "training")
LAST = {"memory_format": torch.channels_last}


@dataclass(frozen=True)
class BlockCase:
    """`build()` makes the module; its input is [batch, channels, size, size]."""

    id: str
    layer: str
    build: Callable[[], nn.Module]
    channels: int
    size: int
    batch_gpu: int = 16
    quick: bool = True

    def batch(self, device: str, direction: str) -> int:
        if device != "cpu":
            return self.batch_gpu
        return 1 if direction == "inference" else 2  # batch norm needs two images where one is pooled


def _separable(channels: int, outputs: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        nn.Conv2d(channels, outputs, 1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )


def _torchvision_aspp(rates: tuple[int, ...]) -> nn.Module:
    from torchvision.models.segmentation.deeplabv3 import ASPP

    return _without_dropout(ASPP(2048, list(rates), 256))


def _separable_aspp() -> nn.Module:
    from segmentation_models_pytorch.decoders.deeplabv3.decoder import ASPP

    return _without_dropout(ASPP(2048, 256, [6, 12, 18], separable=True, dropout=0.0))


def _without_dropout(module: nn.Module) -> nn.Module:
    """Its draws would differ from one candidate to the next."""
    for child in module.modules():
        if isinstance(child, nn.Dropout):
            child.p = 0.0
    return module


BLOCKS = (
    BlockCase("separable-64-128", "Xception entry flow", lambda: _separable(64, 128), 64, 129),
    BlockCase("separable-32-64", "MobileNet, second block", lambda: _separable(32, 64), 32, 257),
    BlockCase("separable-728", "Xception middle flow", lambda: _separable(728, 728), 728, 33),
    BlockCase("aspp-os16", "torchvision's ASPP, 6/12/18", lambda: _torchvision_aspp((6, 12, 18)), 2048, 33),
    BlockCase("separable-aspp", "segmentation_models_pytorch's separable ASPP", _separable_aspp, 2048, 33),
    BlockCase("aspp-os8", "torchvision's ASPP, 12/24/36", lambda: _torchvision_aspp((12, 24, 36)), 2048, 65, 8),
)


def measure(case: BlockCase, direction: str, device: str, dtype: torch.dtype, seconds: float, compiles: bool) -> dict:
    """The record's row of one block."""
    with timing.measuring_stream(device):
        return _measure(case, direction, device, dtype, seconds, compiles)


def _measure(case, direction, device, dtype, seconds, compiles):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = case.build().to(device, dtype).train(direction == "training")
        batch = case.batch(device, direction)
        x = torch.randn(batch, case.channels, case.size, case.size).to(device, dtype)
    row = {
        "id": f"{case.id}/{direction}/{str(dtype).removeprefix('torch.')}",
        "case": case.id,
        "layer": case.layer,
        "direction": direction,
        "dtype": str(dtype).removeprefix("torch."),
        "device": device,
        "shape": list(x.shape),
        "candidates": [],
    }
    exact = _call(copy.deepcopy(module).double(), x.double(), direction)()
    last, x_last = copy.deepcopy(module).to(**LAST), x.contiguous(**LAST)
    accelerated = fastseg.accelerate(copy.deepcopy(module))
    candidates = [
        ("native NCHW", "native", module, x),
        ("native channels_last", "native", last, x_last),
        ("torch.compile", "compile", torch.compile(copy.deepcopy(last), dynamic=False) if compiles else None, x_last),
        ("fastseg", "fastseg", accelerated, x_last),
        ("fastseg NCHW", "fastseg", accelerated, x),
    ]
    if device == "cuda":  # each kernel by its name, whatever "auto" chooses
        for backend in ("triton", "cuda"):
            named = fastseg.accelerate(copy.deepcopy(module), backend=backend)
            candidates.append((f"fastseg {backend}", "fastseg", named, x_last))
    calls, results = {}, {}
    for name, role, candidate, given in candidates:
        entry = {"name": name, "role": role, "skipped": None}
        row["candidates"].append(entry)
        if candidate is None:
            entry["skipped"] = "compiling takes too long for the quick run"
            continue
        try:
            call = _call(candidate, given, direction)
            results[name] = call()
        except fastseg.BackendError as error:
            entry["skipped"] = str(error)
            continue
        natives = [results[n] for n in ("native NCHW", "native channels_last") if n in results]
        entry["gate"] = _agreement(results[name], natives, exact, role)
        if entry["gate"]["green"]:
            calls[name] = [call]
            entry["peak_bytes"] = memory.peak_bytes(call, device)
    samplers, row["timed"] = timing.samplers_for(calls, device)
    timing.add_speeds(
        row["candidates"],
        timing.interleave(samplers, seconds),
        ("native NCHW", "native channels_last", "torch.compile"),
    )
    return row


def _call(module, x, direction) -> Callable[[], tuple[torch.Tensor, ...]]:
    """A function that runs the block once: its output, and in training the input's gradient."""
    if direction == "inference":

        def infer():
            with torch.no_grad():
                return (module(x),)

        return infer
    parameters = list(module.parameters())
    with torch.no_grad():
        y = copy.deepcopy(module)(x)
    generator = torch.Generator(x.device).manual_seed(1)
    grad_y = torch.randn(y.shape, generator=generator, device=x.device).to(y)
    grad_y = torch.empty_like(y).copy_(grad_y)  # in the output's memory format

    def train():
        given = x.detach().requires_grad_()
        y = module(given)
        grads = torch.autograd.grad(y, (given, *parameters), grad_y)
        return y.detach(), grads[0]

    return train


def _agreement(results, natives, exact, role: str) -> dict:
    """The gate, on root mean square errors: near zero a ReLU's gradient is a matter of rounding."""
    errors, message = [], ""
    for name, value, wanted, *theirs in zip(("output", "grad of the input"), results, exact, *natives, strict=False):
        error, *native = (_error(tensor, wanted) for tensor in (value, *theirs))
        errors.append(error)
        allowed = max(TIMES * max(native), 1e-6) if role == "fastseg" else 2.0**-5
        if not error <= allowed:
            message = message or f"{name}: the error is {error:.3g} of the values, {allowed:.3g} is allowed"
    return {"green": not message, "message": message, "error": max(errors)}


def _error(value: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((value.double() - wanted).norm() / wanted.norm())
