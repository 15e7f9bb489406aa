"""Which input pixels a bilinear resize reads, along one axis: the index arithmetic of the family, in one place.

Output i looks at position max(step * (i + 0.5) - 0.5, 0) of the input, or step * i with align_corners. It lies `share`
of the way from pixel `first` to pixel `second`. Positions are computed as ATen computes them, in float32 unless the
tensor is float64, with one rounding where it may fuse (csrc/head/sampling.h is this file in C++).
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Samples(NamedTuple):
    """For each output along one axis: output = (1 - share) * input[first] + share * input[second]."""

    first: torch.Tensor  # [outputs] int64
    second: torch.Tensor  # [outputs] int64
    share: torch.Tensor  # [outputs], in the dtype of positions


def source_step(inputs: int, outputs: int, scale: float | None, align_corners: bool) -> float:
    """How far apart two neighbouring outputs look at the input, in pixels. `scale` is the scale factor asked for."""
    if align_corners:
        return (inputs - 1) / (outputs - 1) if outputs > 1 else 0.0
    return 1.0 / scale if scale is not None else inputs / outputs


def samples(inputs: int, outputs: int, scale, align_corners: bool, dtype: torch.dtype, device) -> Samples:
    """Where each output along an axis looks; `dtype` is that of positions: float32, or float64 for such tensors."""
    step = torch.tensor(source_step(inputs, outputs, scale, align_corners), dtype=dtype, device=device).double()
    output = torch.arange(outputs, dtype=torch.float64, device=device)
    position = step * output if align_corners else (step * (output + 0.5) - 0.5).clamp_min(0)
    position = position.to(dtype)
    first = position.long().clamp_max(inputs - 1)
    share = (position - first).clamp(0, 1)
    return Samples(first, (first + 1).clamp_max(inputs - 1), share)


def position_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of positions, weights and sums for tensors of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32
