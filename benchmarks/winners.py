"""python -m benchmarks winners: the tables of winners that come with fastseg, made from the committed records.

A row of a record tells a winner where native and a kernel were timed in it, in turns and in the same memory format, and
both were right. "forward" and "inference" rows tell that of inference; that of training is told by "forward+backward"
rows, or else by a "forward" and a "backward" row together. Rows of whole blocks tell none: what dispatch compares there
is the block's modules one by one, each on its fastest backend, and not the module as PyTorch has it.

A kernel that lost and has changed since may win now: what it lost is left out.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks import head, record
from benchmarks.row import LAYOUTS
from fastseg import dispatch, winners
from fastseg.measuring import is_sure
from fastseg.ops.arguments import normalise
from fastseg.ops.convolution import geometry_of
from fastseg.winners import Winner

SHIPPED = winners.PACKAGE / "shipped_winners"
KERNELS = ("cpu", "triton", "cuda")
# The folder of each operator's kernels, in csrc and in fastseg/ops.
FAMILIES = {"depthwise_conv2d": "depthwise", "dilated_conv2d": "dilated"} | dict.fromkeys(
    head.OPERATORS.values(), "head"
)


def tables(results: Path = record.RESULTS) -> dict[str, str]:
    """The content of each file of winners, by its name; of records of one device the newest is right."""
    found: dict[str, dict] = {}
    now = record.kernel_hashes()
    for path, one in sorted(_records(results), key=lambda pair: pair[1]["created"], reverse=True):
        device = device_of(one)
        told = winners_of(one)
        if not told:
            continue
        table = found.setdefault(
            device, {"schema": winners.SCHEMA, "made_for": {"device": device, "records": []}, "winners": {}}
        )
        table["made_for"]["records"].append(path.name)
        for key in told.keys() - table["winners"].keys():
            may_win_now = told[key].backend == "native" and _has_changed(key, told[key], one.get("kernels", now), now)
            table["winners"][key] = None if may_win_now else winners.entry(told[key])
    for table in found.values():
        table["winners"] = {key: entry for key, entry in sorted(table["winners"].items()) if entry is not None}
    return {winners.file_name(device): json.dumps(table, indent=1) + "\n" for device, table in found.items()}


def _has_changed(key: str, best: Winner, then: dict[str, str], now: dict[str, str]) -> bool:
    """Whether a source of the kernels that were timed has another hash now than then."""
    family = FAMILIES[key.partition(" ")[0]]
    sources = {
        "cpu": lambda path: path.startswith(f"csrc/{family}/") and "_cpu" in path,
        "triton": lambda path: path.startswith(f"fastseg/ops/{family}/triton"),
        "cuda": lambda path: path.startswith(f"csrc/{family}/") and path.endswith((".cu", ".cuh")),
    }
    changed = [path for path in now.keys() | then.keys() if now.get(path) != then.get(path)]
    return any(sources[backend](path) for backend in best.ms if backend != "native" for path in changed)


def _records(results: Path) -> Iterator[tuple[Path, dict]]:
    return ((path, record.load(path)) for path in results.glob("*.json"))


def device_of(one: dict) -> str:
    """What the tables call the device of a record; earlier records name its parts only."""
    machine = one["machine"]
    if "device" in machine:
        return machine["device"]
    return machine.get("gpu") or f"{machine['cpu']}, {machine['isa'].lower()}, {machine['threads']} threads"


class _Time(NamedTuple):
    """Seconds of one candidate, and how many times faster than native it was: the median and the 20th percentile."""

    seconds: dict[str, float]  # median, p20, p80
    ratio: tuple[float, float]


def winners_of(one: dict) -> dict[str, Winner]:
    """The winners that a record tells, by key."""
    before_tables = "device" not in one["machine"]
    rows: dict[tuple, dict[str, dict]] = {}  # (case, shape, dtype) -> direction -> row
    for row in [*one["operators"], *one["blocks"]]:
        if operator_of(row) is not None:
            rows.setdefault((row["case"], *row["shape"], row["dtype"]), {})[row["direction"]] = row
    found = {}
    for directions in rows.values():
        for layout in LAYOUTS:
            for gradient, parts in ((False, _first(directions, "forward", "inference")), (True, _training(directions))):
                times = _together([_times(row, layout, before_tables) for row in parts])
                if len(times) > 1:
                    key = winners.key(problem(parts[0], layout, gradient), one["machine"].get("cudnn_tf32"))
                    found[key] = _winner(times)
    return found


def _first(directions: dict[str, dict], *names: str) -> list[dict]:
    return [directions[name] for name in names if name in directions][:1]


def _training(directions: dict[str, dict]) -> list[dict]:
    both = [directions[name] for name in ("forward", "backward") if name in directions]
    return _first(directions, "forward+backward") or (both if len(both) == 2 else [])


def _times(row: dict, layout: str, before_tables: bool) -> dict[str, _Time]:
    """Native's time in `layout` and those of the kernels beside it, by backend."""
    native = f"native {layout}"
    found = {}
    for entry in row["candidates"]:
        if "seconds" not in entry or not entry["gate"]["green"]:
            continue
        if entry["name"] == native:
            found["native"] = _Time(entry["seconds"], (1.0, 1.0))
        elif entry["role"] == "fastseg" and entry["backend"] in KERNELS and _layout_of(entry) == layout:
            ratio = entry.get(f"ratio to {native}")
            if ratio is not None and _ran_what_it_says(row, entry, before_tables):
                found[entry["backend"]] = _Time(entry["seconds"], (ratio["median"], ratio["p20"]))
    return found if "native" in found else {}


