"""A convolution by itself: tensors, candidates, expected results and costs, as benchmarks/row.py asks for them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import ClassVar

import torch
import torch.nn.functional as F

import fastseg
from benchmarks import timing
from benchmarks.cases import ConvCase
from benchmarks.row import BASELINE_ERROR, COMPILERS, LAYOUTS, Candidate, Cost, compiled
from fastseg import dispatch
from fastseg.ops.conv2d import operator_of
from fastseg.ops.geometry import live_outputs, output_size
from fastseg.testing import Expected, assert_within, expected_conv


class ConvWorkload:
    """A convolution of x [N, C, H, W] with weight [K, C / groups, R, S]; grad_y [N, K, P, Q] for the gradients."""

    inputs = ("x", "weight")
    # direction -> which inputs need gradients.
    gradients: ClassVar = {
        "forward": (),
        "grad_input": ("x",),
        "grad_weight": ("weight",),
        "backward": ("x", "weight"),
        "forward+backward": ("x", "weight"),
    }

    def __init__(self, case: ConvCase, dtype: torch.dtype, device: str):
        self.case, self.dtype, self.device = case, dtype, device
        self.operator = operator_of(case.channels, case.groups)
        self.shape = (case.batch(device), case.channels, *case.size)
        self.geometry = (
            list(case.stride),
            [case.padding[0], case.padding[0], case.padding[1], case.padding[1]],
            list(case.dilation),
        )
        size = output_size(case.size, case.kernel, *self.geometry)
        self.output_shape = (self.shape[0], case.filter[0], *size)
        self._made: list[dict[str, torch.Tensor]] = []

    def tensors(self, seed: int) -> dict[str, torch.Tensor]:
        """x, weight and the gradient of the output, random; contiguous."""
        generator = torch.Generator(self.device).manual_seed(seed)
        products = math.prod(self.case.filter[1:])

        def random(shape):
            return torch.randn(shape, generator=generator, device=self.device)

        values = {
            "x": random(self.shape),
            "weight": random(self.case.filter) / products**0.5,
            "grad_y": random(self.output_shape),
        }
        return {name: value.to(self.dtype) for name, value in values.items()}

    def candidates(self, layouts=("channels_last",)) -> list[Candidate]:
        """Native in both layouts, torch.compile twice, fastseg under "auto" in `layouts`, every other kernel."""
        found = self.natives()
        for name, mode in COMPILERS.items():
            function = compiled(self._native, mode)
            found.append(Candidate(name, "compile", "channels_last", function, "inductor"))
        for layout in layouts:
            problem = self.problem(layout)
            choice = dispatch.choose(problem, "auto")
            name = "fastseg" if layout == "channels_last" else f"fastseg {layout}"
            found.append(Candidate(name, "fastseg", layout, self.fastseg("auto"), choice.backend, choice.reason))
        for backend in ("cpu", "triton", "cuda"):
            interpreted = backend == "triton" and self.device == "cpu"
            if backend != choice.backend and not interpreted and dispatch.reason_not(backend, problem) is None:
                named = Candidate(f"fastseg {backend}", "fastseg", "channels_last", self.fastseg(backend), backend)
                found.append(named)
        return found

    def problem(self, layout: str) -> dispatch.Problem:
        geometry = dispatch.Geometry(
            self.shape, self.case.filter, *map(tuple, self.geometry), self.output_shape[2:], layout == "channels_last"
        )
        return dispatch.Problem(self.operator, self.device, self.dtype, geometry)

    def _native(self, x, weight):
        case = self.case
        return F.conv2d(x, weight, None, case.stride, case.padding, case.dilation, case.groups)

    def natives(self) -> list[Candidate]:
        return [Candidate(f"native {layout}", "native", layout, self._native, "native") for layout in LAYOUTS]

    def under_auto(self) -> Candidate:
        """fastseg as users call it, without asking what "auto" chooses."""
        return Candidate("fastseg", "fastseg", "channels_last", self.fastseg("auto"), "")

    def fastseg(self, backend: str):
        case = self.case

        def run(x, weight):
            return fastseg.ops.conv2d(
                x, weight, None, case.stride, case.padding, case.dilation, case.groups, backend=backend
            )

        return run

    @cached_property
    def _expected(self):
        t = self.tensors(seed=0)
        dense_on_gpu = self.device == "cuda" and self.case.groups == 1
        tf32 = dense_on_gpu and self.dtype == torch.float32 and torch.backends.cudnn.allow_tf32
        return expected_conv(t["x"], t["weight"], None, *self.geometry, grad_output=t["grad_y"], tf32=tf32)

    def expected(self, direction: str) -> dict[str, Expected]:
        """What `direction` has to give for the tensors of seed 0, by the names that `direction_call` uses."""
        wanted = {}
        if "forward" in direction:
            wanted["y"] = self._expected.output
        if "x" in self.gradients[direction]:
            wanted["grad_x"] = self._expected.grad_input
        if "weight" in self.gradients[direction]:
            wanted["grad_weight"] = self._expected.grad_weight
        return wanted

    def cost(self, direction: str) -> Cost:
        itemsize = self.dtype.itemsize
        x, y = (torch.Size(shape).numel() * itemsize for shape in (self.shape, self.output_shape))
        weight = math.prod(self.case.filter) * itemsize
        product = 2 * self.live_products
        costs = {
            "forward": Cost(x + weight + y, product),
            "grad_input": Cost(y + weight + x, product),
            "grad_weight": Cost(x + y + weight, product),
            "backward": Cost(x + y + weight + x + weight, 2 * product),
        }
        both = costs["forward"], costs["backward"]
        costs["forward+backward"] = Cost(sum(c.bytes for c in both), sum(c.flops for c in both))
        return costs[direction]

    @cached_property
    def live_products(self) -> int:
        """Multiplications of one forward pass whose input lies inside the image."""
        stride, padding, dilation = self.geometry
        live = self.shape[0] * self.case.filter[0] * self.case.filter[1]
        for axis in range(2):
            size, outputs = self.shape[2 + axis], self.output_shape[2 + axis]
            spans = [
                live_outputs(size, outputs, stride[axis], padding[2 * axis], tap * dilation[axis])[0]
                for tap in range(self.case.kernel[axis])
            ]
            live *= sum(span.stop - span.start for span in spans)
        return live

    @property
    def live_taps(self) -> float:
        """Filter taps that see the image, averaged over the outputs."""
        return self.live_products / (torch.Size(self.output_shape).numel() * self.case.filter[1])

    def keeps_for_backward(self, direction: str) -> bool:
        return bool(self.gradients[direction])

    def calls(self, candidate: Candidate, direction: str, most: int | None = None) -> list[Callable]:
        return [direction_call(candidate, self, direction, tensors) for tensors in self._sets(direction)[:most]]

    def _sets(self, direction: str) -> list[dict[str, torch.Tensor]]:
        """The tensors of each set of buffers; kept, since every candidate asks for them."""
        count = timing.buffer_sets(self.cost(direction).bytes, self.device)
        while len(self._made) < count:
            self._made.append(self.tensors(seed=len(self._made)))
        return self._made[:count]

    def gate(self, results: dict[str, torch.Tensor], direction: str, role: str, natives: Sequence = ()) -> dict:
        return check(results, self, direction, role)

    def extras(self, results: dict) -> dict:
        return {}

    def memory_needed(self, direction: str) -> int:
        """Every candidate's tensors, and the float64 results with the matrix that a plain float64 convolution makes."""
        x, y, weight = (math.prod(shape) for shape in (self.shape, self.output_shape, self.case.filter))
        sets = timing.buffer_sets(self.cost(direction).bytes, self.device)
        # A candidate's inputs in its layout, and its results: on a GPU they all stay in graphs.
        each = (2 * x + 2 * y + 2 * weight) * self.dtype.itemsize
        columns = x * math.prod(self.case.kernel) if self.case.groups == 1 else 0
        return 6 * sets * each + 8 * (4 * (x + y + weight) + columns)

    def describe(self, direction: str = "forward") -> dict:
        """The case as JSON, for the record's row."""
        case = self.case
        return {
            "case": case.id,
            "layer": case.layer,
            "operator": self.operator,
            "shape": list(self.shape),
            "outputs": case.filter[0],
            "kernel": list(case.kernel),
            "stride": list(case.stride),
            "padding": list(case.padding),
            "dilation": list(case.dilation),
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": self.device,
            "live_taps": round(self.live_taps, 3),
            "taps": case.kernel[0] * case.kernel[1],
        }


