"""The report's tables of rows: every case, every candidate, a network's, and several records side by side."""

from __future__ import annotations

from html import escape

from benchmarks import html, markdown, summary, table
from benchmarks.html import cell, words
from benchmarks.record import KINDS

_NAMES = {"networks": "network", "blocks": "block", "operators": "operator"}


def cases(record: dict) -> str:
    """One line a row: fastseg as users call it, beside native's better layout."""
    names = (
        "case|kind|direction|shape|native|layout|fastseg|p20 to p80|ratio|p20 to p80|GB/s|TFLOP/s|share of bound|bound|"
        "live taps|peak MB|native's|saved MB|native's|error|native's|kernel"
    )
    heads = names.split("|")
    lines = []
    for kind in KINDS:
        for row in record[kind]:
            entry, native = summary.shown(row), summary.baseline(row)
            line = [
                cell(row["case"]),
                words(_NAMES[kind]),
                words(f"{row['direction']} {row['dtype']}"),
                words(_geometry(row)),
            ]
            lines.append(line)
            if entry is None or native is None:
                reason = f"wrong result, no speed: {summary.red_message(row)}" if summary.is_red(row) else "not timed"
                line.append(f'<td class="text bad wrap" colspan="{len(heads) - 4}">{escape(reason)}</td>')
                continue
            line += [
                cell(table.seconds(native["seconds"]["median"]), native["seconds"]["median"]),
                words(row["baseline"].removeprefix("native ")),
                *html.time_cells(entry),
                *html.ratio_cells(entry.get("ratio")),
                *html.rate_cells(entry),
                html.share_cell(entry),
                words(row["bound"]["name"] if "bound" in row else "-"),
                cell(table.live(row), row.get("live_share", row.get("live_taps", 0) / row.get("taps", 1))),
                *(html.memory_cell(c, key) for key in ("peak_bytes", "saved_bytes") for c in (entry, native)),
                html.error_cell(entry),
                html.error_cell(native),
                words(table.kernel(entry)),
            ]
    return html.of_lines(heads, lines, sortable=True)


def candidates(record: dict) -> str:
    """One line a candidate of every row, also those that were skipped or wrong."""
    names = (
        "row|candidate|median|p20 to p80|rounds|ratio|p20 to p80|peak MB|saved for backward MB|share of bound|error|"
        "backend and why it was chosen"
    )
    heads = names.split("|")
    lines = []
    for kind in KINDS:
        for row in record[kind]:
            red = summary.is_red(row)
            for entry in row["candidates"]:
                line = [cell(row["id"].replace("/", " ")), words(entry["name"])]
                lines.append(line)
                if red or "seconds" not in entry:
                    line.append(html.instead(entry, len(heads) - 2))
                    continue
                line += [
                    *html.time_cells(entry),
                    cell(str(entry["rounds"]), entry["rounds"]),
                    *html.ratio_cells(entry.get("ratio")),
                    html.memory_cell(entry),
                    html.memory_cell(entry, "saved_bytes"),
                    html.share_cell(entry),
                    html.error_cell(entry),
                    words(_why(entry)),
                ]
    return html.of_lines(heads, lines, sortable=True)


def _why(entry: dict) -> str:
    kernels = ", ".join(f"{calls} {name}" for name, calls in entry.get("kernels", {}).items())
    return kernels or ": ".join(part for part in (entry.get("backend"), entry.get("reason")) if part)


def network(row: dict) -> str:
    """Every candidate of one network, with fastseg's ratio to it."""
    heads = (
        "network|median|p20 to p80|fastseg is faster by|p20 to p80|peak MB|saved MB|error|labels unlike native|kernels"
    )
    red = summary.is_red(row)
    own = summary.shown(row) or {}
    lines = []
    for entry in row["candidates"]:
        line = [cell(entry["name"])]
        lines.append(line)
        if red or "seconds" not in entry:
            line.append(html.instead(entry, 9))
            continue
        line += [
            *html.time_cells(entry),
            *html.ratio_cells(own.get(f"ratio to {entry['name']}")),
            html.memory_cell(entry),
            html.memory_cell(entry, "saved_bytes"),
            html.error_cell(entry),
            cell(str(entry["gate"].get("labels_unlike_native", "-"))),
            words(entry.get("backend") or "-"),
        ]
    return html.of_lines(heads.split("|"), lines)


def side_by_side(records: list[dict]) -> str:
    """Time and ratio of every row in each record; and of each later record, how its time stands to the first's."""
    titles = markdown.titles(records)
    heads = ["row"]
    for number, title in enumerate(titles):
        heads += [title, "over native"] + ([f"over {titles[0]}"] if number else [])
    lines = []
    for identity, rows in markdown.paired(records):
        line = [cell(identity.replace("/", " "))]
        lines.append(line)
        first = summary.shown(rows[0]) if rows[0] else None
        for number, row in enumerate(rows):
            entry = summary.shown(row) if row else None
            if entry is None:
                wrong = row is not None and summary.is_red(row)
                text = "wrong result" if wrong else "-" if row is None else "not timed"
                line += [cell(text, kind="bad" if wrong else ""), cell("-")] + ([cell("-")] if number else [])
                continue
            took = entry["seconds"]["median"]
            line += [cell(table.seconds(took), took), html.ratio_cells(entry.get("ratio"))[0]]
            if number:
                line.append(_against(first, took, same=rows[0] is not None and rows[0]["shape"] == row["shape"]))
    return html.of_lines(heads, lines, sortable=True)


def _against(first: dict | None, took: float, same: bool) -> str:
    if first is None or not same:  # other devices have other batches
        return cell("-")
    ratio = first["seconds"]["median"] / took
    return cell(f"{ratio:.2f}x", ratio)


def _geometry(row: dict) -> str:
    shape = "x".join(map(str, row["shape"]))
    if "kernel" not in row:
        return f"{shape} to {row['image'][0]}" if "image" in row else shape
    stride = "" if row["stride"] == [1, 1] else f", stride {row['stride'][0]}"
    outputs = "" if row["outputs"] == row["shape"][1] else f" to {row['outputs']}"
    return f"{shape}{outputs}, {'x'.join(map(str, row['kernel']))}, d {row['dilation'][0]}{stride}"
