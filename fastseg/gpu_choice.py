"""Where "auto" takes a kernel on a GPU: what the records in benchmarks/results show, as rules on sizes.

The records are of a Hopper GPU, in bfloat16 and channels_last. Elsewhere "auto" stays with native until there is one.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from fastseg.dispatch import Geometry, Problem

RECORDED = (9,)  # major numbers of compute capability
_LOW_PRECISION = (torch.bfloat16, torch.float16)
_FASTER = "faster than native in the committed records"


def kernel_on_gpu(problem: Problem) -> tuple[tuple[str, ...], str]:
    """The backends to try for `problem`, the fastest first, and why; none where native is as fast or nobody knows."""
    if _capability() not in RECORDED:
        return (), "no committed record shows a kernel faster than native on a GPU of this kind"
    if problem.dtype not in _LOW_PRECISION:
        return (), "no committed record shows a kernel faster than native on a GPU in this dtype"
    if problem.operator in _HEAD:
        return ("cuda",), _FASTER
    if problem.operator not in _RULES:
        return (), f"no committed record shows a kernel of {problem.operator} faster than native"
    if problem.geometry is None:
        return (), "convolutions without known sizes run on native on a GPU"
    if not problem.geometry.channels_last:
        return (), "no committed record shows a kernel faster than native on contiguous tensors"
    backends = _RULES[problem.operator](problem, problem.geometry)
    return backends, _FASTER if backends else "native is as fast for such sizes"


@functools.cache
def _capability() -> int:
    return torch.cuda.get_device_capability()[0] if torch.cuda.is_available() else 0


def _depthwise(problem: Problem, geometry: Geometry) -> tuple[str, ...]:
    """Forward without dilation is as fast on cuDNN; everything else is not."""
    return ("cuda", "triton") if max(geometry.dilation) > 1 or problem.gradient else ()


def _dense(problem: Problem, geometry: Geometry) -> tuple[str, ...]:
    """cuDNN slows down at large dilations; below, its gradients of weights are faster."""
    outputs, channels, *kernel = geometry.weight
    if max(kernel) == 1 or min(outputs, channels) < 64:
        return ()
    dilation = max(geometry.dilation)
    return ("triton",) if dilation >= 12 or (dilation >= 6 and not problem.gradient) else ()


_HEAD = ("upsample_bilinear2d", "upsample_argmax", "upsample_cross_entropy")
_RULES = {"depthwise_conv2d": _depthwise, "dilated_conv2d": _dense}
