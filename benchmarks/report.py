"""The report: one HTML page that needs nothing beside it, made from records alone."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from pathlib import Path

from benchmarks import plots, summary, table
from benchmarks.memory import HOW
from benchmarks.record import gates

_HERE = Path(__file__).parent
# Columns of words; the others are numbers.
_WORDS = ("direction", "shape", "layout", "bound", "kernel", "candidate", "backend and why it was chosen", "result")
_HEAD_STYLES = dict.fromkeys(_WORDS, ' class="text"')


def render(records: list[dict]) -> str:
    """The page for one or more records."""
    style, script = (_HERE / "page.css").read_text(), (_HERE / "page.js").read_text()
    sections = "".join(_record(record) for record in records)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><title>fastseg benchmark</title>'
        f"<style>{style}</style></head><body>{sections}{_how_to_read(records)}<script>{script}</script></body></html>\n"
    )


def _record(record: dict) -> str:
    machine = record["machine"]
    commit = (record["commit"] or "unknown")[:10] + (" with changes" if record["dirty"] else "")
    facts = [
        table.machine_line(record),
        f"Python {machine['python']}, Triton {machine['triton']}, {machine['system']}",
        f"commit {commit}, {record['created']}",
    ]
    facts += [table.ceilings_line(record)] if record["ceilings"] else []
    disturbed = table.disturbed(record)
    parts = [
        f"<h1>fastseg on {escape(machine.get('gpu') or machine['cpu'])}</h1>",
        f'<p class="soft">{"<br>".join(escape(fact) for fact in facts)}</p>',
        f'<p class="bad">{escape(disturbed)}</p>' if disturbed else "",
        _summary(record),
    ]
    parts += [_network(row) for row in record["networks"]]
    if record.get("blocks"):
        parts += ["<h2>Blocks</h2>", _blocks(record["blocks"])]
    if record["operators"]:
        parts += [
            "<h2>Speed-up over native's better layout</h2>",
            plots.speed_up_bars(record),
            _note("Logarithmic. The upright line is 1x; the thin line across a bar spans p20 to p80 of the pairs."),
            "<h2>Under the machine's ceilings</h2>",
            f'<div class="scroll">{plots.roofline(record)}</div>',
            _note(
                "Filled: fastseg. Hollow: native in its better layout. Discs: forward; squares: other directions. "
                "The line is the measured copy bandwidth, then the measured float32 matrix rate; "
                "tensors in a cache can rise above it."
            ),
            "<h2>Every case</h2>",
            _operators(record),
            f"<details><summary>Every candidate of every row</summary>{_candidates(record)}</details>",
        ]
    return "".join([*parts, _overhead(record), _stages(record), _skipped(record)])


def _blocks(rows: list[dict]) -> str:
    """Every candidate of every block, with fastseg's ratio to it."""
    lines = []
    for row in rows:
        own = summary.shown(row) or {}
        for entry in row["candidates"]:
            if "seconds" not in entry:
                reason = entry["skipped"] or entry["gate"]["message"]
                took, ratio = f'<span class="bad">{escape(reason)}</span>', ""
            else:
                took = table.seconds(entry["seconds"]["median"])
                found = own.get(f"ratio to {entry['name']}")
                ratio = (
                    "" if found is None or entry["role"] == "fastseg" else f"{found['median']:.2f}x ({_middle(found)})"
                )
            cells = (row["case"], row["layer"], row["direction"], table.shape(row), entry["name"])
            memory = table.megabytes(entry.get("peak_bytes"))
            lines.append(
                "<tr>"
                + "".join(f"<td>{escape(c)}</td>" for c in cells)
                + f"<td>{took}</td><td>{memory}</td><td>{ratio}</td></tr>"
            )
    heads = ("case", "layer", "direction", "shape", "candidate", "median", "peak MB", "fastseg is faster by")
    head = "".join(f"<th>{h}</th>" for h in heads)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def _summary(record: dict) -> str:
    found = gates(record)
    red = f'<span class="bad">{found["red"]} wrong</span>' if found["red"] else "none wrong"
    cards = [_card("results checked before timing", f"{found['green']} right", red)]
    for row in record["networks"]:
        for key, ratio in (summary.shown(row) or {}).items():
            if key.startswith("ratio to "):
                text = f"over eager {key.split()[-1]} (pairs: {_middle(ratio)})"
                cards.append(_card(f"{row['model']}, batch {row['shape'][0]}", f"{ratio['median']:.2f}x", text))
    for s in summary.summaries(record):
        text = (
            "geometric mean over native's better layout; "
            f"best {s.best[0]:.2f}x ({escape(s.best[1])}), worst {s.worst[0]:.2f}x ({escape(s.worst[1])})"
        )
        cards.append(_card(f"{s.direction}, {s.rows} cases", f"{s.geometric_mean:.2f}x", text))
    goals = summary.targets(record)
    lines = [
        [_cell(escape(wanted), kind="wrap"), _cell(escape(measured)), _good_or_bad("met" if met else "not met", met)]
        for wanted, measured, met in goals
    ]
    heading = f"<summary>Targets: {sum(met for *_, met in goals)} of {len(goals)} met</summary>"
    listed = f"<details>{heading}{_table(['target', 'measured', ''], lines)}</details>" if goals else ""
    return f'<h2>Summary</h2><div class="cards">{"".join(cards)}</div>{listed}'


