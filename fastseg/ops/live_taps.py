"""Where the taps of a convolution look at the image and where at padding: the plan of the dense dilated kernels.

The arithmetic is C++ (csrc/dilated/rectangles.h), the same for every backend; this is its Python face.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from fastseg import extension
from fastseg.ops.geometry import output_size


class Tap(NamedTuple):
    """One filter tap along one axis: target j of a span reads source `source` + step * j."""

    source: int
    weight: int  # index along the filter


class Span(NamedTuple):
    """Targets index + period * j, j < count, of one axis, and the taps that are live at all of them."""

    index: int
    period: int
    count: int
    step: int
    taps: tuple[Tap, ...]


class Rectangle(NamedTuple):
    """Rows x columns of targets, with the live taps of each axis; every pair of them is live."""

    rows: Span
    columns: Span

    @property
    def area(self) -> int:
        return self.rows.count * self.columns.count

    @property
    def taps(self) -> int:
        return len(self.rows.taps) * len(self.columns.taps)


def rectangles(
    targets: str,
    input: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0, 0, 0),
    dilation: Sequence[int] = (1, 1),
) -> list[Rectangle]:
    """The rectangles of a convolution on which the set of live taps is constant.

    Args:
        targets: "outputs" (forward, grad_weight) or "inputs" (grad_input): what the rectangles cover, each once.
        input, kernel: (height, width), in pixels.
        stride, dilation: (height, width). padding: (top, bottom, left, right).

    Raises:
        ValueError: another `targets`, or a size, stride or dilation below 1, or an image smaller than the filter.
        RuntimeError: the extension is not built.
    """
    if extension.EXTENSION is None:
        raise RuntimeError(f"the planner is part of the extension: {extension.MISSING}")
    if min(*input, *kernel, *stride, *dilation) < 1:
        raise ValueError(
            f"expected positive sizes, strides and dilations, but got input {tuple(input)}, kernel {tuple(kernel)}, "
            f"stride {tuple(stride)}, dilation {tuple(dilation)}"
        )
    output = output_size(input, kernel, stride, padding, dilation)
    found = extension.EXTENSION.live_rectangles(
        targets, list(input), list(output), list(kernel), list(stride), list(padding), list(dilation)
    )
    return [Rectangle(_span(rows), _span(columns)) for rows, columns in found]


def _span(raw) -> Span:
    *counts, taps = raw
    return Span(*counts, tuple(Tap(*tap) for tap in taps))


def live_share(found: Sequence[Rectangle], kernel: Sequence[int]) -> float:
    """The share of filter taps, over all targets with a period of 1, that look at the image."""
    targets = sum(rectangle.area for rectangle in found)
    return sum(r.area * r.taps for r in found) / (targets * kernel[0] * kernel[1])
