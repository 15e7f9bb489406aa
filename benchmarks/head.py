"""The segmentation head: resize with cross entropy, resize with argmax, and bilinear resize by itself.

Native is PyTorch's composition, eager in both layouts and torch.compile in channels_last; fastseg is one operator. The
gate: fastseg's results are inside fastseg.testing's bounds, and its labels are float64's where scores do not tie;
baselines have to be recognisably right.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

import fastseg
from benchmarks import timing
from benchmarks.row import BASELINE_ERROR, COMPILERS, LAYOUTS, Candidate, Cost, compiled
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

OPERATORS = {
    "loss": "upsample_cross_entropy",
    "labels": "upsample_argmax",
    "resize": "upsample_bilinear2d",
}
# What decides the time of a call beside its sizes, as the operators tell dispatch: no scale factor, int64 labels, the
# mean; corners are not aligned.
DETAILS = {
    "upsample_cross_entropy": ("mean", False),
    "upsample_argmax": (str(torch.int64), False),
    "upsample_bilinear2d": (True, False),
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
    quick: bool = True
    devices: tuple[str, ...] = ("cpu", "cuda")

    @property
    def table(self) -> str:
        """What the field calls it."""
        return {"labels": "head-argmax", "loss": "head-loss"}.get(self.kind, "")

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


class HeadWorkload:
    """A case of the head, as benchmarks/row.py asks for it."""

    def __init__(self, case: HeadCase, dtype: torch.dtype, device: str):
        self.case, self.dtype, self.device = case, dtype, device
        self.shape = case.shape(device)
        self._made: list[tuple[torch.Tensor, torch.Tensor | None]] = []
        self._wanted: dict[str, tuple[Expected, ...]] = {}

    def describe(self, direction: str) -> dict:
        case = self.case
        return {
            "case": case.id,
            "layer": case.layer,
            "operator": OPERATORS[case.kind],
            "shape": list(self.shape),
            "image": [case.image, case.image],
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": self.device,
        }

    def cost(self, direction: str) -> Cost:
        """Logits, and what goes with the pixels, once; a resize is four products a pixel and channel."""
        x = math.prod(self.shape) * self.dtype.itemsize
        pixels = self.shape[0] * self.case.image**2
        resized = 2 * 4 * pixels * self.shape[1]
        if self.case.kind == "loss":
            return Cost(2 * x + 8 * pixels, 2 * resized)
        if self.case.kind == "labels":
            return Cost(x + 8 * pixels, resized)
        return Cost(x + pixels * self.shape[1] * self.dtype.itemsize, resized)

    def memory_needed(self, direction: str) -> int:
        """Logits of full size: native has a few of them, and so has the float64 result."""
        full = self.shape[0] * self.shape[1] * self.case.image**2
        sets = timing.buffer_sets(self.cost(direction).bytes, self.device)
        graphs = 4 * sets if self.device == "cuda" else 1
        return full * (4 * graphs * self.dtype.itemsize + 3 * 8) + 6 * sets * self.cost(direction).bytes

    def keeps_for_backward(self, direction: str) -> bool:
        return direction in ("forward+backward", "backward")

    def candidates(self) -> list[Candidate]:
        """Native twice, torch.compile twice, fastseg twice, the kernels by name."""
        case, eager = self.case, _native(self.case)
        problem = dispatch.Problem(OPERATORS[case.kind], self.device, self.dtype)
        auto = dispatch.choose(problem, "auto")
        found = self.natives()
        for name, mode in COMPILERS.items():
            function = compiled(eager, mode)
            found.append(Candidate(name, "compile", "channels_last", function, "inductor"))
        for name, layout in (("fastseg", "channels_last"), ("fastseg NCHW", "NCHW")):
            found.append(Candidate(name, "fastseg", layout, _fastseg(case, "auto"), auto.backend, auto.reason))
        for backend in ("cpu", "triton", "cuda"):
            interpreted = backend == "triton" and self.device == "cpu"
            if backend != auto.backend and not interpreted and dispatch.reason_not(backend, problem) is None:
                named = Candidate(f"fastseg {backend}", "fastseg", "channels_last", _fastseg(case, backend), backend)
                found.append(named)
        return found

    def natives(self) -> list[Candidate]:
        eager = _native(self.case)
        return [Candidate(f"native {layout}", "native", layout, eager, "native") for layout in LAYOUTS]

    def under_auto(self) -> Candidate:
        """fastseg as users call it, without asking what "auto" chooses."""
        return Candidate("fastseg", "fastseg", "channels_last", _fastseg(self.case, "auto"), "")

    def calls(
        self, candidate: Candidate, direction: str, most: int | None = None
    ) -> list[Callable[[], tuple[torch.Tensor, ...]]]:
        layout, sets = LAYOUTS[candidate.layout], self._sets(direction)[:most]
        return [_call(self.case, direction, candidate.function, layout, *given) for given in sets]

    def _sets(self, direction: str) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
        count = timing.buffer_sets(self.cost(direction).bytes, self.device)
        while len(self._made) < count:
            self._made.append(_tensors(self.case, self.device, self.dtype, seed=len(self._made)))
        return self._made[:count]

    def gate(self, results, direction: str, role: str, natives: Sequence = ()) -> dict:
        if direction not in self._wanted:
            self._wanted[direction] = _expected(self.case, direction, *self._sets(direction)[0])
        return _gate(self.case, results, self._wanted[direction], role)

    def extras(self, results: dict) -> dict:
        return {}


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
        errors.append(_largest_error(case, result, expected.value))
        try:
            if role == "fastseg" and case.kind == "labels":
                assert_argmax(result, expected)
            elif role == "fastseg":
                assert_within(result, expected, "result")
            elif not errors[-1] <= BASELINE_ERROR * (4 if result.dtype in LOW_PRECISION else 1):
                raise AssertionError(f"the largest error is {errors[-1]:.3g} of the largest value")
        except AssertionError as failure:
            message = message or str(failure)
    finite = all(math.isfinite(error) for error in errors)
    return {"green": not message, "message": message, "error": max(errors) if finite else None}


def _largest_error(case: HeadCase, result: torch.Tensor, value: torch.Tensor) -> float:
    labels = case.kind == "labels"
    if result.shape != (value[:, 0] if labels else value).shape:
        return math.inf
    if labels:
        difference = value.amax(1, keepdim=True) - value.gather(1, result[:, None].clamp(0, value.shape[1] - 1))
    else:
        difference = (result.double() - value).abs()
    return float(difference.max() / value.abs().max())