def _network(row: dict) -> str:
    captions = {
        "photograph": "the photograph",
        "native": "labels, native",
        "fastseg": "labels, fastseg",
        "difference": f"{row['pictures']['differing_labels']} labels differ",
    }
    figures = [
        f'<figure><img src="{row["pictures"][name]}" alt="{caption}"><figcaption>{caption}</figcaption></figure>'
        for name, caption in captions.items()
    ]
    lines = []
    for entry in row["candidates"]:
        name = _cell(escape(entry["name"]))
        if "seconds" not in entry:
            lines.append([name, _instead(entry, 7)])
            continue
        ratios = [entry.get(f"ratio to {base}") for base in ("native NCHW", "native channels_last")]
        lines.append(
            [
                name,
                *_time_cells(entry),
                *(_cell(f"{r['median']:.2f}x ({_middle(r)})" if r else "-") for r in ratios),
                _memory_cell(entry),
                _cell(f"{entry['gate']['error']:.1e}"),
                _cell(str(entry["gate"]["labels_unlike_native"])),
            ]
        )
    heads = "network|median|p20 to p80|over eager NCHW|over eager channels_last|peak MB|error|labels unlike native"
    return (
        f"<h2>{escape(row['model'])} on a photograph</h2>"
        f"<p>Input {table.shape(row)}, inference. The weights are random, so the labels mean nothing; "
        "they show that both networks compute the same. This was checked before timing.</p>"
        f'<div class="pictures">{"".join(figures)}</div>{_table(heads.split("|"), lines)}'
    )


def _operators(record: dict) -> str:
    heads = (
        "case|direction|shape|native|layout|fastseg|p20 to p80|ratio|p20 to p80|GB/s|TFLOP/s|share of bound|bound|"
        "live taps|peak MB|native's|error|native's|kernel"
    )
    lines = []
    for row in record["operators"]:
        line = [_cell(escape(row["case"])), _text(f"{row['direction']} {row['dtype']}"), _text(_geometry(row))]
        lines.append(line)
        entry, native = summary.shown(row), summary.baseline(row)
        if entry is None or native is None:
            reason = f"wrong result, no speed: {summary.red_message(row)}" if summary.is_red(row) else "not timed"
            line.append(f'<td class="text bad wrap" colspan="16">{escape(reason)}</td>')
            continue
        ratio = entry["ratio"]
        clear = "good" if ratio["p20"] > 1 else "bad" if ratio["p80"] < 1 else ""
        line += [
            _cell(table.seconds(native["seconds"]["median"]), native["seconds"]["median"]),
            _text(native["layout"]),
            *_time_cells(entry),
            _cell(f"{ratio['median']:.2f}x", ratio["median"], clear),
            _cell(_middle(ratio)),
            _cell(f"{entry['bytes_per_s'] / 1e9:.1f}", entry["bytes_per_s"]),
            _cell(f"{entry['flop_per_s'] / 1e12:.3f}", entry["flop_per_s"]),
            _share_cell(entry),
            _text(row["bound"]["name"]),
            _cell(f"{row['live_taps']:.2f} of {row['taps']}", row["live_taps"]),
            _memory_cell(entry),
            _memory_cell(native),
            _cell(f"{entry['gate']['error']:.1e}", entry["gate"]["error"]),
            _cell(f"{native['gate']['error']:.1e}", native["gate"]["error"]),
            _text(table.kernel(entry)),
        ]
    return _table(heads.split("|"), lines, sortable=True)


def _candidates(record: dict) -> str:
    heads = (
        "row|candidate|median|p20 to p80|rounds|ratio|peak MB|saved for backward MB|share of bound|error|"
        "backend and why it was chosen"
    )
    lines = []
    for row in record["operators"]:
        red = summary.is_red(row)
        for entry in row["candidates"]:
            line = [_cell(escape(row["id"])), _text(entry["name"])]
            lines.append(line)
            if red or "seconds" not in entry:
                line.append(_instead(entry, 9))
                continue
            saved = entry["saved_bytes"]
            line += [
                *_time_cells(entry),
                _cell(str(entry["rounds"]), entry["rounds"]),
                _cell(f"{entry['ratio']['median']:.2f}x", entry["ratio"]["median"]) if "ratio" in entry else _cell("-"),
                _memory_cell(entry),
                _cell(table.megabytes(saved), saved),
                _share_cell(entry),
                _cell(f"{entry['gate']['error']:.1e}", entry["gate"]["error"]),
                _text(": ".join(part for part in (entry["backend"], entry["reason"]) if part)),
            ]
    return _table(heads.split("|"), lines, sortable=True)