def _layout_of(entry: dict) -> str:
    return entry.get("layout") or ("NCHW" if entry["name"].endswith("NCHW") else "channels_last")


def _ran_what_it_says(row: dict, entry: dict, before_tables: bool) -> bool:
    """Whether the backend noted is the one that ran: under "auto" it is what rules on sizes say of a forward pass.

    Of a backward pass they say the same, except of some dense convolutions. With tables of winners "auto" may take
    something else, and on a GPU it does after the first call.
    """
    if entry["name"] == f"fastseg {entry['backend']}":
        return True
    forward = "backward" not in row["direction"]
    if not before_tables:
        return forward and row["device"] == "cpu"
    dense = operator_of(row) == "dilated_conv2d" and (max(row["kernel"]) == 1 or row["device"] == "cuda")
    return forward or not dense


def _together(parts: list[dict[str, _Time]]) -> dict[str, _Time]:
    """Rows that follow each other as one: the backends that are in each, and the least that the spreads allow."""
    if len(parts) == 1:
        return parts[0]
    backends = [name for name in parts[0] if all(name in part for part in parts)] if parts else []
    sums = {
        name: {share: sum(part[name].seconds[share] for part in parts) for share in ("median", "p20", "p80")}
        for name in backends
    }
    native = sums.get("native")
    return {
        name: _Time(taken, (native["median"] / taken["median"], native["p20"] / taken["p80"]))
        for name, taken in sums.items()
    }


def _winner(times: dict[str, _Time]) -> Winner:
    """As fastseg.measuring.judged says it of its own samples."""
    ms = {backend: time.seconds["median"] * 1e3 for backend, time in times.items()}
    best = min(ms, key=ms.__getitem__)
    return Winner(best if best == "native" or is_sure(*times[best].ratio) else "native", ms)


def operator_of(row: dict) -> str | None:
    """The operator of a row; None of whole blocks and networks."""
    if "operator" in row:
        return row["operator"]
    return next((head.OPERATORS[case.kind] for case in head.HEADS if case.id == row["case"]), None)


def problem(row: dict, layout: str, gradient: bool) -> dispatch.Problem:
    """What the call of a row asks dispatch."""
    operator, dtype = operator_of(row), getattr(torch, row["dtype"])
    x = torch.empty(row["shape"], device="meta", memory_format=LAYOUTS[layout])
    if "image" in row:
        sizes = dispatch.Sizes(tuple(x.shape), tuple(row["image"]), head.DETAILS[operator], x.stride(1) == 1)
    else:
        groups = x.shape[1] if operator == "depthwise_conv2d" else 1
        weight = torch.empty((row["outputs"], x.shape[1] // groups, *row["kernel"]), device="meta")
        sizes = geometry_of(normalise(x, weight, None, row["stride"], row["padding"], row["dilation"], groups), weight)
    return dispatch.Problem(operator, row["device"], dtype, sizes, gradient)


def stale(made: dict[str, str], folder: Path = SHIPPED) -> list[str]:
    """The files that are not as the records tell them, with those that no record tells of."""
    there = {path.name: path.read_text() for path in folder.glob("*.json")}
    return sorted(name for name in made.keys() | there.keys() if made.get(name) != there.get(name))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--write", action="store_true", help=f"write them to fastseg/{SHIPPED.name}")


def main(arguments: argparse.Namespace) -> int:
    made = tables()
    for name, text in made.items():
        table = json.loads(text)
        backends: Iterable[str] = [entry["backend"] for entry in table["winners"].values()]
        ours = sum(backend != "native" for backend in backends)
        sources = ", ".join(table["made_for"]["records"])
        print(f"{name}: {len(table['winners'])} problems, {ours} won by fastseg's kernels; from {sources}")
    differing = stale(made)
    if not arguments.write:
        for name in differing:
            print(f"{name} is not as the records tell it: python -m benchmarks winners --write")
        return 1 if differing else 0
    SHIPPED.mkdir(exist_ok=True)
    for name in differing:
        if name in made:
            (SHIPPED / name).write_text(made[name])
        else:
            (SHIPPED / name).unlink()
    return 0