def direction_call(candidate: Candidate, workload, direction: str, tensors) -> Callable[[], dict[str, torch.Tensor]]:
    """A function that runs `direction` once and returns its results by name.

    For the gradients alone the forward pass is run here, once, and kept; they come through autograd, as in training.
    """
    layout = LAYOUTS[candidate.layout]
    needed = workload.gradients[direction]
    given = {
        name: tensors[name].contiguous(memory_format=layout).detach().requires_grad_(name in needed)
        for name in workload.inputs
    }
    wanted = [given[name] for name in needed]
    names = [f"grad_{name}" for name in needed]
    grad_y = tensors["grad_y"].contiguous(memory_format=layout)
    inputs = tuple(given.values())
    if direction == "forward":
        return lambda: {"y": candidate.function(*inputs)}
    if direction == "forward+backward":

        def both():
            y = candidate.function(*inputs)
            return {"y": y.detach(), **dict(zip(names, torch.autograd.grad(y, wanted, grad_y), strict=True))}

        return both
    y = candidate.function(*inputs)
    return lambda: dict(zip(names, torch.autograd.grad(y, wanted, grad_y, retain_graph=True), strict=True))


def check(results: dict[str, torch.Tensor], workload, direction: str, role: str) -> dict:
    """The gate: {"green", "error", "message"}; the error is the largest one, relative to the largest value.

    The error is None where a result has the wrong shape or is not finite.
    """
    errors, message = [], ""
    for name, wanted in workload.expected(direction).items():
        actual = results[name].detach()
        same_shape = actual.shape == wanted.value.shape
        difference = float((actual.double() - wanted.value).abs().max()) if same_shape else math.inf
        errors.append(difference / float(wanted.value.abs().max()))
        try:
            if role == "fastseg":
                assert_within(actual, wanted, name)
            elif not errors[-1] <= BASELINE_ERROR:
                raise AssertionError(f"{name}: the largest error is {errors[-1]:.3g} of the largest value")
        except AssertionError as failure:
            message = message or str(failure)
    finite = all(math.isfinite(error) for error in errors)
    return {"green": not message, "error": max(errors) if finite else None, "message": message}
