"""Going on with a run that was interrupted: only with the same code and settings, on the same machine."""

from __future__ import annotations

from dataclasses import asdict, fields
from pathlib import Path

import torch

from benchmarks import record
from benchmarks.selection import Settings, Step

# What may differ between a run and the one that goes on with it.
_FREE = {"budget"}
_MACHINE = ("cpu", "isa", "cores", "threads", "torch", "triton", "gpu", "driver", "cuda", "cudnn")


def missing(steps: list[Step], found: dict) -> list[Step]:
    """The steps whose rows a record has not yet."""
    there = {row["id"] for row in record.rows(found)}
    return [step for step in steps if step.id not in there]


def load(path: Path) -> tuple[dict, Settings]:
    """An unfinished record, and the settings it was begun with.

    Raises:
        OSError: there is no such file.
        ValueError: it is no record, or finished, or of other code or another machine; the message says what differs.
    """
    found = record.load(path)
    settings = settings_of(found)
    if found["finished"]:
        raise ValueError(f"{path.name} is finished: there is nothing to go on with")
    differences = _differences(found, settings)
    if differences:
        raise ValueError(f"{path.name} cannot be gone on with: {'; '.join(differences)}")
    return found, settings


def settings_of(found: dict) -> Settings:
    """Raises ValueError where the record was made by another command."""
    given = found["settings"]
    names = {field.name for field in fields(Settings)}
    if not names <= given.keys():
        raise ValueError("expected a record of `python -m benchmarks run`, but got one of another command or version")
    return Settings(**{name: given[name] for name in names - {"dtypes"}}, dtypes=tuple(given["dtypes"]))


def contradictions(settings: Settings, given: dict) -> list[str]:
    """Where options that were given now are not those of the record."""
    begun = asdict(settings)
    return [
        f"{name} was {begun[name]!r} and is now {value!r}"
        for name, value in given.items()
        if name not in _FREE and value is not None and begun[name] != value
    ]


def _differences(found: dict, settings: Settings) -> list[str]:
    if settings.device == "cuda" and not torch.cuda.is_available():
        return ["it was made on a GPU, and PyTorch sees none here"]
    then, now = found["machine"], record.machine(settings.device)
    now["threads"] = settings.threads or now["threads"]
    differences = [
        f"{name} was {then.get(name)!r} and is now {now.get(name)!r}"
        for name in _MACHINE
        if then.get(name) != now.get(name)
    ]
    commit = record.commit()
    if found["commit"] != commit:
        differences.append(f"the commit was {_short(found['commit'])} and is now {_short(commit)}")
    elif found["sources"] != record.sources():
        differences.append("files of fastseg or benchmarks have changed since")
    return differences


def _short(commit: str | None) -> str:
    return (commit or "unknown")[:10]


def set_aside(path: Path) -> Path | None:
    """Keep an unfinished record that a new run would write over: its new place, or None where there is none."""
    try:
        found = record.load(path)
    except (OSError, ValueError):
        return None
    if found["finished"] or not record.rows(found):
        return None
    aside = path.with_suffix(f".unfinished{path.suffix}")
    path.replace(aside)
    return aside
