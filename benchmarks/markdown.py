"""Records as Markdown, for READMEs."""

from __future__ import annotations

from benchmarks import summary
from benchmarks.record import KINDS
from benchmarks.table import kernel, machine_line, megabytes, ratios, seconds, shape, share

_HEADS = (
    "| case | shape | direction | native, better layout | fastseg | ratio (p20 to p80) | peak MB | share of bound "
    "| kernel |",
    "|---|---|---|--:|--:|--:|--:|--:|---|",
)


def markdown(record: dict) -> str:
    """One line per case and direction, of networks and blocks one per baseline, and below what it was measured on."""
    lines = list(_HEADS)
    for row in record["networks"]:
        lines += _against_each(row, row["model"])
    for row in record["blocks"]:
        lines += _against_each(row, row["case"])
    for row in record["operators"]:
        entry, native = summary.shown(row), summary.baseline(row)
        if summary.is_red(row):
            lines.append(_red(row, row["case"]))
        elif entry is not None and native is not None:
            lines.append(_line(row, row["case"], native, entry, entry["ratio"]))
    commit = (record["commit"] or "unknown")[:10] + (", with changes" if record["dirty"] else "")
    return "\n".join([*lines, "", f"{machine_line(record)}; commit {commit}, {record['created'][:10]}."])


def _against_each(row: dict, title: str) -> list[str]:
    if summary.is_red(row):
        return [_red(row, title)]
    entry = summary.shown(row)
    found = {} if entry is None else ratios(entry)
    return [_line(row, f"{title}, over {name}", summary.candidate(row, name), entry, found[name]) for name in found]


def _red(row: dict, title: str) -> str:
    return f"| {title} | {shape(row)} | {row['direction']} | | wrong result, no speed | | | | |"


def _line(row: dict, title: str, native: dict, entry: dict, ratio: dict) -> str:
    speed = f"**{ratio['median']:.2f}x** ({ratio['p20']:.2f} to {ratio['p80']:.2f})"
    memory = megabytes(entry.get("peak_bytes"))
    if native.get("peak_bytes") is not None:
        memory += f" of {megabytes(native['peak_bytes'])}"
    cells = (
        title, shape(row), row["direction"], seconds(native["seconds"]["median"]),
        seconds(entry["seconds"]["median"]), speed, memory, share(entry, row), kernel(entry),
    )  # fmt: skip
    return f"| {' | '.join(cells)} |"


def side_by_side(records: list[dict]) -> str:
    """Every row that one of several records has: fastseg's time and its ratio to native, record by record."""
    names = [f"{title} ({record['created'][:10]})" for title, record in zip(titles(records), records, strict=True)]
    lines = [f"| case | {' | '.join(names)} |", "|---|" + "--:|" * len(names)]
    for identity, rows in paired(records):
        cells = ["-" if row is None else _short(row) for row in rows]
        lines.append(f"| {identity} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _short(row: dict) -> str:
    entry = summary.shown(row)
    if summary.is_red(row):
        return "wrong result, no speed"
    if entry is None:
        return "not timed"
    ratio = f", **{entry['ratio']['median']:.2f}x**" if "ratio" in entry else ""
    return f"{seconds(entry['seconds']['median'])}{ratio}"


def titles(records: list[dict]) -> list[str]:
    """What tells records apart: the device, and the commit where devices are the same."""
    devices = [record["machine"].get("gpu") or record["machine"]["cpu"] for record in records]
    return [
        device if devices.count(device) == 1 else f"{device}, commit {(record['commit'] or 'unknown')[:10]}"
        for device, record in zip(devices, records, strict=True)
    ]


def paired(records: list[dict]) -> list[tuple[str, list[dict | None]]]:
    """(id, its row in each record), in the order of the first record that has it.

    Rows that differ in batch between devices keep their id: their shapes stand in the records' own tables.
    """
    by_id = [{row["id"]: row for kind in KINDS for row in record[kind]} for record in records]
    order = dict.fromkeys(identity for rows in by_id for identity in rows)
    return [(identity, [rows.get(identity) for rows in by_id]) for identity in order]
