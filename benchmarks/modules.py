"""Modules as candidates, which blocks and networks are: native as users have it, compiled, and accelerated.

Native is eager in both layouts; torch.compile gets the module in channels_last, as its default and with max-autotune;
fastseg is the same module accelerated.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence

import torch
from torch import nn

import fastseg
from benchmarks import memory
from benchmarks.row import BASELINE_ERROR, COMPILERS, LAYOUTS, Candidate, Cost
from fastseg.models.counts import Summary, summary

# How much further from float64 than native the modules under test may be.
TIMES = 3
# How far rounding moves a ReLU's input, as a share of the mean of their absolute values.
STEP = 2.0**-18
LAST = {"memory_format": torch.channels_last}
TRAINING = "training"


class ModuleWorkload:
    """What a family's class adds: `build`, `inputs`, `call`, and the judgement of results in `gate`.

    Attributes:
        fastseg_layouts: in which layouts the accelerated module is given its input.
    """

    fastseg_layouts: tuple[str, ...] = ("channels_last", "NCHW")

    def __init__(self, case, dtype: torch.dtype, device: str):
        self.case, self.dtype, self.device = case, dtype, device
        # By direction, and modules by candidate too: made once.
        self._modules: dict[tuple[str, str], nn.Module] = {}
        self._inputs: dict[str, torch.Tensor] = {}
        self._counts: dict[str, Summary] = {}
        self._exact: dict[str, object] = {}
        self._slack: dict[str, list[float]] = {}

    # What a family gives

    def build(self, direction: str) -> nn.Module:
        """The native module in its mode, on the device, in the dtype; always the same."""
        raise NotImplementedError

    def inputs(self, direction: str) -> torch.Tensor:
        """[N, C, H, W], contiguous."""
        raise NotImplementedError

    def call(self, module: nn.Module, x: torch.Tensor, direction: str) -> Callable[[], object]:
        """A function that runs `module` on `x` once, with a backward pass in training."""
        raise NotImplementedError

    # What row.py asks for

    def keeps_for_backward(self, direction: str) -> bool:
        return direction == TRAINING

    def candidates(self) -> list[Candidate]:
        """Each one's `function` makes its module for a direction."""
        found = self.natives()
        for name, mode in COMPILERS.items():

            def compiled(direction, mode=mode):
                return torch.compile(self.native_last(direction), dynamic=False, mode=mode)

            found.append(Candidate(name, "compile", "channels_last", compiled, "inductor"))
        found.append(self.under_auto())
        for layout in self.fastseg_layouts[1:]:
            found.append(Candidate(f"fastseg {layout}", "fastseg", layout, self.accelerated, ""))
        if self.device == "cuda":  # each kernel by its name, whatever "auto" chooses
            for backend in ("triton", "cuda"):

                def named(direction, backend=backend):
                    return self.accelerated(direction, backend)

                found.append(Candidate(f"fastseg {backend}", "fastseg", self.fastseg_layouts[0], named, ""))
        return found

    def natives(self) -> list[Candidate]:
        return [
            Candidate("native NCHW", "native", "NCHW", self.native, ""),
            Candidate("native channels_last", "native", "channels_last", self.native_last, ""),
        ]

    def under_auto(self) -> Candidate:
        """fastseg as users call it."""
        return Candidate("fastseg", "fastseg", self.fastseg_layouts[0], self.accelerated, "")

    def native(self, direction: str) -> nn.Module:
        return self._kept("native", direction, self.build)

    def native_last(self, direction: str) -> nn.Module:
        return copy.deepcopy(self.native(direction)).to(**LAST)

    def accelerated(self, direction: str, backend: str = "auto") -> nn.Module:
        return fastseg.accelerate(copy.deepcopy(self.native(direction)), backend=backend)

    def calls(self, candidate: Candidate, direction: str, most: int | None = None) -> list[Callable[[], object]]:
        module = self._kept(candidate.name, direction, candidate.function)
        x = self.inputs(direction).contiguous(memory_format=LAYOUTS[candidate.layout])
        return [self.call(module, x, direction)]

    def _kept(self, name: str, direction: str, make: Callable[[str], nn.Module]) -> nn.Module:
        if (name, direction) not in self._modules:
            self._modules[name, direction] = make(direction)
        return self._modules[name, direction]

    def counts(self, direction: str) -> Summary:
        if direction not in self._counts:
            batch, channels, *size = self.inputs(direction).shape
            self._counts[direction] = summary(self.native(direction), tuple(size), channels, batch=batch)
        return self._counts[direction]

    def cost(self, direction: str) -> Cost:
        """The module as one operator: input, parameters and output once, products of live taps only."""
        counted = self.counts(direction)
        itemsize = self.dtype.itemsize
        x, parameters = math.prod(counted.input) * itemsize, counted.parameters * itemsize
        output = counted.features[-1].shape if counted.features else counted.rows[-1].output
        y = math.prod(output) * itemsize
        forward = Cost(x + parameters + y, 2 * counted.macs_live)
        if direction != TRAINING:
            return forward
        return Cost(forward.bytes + x + y + parameters + x + parameters, 3 * forward.flops)

    def live_share(self, direction: str) -> float:
        """The share of products whose input lies in the image."""
        counted = self.counts(direction)
        return round(counted.macs_live / counted.macs, 4) if counted.macs else 1.0

    def memory_needed(self, direction: str) -> int:
        """A float64 run, every candidate's parameters, and one run more; on a GPU one of each, which graphs keep."""
        module, x = self.native(direction), self.inputs(direction)
        parameters = 4 * sum(p.numel() for p in module.parameters())
        peak = memory.peak_without_data(module, x, lambda m, t: self.call(m, t, direction)())
        candidates = len(self.candidates())
        # On a CPU float64 convolutions write out every tap's image, and freed memory lies in pieces.
        peak *= 1 if self.device == "cuda" else 3
        runs = candidates if self.device == "cuda" else 2
        return (2 + candidates) * parameters + 2 * peak + runs * peak * self.dtype.itemsize // 4

    def exact(self, direction: str):
        """What float64 gives."""
        if direction not in self._exact:
            module = copy.deepcopy(self.native(direction)).double()
            self._exact[direction] = self.call(module, self.inputs(direction).double(), direction)()
        return self._exact[direction]

    def slack(self, direction: str) -> list[float]:
        """How far rounding alone may take each result, as a share of its norm: where a ReLU's input is as good as zero,
        either side is right, and the gradient has a step there.
        """
        if direction not in self._slack:
            sides = []
            for share in (-STEP, STEP):

                def moved(_, args, share=share):
                    return args[0] + share * args[0].abs().mean()

                module = copy.deepcopy(self.native(direction)).double()
                for relu in module.modules():
                    if isinstance(relu, (nn.ReLU, nn.ReLU6)):
                        relu.register_forward_pre_hook(moved)
                sides.append(self.call(module, self.inputs(direction).double(), direction)())
            self._slack[direction] = [rms_error(*both) for both in zip(*sides, strict=True)]
        return self._slack[direction]

    def extras(self, results: dict) -> dict:
        return {}


