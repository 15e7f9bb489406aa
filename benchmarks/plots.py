"""The report's plots, as HTML and SVG that follow the page's colours."""

from __future__ import annotations

import itertools
import math
from html import escape

from benchmarks import summary, table


def _label(row: dict) -> str:
    return f"{row['case']} {row['direction']} {row['dtype']}"


def speed_up_bars(rows: list[dict]) -> str:
    """One bar a row on a logarithmic scale, from 1x to the right for a gain and to the left for a loss."""
    entries = [(row, summary.shown(row)) for row in rows]
    found = [(_label(row), entry["ratio"]) for row, entry in entries if entry is not None and "ratio" in entry]
    if not found:
        return ""
    low = min(0.8, *(r["p20"] for _, r in found))
    high = max(1.25, *(r["p80"] for _, r in found))

    def x(value: float) -> float:
        return 100 * math.log(value / low) / math.log(high / low)

    parts = []
    for label, ratio in found:
        start, end = sorted((x(1), x(ratio["median"])))
        p20, p80 = x(ratio["p20"]), x(ratio["p80"])
        kind = "bar" if ratio["median"] >= 1 else "bar loss"
        parts.append(
            f'<div class="label">{escape(label)}</div><div class="track">'
            f'<div class="{kind}" style="left:{start:.2f}%;width:{end - start:.2f}%"></div>'
            f'<div class="whisker" style="left:{p20:.2f}%;width:{p80 - p20:.2f}%"></div>'
            f'<div class="one" style="left:{x(1):.2f}%"></div></div>'
            f'<div class="value">{ratio["median"]:.2f}x</div>'
        )
    return f'<div class="bars">{"".join(parts)}</div>'


def memory_bars(rows: list[dict], key: str = "peak_bytes") -> str:
    """fastseg's bytes as a share of those of native's better layout, which is the whole track, or the upright line."""
    found = []
    for row in rows:
        entry, native = summary.shown(row), summary.baseline(row)
        if entry is not None and native is not None and entry.get(key) is not None and native.get(key):
            found.append((_label(row), entry[key], native[key]))
    if not found:
        return ""
    most = max(1.0, *(own / native for _, own, native in found))
    parts = []
    for label, own, native in found:
        share = own / native
        kind = "bar" if share <= 1 else "bar loss"
        parts.append(
            f'<div class="label">{escape(label)}</div><div class="track">'
            f'<div class="{kind}" style="left:0;width:{100 * share / most:.2f}%"></div>'
            f'<div class="one" style="left:{100 / most:.2f}%"></div></div>'
            f'<div class="value">{table.megabytes(own)} of {table.megabytes(native)}</div>'
        )
    return f'<div class="bars wide">{"".join(parts)}</div>'


# The drawing area of the roofline inside its 720 x 420 picture.
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 700, 20, 370


def roofline(record: dict) -> str:
    """Arithmetic rate over arithmetic intensity, both logarithmic: each case under the measured ceilings."""
    copy, peak = record["ceilings"]["copy_bytes_per_s"], record["ceilings"]["float32_flop_per_s"]
    points = []
    for row in (*record["operators"], *record["blocks"], *record["networks"]):
        if summary.is_red(row) or "flops" not in row:
            continue
        intensity = row["flops"] / row["bytes"]
        for kind, entry in (("native", summary.baseline(row)), ("fastseg", summary.shown(row))):
            if entry is not None:
                points.append((kind, row, intensity, entry["flop_per_s"]))
    if not points:
        return ""
    x_low, x_high = _decades([p[2] for p in points] + [peak / copy])
    y_low, y_high = _decades([p[3] for p in points] + [peak])

    def x(value: float) -> float:
        return _LEFT + (_RIGHT - _LEFT) * (math.log10(value) - x_low) / (x_high - x_low)

    def y(value: float) -> float:
        return _BOTTOM - (_BOTTOM - _TOP) * (math.log10(value) - y_low) / (y_high - y_low)

    parts = ['<svg class="roofline" viewBox="0 0 720 420" role="img" aria-label="Roofline plot">']
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
        if row["direction"] in ("forward", "inference"):
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


# (pixels a side, rate) of the ASPPs that people use: output stride 16 and 8 of a 513 or 520 crop.
ASPP_RATES = ((33, 6), (33, 12), (33, 18), (65, 12), (65, 24), (65, 36), (33, 24), (33, 36))


def live_taps(size: int, rate: int) -> str:
    """Where in an image how many taps of a 3x3 filter of this rate look at the image; the darker the more."""
    spans = _spans(size, rate)
    mean = sum(length * taps for _, length, taps in spans) / size
    parts = [f'<svg class="taps" viewBox="0 0 100 100" role="img" aria-label="{size} x {size}, rate {rate}">']
    scale = 100 / size
    for top, height, rows in spans:
        for left, width, columns in spans:
            taps = rows * columns
            corner = f'x="{left * scale:.2f}" y="{top * scale:.2f}"'
            sides = f'width="{width * scale:.2f}" height="{height * scale:.2f}"'
            parts.append(f'<rect class="live" {corner} {sides} opacity="{taps / 9:.3f}"/>')
            if min(width, height) * scale > 10:
                at = f'x="{(left + width / 2) * scale:.2f}" y="{(top + height / 2) * scale + 3:.2f}"'
                style = ' class="on"' if taps > 4 else ""
                parts.append(f'<text {at} text-anchor="middle"{style}>{taps}</text>')
    parts.append("</svg>")
    caption = f"{size} x {size}, rate {rate}: {mean**2:.2f} of 9 taps"
    return f"<figure>{''.join(parts)}<figcaption>{caption}</figcaption></figure>"


def _spans(size: int, rate: int) -> list[tuple[int, int, int]]:
    """(start, length, live taps of 3) along one axis."""
    cuts = sorted({0, min(rate, size), max(size - rate, 0), size})
    return [(start, end - start, 1 + (start >= rate) + (end + rate <= size)) for start, end in itertools.pairwise(cuts)]
