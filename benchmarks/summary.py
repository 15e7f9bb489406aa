"""What a record says, in a few numbers. Everything here is computed from the record alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from benchmarks.record import KINDS
from benchmarks.record import rows as record_rows


def candidate(row: dict, name: str) -> dict | None:
    return next((c for c in row["candidates"] if c["name"] == name), None)


def is_red(row: dict) -> bool:
    """Whether a kernel under test gave a wrong result; such a row shows no speed."""
    return bool(_red(row))


def red_message(row: dict) -> str:
    return "; ".join(f"{c['name']}: {c['gate']['message']}" for c in _red(row))


def _red(row: dict) -> list[dict]:
    """The kernels under test that gave a wrong result. What "auto" leaves to native is none of them."""
    tested = (c for c in row["candidates"] if c["role"] == "fastseg" and c.get("backend") != "native")
    return [c for c in tested if "gate" in c and not c["gate"]["green"]]


def shown(row: dict) -> dict | None:
    """The candidate a row stands for: fastseg under "auto", or the fastest kernel where "auto" still takes native."""
    if is_red(row):
        return None
    timed = [c for c in row["candidates"] if c["role"] == "fastseg" and "seconds" in c]
    kernels = [c for c in timed if c.get("backend") != "native"]
    default = next((c for c in timed if c["name"] == "fastseg"), None)
    if default is not None and (default.get("backend") != "native" or not kernels):
        return default
    return min(kernels, key=lambda c: c["seconds"]["median"], default=None)


def baseline(row: dict) -> dict | None:
    """Native in its better layout."""
    return candidate(row, row["baseline"]) if row["baseline"] else None


@dataclass(frozen=True)
class Summary:
    """Speed-ups of one kind of rows and one direction over native's better layout."""

    title: str
    rows: int
    geometric_mean: float
    best: tuple[float, str]
    worst: tuple[float, str]


def summaries(record: dict) -> list[Summary]:
    """One per kind of rows, direction and dtype that has a speed."""
    groups: dict[str, list[tuple[float, str]]] = {}
    for kind in KINDS:
        for row in record[kind]:
            entry = shown(row)
            if entry is not None and "ratio" in entry:
                title = f"{kind}, {row['direction']} {row['dtype']}"
                groups.setdefault(title, []).append((entry["ratio"]["median"], row["case"]))
    return [
        Summary(title, len(found), math.exp(sum(math.log(r) for r, _ in found) / len(found)), max(found), min(found))
        for title, found in groups.items()
    ]


class NeverSlower(NamedTuple):
    """The rows where "auto" was timed beside native, and those where it is slower by more than noise."""

    rows: int
    slower: list[tuple[str, dict]]  # id, ratio


def never_slower(record: dict) -> NeverSlower:
    """Slower by more than noise: four pairs of five at least say so."""
    ratios = []
    for row in record_rows(record):
        entry = candidate(row, "fastseg")
        if entry is not None and "ratio" in entry and not is_red(row):
            ratios.append((row["id"], entry["ratio"]))
    slower = [(identity, ratio) for identity, ratio in ratios if ratio["p80"] < 1]
    return NeverSlower(len(ratios), sorted(slower, key=lambda found: found[1]["median"]))