def close_to_exact(names: Sequence[str], results, exact, natives, role: str, slack: Callable[[], list[float]]) -> dict:
    """The gate on root mean square errors, for tensors. What is further off than native may be so by `slack`."""
    errors, message = [], ""
    for i, (name, value, wanted, *theirs) in enumerate(zip(names, results, exact, *natives, strict=False)):
        error, *native = (rms_error(tensor, wanted) for tensor in (value, *theirs))
        errors.append(error)
        allowed = max(TIMES * max(native, default=0.0), 1e-6) if role == "fastseg" else BASELINE_ERROR
        if not error <= allowed:
            allowed += slack()[i]
        if not error <= allowed:
            message = message or f"{name}: the error is {error:.3g} of the values, {allowed:.3g} is allowed"
    finite = all(math.isfinite(error) for error in errors)
    return {"green": not message, "message": message, "error": max(errors) if finite else None}


def rms_error(value: torch.Tensor, wanted: torch.Tensor) -> float:
    if value.shape != wanted.shape:
        return math.inf
    return float((value.double() - wanted).norm() / wanted.norm())


def without_dropout(module: nn.Module) -> nn.Module:
    """Its draws would differ from one candidate to the next."""
    for child in module.modules():
        if isinstance(child, (nn.Dropout, nn.Dropout2d)):
            child.p = 0.0
    return module
