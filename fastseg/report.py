"""What `fastseg.explain` found, as data, as a table and as JSON."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Iterable, Sequence


@dataclasses.dataclass
class Row:
    """One convolution layer with one input shape."""

    name: str
    input: tuple[int, ...]  # [N, C, H, W]
    output: tuple[int, ...]  # [N, K, P, Q]
    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    kernel: str  # the backend that runs it
    reason: str  # why that one
    margin: float | None  # where it was measured: how many times faster than native; native itself, than the kernels
    fold: str  # the norm and activation it applies as well, and where
    ms: float
    native_ms: float  # native in the faster of its two layouts, with the same norm and activation
    live_taps: float  # share of (output, tap) pairs that lie inside the image
    megabytes: float  # input, weight and output, once each
    gflop: float  # of live taps
    bound_ms: float  # the larger of the time to move the bytes and the time to do the arithmetic
    calls: int

    @property
    def share_of_bound(self) -> float:
        return self.bound_ms / self.ms


@dataclasses.dataclass
class Report:
    """What `fastseg.explain` found; str() is a table, `.to_json()` the same as JSON text."""

    model: str
    accelerated: bool
    device: str
    dtype: str
    bandwidth: float  # bytes a second
    rate: float  # floating-point operations a second
    rows: list[Row]
    fused: list[str]  # modules that can run as a whole, and on what; their convolutions are timed one by one above
    resizes: list[str]  # modules that resize bilinearly, and on what
    warnings: list[str]

    @property
    def ms(self) -> float:
        return sum(row.ms * row.calls for row in self.rows)

    @property
    def native_ms(self) -> float:
        return sum(row.native_ms * row.calls for row in self.rows)

    def to_json(self) -> str:
        rows = [dataclasses.asdict(row) | {"share_of_bound": row.share_of_bound} for row in self.rows]
        totals = {"ms": self.ms, "native_ms": self.native_ms}
        return json.dumps(dataclasses.asdict(self) | totals | {"rows": rows}, indent=2)

    def __str__(self) -> str:
        return "\n".join([self._title(), "", *_table(self.rows), "", *self._summary()])

    def _title(self) -> str:
        state = "accelerated" if self.accelerated else "not accelerated; this is what fastseg.accelerate would do"
        return f"{self.model} ({state}), {self.dtype} on {self.device}"

    def _summary(self) -> list[str]:
        lines = []
        if self.rows:
            lines.append(
                f"{len(self.rows)} convolutions: {self.ms:.2f} ms, native {self.native_ms:.2f} ms in the faster layout "
                f"of each, {self.native_ms / self.ms:.2f}x"
            )
        for (kernel, reason), count in Counter((row.kernel, row.reason) for row in self.rows).most_common():
            lines.append(f"{count} on {kernel}: {reason}")
        lines.append(
            f"bound: the slower of {self.bandwidth / 1e9:.1f} GB/s (measured by a copy) and {self.rate / 1e9:.0f} "
            "GFLOP/s (measured by a matrix product); more than 100 % means that the tensors stay in a cache"
        )
        lines += [f"fused: {line}" for line in self.fused]
        lines += [f"resize: {line}" for line in self.resizes]
        lines += [f"warning: {warning}" for warning in self.warnings]
        return lines


def _table(rows: list[Row]) -> list[str]:
    if not rows:
        return ["no convolutions"]
    columns = ("ms", "native ms", "ratio", "live", "MB", "of bound")
    head = ["layer", "input", "convolution", "kernel", "margin", *columns, "folds"]
    return aligned(head, [_cells(row) for row in rows], right=range(4, 5 + len(columns)))


def aligned(head: list[str], lines: list[list[str]], right: Iterable[int] = ()) -> list[str]:
    """Lines of text with cells one below the other, those of `right` to the right."""
    widths = [max(map(len, column)) for column in zip(head, *lines, strict=True)]
    texts = [
        "  ".join(
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in [head, *lines]
    ]
    return [texts[0], "-" * max(map(len, texts)), *texts[1:]]


def geometry_text(kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int], groups: int) -> str:
    """A convolution in short, such as "3x3 s2 d1,2 g16"; what is 1 is left out."""
    text = "x".join(map(str, kernel))
    for letter, numbers in (("s", stride), ("d", dilation)):
        if any(number != 1 for number in numbers):
            text += f" {letter}" + (",".join(map(str, numbers)) if len(set(numbers)) > 1 else str(numbers[0]))
    return text + (f" g{groups}" if groups > 1 else "")


def times(ratio: float) -> str:
    return f"{ratio:.2f}x"


def _cells(row: Row) -> list[str]:
    """One line of the table."""
    repeated = f" x{row.calls}" if row.calls > 1 else ""
    convolution = geometry_text(row.kernel_size, row.stride, row.dilation, row.groups)
    return [
        row.name + repeated,
        "x".join(map(str, row.input)),
        f"{convolution} -> {row.output[1]}",
        row.kernel,
        "" if row.margin is None else times(row.margin),
        f"{row.ms:.3f}",
        f"{row.native_ms:.3f}",
        times(row.native_ms / row.ms),
        f"{100 * row.live_taps:.0f} %",
        f"{row.megabytes:.2f}",
        f"{100 * row.share_of_bound:.0f} %",
        row.fold,
    ]
