"""Records as text: lines for the terminal, a Markdown table for the README."""

from __future__ import annotations

from benchmarks import summary
from benchmarks.record import gates

HEADER = (
    f"{'case':<20} {'direction':<16} {'dtype':<8} {'native':>9} {'fastseg':>9} {'p20-p80':>17} {'ratio':>7} "
    f"{'p20-p80':>13} {'GB/s':>6} {'GFLOP/s':>7} {'bound':>12} {'memory MB':>13} {'taps':>5} {'error, native':>15}"
    "  kernel"
)


def seconds(value: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e3), ("us", 1e6)):
        if value * scale >= 1:
            return f"{value * scale:.3g} {unit}"
    return f"{value * 1e6:.2f} us"


def megabytes(value: int | None) -> str:
    return "-" if value is None else f"{value / 1e6:.1f}"


def shape(row: dict) -> str:
    return "x".join(map(str, row["shape"])) + f" {row['dtype']}"


def share(entry: dict, row: dict) -> str:
    return f"{100 * entry['share_of_bound']:.0f} % {row['bound']['name']}"


def row_line(row: dict) -> str:
    start = f"{row['case']:<20} {row['direction']:<16} {row['dtype']:<8}"
    if summary.is_red(row):
        return f"{start} RED, no speed: {summary.red_message(row)}"
    entry, native = summary.shown(row), summary.baseline(row)
    if entry is None:
        reasons = [f"{c['name']}: {c['skipped']}" for c in row["candidates"] if c["skipped"]]
        return f"{start} not timed: {'; '.join(reasons)}"
    spread, ratio = entry["seconds"], entry.get("ratio")
    return " ".join(
        [
            start,
            f"{seconds(native['seconds']['median']) if native else '-':>9}",
            f"{seconds(spread['median']):>9}",
            f"{seconds(spread['p20']) + '-' + seconds(spread['p80']):>17}",
            f"{ratio['median']:>6.2f}x" if ratio else f"{'-':>7}",
            f"{ratio['p20']:>6.2f}-{ratio['p80']:<6.2f}" if ratio else f"{'-':>13}",
            f"{entry['bytes_per_s'] / 1e9:>6.1f}",
            f"{entry['flop_per_s'] / 1e9:>7.1f}",
            f"{share(entry, row):>12}",
            f"{megabytes(entry['peak_bytes']) + '/' + megabytes(native['peak_bytes'] if native else None):>13}",
            f"{row['live_taps']:>5.2f}",
            f"{entry['gate']['error']:>7.1e} {native['gate']['error'] if native else float('nan'):>7.1e}",
            f" {kernel(entry)}",
        ]
    )


def kernel(entry: dict) -> str:
    return entry["backend"] if entry["name"] == "fastseg" else f"{entry['backend']} (by name)"


def network_lines(row: dict) -> str:
    lines = [f"{row['model']}, {shape(row)}, random weights"]
    for entry in row["candidates"]:
        name = f"  {entry['name']:<22}"
        if entry["skipped"]:
            lines.append(f"{name} skipped: {entry['skipped']}")
        elif not entry["gate"]["green"]:
            lines.append(f"{name} RED, no speed: {entry['gate']['message']}")
        else:
            took, gate = entry["seconds"], entry["gate"]
            ratios = [
                f"{value['median']:.2f}x over {key.removeprefix('ratio to ')}"
                for key, value in entry.items()
                if key.startswith("ratio")
            ]
            lines.append(
                f"{name} {seconds(took['median']):>8} ({seconds(took['p20'])}-{seconds(took['p80'])}), "
                f"{', '.join(ratios)}, {megabytes(entry['peak_bytes'])} MB, error {gate['error']:.1e}, "
                f"{gate['labels_unlike_native']} of {gate['labels']} labels unlike native's"
            )
    return "\n".join(lines)


def block_line(row: dict) -> str:
    start = f"{row['case']:<20} {row['direction']:<10} {shape(row):<24}"
    if summary.is_red(row):
        return f"{start} RED, no speed: {summary.red_message(row)}"
    parts = []
    for entry in row["candidates"]:
        if "seconds" not in entry:
            continue
        took = f"{entry['name']} {seconds(entry['seconds']['median'])}"
        if entry["name"] == "fastseg":
            ratios = [f"{v['median']:.2f}x" for k, v in entry.items() if k.startswith("ratio")]
            took += f" ({', '.join(ratios)})"
        parts.append(f"{took}, {megabytes(entry['peak_bytes'])} MB")
    return f"{start} {'; '.join(parts)}"


def machine_line(record: dict) -> str:
    machine = record["machine"]
    device = f"{machine['gpu']}, driver {machine['driver']}, CUDA {machine['cuda']}; " if "gpu" in machine else ""
    return (
        f"{device}{machine['cpu']}, {machine['isa']}, {machine['threads']} threads on {machine['cores']} cores, "
        f"torch {machine['torch']}"
    )


