"""The cases, as data: shapes the field recognises, in the order of their value, and the directions they are timed in.

Every case names a layer of a published network. `batch_gpu` is the batch users train with; `batch_cpu` is cut to what a
CPU can do in reasonable time, and None where that would repeat a case. Nothing but the batch is ever cut.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase

DIRECTIONS = ("forward", "backward", "forward+backward", "grad_input", "grad_weight")
# The quick run times these; "backward" is both gradients in one call.
QUICK_DIRECTIONS = ("forward", "backward")


@dataclass(frozen=True)
class ConvCase:
    """One depthwise convolution, or with `outputs` a dense one, with "same"-sized padding.

    Sizes are (height, width), in pixels. `quick` says whether the quick run on a CPU has it; `table` is the name that
    the field has for it, where several cases share one.
    """

    id: str
    layer: str
    channels: int
    size: tuple[int, int]
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    batch_gpu: int = 16
    batch_cpu: int | None = 1
    outputs: int | None = None
    quick: bool = True
    table: str = ""

    @property
    def devices(self) -> tuple[str, ...]:
        return tuple(device for device in ("cpu", "cuda") if self.batch(device) is not None)

    @property
    def groups(self) -> int:
        return 1 if self.outputs else self.channels

    @property
    def filter(self) -> tuple[int, int, int, int]:
        """The weight's shape."""
        return self.outputs or self.channels, self.channels // self.groups, *self.kernel

    @property
    def padding(self) -> tuple[int, int]:
        return tuple(d * (k - 1) // 2 for d, k in zip(self.dilation, self.kernel, strict=True))

    def batch(self, device: str) -> int | None:
        return self.batch_cpu if device == "cpu" else self.batch_gpu


def _sep_aspp(rate: int, **options) -> ConvCase:
    layer = "DeepLab v3+ separable ASPP, 513 crop" if rate > 1 else "the same shape without dilation"
    return ConvCase(f"sep-aspp-d{rate}", layer, 2048, (33, 33), dilation=(rate, rate), table="sep-aspp", **options)


DEPTHWISE = (
    _sep_aspp(18),
    _sep_aspp(6),
    ConvCase(
        "xception-middle-d2", "Xception middle flow, output stride 8", 728, (33, 33), dilation=(2, 2), batch_cpu=2
    ),
    ConvCase("xception-middle", "Xception middle flow", 728, (33, 33), batch_cpu=2),
    _sep_aspp(12),
    _sep_aspp(1),
    ConvCase("decoder-256", "DeepLab v3+ decoder, second layer", 256, (129, 129), batch_gpu=8, table="decoder"),
    ConvCase("xception-entry", "Xception entry flow", 64, (257, 257)),
    ConvCase("mobilenet-960-d2", "MobileNetV2 last blocks", 960, (33, 33), dilation=(2, 2), table="mobilenet-dw"),
    ConvCase(
        "mobilenet-v3-5x5-d2", "MobileNetV3 last blocks, output stride 16", 960, (33, 33), (5, 5), dilation=(2, 2)
    ),
    ConvCase("xception-exit-d2", "Xception exit flow", 1536, (33, 33), dilation=(2, 2), table="xception-exit"),
    ConvCase("decoder-304", "DeepLab v3+ decoder, first layer", 304, (129, 129), batch_gpu=8, table="decoder"),
    ConvCase("mobilenet-32", "MobileNetV2 first block", 32, (257, 257), table="mobilenet-dw"),
    ConvCase("mobilenet-96-s2", "MobileNetV2 second block", 96, (257, 257), stride=(2, 2), table="mobilenet-dw"),
    ConvCase("mobilenet-384", "MobileNetV2 middle blocks", 384, (33, 33), table="mobilenet-dw"),
    ConvCase("large-kernel-7x7", "large-kernel backbones", 384, (33, 33), (7, 7)),
    ConvCase(
        "sep-aspp-d18-n1", "separable ASPP, one image", 2048, (33, 33), dilation=(18, 18), batch_gpu=1, batch_cpu=None
    ),
    ConvCase("xception-middle-n1", "Xception middle flow, one image", 728, (33, 33), batch_gpu=1, batch_cpu=None),
)


@dataclass(frozen=True)
class AsppCase:
    """Parallel 3x3 branches of several rates over one input [batch, channels, size, size]."""

    id: str
    layer: str
    batch: int
    channels: int
    size: int
    rates: tuple[int, ...]
    outputs: int
    batch_cpu: int | None = 1
    quick: bool = False

    def branches(self) -> list[ConvCase]:
        """Each branch as a convolution by itself."""
        return [
            ConvCase(
                f"{self.id}-d{rate}",
                self.layer,
                self.channels,
                (self.size, self.size),
                dilation=(rate, rate),
                batch_gpu=self.batch,
                batch_cpu=self.batch_cpu,
                outputs=self.outputs,
                quick=self.quick,
                table=self.id,
            )
            for rate in self.rates
        ]


ASPP = (
    AsppCase("aspp-r101-os16", "DeepLab v3 ASPP, 513 crop", 16, 2048, 33, (6, 12, 18), 256, quick=True),
    AsppCase("aspp-tv-os8", "torchvision ASPP, 520", 8, 2048, 65, (12, 24, 36), 256, quick=True),
    AsppCase("aspp-mnv3", "torchvision MobileNetV3 head", 16, 960, 33, (12, 24, 36), 256),
    AsppCase("aspp-r101-os16-n1", "DeepLab v3 ASPP, one image", 1, 2048, 33, (6, 12, 18), 256, batch_cpu=None),
    AsppCase("aspp-v2", "DeepLab v2, summed", 10, 2048, 41, (6, 12, 18, 24), 21),
    AsppCase("largefov", "DeepLab v1 fc6", 10, 512, 41, (12,), 1024),
    AsppCase("resnet-l4", "ResNet's last stage, output stride 8", 8, 512, 65, (4,), 512),
    AsppCase("resnet-l3", "ResNet's third stage, output stride 8", 8, 256, 65, (2,), 256),
)


def _pointwise(id: str, layer: str, channels: int, size: int, outputs: int, **options) -> ConvCase:
    return ConvCase(id, layer, channels, (size, size), (1, 1), outputs=outputs, **options)


DENSE = (
    *(branch for case in ASPP for branch in case.branches()),
    _pointwise("aspp-1x1", "DeepLab v3 ASPP, the 1x1 branch", 2048, 33, 256),
    _pointwise("project-1x1", "DeepLab v3 ASPP, projection", 1280, 33, 256, quick=False),
    _pointwise("mobilenet-expand", "MobileNetV3 last blocks", 160, 33, 960),
    _pointwise("mobilenet-reduce", "MobileNetV3 last blocks", 960, 33, 160, quick=False),
    _pointwise("mobilenet-early", "MobileNetV3 second stage", 24, 129, 72, quick=False),
    ConvCase(
        "decoder-dense", "DeepLab v3+ decoder", 304, (129, 129), batch_gpu=8, outputs=256, quick=False, table="decoder"
    ),
    ConvCase("unet-top", "U-Net, first level down", 64, (512, 512), batch_gpu=8, outputs=64, quick=False),
    ConvCase(
        "unet-concat", "U-Net, last level up", 128, (512, 512), batch_gpu=8, outputs=64, quick=False, table="unet-top"
    ),
)
CASES = DEPTHWISE + DENSE


def select(pattern: str, device: str, quick: bool = False) -> list[ConvCase]:
    """The cases whose id matches the shell pattern and that are run on `device`, most valuable first."""
    found = [case for case in CASES if fnmatchcase(case.id, pattern) and case.batch(device) is not None]
    return [case for case in found if case.quick or not quick]
