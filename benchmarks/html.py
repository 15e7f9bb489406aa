"""The small parts of the report: tables, their cells, cards."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

from benchmarks import table

# Columns of words; the others are numbers.
_WORDS = {
    "row", "kind", "direction", "shape", "layout", "bound", "kernel", "candidate", "result", "target",
    "backend and why it was chosen", "kernels", "commit", "made", "torch", "geometric means over native",
}  # fmt: skip


def cell(text: str, value: float | None = None, kind: str = "") -> str:
    """A table cell with escaped text; `value` is what the column sorts by."""
    sort = "" if value is None else f' data-v="{value:.6g}"'
    style = f' class="{kind}"' if kind else ""
    return f"<td{sort}{style}>{escape(text)}</td>"


def words(text: str, kind: str = "") -> str:
    return cell(text, kind=f"text {kind}".strip())


def good_or_bad(text: str, good: bool) -> str:
    return words(text, "good" if good else "bad")


def time_cells(entry: dict) -> list[str]:
    """The median, and the middle of the samples."""
    took = entry["seconds"]
    middle = f"{table.seconds(took['p20'])} to {table.seconds(took['p80'])}"
    return [cell(table.seconds(took["median"]), took["median"]), cell(middle)]


def ratio_cells(ratio: dict | None) -> list[str]:
    """The median, green or red where it is beyond noise, and the middle of the pairs."""
    if ratio is None:
        return [cell("-"), cell("-")]
    clear = "good" if ratio["p20"] > 1 else "bad" if ratio["p80"] < 1 else ""
    return [cell(f"{ratio['median']:.2f}x", ratio["median"], clear), cell(middle(ratio))]


def rate_cells(entry: dict) -> list[str]:
    """GB/s and TFLOP/s of what had to move and to be computed."""
    if "flop_per_s" not in entry:
        return [cell("-"), cell("-")]
    return [
        cell(f"{entry['bytes_per_s'] / 1e9:.1f}", entry["bytes_per_s"]),
        cell(f"{entry['flop_per_s'] / 1e12:.3g}", entry["flop_per_s"]),
    ]


def share_cell(entry: dict) -> str:
    share = entry.get("share_of_bound")
    return cell("-") if share is None else cell(f"{100 * share:.0f} %", share)


def memory_cell(entry: dict, key: str = "peak_bytes") -> str:
    return cell(table.megabytes(entry.get(key)), entry.get(key))


def error_cell(entry: dict | None) -> str:
    return cell(table.error(entry), entry["gate"]["error"] if entry else None)


def instead(entry: dict, columns: int) -> str:
    """What stands in place of a speed: why the candidate was skipped, or that it, or its row, was wrong."""
    wrong = "gate" in entry and not entry["gate"]["green"]
    reason = entry["skipped"] or (entry["gate"]["message"] if wrong else "a kernel of this row was wrong")
    return f'<td class="text wrap {"bad" if wrong else "soft"}" colspan="{columns}">{escape(reason)}</td>'


def middle(spread: dict) -> str:
    return f"{spread['p20']:.2f} to {spread['p80']:.2f}"


def note(text: str) -> str:
    return f'<p class="soft">{escape(text)}</p>'


def card(title: str, figure: str, text: str, kind: str = "") -> str:
    return (
        f'<div class="card"><small>{escape(title)}</small><b{f" class={kind!r}" if kind else ""}>{escape(figure)}</b>'
        f"{escape(text)}</div>"
    )


def fold(title: str, content: str, opened: bool = False) -> str:
    return f"<details{' open' if opened else ''}><summary>{escape(title)}</summary>{content}</details>"


def of_lines(heads: list[str], lines: Iterable[list[str]], sortable: bool = False) -> str:
    """A table that scrolls sideways by itself; its first column stays."""

    def head(name: str) -> str:
        style = ' class="text"' if name in _WORDS else ""
        return f"<th{style}>{escape(name)}</th>"

    body = "".join(f"<tr>{''.join(line)}</tr>" for line in lines)
    kind = "sortable sticky" if sortable else "sticky"
    return (
        f'<div class="scroll" tabindex="0"><table class="{kind}"><thead><tr>{"".join(map(head, heads))}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )
