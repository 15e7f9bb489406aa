"""What `python -m benchmarks train` found: lines for the terminal, and the report's section with its plots."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape

from benchmarks import html, table, timing
from benchmarks.html import card, cell, fold, note

ROLES = ("native", "fastseg")


def is_red(row: dict) -> bool:
    """Whether native and fastseg disagreed on the first step, and were not trained."""
    return not row["candidates"][-1].get("gate", {"green": True})["green"]


def miou(entry: dict) -> float | None:
    """Of the held-out pictures, when they were last looked at."""
    return entry["looks"][-1]["miou"] if entry.get("looks") else None


def _miou(entry: dict) -> str:
    return "-" if miou(entry) is None else f"{miou(entry):.3f}"


def by_model(record: dict) -> dict[str, list[dict]]:
    found: dict[str, list[dict]] = {}
    for row in record["training"]:
        found.setdefault(row["model"], []).append(row)
    return found


# Lines


def terminal(record: dict) -> str:
    """Everything, for `python -m benchmarks report`."""
    rows = [row_line(row) for row in record["training"] if not row["stopped"]]
    return "\n".join([table.machine_line(record), data_line(record["data"]), *rows, summary_lines(record)])


def data_line(data: dict) -> str:
    linear = ", ".join(f"{value:.3f} from {name}" for name, value in data["linear_miou"].items())
    return (
        f"{data['pictures']} pictures of {data['size']} x {data['size']}, {data['held_out']} held out, "
        f"{len(data['classes'])} classes; mIoU of a linear classifier: {linear}"
    )


def probe_line(name: str, probe: dict) -> str:
    steps = ", ".join(f"{key} {table.seconds(value)}" for key, value in probe["seconds"].items())
    return f"{name}, {probe['parameters'] / 1e6:.2f} M parameters; a step of {steps}"


def progress(row: dict) -> str:
    """Where a training is."""
    native, fastseg = row["candidates"]
    start = f"{row['model']}, seed {row['seed']}"
    if "loss" not in native:
        return f"{start}: first steps"
    done = min(row["steps"], row["turn"] * len(native["loss"]))
    losses = " and ".join(f"{entry['loss'][-1]:.3f} {entry['name']}" for entry in (native, fastseg))
    seconds = f"{fastseg['seconds']['median']:.3g} s a step, {fastseg['ratio']['median']:.2f}x"
    looked = f", mIoU {_miou(native)} and {_miou(fastseg)}" if fastseg["looks"] else ""
    return f"{start}, step {done} of {row['steps']}: loss {losses}, {seconds}{looked}"


def row_line(row: dict) -> str:
    start = f"{row['model']}, seed {row['seed']}, {row['dtype']}"
    native, fastseg = row["candidates"]
    if is_red(row):
        return f"{start}: RED, not trained: {fastseg['gate']['message']}"
    if "seconds" not in fastseg:
        return f"{start}: {row['stopped']}"
    parts = [
        f"{entry['name']} {entry['layout']} mIoU {_miou(entry)}, {entry['trained_seconds']:.0f} s, "
        f"{table.megabytes(entry['peak_bytes'])} MB"
        for entry in (native, fastseg)
    ]
    stopped = f" ({row['stopped']})" if row["stopped"] else ""
    return f"{start}{stopped}: {'; '.join(parts)}; {_ratio(fastseg['ratio'])}"


def summary_lines(record: dict) -> str:
    """What was not trained to the end, and what the rest shows, network by network."""
    lines = [row_line(row) for row in record["training"] if row["stopped"]]
    for name, rows in by_model(record).items():
        found = {role: _finals(rows, role) for role in ROLES}
        if all(found.values()):
            means = ", ".join(f"{role} {_range(values)}" for role, values in found.items())
            lines.append(f"{name}, held-out mIoU of {_seeds(found['native'])}: {means}; {_speed(rows)}, {_spent(rows)}")
    lines += [table.disturbed(record)] if table.disturbed(record) else []
    return "\n".join(lines)


def _finals(rows: list[dict], role: str) -> list[float]:
    entries = [entry for row in rows if not row["stopped"] for entry in row["candidates"] if entry["name"] == role]
    return [miou(entry) for entry in entries if miou(entry) is not None]


def _seeds(values: list[float]) -> str:
    return f"{len(values)} seed{'s' * (len(values) > 1)}"


def _range(values: Sequence[float]) -> str:
    return f"{sum(values) / len(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def _ratio(ratio: dict) -> str:
    return f"{ratio['median']:.2f}x ({html.middle(ratio)})"


def _speed(rows: list[dict]) -> str:
    """How many times faster fastseg is, over the turns of all seeds, and where the median of such turns lies."""
    ratios = [ratio for row in rows if not row["stopped"] for ratio in row["candidates"][-1]["ratios"]]
    found, sure = timing.spread(ratios), timing.median_interval(ratios)
    return (
        f"{found.median:.2f}x ({found.p20:.2f} to {found.p80:.2f}; the median is {sure.low:.3f} to {sure.high:.3f} "
        f"with {100 * sure.confidence:.0f} %)"
    )


def _spent(rows: list[dict]) -> str:
    """In training alone, over all seeds."""
    spent = [[entry["trained_seconds"] for entry in row["candidates"]] for row in rows if not row["stopped"]]
    native, fastseg = (sum(seconds) for seconds in zip(*spent, strict=True))
    return f"{fastseg:.0f} s of training with fastseg, {native:.0f} s with native"


# The report


def section(record: dict) -> str:
    """Everything about `record["training"]`."""
    if not record.get("training"):
        return ""
    parts = [_introduction(record["data"]), f'<div class="cards">{"".join(_cards(record))}</div>', _table(record)]
    for name, rows in by_model(record).items():
        trained = [row for row in rows if "loss" in row["candidates"][0]]
        if trained:
            plot = f'<div class="scroll" tabindex="0">{curves(trained, record["data"])}</div>'
            parts.append(fold(f"{name}: loss and held-out mIoU", plot, opened=True))
        pictures = [picture for row in rows for picture in row.get("pictures", [])]
        if pictures:
            parts.append(fold(f"{name}: held-out pictures, seed 0", _pictures(pictures), opened=True))
    points = (
        "Solid: native. Dashed: fastseg. One line a seed; a loss is the mean of "
        f"{record['training'][0]['turn']} steps, on a logarithmic scale. Dotted: the better linear classifier."
    )
    return "".join([*parts, note(points), _legend(record["data"])])


def _introduction(data: dict) -> str:
    linear = " and ".join(f"{value:.3f} from {name}" for name, value in data["linear_miou"].items())
    return (
        f"<p>Trained on {data['pictures']} generated pictures of {data['size']} x {data['size']} pixels, judged by "
        f"{data['held_out']} others. Textures tell the classes apart and colours do not: a linear classifier gets an "
        f"mIoU of {escape(linear)}. Both kinds of layers start from the same parameters, see the same batches and take "
        "turns in one process.</p>"
    )


def _cards(record: dict) -> list[str]:
    found = []
    for name, rows in by_model(record).items():
        finals = {role: _finals(rows, role) for role in ROLES}
        if not all(finals.values()):
            continue
        native, fastseg = (_range(finals[role]) for role in ROLES)
        title = f"{name}, held-out mIoU, {_seeds(finals['native'])}"
        found.append(card(title, fastseg.split()[0], f"fastseg {fastseg}; native {native}"))
        figure, _, middle = _speed(rows).partition(" ")
        found.append(card(f"{name}, faster training", figure, f"{middle}; {_spent(rows)}"))
    return found


def _table(record: dict) -> str:
    heads = [
        "network", "seed", "candidate", "mIoU", "last loss", "a step", "p20 to p80", "ratio", "p20 to p80", "in all",
        "peak MB", "labels alike",
    ]  # fmt: skip
    lines = []
    for row in record["training"]:
        for entry in row["candidates"]:
            line = [cell(row["model"]), cell(str(row["seed"])), html.words(f"{entry['name']} {entry['layout']}")]
            lines.append(line)
            if "seconds" not in entry:
                reason = row["candidates"][-1].get("gate", {}).get("message") or row["stopped"]
                line.append(f'<td class="text wrap bad" colspan="{len(heads) - len(line)}">{escape(reason)}</td>')
                continue
            same = row.get("same_labels")
            line += [
                cell(_miou(entry), miou(entry)),
                cell(f"{entry['loss'][-1]:.3f}", entry["loss"][-1]),
                *html.time_cells(entry),
                *html.ratio_cells(entry.get("ratio")),
                cell(f"{entry['trained_seconds']:.0f} s", entry["trained_seconds"]),
                html.memory_cell(entry),
                cell("-" if same is None else f"{100 * same:.1f} %"),
            ]
    return html.of_lines(heads, lines, sortable=True)


def _pictures(pictures: list[dict]) -> str:
    captions = {"image": "picture", "truth": "truth", "native": "native", "fastseg": "fastseg"}
    figures = [
        f'<figure><img src="{picture[key]}" alt="{caption}"><figcaption>{caption}</figcaption></figure>'
        for picture in pictures
        for key, caption in captions.items()
    ]
    return f'<div class="pictures">{"".join(figures)}</div>'


def _legend(data: dict) -> str:
    swatches = [
        f'<span style="background:rgb({",".join(map(str, colour))})">&emsp;</span> {escape(name)}'
        for name, colour in zip(data["classes"], data["colours"], strict=True)
    ]
    return f'<p class="soft">{" &emsp; ".join(swatches)}</p>'


# The two drawing areas in a picture of 720 x 300: left, right; top and bottom are shared.
_LOSS, _MIOU = (50, 345), (410, 705)
_TOP, _BOTTOM = 20, 250
_STYLES = {
    "native": 'class="native"',
    "fastseg": 'style="fill:none;stroke:var(--accent);stroke-width:2;stroke-dasharray:5 4"',
}


def curves(rows: list[dict], data: dict) -> str:
    """Loss and held-out mIoU over the steps, a line for each seed and kind of layers."""
    steps = max(row["steps"] for row in rows)
    losses = [value for row in rows for entry in row["candidates"] for value in entry["loss"] if 0 < value < math.inf]
    low, high = math.log10(min(losses)), math.log10(max(losses))
    high = max(high, low + 0.1)

    def x(step: float, area: tuple[int, int]) -> float:
        return area[0] + (area[1] - area[0]) * step / steps

    def y(share: float) -> float:
        return _BOTTOM - (_BOTTOM - _TOP) * share

    def loss_y(value: float) -> float:
        return y((math.log10(value) - low) / (high - low))

    parts = ['<svg viewBox="0 0 720 300" role="img" aria-label="Loss and held-out mIoU over the steps">']
    ticks = [t for t in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10) if low <= math.log10(t) <= high]
    parts += _axes(_LOSS, "loss", steps, [(loss_y(tick), f"{tick:g}") for tick in ticks], x)
    parts += _axes(_MIOU, "held-out mIoU", steps, [(y(k / 5), f"{k / 5:g}") for k in range(6)], x)
    linear = max(data["linear_miou"].values(), default=None)
    if linear is not None:
        line = f"M{_MIOU[0]} {y(linear):.1f}H{_MIOU[1]}"
        parts.append(f'<path d="{line}" style="fill:none;stroke:var(--soft);stroke-dasharray:2 3"/>')
    for row in rows:
        for entry in row["candidates"]:
            title = f"{entry['name']}, seed {row['seed']}"
            ends = [min(row["steps"], row["turn"] * (k + 1)) for k in range(len(entry["loss"]))]
            points = [(x(s, _LOSS), loss_y(v)) for s, v in zip(ends, entry["loss"], strict=True) if 0 < v < math.inf]
            parts.append(_line(points, entry["name"], title))
            points = [(x(look["step"], _MIOU), y(look["miou"])) for look in entry["looks"]]
            parts.append(_line(points, entry["name"], title))
    return "".join([*parts, "</svg>"])


def _axes(area, title, steps, ticks: list[tuple[float, str]], x: Callable) -> list[str]:
    left, right = area
    parts = []
    for at, text in ticks:
        parts.append(f'<path class="grid" d="M{left} {at:.1f}H{right}"/>')
        parts.append(f'<text x="{left - 8}" y="{at + 4:.1f}" text-anchor="end">{text}</text>')
    for step in (0, steps // 2, steps):
        parts.append(f'<text x="{x(step, area):.1f}" y="{_BOTTOM + 18}" text-anchor="middle">{step}</text>')
    parts.append(f'<path class="grid" d="M{left} {_TOP}V{_BOTTOM}H{right}" fill="none"/>')
    parts.append(f'<text x="{(left + right) / 2}" y="{_BOTTOM + 38}" text-anchor="middle">{title}, by step</text>')
    return parts


def _line(points: list[tuple[float, float]], name: str, title: str) -> str:
    if not points:
        return ""
    path = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    return f'<path d="M{path}" {_STYLES[name]}><title>{escape(title)}</title></path>'
