"""Which rows a run has, in the order of their value, and what measures each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import zip_longest
from typing import NamedTuple

from benchmarks import blocks, cases, head, memory, network
from benchmarks.blocks import BlockWorkload
from benchmarks.head import HeadWorkload
from benchmarks.modules import TRAINING
from benchmarks.network import NetworkWorkload
from benchmarks.row import AUTOCAST, Candidate, Workload, dtype_of, identity
from benchmarks.workload import ConvWorkload
from fastseg import dispatch

DTYPES = {"cpu": ("float32", AUTOCAST), "cuda": ("bfloat16", "float32", AUTOCAST)}
BUDGETS = {"quick": 480.0, "full": 3600.0}
# How long timing takes, against an operator's, and at most.
WEIGHTS = {"networks": 6.0, "blocks": 1.2, "operators": 1.0}
LONGEST_ROW_SECONDS = {"networks": 20.0, "blocks": 6.0, "operators": 5.0}
# In a quick run torch.compile is left out once compiling operators has taken this long.
QUICK_COMPILE_SECONDS = 30.0


@dataclass(frozen=True)
class Settings:
    """What to run.

    dtypes: of torch, and "autocast" for networks.
    cases, models: shell patterns, comma-separated, of cases and networks; of ids, or of names the field has.
    budget: seconds for everything; rows that do not fit are skipped and listed.
    compiles: whether torch.compile is among the candidates.
    """

    device: str = "cpu"
    dtypes: tuple[str, ...] = DTYPES["cpu"]
    cases: str = "*"
    models: str = "*"
    quick: bool = True
    budget: float = BUDGETS["quick"]
    networks: bool = True
    blocks: bool = True  # whole blocks and heads
    operators: bool = True
    compiles: bool = True
    threads: int | None = None


class Step(NamedTuple):
    """One row to be measured."""

    kind: str  # the record's key: "networks", "blocks" or "operators"
    family: str  # a key of WORKLOADS
    case: object
    direction: str
    dtype: str

    @property
    def id(self) -> str:
        return identity(self.case.id, self.direction, self.dtype)


WORKLOADS: dict[str, Callable[..., Workload]] = {
    "network": NetworkWorkload,
    "head": HeadWorkload,
    "block": BlockWorkload,
    "operator": ConvWorkload,
}


def workload(step: Step, device: str) -> Workload:
    return WORKLOADS[step.family](step.case, dtype_of(step.dtype), device)


def obstacle(step: Step, work: Workload, device: str) -> str | None:
    """Why the row cannot be measured on this machine, or None."""
    if device == "cpu" and step.kind == "networks" and work.dtype in dispatch.SLOW_ON_NATIVE:
        dtype = str(work.dtype).removeprefix("torch.")
        return f"PyTorch convolves {dtype} in plain loops on this processor, which takes minutes a network"
    return memory.shortage(work.memory_needed(step.direction), device)


def matches(case, patterns: str) -> bool:
    """Whether one of the comma-separated shell patterns fits the case's id or the name that the field has for it."""
    names = (case.id, getattr(case, "table", "") or case.id)
    return any(fnmatchcase(name, pattern.strip()) for pattern in patterns.split(",") for name in names)


def plan(settings: Settings) -> list[Step]:
    """Inference of networks, heads, blocks, what users call operators; with `quick` off then what is left.

    A quick run on a CPU may be cut short, and has another order: see _turn.
    """
    plain = [dtype for dtype in settings.dtypes if dtype != AUTOCAST]
    quick = settings.quick
    found: list[Step] = []
    if settings.networks:
        found += _networks(settings, "inference", [*plain, *_autocast(settings)])
    if settings.blocks:
        found += [
            Step("blocks", family, case, direction, dtype)
            for family, all_cases in (("head", head.HEADS), ("block", blocks.BLOCKS))
            for dtype in plain
            for case in _chosen(all_cases, settings)
            for direction in (head.DIRECTIONS[case.kind] if family == "head" else blocks.DIRECTIONS)
        ]
    if settings.operators:
        found += _operators(settings, cases.QUICK_DIRECTIONS, plain)
    if settings.networks and not quick:
        found += _networks(settings, TRAINING, [*plain, *_autocast(settings)])
    if settings.operators and not quick:
        later = tuple(d for d in cases.DIRECTIONS if d not in cases.QUICK_DIRECTIONS)
        found += _operators(settings, later, plain)
    return sorted(found, key=_turn) if quick and settings.device == "cpu" else found


def _turn(step: Step) -> int:
    """The first network, depthwise convolutions, heads, blocks, dense convolutions, and the networks that take long."""
    if step.kind == "networks":
        return 0 if step.case is network.NETWORKS[0] and step.dtype != AUTOCAST else 5
    if step.kind == "operators":
        return 1 if step.case.outputs is None else 4
    return 2 if step.family == "head" else 3


def _autocast(settings: Settings) -> list[str]:
    return [AUTOCAST] if AUTOCAST in settings.dtypes else []


def _chosen(all_cases, settings: Settings) -> list:
    """Those that fit the pattern and run on the device; a quick run on a CPU leaves the longer ones out."""
    short = settings.quick and settings.device == "cpu"
    return [
        case
        for case in all_cases
        if matches(case, settings.cases) and settings.device in case.devices and (case.quick or not short)
    ]


def _operators(settings: Settings, directions, dtypes) -> list[Step]:
    chosen = _chosen(cases.CASES, settings)
    if settings.device == "cuda":  # a short run shows something of both families
        depthwise, dense = ([c for c in chosen if (c.outputs is None) == which] for which in (True, False))
        chosen = [case for pair in zip_longest(dense, depthwise) for case in pair if case is not None]
    return [
        Step("operators", "operator", case, direction, dtype)
        for dtype in dtypes
        for case in chosen
        for direction in directions
    ]


def _networks(settings: Settings, direction: str, dtypes) -> list[Step]:
    quick = settings.quick
    return [
        Step("networks", "network", case, direction, dtype)
        for dtype in dtypes
        for case in network.NETWORKS
        if matches(case, settings.models) and settings.device in case.devices and direction in case.directions
        if not quick or (case.quick and (dtype != AUTOCAST or case.autocast))
    ]


class Compiling:
    """Says which candidates of torch.compile a run leaves out, and why."""

    def __init__(self, settings: Settings):
        self.settings = settings
        self.spent = 0.0

    def reason(self, step: Step, candidate: Candidate) -> str | None:
        if candidate.role != "compile":
            return None
        if not self.settings.compiles:
            return "torch.compile was left out"
        if not self.settings.quick:
            return None
        on_cpu = self.settings.device == "cpu"
        if candidate.name != "torch.compile" and on_cpu:
            return "max-autotune takes too long for the quick run"
        if step.kind == "networks" or (step.family == "block" and step.direction == TRAINING):
            return f"compiling {'a network' if step.kind == 'networks' else 'it'} takes too long for the quick run"
        if self.spent >= QUICK_COMPILE_SECONDS:
            return f"the quick run spends at most {QUICK_COMPILE_SECONDS:.0f} s on compiling"
        return None

    def add(self, row: dict) -> None:
        self.spent += sum(c.get("prepare_seconds", 0.0) for c in row["candidates"] if c["role"] == "compile")
