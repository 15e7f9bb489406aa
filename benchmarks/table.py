"""Records as text: lines for the terminal, a Markdown table for the README."""

from __future__ import annotations

from benchmarks import summary
from benchmarks import targets as goals
from benchmarks.record import gates

HEADER = (
    f"{'case':<20} {'direction':<16} {'dtype':<8} {'native':>9} {'fastseg':>9} {'p20-p80':>17} {'ratio':>7} "
    f"{'p20-p80':>13} {'GB/s':>6} {'GFLOP/s':>7} {'bound':>12} {'memory MB':>13} {'saved MB':>11} {'live':>5} "
    f"{'error, native':>15}  kernel"
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
    """Of the bound, and which it is; rows of early records have none."""
    return f"{100 * entry['share_of_bound']:.0f} % {row['bound']['name']}" if "share_of_bound" in entry else "-"


def live(row: dict) -> str:
    """Live taps of all, or of a module the share of products that are."""
    if "live_taps" in row:
        return f"{row['live_taps']:.2f} of {row['taps']}"
    return f"{100 * row['live_share']:.0f} %" if "live_share" in row else "-"


def error(entry: dict | None) -> str:
    found = entry["gate"]["error"] if entry else None
    return "-" if found is None else f"{found:.1e}"


def row_line(row: dict) -> str:
    start = f"{row['case']:<20} {row['direction']:<16} {row['dtype']:<8}"
    if summary.is_red(row):
        return f"{start} RED, no speed: {summary.red_message(row)}"
    entry, native = summary.shown(row), summary.baseline(row)
    if entry is None:
        reasons = [f"{c['name']}: {c['skipped']}" for c in row["candidates"] if c["skipped"]]
        return f"{start} not timed: {'; '.join(reasons)}"
    spread, ratio = entry["seconds"], entry.get("ratio")

    def pair(key: str) -> str:
        return f"{megabytes(entry.get(key))}/{megabytes(native.get(key) if native else None)}"

    def rate(key: str, unit: float) -> str:
        return f"{entry[key] / unit:.1f}" if key in entry else "-"

    return " ".join(
        [
            start,
            f"{seconds(native['seconds']['median']) if native else '-':>9}",
            f"{seconds(spread['median']):>9}",
            f"{seconds(spread['p20']) + '-' + seconds(spread['p80']):>17}",
            f"{ratio['median']:>6.2f}x" if ratio else f"{'-':>7}",
            f"{ratio['p20']:>6.2f}-{ratio['p80']:<6.2f}" if ratio else f"{'-':>13}",
            f"{rate('bytes_per_s', 1e9):>6}",
            f"{rate('flop_per_s', 1e9):>7}",
            f"{share(entry, row):>12}",
            f"{pair('peak_bytes'):>13}",
            f"{pair('saved_bytes') if entry.get('saved_bytes') is not None else '-':>11}",
            f"{live(row).split(' of ')[0]:>5}",
            f"{error(entry):>7} {error(native):>7}",
            f" {kernel(entry)}",
        ]
    )


def kernel(entry: dict) -> str:
    """The kernel of an operator, or how many calls of a module went where."""
    chosen = entry["name"] in ("fastseg", "fastseg NCHW")
    return f"{entry.get('backend') or '-'}{'' if chosen else ' (by name)'}"


def block_line(row: dict) -> str:
    """The row, and below it what it stands beside."""
    lines = [row_line(row)]
    entry = summary.shown(row)
    if entry is not None:
        others = [
            f"{name} {seconds(summary.candidate(row, name)['seconds']['median'])} ({ratio['median']:.2f}x)"
            for name, ratio in ratios(entry).items()
        ]
        lines += [f"{'':<20} fastseg over {', '.join(others)}"] if others else []
    return "\n".join(lines)


def ratios(entry: dict) -> dict[str, dict]:
    """Baseline -> how many times faster the entry is."""
    return {key.removeprefix("ratio to "): value for key, value in entry.items() if key.startswith("ratio to ")}


def network_lines(row: dict) -> str:
    lines = [f"{row['model']}, {row['direction']}, {shape(row)}, random weights"]
    if summary.is_red(row):
        lines.append(f"  RED, no speed: {summary.red_message(row)}")
    for entry in row["candidates"]:
        name = f"  {entry['name']:<26}"
        if entry["skipped"]:
            lines.append(f"{name} skipped: {entry['skipped']}")
        elif not entry["gate"]["green"]:
            lines.append(f"{name} RED, no speed: {entry['gate']['message']}")
        elif not summary.is_red(row):
            lines.append(f"{name} {_network_entry(entry, row)}")
    return "\n".join(lines)


def _network_entry(entry: dict, row: dict) -> str:
    took, gate = entry["seconds"], entry["gate"]
    parts = [f"{seconds(took['median']):>8} ({seconds(took['p20'])}-{seconds(took['p80'])})"]
    parts += [f"{ratio['median']:.2f}x over {name}" for name, ratio in ratios(entry).items() if name != entry["name"]]
    parts += [f"{megabytes(entry['peak_bytes'])} MB"] if entry.get("peak_bytes") is not None else []
    parts += [f"{megabytes(entry['saved_bytes'])} MB saved"] if entry.get("saved_bytes") is not None else []
    parts += [f"{entry['flop_per_s'] / 1e9:.0f} GFLOP/s, {share(entry, row)}"] if "flop_per_s" in entry else []
    parts.append(f"error {error(entry)}")
    if "labels" in gate:
        parts.append(f"{gate['labels_unlike_native']} of {gate['labels']} labels unlike native's")
    parts += [f"kernels: {entry['backend']}"] if entry["role"] == "fastseg" and entry.get("backend") else []
    return ", ".join(parts)


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


def never_slower_line(record: dict) -> str:
    rows, slower = summary.never_slower(record)
    if not slower:
        return f"never slower: in none of {rows} rows is fastseg slower than native's better layout by more than noise"
    listed = ", ".join(f"{identity} {ratio['median']:.2f}x" for identity, ratio in slower)
    return f"SLOWER than native's better layout by more than noise in {len(slower)} of {rows} rows: {listed}"


def summary_lines(record: dict) -> str:
    lines = [
        f"{s.title:<34} geometric mean {s.geometric_mean:6.2f}x over {s.rows:>2} cases, "
        f"best {s.best[0]:6.2f}x ({s.best[1]}), worst {s.worst[0]:6.2f}x ({s.worst[1]})"
        for s in summary.summaries(record)
    ]
    lines.append(never_slower_line(record))
    lines += [
        f"{'met    ' if met else 'NOT MET'} {wanted}: {measured}" for wanted, measured, met in goals.targets(record)
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
    rows = record["blocks"] + record["operators"]
    parts += [HEADER] if rows else []
    parts += [block_line(row) for row in record["blocks"]]
    parts += [row_line(row) for row in record["operators"]]
    parts += [overhead_line(record)] if record["overhead"] else []
    return "\n".join([*parts, summary_lines(record)])
