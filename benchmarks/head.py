"""The segmentation head: resize with cross entropy, resize with argmax, and bilinear resize by itself.

Native is PyTorch's composition, eager in both layouts and torch.compile in channels_last; fastseg is one operator. The
gate: fastseg's results are inside fastseg.testing's bounds, and its labels are float64's where scores do not tie;
baselines have to be recognisably right.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

import fastseg
from benchmarks import memory, timing
from benchmarks.operators import BASELINE_ERROR
from fastseg import dispatch
from fastseg.ops.head import native
from fastseg.testing import (
    Expected,
    assert_argmax,
    assert_within,
    expected_cross_entropy,
    expected_scores,
    expected_upsample,
)

LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
OPERATORS = {
    "loss": "upsample_cross_entropy",
    "labels": "upsample_argmax",
    "resize": "upsample_bilinear2d",
}
DIRECTIONS = {"loss": ("forward+backward",), "labels": ("inference",), "resize": ("forward", "backward")}
IGNORED = 255
# On a GPU PyTorch adds up the gradients of a resize in the tensors' dtype: two bits of these are lost.
LOW_PRECISION = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class HeadCase:
    """`kind` is one of OPERATORS; the input is [batch, channels, size, size], resized to image x image."""

    id: str
    layer: str
    kind: str
    channels: int
    size: int
    image: int
    batch_cpu: int
    batch_gpu: int

    def shape(self, device: str) -> tuple[int, ...]:
        batch = self.batch_cpu if device == "cpu" else self.batch_gpu
        return batch, self.channels, self.size, self.size


def _scores(kind: str, prefix: str) -> tuple[HeadCase, ...]:
    return (
        HeadCase(f"{prefix}-21", "PASCAL VOC, 129 to 513", kind, 21, 129, 513, 2, 8),
        HeadCase(f"{prefix}-150", "ADE20K, 128 to 512", kind, 150, 128, 512, 1, 16),
        HeadCase(f"{prefix}-19", "Cityscapes, 193 to 769", kind, 19, 193, 769, 1, 4),
    )


HEADS = (
    *_scores("labels", "head-argmax"),
    *_scores("loss", "head-loss"),
    HeadCase("bilinear-logits", "logits, 65 to 513", "resize", 21, 65, 513, 2, 8),
    HeadCase("bilinear-decoder", "DeepLab v3+ decoder, 33 to 129", "resize", 256, 33, 129, 1, 8),
)


def measure(case: HeadCase, direction: str, device: str, dtype: torch.dtype, seconds: float, compiles: bool) -> dict:
    """The record's row of one case and direction."""
    with timing.measuring_stream(device):
        return _measure(case, direction, device, dtype, seconds, compiles)


def _measure(case, direction, device, dtype, seconds, compiles):
    shape = case.shape(device)
    row = {
        "id": f"{case.id}/{direction}/{str(dtype).removeprefix('torch.')}",
        "case": case.id,
        "layer": case.layer,
        "direction": direction,
        "dtype": str(dtype).removeprefix("torch."),
        "device": device,
        "shape": list(shape),
        "image": [case.image, case.image],
        "candidates": [],
    }
    given = [_tensors(case, device, dtype, seed) for seed in range(_buffer_sets(case, device, dtype))]
    wanted = _expected(case, direction, *given[0])
    calls = {}
    for name, role, layout, function, choice in _candidates(case, device, dtype):
        entry = {"name": name, "role": role, "skipped": None, "backend": choice.backend, "reason": choice.reason}
        row["candidates"].append(entry)
        if role == "compile" and not compiles:
            entry["skipped"] = "compiling takes too long for the quick run"
            continue
        prepared = [_call(case, direction, function, LAYOUTS[layout], *tensors) for tensors in given]
        entry["gate"] = _gate(case, prepared[0](), wanted, "native" if choice.backend == "native" else role)
        if entry["gate"]["green"]:
            calls[name] = prepared
            entry["peak_bytes"] = memory.peak_bytes(prepared[0], device)
    samplers, row["timed"] = timing.samplers_for(calls, device)
    timing.add_speeds(
        row["candidates"],
        timing.interleave(samplers, seconds),
        ("native NCHW", "native channels_last", "torch.compile"),
    )
    return row