def disturbed(record: dict) -> str:
    """A warning when other programs ran at the same time, else nothing."""
    machine = record["machine"]
    start, end = machine["load_at_start"], machine["load_at_end"]
    busy = (start or 0) > 0.5 * machine["cores"] or (end or 0) > machine["threads"] + 0.5
    return f"other programs were running (load {start} before, {end} after): these times are disturbed" if busy else ""


def ceilings_line(record: dict) -> str:
    found = record["ceilings"]
    rates = ", ".join(
        f"{key.removesuffix('_flop_per_s')} {value / 1e12:.3g} TFLOP/s"
        for key, value in found.items()
        if key.endswith("flop_per_s")
    )
    copy = found["copy_bytes_per_s"] / 1e9
    return f"measured ceilings: copy {copy:.4g} GB/s read and written, matrix product {rates}"


def overhead_line(record: dict) -> str:
    parts = [
        f"{r['name']} [{r['backend']}] {1e6 * r['seconds']['median']:.1f} us ({1e6 * r['above_native']['median']:+.1f})"
        for r in record["overhead"]
    ]
    return "one operator call on a 5x5 image (above native): " + "; ".join(parts)


def summary_lines(record: dict) -> str:
    lines = [
        f"{s.direction:<24} geometric mean {s.geometric_mean:6.2f}x over {s.rows:>2} cases, "
        f"best {s.best[0]:6.2f}x ({s.best[1]}), worst {s.worst[0]:6.2f}x ({s.worst[1]})"
        for s in summary.summaries(record)
    ]
    lines += [
        f"{'met    ' if met else 'NOT MET'} {wanted}: {measured}" for wanted, measured, met in summary.targets(record)
    ]
    lines += [disturbed(record)] if disturbed(record) else []
    found = gates(record)
    lines.append(f"gates: {found['green']} green, {found['red']} red")
    if record["skipped"]:
        lines.append(f"skipped: {len(record['skipped'])} rows, the first because {record['skipped'][0]['reason']}")
    return "\n".join(lines)


def terminal(record: dict) -> str:
    """Everything, for `python -m benchmarks report`."""
    parts = [machine_line(record)]
    parts += [ceilings_line(record)] if record["ceilings"] else []
    parts += [network_lines(row) for row in record["networks"]]
    parts += [block_line(row) for row in record.get("blocks", [])]
    parts += [HEADER, *(row_line(row) for row in record["operators"])] if record["operators"] else []
    parts += [overhead_line(record)] if record["overhead"] else []
    return "\n".join([*parts, summary_lines(record)])


def markdown(record: dict) -> str:
    """The README's table: one line per case and direction, with what it was measured on below."""
    lines = [
        "| case | shape | direction | native, better layout | fastseg | ratio (p20 to p80) | share of bound | kernel |",
        "|---|---|---|--:|--:|--:|--:|---|",
    ]
    for row in record["networks"]:
        lines += _markdown_network(row, row["model"])
    for row in record.get("blocks", []):
        lines += _markdown_network(row, row["case"])
    for row in record["operators"]:
        entry, native = summary.shown(row), summary.baseline(row)
        head = f"| {row['case']} | {shape(row)} | {row['direction']} |"
        if summary.is_red(row):
            lines.append(f"{head} | | wrong result, no speed | | |")
        elif entry is not None and native is not None:
            speed = _markdown_speed(native, entry, entry["ratio"])
            lines.append(f"{head} {speed} | {share(entry, row)} | {kernel(entry)} |")
    commit = (record["commit"] or "unknown")[:10] + (", with changes" if record["dirty"] else "")
    return "\n".join([*lines, "", f"{machine_line(record)}; commit {commit}, {record['created'][:10]}."])


def _markdown_network(row: dict, title: str) -> list[str]:
    entry = summary.shown(row)
    if entry is None:
        return [f"| {title} | | {row['direction']} | | wrong result, no speed | | | |"]
    lines = []
    for name in ("native NCHW", "native channels_last", "torch.compile"):
        native, ratio = summary.candidate(row, name), entry.get(f"ratio to {name}")
        if native and ratio:
            head = f"| {title}, over {name} | {shape(row)} | {row['direction']} |"
            lines.append(f"{head} {_markdown_speed(native, entry, ratio)} | | |")
    return lines


def _markdown_speed(native: dict, entry: dict, ratio: dict) -> str:
    return (
        f"{seconds(native['seconds']['median'])} | {seconds(entry['seconds']['median'])} | "
        f"**{ratio['median']:.2f}x** ({ratio['p20']:.2f} to {ratio['p80']:.2f})"
    )
