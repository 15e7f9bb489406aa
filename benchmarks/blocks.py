"""Whole blocks of DeepLab, as modules: separable convolutions with their norms, ASPP, separable ASPP.

"inference" is eval mode without gradients, "training" a forward and a backward pass with batch statistics. The gate:
result and input's gradient are at most modules.TIMES further from float64 than native's own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from benchmarks.modules import ModuleWorkload, close_to_exact, without_dropout
from fastseg.models.layers import ASPP

DIRECTIONS = ("inference", "training")


@dataclass(frozen=True)
class BlockCase:
    """`build()` makes the module; its input is [batch, channels, size, size].

    `table` is what the field calls it. A case whose `devices` leave the CPU out repeats another one there.
    """

    id: str
    layer: str
    build: Callable[[], nn.Module]
    channels: int
    size: int
    batch_gpu: int = 16
    quick: bool = True
    table: str = ""
    devices: tuple[str, ...] = ("cpu", "cuda")

    def batch(self, device: str, direction: str) -> int:
        if direction == "training":
            return max(2, self.batch_gpu if device != "cpu" else 1)  # batch norm needs two images where one is pooled
        return 1 if device == "cpu" else self.batch_gpu


def _separable(channels: int, outputs: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        nn.Conv2d(channels, outputs, 1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )


def _torchvision_aspp(rates: tuple[int, ...], channels: int = 2048) -> nn.Module:
    from torchvision.models.segmentation import deeplabv3

    return without_dropout(deeplabv3.ASPP(channels, list(rates), 256))


def _separable_aspp() -> nn.Module:
    from segmentation_models_pytorch.decoders.deeplabv3 import decoder

    return without_dropout(decoder.ASPP(2048, 256, [6, 12, 18], separable=True, dropout=0.0))


def _summed_aspp() -> nn.Module:
    options = {"pointwise": False, "pooling": None, "norm": None, "activation": "none", "reduction": "sum"}
    return ASPP(2048, 21, (6, 12, 18, 24), **options)


def _double(channels: int) -> nn.Module:
    """U-Net's pair of convolutions, padded."""
    return nn.Sequential(
        *(nn.Conv2d(channels, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU()),
        *(nn.Conv2d(64, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU()),
    )


def _decoder(separable: bool) -> nn.Module:
    """DeepLab v3+'s two convolutions behind the join."""
    if separable:
        return nn.Sequential(*_separable(304, 256), *_separable(256, 256))
    return nn.Sequential(
        *(nn.Conv2d(304, 256, 3, padding=1, bias=False), nn.BatchNorm2d(256), nn.ReLU()),
        *(nn.Conv2d(256, 256, 3, padding=1, bias=False), nn.BatchNorm2d(256), nn.ReLU()),
    )


_GPU = ("cuda",)
_OS16, _OS8 = (6, 12, 18), (12, 24, 36)
BLOCKS = (
    BlockCase("separable-64-128", "Xception entry flow", lambda: _separable(64, 128), 64, 129),
    BlockCase("separable-32-64", "MobileNet, second block", lambda: _separable(32, 64), 32, 257),
    BlockCase(
        "separable-728", "Xception middle flow", lambda: _separable(728, 728), 728, 33, table="xception-middle"
    ),
    BlockCase("aspp-os16", "torchvision's ASPP, 6/12/18", lambda: _torchvision_aspp(_OS16), 2048, 33,
              table="aspp-r101-os16"),
    BlockCase("separable-aspp", "segmentation_models_pytorch's separable ASPP", _separable_aspp, 2048, 33,
              table="sep-aspp"),
    BlockCase("aspp-os8", "torchvision's ASPP, 12/24/36", lambda: _torchvision_aspp(_OS8), 2048, 65, 8,
              table="aspp-tv-os8"),
    BlockCase("aspp-mnv3-block", "torchvision's MobileNetV3 ASPP, 12/24/36", lambda: _torchvision_aspp(_OS8, 960), 960,
              33, table="aspp-mnv3"),
    BlockCase("aspp-v2-block", "DeepLab v2's summed ASPP, 6/12/18/24", _summed_aspp, 2048, 41, 10, table="aspp-v2"),
    BlockCase("aspp-os16-n1", "torchvision's ASPP, one image", lambda: _torchvision_aspp(_OS16), 2048, 33, 1,
              table="aspp-r101-os16-n1", devices=_GPU),
    BlockCase("decoder-separable", "DeepLab v3+ decoder, separable", lambda: _decoder(True), 304, 129, 8, quick=False,
              table="decoder"),
    BlockCase("decoder-dense-block", "DeepLab v3+ decoder, dense", lambda: _decoder(False), 304, 129, 8, quick=False,
              table="decoder"),
    BlockCase("unet-encoder-block", "U-Net, first level", lambda: _double(64), 64, 512, 8, quick=False,
              table="unet-top"),
    BlockCase("unet-decoder-block", "U-Net, last level", lambda: _double(128), 128, 512, 8, quick=False,
              table="unet-top"),
)  # fmt: skip


class BlockWorkload(ModuleWorkload):
    """A block, and random inputs of its size."""

    case: BlockCase

    def build(self, direction: str) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            module = self.case.build()
        return module.to(self.device, self.dtype).train(direction == "training")

    def inputs(self, direction: str) -> torch.Tensor:
        if direction not in self._inputs:
            case = self.case
            shape = (case.batch(self.device, direction), case.channels, case.size, case.size)
            x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
            self._inputs[direction] = x.to(self.device, self.dtype)
        return self._inputs[direction]

    def call(self, module: nn.Module, x: torch.Tensor, direction: str) -> Callable[[], tuple[torch.Tensor, ...]]:
        """Gives the output, and in training the input's gradient."""
        if direction == "inference":

            def infer():
                with torch.no_grad():
                    return (module(x),)

            return infer
        parameters = [p for p in module.parameters() if p.requires_grad]
        upstream: list[torch.Tensor] = []

        def train():
            given = x.detach().requires_grad_()
            y = module(given)
            if not upstream:
                random = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
                upstream.append(torch.empty_like(y).copy_(random))  # in the output's memory format
            grads = torch.autograd.grad(y, (given, *parameters), upstream[0])
            return y.detach(), grads[0]

        return train

    def gate(self, results, direction: str, role: str, natives: Sequence) -> dict:
        names, exact = ("output", "grad of the input"), self.exact(direction)
        return close_to_exact(names, results, exact, natives, role, lambda: self.slack(direction))

    def describe(self, direction: str) -> dict:
        return {
            "case": self.case.id,
            "layer": self.case.layer,
            "shape": list(self.inputs(direction).shape),
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": self.device,
            "live_share": self.live_share(direction),
        }