def _candidates(case: HeadCase, device: str, dtype: torch.dtype):
    """(name, role, layout, function, choice): native twice, torch.compile, fastseg twice, the kernels by name."""
    eager = _native(case)
    aten, inductor = dispatch.Choice("native", ""), dispatch.Choice("inductor", "")
    problem = dispatch.Problem(OPERATORS[case.kind], device, dtype)
    auto = dispatch.choose(problem, "auto")
    yield "native NCHW", "native", "NCHW", eager, aten
    yield "native channels_last", "native", "channels_last", eager, aten
    yield "torch.compile", "compile", "channels_last", torch.compile(eager, dynamic=False), inductor
    yield "fastseg", "fastseg", "channels_last", _fastseg(case, "auto"), auto
    yield "fastseg NCHW", "fastseg", "NCHW", _fastseg(case, "auto"), auto
    for backend in ("cpu", "triton", "cuda"):
        interpreted = backend == "triton" and device == "cpu"
        if backend != auto.backend and not interpreted and dispatch.reason_not(backend, problem) is None:
            named = dispatch.Choice(backend, "asked for by name")
            yield f"fastseg {backend}", "fastseg", "channels_last", _fastseg(case, backend), named


def _native(case: HeadCase) -> Callable:
    size = (case.image, case.image)
    if case.kind == "loss":
        return lambda logits, target: native.cross_entropy(logits, target, None, IGNORED, "mean", 0.0, False)
    if case.kind == "labels":
        return lambda logits: native.argmax(logits, size, False, torch.int64)
    return lambda x: native.upsample_bilinear2d(x, size, None, False)


def _fastseg(case: HeadCase, backend: str) -> Callable:
    size = (case.image, case.image)
    if case.kind == "loss":
        return lambda logits, target: fastseg.ops.upsample_cross_entropy(
            logits, target, ignore_index=IGNORED, backend=backend
        )
    if case.kind == "labels":
        return lambda logits: fastseg.ops.upsample_argmax(logits, size, backend=backend)
    return lambda x: fastseg.ops.upsample_bilinear2d(x, size, backend=backend)


def _tensors(case: HeadCase, device: str, dtype: torch.dtype, seed: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The input, and beside it the target of a loss or the output's gradient of a resize."""
    shape, image = case.shape(device), (case.image, case.image)
    generator = torch.Generator(device).manual_seed(seed)
    x = torch.randn(shape, generator=generator, device=device).to(dtype)
    if case.kind == "labels":
        return x, None
    if case.kind == "resize":
        return x, torch.randn(*shape[:2], *image, generator=generator, device=device).to(dtype)
    target = torch.randint(case.channels, (shape[0], *image), generator=generator, device=device)
    border = case.image // 20
    target[:, :border] = target[:, :, :border] = IGNORED
    return x, target


def _buffer_sets(case: HeadCase, device: str, dtype: torch.dtype) -> int:
    batch, channels = case.shape(device)[:2]
    moved = batch * channels * case.size**2 * dtype.itemsize
    moved += batch * case.image**2 * (channels * dtype.itemsize if case.kind == "resize" else 8)
    return timing.buffer_sets(moved, device)


def _call(case, direction, function, layout, x, other) -> Callable[[], tuple[torch.Tensor, ...]]:
    """A function that runs the case once: its results, in the order of `_expected`."""
    x = x.contiguous(memory_format=layout)
    if case.kind == "labels" or direction == "forward":

        def infer():
            with torch.no_grad():
                return (function(x),)

        return infer
    leaf = x.detach().requires_grad_()
    if case.kind == "loss":

        def train():
            loss = function(leaf, other)
            return loss.detach(), torch.autograd.grad(loss, leaf)[0]

        return train
    grad_y, y = other.contiguous(memory_format=layout), function(leaf)
    return lambda: torch.autograd.grad(y, leaf, grad_y, retain_graph=True)


def _expected(case: HeadCase, direction: str, x, other) -> tuple[Expected, ...]:
    size = (case.image, case.image)
    if case.kind == "loss":
        return expected_cross_entropy(x, other, ignore_index=IGNORED, grad=torch.ones((), device=x.device))
    if case.kind == "labels":
        return (expected_scores(x, size, False),)
    output, grad_input = expected_upsample(x, size, None, False, other)
    return (output,) if direction == "forward" else (grad_input,)


def _gate(case: HeadCase, results, wanted: tuple[Expected, ...], role: str) -> dict:
    """{"green", "message", "error"}; the error is the largest one, relative to the largest value.

    That of labels is by how much the score of a label may fall short of the best.
    """
    errors, message = [], ""
    for result, expected in zip(results, wanted, strict=True):
        value = expected.value
        if case.kind == "labels":
            difference = (value.amax(1, keepdim=True) - value.gather(1, result[:, None])).max()
        else:
            difference = (result.double() - value).abs().max()
        errors.append(float(difference / value.abs().max()))
        try:
            if role == "fastseg" and case.kind == "labels":
                assert_argmax(result, expected)
            elif role == "fastseg":
                assert_within(result, expected, "result")
            elif not errors[-1] <= BASELINE_ERROR * (4 if result.dtype in LOW_PRECISION else 1):
                raise AssertionError(f"the largest error is {errors[-1]:.3g} of the largest value")
        except AssertionError as failure:
            message = message or str(failure)
    return {"green": not message, "message": message, "error": max(errors)}
