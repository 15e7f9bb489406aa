"""The report: one HTML page that needs nothing beside it, made from records alone."""

from __future__ import annotations

from html import escape
from pathlib import Path

from benchmarks import html, markdown, plots, summary, table, tables, targets, train_report
from benchmarks.html import card, cell, fold, good_or_bad, note, words
from benchmarks.memory import HOW
from benchmarks.photograph import CAPTIONS
from benchmarks.record import KINDS, gates

_HERE = Path(__file__).parent
_TITLES = {"networks": "Networks", "blocks": "Blocks and heads", "operators": "Operators"}


def render(records: list[dict]) -> str:
    """The page for one or more records."""
    style, script = (_HERE / "page.css").read_text(), (_HERE / "page.js").read_text()
    sections = [_side_by_side(records)] if len(records) > 1 else []
    sections += [_record(record, title) for record, title in zip(records, markdown.titles(records), strict=True)]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><title>fastseg benchmark</title>'
        f"<style>{style}</style></head><body>{''.join(sections)}{_how_to_read(records)}"
        f"<script>{script}</script></body></html>\n"
    )


def _section(name: str, title: str, content: str) -> str:
    return f'<section data-name="{name}"><h2>{escape(title)}</h2>{content}</section>' if content else ""


def _record(record: dict, title: str) -> str:
    machine = record["machine"]
    commit = (record["commit"] or "unknown")[:10] + (" with changes" if record["dirty"] else "")
    facts = [
        table.machine_line(record),
        f"Python {machine['python']}, Triton {machine['triton']}, {machine['system']}",
        f"commit {commit}, {record['created']}" + ("" if record["finished"] else "; the run is not finished"),
    ]
    facts += [table.ceilings_line(record)] if record["ceilings"] else []
    disturbed = table.disturbed(record)
    parts = [
        f"<h1>fastseg on {escape(title)}</h1>",
        f'<p class="soft">{"<br>".join(escape(fact) for fact in facts)}</p>',
        f'<p class="bad">{escape(disturbed)}</p>' if disturbed else "",
        _section("training", "Training", train_report.section(record)),
        _section("summary", "Summary", "" if "training" in record else _summary(record)),
        _section("photograph", "Networks on a photograph", _networks(record)),
        _section("speed", "Speed-up over native's better layout", _speed(record)),
        _section("roofline", "Under the machine's ceilings", _roofline(record)),
        _section("memory", "Memory", _memory(record)),
        _section("live-taps", "Filter taps that look at the image", _live_taps(record)),
        _section("cases", "Every case", _cases(record)),
        _section("overhead", "What a call costs", _overhead(record)),
        _section("stages", "Stages on the GPU", _stages(record)),
        _skipped(record),
    ]
    return f"<article>{''.join(parts)}</article>"


def _summary(record: dict) -> str:
    found = gates(record)
    wrong = f"{found['red']} wrong" if found["red"] else "none wrong"
    cards = [card("results checked before timing", f"{found['green']} right", wrong, "bad" if found["red"] else "")]
    rows, slower = summary.never_slower(record)
    if rows:
        figure = f"{len(slower)} of {rows}" if slower else f"never, in {rows} rows"
        text = "of fastseg as users call it against native's better layout, beyond the noise of the pairs"
        cards.append(card("slower than native", figure, text, "bad" if slower else "good"))
    for s in summary.summaries(record):
        text = (
            "geometric mean over native's better layout; "
            f"best {s.best[0]:.2f}x ({s.best[1]}), worst {s.worst[0]:.2f}x ({s.worst[1]})"
        )
        cards.append(card(f"{s.title}, {s.rows} row{'s' * (s.rows > 1)}", f"{s.geometric_mean:.2f}x", text))
    parts = [f'<div class="cards">{"".join(cards)}</div>']
    if slower:
        lines = [[cell(identity), *html.ratio_cells(ratio)] for identity, ratio in slower]
        parts.append(fold("Rows that are slower than native", html.of_lines(["row", "ratio", "p20 to p80"], lines)))
    goals = targets.targets(record)
    if goals:
        lines = [
            [cell(wanted, kind="wrap"), cell(measured), good_or_bad("met" if met else "not met", met)]
            for wanted, measured, met in goals
        ]
        title = f"Targets: {sum(met for *_, met in goals)} of {len(goals)} met"
        parts.append(fold(title, html.of_lines(["target", "measured", ""], lines)))
    return "".join(parts)


def _networks(record: dict) -> str:
    if not record["networks"]:
        return ""
    parts = [
        "<p>The weights are random, so the labels mean nothing; they show that native and fastseg compute the same. "
        "This was checked before timing.</p>"
    ]
    for number, row in enumerate(record["networks"]):
        title = f"{row['model']}, {row['direction']}, {table.shape(row)}"
        parts.append(fold(title, _pictures(row) + tables.network(row), opened=number == 0))
    return "".join(parts)


def _pictures(row: dict) -> str:
    found = row.get("pictures")
    if not found:
        return ""
    captions = ("the photograph", "labels, native", "labels, fastseg", f"{found['differing_labels']} labels differ")
    figures = [
        f'<figure><img src="{found[name]}" alt="{caption}"><figcaption>{caption}</figcaption></figure>'
        for name, caption in zip(CAPTIONS, captions, strict=True)
    ]
    return f'<div class="pictures">{"".join(figures)}</div>'


