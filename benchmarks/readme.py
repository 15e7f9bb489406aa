"""The README's tables, written from records and from nothing else.

They stand between `<!-- gpu-table -->` and `<!-- /gpu-table -->`, and likewise for the CPU.
"""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path

from benchmarks.markdown import markdown
from benchmarks.record import KINDS, RESULTS, committed

BLOCKS = {"cpu-table": "cpu", "gpu-table": "cuda"}


def block(name: str, results: Path = RESULTS) -> str:
    """The text of one block: the newest record's table, and of every earlier one what later ones lack.

    Those of processors with other instructions have their own rows.
    """
    tables, all_seen = [], defaultdict(set)
    for record in committed(BLOCKS[name], results):
        rest = dict(record)
        seen = all_seen[record["machine"].get("isa")]
        for kind in KINDS:
            rest[kind] = [row for row in record[kind] if row["id"] not in seen]
            seen |= {row["id"] for row in rest[kind]}
        if any(rest[kind] for kind in KINDS):
            tables.append(markdown(rest))
    return "\n\n".join(tables) or "no record yet"


def filled(text: str, results: Path = RESULTS) -> str:
    """`text` with every marked block made anew.

    Raises:
        ValueError: a block's opening or closing mark is missing.
    """
    for name in BLOCKS:
        marks = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        content = f"{block(name, results)}\n"
        text, count = marks.subn(lambda match, content=content: match[1] + content + match[2], text)
        if count != 1:
            raise ValueError(f"expected one block from <!-- {name} --> to <!-- /{name} -->, but got {count}")
    return text
