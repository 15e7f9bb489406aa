"""The report's plots, as HTML and SVG that follow the page's colours."""

from __future__ import annotations

import math
from html import escape

from benchmarks import summary


def speed_up_bars(record: dict) -> str:
    """One bar a row on a logarithmic scale, from 1x to the right for a gain and to the left for a loss."""
    found = []
    for row in record["operators"]:
        entry = summary.shown(row)
        if entry is not None and "ratio" in entry:
            found.append((f"{row['case']} {row['direction']} {row['dtype']}", entry["ratio"]))
    if not found:
        return ""
    low = min(0.8, *(r["p20"] for _, r in found))
    high = max(1.25, *(r["p80"] for _, r in found))

    def x(value: float) -> float:
        return 100 * math.log(value / low) / math.log(high / low)

    rows = []
    for label, ratio in found:
        start, end = sorted((x(1), x(ratio["median"])))
        p20, p80 = x(ratio["p20"]), x(ratio["p80"])
        kind = "bar" if ratio["median"] >= 1 else "bar loss"
        rows.append(
            f'<div class="label">{escape(label)}</div><div class="track">'
            f'<div class="{kind}" style="left:{start:.2f}%;width:{end - start:.2f}%"></div>'
            f'<div class="whisker" style="left:{p20:.2f}%;width:{p80 - p20:.2f}%"></div>'
            f'<div class="one" style="left:{x(1):.2f}%"></div></div>'
            f'<div class="value">{ratio["median"]:.2f}x</div>'
        )
    return f'<div class="bars">{"".join(rows)}</div>'


# The drawing area of the roofline inside its 720 x 420 picture.
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 700, 20, 370


def roofline(record: dict) -> str:
    """Arithmetic rate over arithmetic intensity, both logarithmic: each case under the measured ceilings."""
    copy, peak = record["ceilings"]["copy_bytes_per_s"], record["ceilings"]["float32_flop_per_s"]
    points = []
    for row in record["operators"]:
        intensity = row["flops"] / row["bytes"]
        for kind, entry in (("native", summary.baseline(row)), ("fastseg", summary.shown(row))):
            if entry is not None and not summary.is_red(row):
                points.append((kind, row, intensity, entry["flop_per_s"]))
    if not points:
        return ""
    x_low, x_high = _decades([p[2] for p in points] + [peak / copy])
    y_low, y_high = _decades([p[3] for p in points] + [peak])

    def x(value: float) -> float:
        return _LEFT + (_RIGHT - _LEFT) * (math.log10(value) - x_low) / (x_high - x_low)

    def y(value: float) -> float:
        return _BOTTOM - (_BOTTOM - _TOP) * (math.log10(value) - y_low) / (y_high - y_low)

    parts = ['<svg viewBox="0 0 720 420" role="img" aria-label="Roofline plot">']
    for decade in range(x_low, x_high + 1):
        at = x(10.0**decade)
        parts.append(f'<path class="grid" d="M{at:.1f} {_TOP}V{_BOTTOM}"/>')
        parts.append(f'<text x="{at:.1f}" y="{_BOTTOM + 18}" text-anchor="middle">{10.0**decade:g}</text>')
    for decade in range(y_low, y_high + 1):
        at = y(10.0**decade)
        parts.append(f'<path class="grid" d="M{_LEFT} {at:.1f}H{_RIGHT}"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">{10.0**decade / 1e9:g}</text>')
    # The slope starts where it enters the picture, at the left or from below.
    left = max(10.0**x_low, 10.0**y_low / copy)
    ridge, right = peak / copy, 10.0**x_high
    corners = ((left, copy * left), (ridge, peak), (right, peak))
    line = "L".join(f"{x(intensity):.1f} {y(rate):.1f}" for intensity, rate in corners)
    parts.append(f'<path class="roof" d="M{line}"/>')
    for kind, row, intensity, rate in points:
        title = f"<title>{escape(row['id'])}, {kind}: {rate / 1e9:.3g} GFLOP/s, {intensity:.2f} FLOP a byte</title>"
        cx, cy = x(intensity), y(rate)
        if row["direction"] == "forward":
            parts.append(f'<circle class="{kind}" cx="{cx:.1f}" cy="{cy:.1f}" r="5">{title}</circle>')
        else:
            parts.append(f'<rect class="{kind}" x="{cx - 4:.1f}" y="{cy - 4:.1f}" width="8" height="8">{title}</rect>')
    parts.append(f'<text x="{(_LEFT + _RIGHT) / 2}" y="412" text-anchor="middle">FLOP a byte that has to move</text>')
    turned = f'transform="translate(16 {(_TOP + _BOTTOM) / 2}) rotate(-90)"'
    parts.append(f'<text {turned} text-anchor="middle">GFLOP/s</text>')
    return "".join([*parts, "</svg>"])


def _decades(values: list[float]) -> tuple[int, int]:
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values) * 1.1))
    return low, max(high, low + 1)
