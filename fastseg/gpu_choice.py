"""Where "auto" takes a kernel on a GPU: what the committed records of benchmarks/results show, as rules on sizes.

The records are of a Hopper GPU. On others "auto" stays with native until there is one of them.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from fastseg.dispatch import Geometry, Problem

RECORDED = (9,)  # major numbers of compute capability


def kernel_on_gpu(problem: Problem) -> tuple[tuple[str, ...], str]:
    """The backends to try for `problem`, the fastest first, and why; none where native is as fast or nobody knows."""
    if problem.operator not in _RULES:
        return (), f"no committed record shows a kernel of {problem.operator} faster than native"
    if _capability() not in RECORDED:
        return (), "no committed record shows a kernel faster than native on a GPU of this kind"
    if problem.geometry is None:
        return (), "without known sizes convolutions run on native on a GPU"
    if not problem.geometry.channels_last:
        return (), "no committed record shows a kernel faster than native on contiguous tensors"
    backends = _RULES[problem.operator](problem, problem.geometry)
    return backends, "faster than native in the committed records" if backends else "native is as fast"


@functools.cache
def _capability() -> int:
    return torch.cuda.get_device_capability()[0] if torch.cuda.is_available() else 0


def _depthwise(problem: Problem, geometry: Geometry) -> tuple[str, ...]:
    if max(geometry.dilation) > 1 or problem.gradient:
        return "cuda", "triton"
    return ()


def _dense(problem: Problem, geometry: Geometry) -> tuple[str, ...]:
    outputs, channels, *kernel = geometry.weight
    if max(kernel) == 1 or problem.dtype not in (torch.bfloat16, torch.float16) or min(outputs, channels) < 64:
        return ()
    # cuDNN slows down at large dilations; below, its gradients of weights are faster than ours.
    dilation = max(geometry.dilation)
    return ("triton",) if dilation >= 12 or (dilation >= 6 and not problem.gradient) else ()


_RULES = {"depthwise_conv2d": _depthwise, "dilated_conv2d": _dense}
