"""What an operator family gives to the benchmark: tensors, candidates, expected results and costs.

A family is one class like `ConvWorkload`; `operators.py` measures any of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F

import fastseg
from benchmarks.cases import ConvCase
from fastseg import dispatch
from fastseg.ops.conv2d import operator_of
from fastseg.ops.geometry import live_outputs, output_size
from fastseg.testing import Expected, expected_conv

LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}


@dataclass(frozen=True)
class Candidate:
    """One way to run the operator.

    role: "native" (eager, a baseline), "compile" (torch.compile, shown beside them) or "fastseg" (under test).
    function: the operator's tensors -> output.
    """

    name: str
    role: str
    layout: str  # a key of LAYOUTS
    function: Callable[..., torch.Tensor]
    backend: str
    reason: str = ""


class Cost(NamedTuple):
    """What the operator cannot do without: each tensor moved once, each product whose input lies in the image."""

    bytes: int
    flops: int


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
        """Native in both layouts, torch.compile, fastseg under "auto" in `layouts`, every other kernel."""
        found = [Candidate(f"native {layout}", "native", layout, self._native, "native") for layout in LAYOUTS]
        compiled = torch.compile(self._native, dynamic=False)
        found.append(Candidate("torch.compile", "compile", "channels_last", compiled, "inductor"))
        for layout in layouts:
            problem = self.problem(layout)
            choice = dispatch.choose(problem, "auto")
            name = "fastseg" if layout == "channels_last" else f"fastseg {layout}"
            found.append(Candidate(name, "fastseg", layout, self._fastseg("auto"), choice.backend, choice.reason))
        for backend in ("cpu", "triton", "cuda"):
            interpreted = backend == "triton" and self.device == "cpu"
            if backend != choice.backend and not interpreted and dispatch.reason_not(backend, problem) is None:
                named = Candidate(f"fastseg {backend}", "fastseg", "channels_last", self._fastseg(backend), backend)
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

    def _fastseg(self, backend: str):
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
        """What `direction` has to give for the tensors of seed 0, by the names `operators.direction_call` uses."""
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

    def describe(self) -> dict:
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
