"""python -m benchmarks run: the options, and what happens around a run."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from benchmarks import record, report, resume, suite, summary, table
from benchmarks.selection import BUDGETS, DTYPES, Settings, plan

# Options that name a field of Settings; None where they are not given.
_FIELDS = (
    "device", "dtypes", "cases", "models", "quick", "budget", "networks", "blocks", "operators", "compiles", "threads"
)  # fmt: skip
INTERRUPTED = 130


def add_arguments(run: argparse.ArgumentParser) -> None:
    length = run.add_mutually_exclusive_group()
    length.add_argument("--quick", action="store_const", const=True, help="the default: forward and backward")
    length.add_argument(
        "--full", dest="quick", action="store_const", const=False, help="every direction, layout, network and compiler"
    )
    run.add_argument("--device", choices=("cpu", "cuda"), help="default: a GPU where there is one")
    run.add_argument(
        "--dtype",
        dest="dtypes",
        type=lambda text: tuple(text.split(",")),
        help='comma-separated; "autocast" is of networks; default float32,autocast on a CPU, with bfloat16 on a GPU',
    )
    run.add_argument("--cases", help="shell patterns, comma-separated, of operators, blocks and heads: 'sep-aspp*'")
    run.add_argument(
        "--models", help="shell patterns of networks; --cases and --models given alone leave out the other"
    )
    run.add_argument("--list", action="store_true", help="print the rows of the run, and measure nothing")
    for kind in ("networks", "blocks", "operators"):
        run.add_argument(f"--no-{kind}", dest=kind, action="store_const", const=False, help=f"leave {kind} out")
    run.add_argument("--no-compile", dest="compiles", action="store_const", const=False, help="without torch.compile")
    budgets = ", ".join(f"{seconds:.0f} {name}" for name, seconds in BUDGETS.items())
    run.add_argument("--budget", type=float, metavar="SECONDS", help=f"default {budgets}")
    run.add_argument("--threads", type=int, help="CPU threads")
    run.add_argument("--output", type=Path, help="write the JSON record here, after every row")
    run.add_argument("--resume", type=Path, metavar="FILE", help="go on with this unfinished record")
    run.add_argument("--html", type=Path, help="write the report here")


def main(arguments: argparse.Namespace) -> int:
    begun = None
    given = {name: getattr(arguments, name) for name in _FIELDS}
    try:
        if arguments.resume:
            begun, settings = resume.load(arguments.resume)
            differences = resume.contradictions(settings, given)
            if differences:
                raise ValueError(f"{arguments.resume.name} was begun with other settings: {'; '.join(differences)}")
            if arguments.output not in (None, arguments.resume):
                raise ValueError("expected --output to be the file of --resume, which is written to, or to be left out")
            if given["budget"]:
                settings = Settings(**{**vars(settings), "budget": given["budget"]})
            output = arguments.resume
        else:
            settings, output = _settings(given), arguments.output
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    if arguments.list:
        print("\n".join(step.id for step in plan(settings)))
        return 0
    if settings.device == "cuda" and not torch.cuda.is_available():
        print("PyTorch sees no CUDA device here: use --device cpu", file=sys.stderr)
        return 2
    aside = resume.set_aside(output) if output and begun is None else None
    if aside:
        print(f"an unfinished run was in {output}: it is now {aside}, and --resume {aside} would go on with it")
    return _run(settings, begun, output, arguments.html)


def _settings(given: dict) -> Settings:
    """Raises ValueError where an option is not known, or nothing is chosen."""
    chosen = {name: value for name, value in given.items() if value is not None}
    chosen.setdefault("device", "cuda" if torch.cuda.is_available() else "cpu")
    chosen.setdefault("dtypes", DTYPES[chosen["device"]])
    chosen.setdefault("budget", BUDGETS["quick" if chosen.get("quick", True) else "full"])
    if ("cases" in chosen) != ("models" in chosen):
        for kind in ("networks",) if "cases" in chosen else ("blocks", "operators"):
            chosen.setdefault(kind, False)
    for dtype in chosen["dtypes"]:
        if dtype != "autocast" and not isinstance(getattr(torch, dtype, None), torch.dtype):
            raise ValueError(f"expected --dtype to name dtypes of torch, or autocast, but got {dtype!r}")
    settings = Settings(**chosen)
    if not plan(settings):
        raise ValueError("no row fits this selection: `python -m benchmarks run --full --list` prints them all")
    return settings


def _run(settings: Settings, begun: dict | None, output: Path | None, html: Path | None) -> int:
    kept = []

    def keep(found: dict) -> None:
        kept[:] = [found]
        if output:
            record.save(found, output)

    try:
        found = suite.run(settings, sys.stdout, keep, begun)
    except KeyboardInterrupt:
        done, rows = (len(record.rows(kept[0])) if kept else 0), len(plan(settings))
        print(f"\ninterrupted after {done} of {rows} rows", end="")
        if output and kept:
            print(f"; to go on: python -m benchmarks --resume {output}")
        else:
            print("; with --output FILE they would have been kept")
        return INTERRUPTED
    print(table.summary_lines(found))
    if output and not found["finished"]:
        print(f"rows that the budget left out: python -m benchmarks --resume {output}")
    if html:
        html.write_text(report.render([found]))
        print(f"report: {html}")
    return 1 if any(summary.is_red(row) for row in record.rows(found)) else 0