def _by_kind(record: dict, draw) -> str:
    """What `draw` makes of the rows of each kind; operators, which are many, folded away behind the others."""
    drawn = [(kind, draw(record[kind])) for kind in KINDS]
    drawn = [(kind, content) for kind, content in drawn if content]
    return "".join(
        fold(_TITLES[kind], content, opened=kind != "operators" or len(drawn) == 1) for kind, content in drawn
    )


def _speed(record: dict) -> str:
    bars = _by_kind(record, plots.speed_up_bars)
    text = "Logarithmic. The upright line is 1x; the thin line across a bar spans p20 to p80 of the pairs."
    return bars and bars + note(text)


def _roofline(record: dict) -> str:
    plot = plots.roofline(record) if record["ceilings"] else ""
    return plot and (
        f'<div class="scroll" tabindex="0">{plot}</div>'
        + note(
            "Filled: fastseg. Hollow: native in its better layout. Discs: forward and inference; squares: other "
            "directions. The line is the measured copy bandwidth, then the measured float32 matrix rate; tensors in a "
            "cache can rise above it."
        )
    )


def _memory(record: dict) -> str:
    peaks = _by_kind(record, plots.memory_bars)
    kept = _by_kind(record, lambda rows: plots.memory_bars(rows, "saved_bytes"))
    parts = [peaks + note("MB at the peak of one call; the upright line is native's better layout.")] if peaks else []
    parts += [f"<h3>Kept for the backward pass</h3>{kept}"] if kept else []
    return "".join(parts)


def _live_taps(record: dict) -> str:
    if not any(record[kind] for kind in KINDS):
        return ""
    figures = "".join(plots.live_taps(size, rate) for size, rate in plots.ASPP_RATES)
    text = (
        "Of the nine taps of a dilated 3x3 filter those beyond the border see padding only. fastseg's kernels leave "
        "them out. Each picture is an image of ASPP's input, with how many taps are live where."
    )
    return f'{note(text)}<div class="pictures taps">{figures}</div>'


def _cases(record: dict) -> str:
    if not any(record[kind] for kind in KINDS):
        return ""
    hint = note("A click on a heading sorts by that column.")
    return hint + tables.cases(record) + fold("Every candidate of every row", tables.candidates(record))


def _overhead(record: dict) -> str:
    lines = []
    for row in record["overhead"]:
        above = {key: f"{1e6 * value:+.1f}" for key, value in row["above_native"].items()}
        name = f"{row['name']} ({row['backend']})"
        spread = f"{above['median']} us ({above['p20']} to {above['p80']})"
        lines.append([cell(name), cell(f"{1e6 * row['seconds']['median']:.1f} us"), cell(spread)])
    if not lines:
        return ""
    text = "<p>A depthwise convolution of one 5x5 image, where nearly all is overhead.</p>"
    return text + html.of_lines(["candidate", "a call", "above native"], lines)


def _stages(record: dict) -> str:
    lines = [
        [
            cell(stage["name"]),
            good_or_bad(stage["status"], stage["status"] == "passed"),
            cell(f"{stage['seconds']:.0f} s"),
            words(stage["detail"], "wrap"),
        ]
        for stage in record.get("stages", [])
    ]
    return html.of_lines(["stage", "result", "took", ""], lines) if lines else ""


def _skipped(record: dict) -> str:
    items = "".join(f"<li>{escape(s['id'])}: {escape(s['reason'])}</li>" for s in record["skipped"])
    return fold(f"{len(record['skipped'])} rows were not run", f"<ul>{items}</ul>") if items else ""


def _side_by_side(records: list[dict]) -> str:
    titles = markdown.titles(records)
    lines = []
    for record, title in zip(records, titles, strict=True):
        rows, slower = summary.never_slower(record)
        means = [f"{s.geometric_mean:.2f}x {s.title}" for s in summary.summaries(record)]
        commit = (record["commit"] or "unknown")[:10]
        lines.append([cell(title), words(commit), words(record["created"][:10]), words(record["machine"]["torch"])])
        lines[-1] += [cell(f"{len(slower)} of {rows}", kind="bad" if slower else ""), words("; ".join(means), "wrap")]
    heads = ["record", "commit", "made", "torch", "slower rows", "geometric means over native"]
    content = html.of_lines(heads, lines) + tables.side_by_side(records)
    text = "Times are medians; where a row's sizes differ between devices no ratio is given."
    return _section("side-by-side", "Side by side", content + note(text))


def _how_to_read(records: list[dict]) -> str:
    devices = sorted({record["settings"]["device"] for record in records})
    points = [
        "Every result was compared with float64 before it was timed: operators element by element, blocks and networks "
        "beside native's own error. A kernel that fails turns its row red, and a red row has no speed.",
        "Candidates take turns in one process. A time is the median of samples; a ratio is the median over pairs taken "
        "in the same round. p20 and p80 enclose the middle 60 %.",
        "Native's better layout is the faster of eager NCHW and eager channels_last in that row.",
        "Bytes count each tensor once, FLOPs only taps that see the image; of a block or a network, its input, output "
        "and parameters, and the products of its convolutions. The bound is the longer of bytes over the measured copy "
        "bandwidth and FLOPs over the measured matrix rate; above 100 % the tensors fitted in a cache.",
        *(f"Peak memory on {device}: {HOW[device]}." for device in devices),
        "An error is the largest one, relative to the largest value; of blocks and training a root mean square.",
        "Kernels of a block or network are counted by call: fastseg's by backend, and native convolutions and resizes.",
    ]
    content = f"<ul>{''.join(f'<li>{escape(point)}</li>' for point in points)}</ul>"
    return _section("how-to-read", "How to read this page", content)
