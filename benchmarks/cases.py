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
class DepthwiseCase:
    """One depthwise convolution with "same"-sized padding. Sizes are (height, width), in pixels."""

    id: str
    layer: str
    channels: int
    size: tuple[int, int]
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    batch_gpu: int = 16
    batch_cpu: int | None = 1

    @property
    def padding(self) -> tuple[int, int]:
        return tuple(d * (k - 1) // 2 for d, k in zip(self.dilation, self.kernel, strict=True))

    def batch(self, device: str) -> int | None:
        return self.batch_cpu if device == "cpu" else self.batch_gpu


def _sep_aspp(rate: int, **options) -> DepthwiseCase:
    layer = "DeepLab v3+ separable ASPP, 513 crop" if rate > 1 else "the same shape without dilation"
    return DepthwiseCase(f"sep-aspp-d{rate}", layer, 2048, (33, 33), dilation=(rate, rate), **options)


DEPTHWISE = (
    _sep_aspp(18),
    _sep_aspp(6),
    DepthwiseCase(
        "xception-middle-d2", "Xception middle flow, output stride 8", 728, (33, 33), dilation=(2, 2), batch_cpu=2
    ),
    DepthwiseCase("xception-middle", "Xception middle flow", 728, (33, 33), batch_cpu=2),
    _sep_aspp(12),
    _sep_aspp(1),
    DepthwiseCase("decoder-256", "DeepLab v3+ decoder, second layer", 256, (129, 129), batch_gpu=8),
    DepthwiseCase("xception-entry", "Xception entry flow", 64, (257, 257)),
    DepthwiseCase("mobilenet-960-d2", "MobileNetV2 last blocks, output stride 16", 960, (33, 33), dilation=(2, 2)),
    DepthwiseCase(
        "mobilenet-v3-5x5-d2", "MobileNetV3 last blocks, output stride 16", 960, (33, 33), (5, 5), dilation=(2, 2)
    ),
    DepthwiseCase("xception-exit-d2", "Xception exit flow", 1536, (33, 33), dilation=(2, 2)),
    DepthwiseCase("decoder-304", "DeepLab v3+ decoder, first layer", 304, (129, 129), batch_gpu=8),
    DepthwiseCase("mobilenet-32", "MobileNetV2 first block", 32, (257, 257)),
    DepthwiseCase("mobilenet-96-s2", "MobileNetV2 second block", 96, (257, 257), stride=(2, 2)),
    DepthwiseCase("mobilenet-384", "MobileNetV2 middle blocks", 384, (33, 33)),
    DepthwiseCase("large-kernel-7x7", "large-kernel backbones", 384, (33, 33), (7, 7)),
    DepthwiseCase(
        "sep-aspp-d18-n1", "separable ASPP, one image", 2048, (33, 33), dilation=(18, 18), batch_gpu=1, batch_cpu=None
    ),
    DepthwiseCase("xception-middle-n1", "Xception middle flow, one image", 728, (33, 33), batch_gpu=1, batch_cpu=None),
)


def select(pattern: str, device: str) -> list[DepthwiseCase]:
    """The cases whose id matches the shell pattern and that are run on `device`, most valuable first."""
    return [case for case in DEPTHWISE if fnmatchcase(case.id, pattern) and case.batch(device) is not None]