def _overhead(record: dict) -> str:
    lines = []
    for row in record["overhead"]:
        above = {key: f"{1e6 * value:+.1f}" for key, value in row["above_native"].items()}
        name = f"{row['name']} ({row['backend']})"
        spread = f"{above['median']} us ({above['p20']} to {above['p80']})"
        lines.append([_cell(escape(name)), _cell(f"{1e6 * row['seconds']['median']:.1f} us"), _cell(spread)])
    if not lines:
        return ""
    return (
        "<h2>What a call costs</h2><p>A depthwise convolution of one 5x5 image, where nearly all is overhead.</p>"
        + _table(["candidate", "a call", "above native"], lines)
    )


def _stages(record: dict) -> str:
    lines = [
        [
            _cell(escape(stage["name"])),
            _good_or_bad(escape(stage["status"]), stage["status"] == "passed"),
            _cell(f"{stage['seconds']:.0f} s"),
            _cell(escape(stage["detail"]), kind="text wrap"),
        ]
        for stage in record.get("stages", [])
    ]
    return f"<h2>Stages on the GPU</h2>{_table(['stage', 'result', 'took', ''], lines)}" if lines else ""


def _skipped(record: dict) -> str:
    items = "".join(f"<li>{escape(s['id'])}: {escape(s['reason'])}</li>" for s in record["skipped"])
    return (
        f"<details><summary>{len(record['skipped'])} rows were not run</summary><ul>{items}</ul></details>"
        if items
        else ""
    )


def _how_to_read(records: list[dict]) -> str:
    devices = sorted({record["settings"]["device"] for record in records})
    points = [
        "Every result was compared with float64, element by element, before it was timed. A kernel outside the error "
        "bound turns its row red, and a red row has no speed.",
        "Candidates take turns in one process. A time is the median of samples; a ratio is the median over pairs taken "
        "in the same round. p20 and p80 enclose the middle 60 %.",
        "Native's better layout is the faster of eager NCHW and eager channels_last in that row.",
        "Bytes count each tensor once, FLOPs only taps that see the image. The bound is the longer of bytes over the "
        "measured copy bandwidth and FLOPs over the measured float32 matrix rate; above 100 % the tensors fitted in a "
        "cache.",
        *(f"Peak memory on {device}: {HOW[device]}." for device in devices),
        "An error is the largest one, relative to the largest value.",
    ]
    return f"<h2>How to read this page</h2><ul>{''.join(f'<li>{escape(point)}</li>' for point in points)}</ul>"


def _geometry(row: dict) -> str:
    stride = "" if row["stride"] == [1, 1] else f", stride {row['stride'][0]}"
    shape, kernel = ("x".join(map(str, row[key])) for key in ("shape", "kernel"))
    return f"{shape}, {kernel}, d {row['dilation'][0]}{stride}"


def _middle(spread: dict) -> str:
    return f"{spread['p20']:.2f} to {spread['p80']:.2f}"


def _cell(text: str, value: float | None = None, kind: str = "") -> str:
    """A table cell; `value` is what the column sorts by."""
    sort = "" if value is None else f' data-v="{value:.6g}"'
    style = f' class="{kind}"' if kind else ""
    return f"<td{sort}{style}>{text}</td>"


def _text(text: str) -> str:
    return _cell(escape(text), kind="text")


def _good_or_bad(text: str, good: bool) -> str:
    return _cell(text, kind="text good" if good else "text bad")


def _time_cells(entry: dict) -> list[str]:
    took = entry["seconds"]
    middle = f"{table.seconds(took['p20'])} to {table.seconds(took['p80'])}"
    return [_cell(table.seconds(took["median"]), took["median"]), _cell(middle)]


def _memory_cell(entry: dict) -> str:
    return _cell(table.megabytes(entry["peak_bytes"]), entry["peak_bytes"])


def _share_cell(entry: dict) -> str:
    return _cell(f"{100 * entry['share_of_bound']:.0f} %", entry["share_of_bound"])


def _instead(entry: dict, columns: int) -> str:
    """What stands in place of a speed: why the candidate was skipped, or that it, or its row, was wrong."""
    wrong = "gate" in entry and not entry["gate"]["green"]
    reason = entry["skipped"] or (entry["gate"]["message"] if wrong else "a kernel of this row was wrong")
    return f'<td class="text wrap {"bad" if wrong else "soft"}" colspan="{columns}">{escape(reason)}</td>'


def _note(text: str) -> str:
    return f'<p class="soft">{escape(text)}</p>'


def _card(title: str, figure: str, text: str) -> str:
    return f'<div class="card"><small>{escape(title)}</small><b>{escape(figure)}</b>{text}</div>'


def _table(heads: list[str], lines: Iterable[list[str]], sortable: bool = False) -> str:
    head = "".join(f"<th{_HEAD_STYLES.get(name, '')}>{escape(name)}</th>" for name in heads)
    body = "".join(f"<tr>{''.join(line)}</tr>" for line in lines)
    kind = "sortable sticky" if sortable else "sticky"
    return (
        f'<div class="scroll"><table class="{kind}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )
