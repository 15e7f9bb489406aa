"""python -m benchmarks: the quick run. python -m benchmarks report|readme|stale: what records say."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from benchmarks import readme, record, report, suite, table


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", metavar="{run,report,readme,stale}")

    run = commands.add_parser("run", help="measure (the default)")
    length = run.add_mutually_exclusive_group()
    length.add_argument("--quick", action="store_true", default=True, help="the default: forward and backward")
    length.add_argument("--full", dest="quick", action="store_false", help="every direction, layout and network")
    run.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    run.add_argument("--dtype", help="comma-separated; default float32 on a CPU, bfloat16 and float32 on a GPU")
    run.add_argument("--cases", default="*", help="shell pattern of case ids, such as 'sep-aspp*'")
    run.add_argument("--no-networks", dest="networks", action="store_false", help="leave the whole networks out")
    run.add_argument("--no-blocks", dest="blocks", action="store_false", help="leave whole blocks and heads out")
    run.add_argument("--no-compile", dest="compiles", action="store_false", help="leave torch.compile out")
    run.add_argument("--budget", type=float, metavar="SECONDS", help="default 150, or 1800 with --full")
    run.add_argument("--threads", type=int, help="CPU threads")
    run.add_argument("--output", type=Path, help="write the JSON record here, after every row")
    run.add_argument("--html", type=Path, help="write the report here")

    shown = commands.add_parser("report", help="print records and write their report")
    shown.add_argument("records", nargs="+", type=Path)
    shown.add_argument("--html", type=Path, default=Path("report.html"))

    tables = commands.add_parser("readme", help="print the README's tables, made from the newest records")
    tables.add_argument("--write", type=Path, metavar="README.md", help="put them into the marked blocks of this file")

    commands.add_parser("stale", help="list the kernel files not yet run on a GPU")
    return parser


def _run(arguments) -> int:
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("PyTorch sees no CUDA device here: use --device cpu", file=sys.stderr)
        return 2
    default = "float32" if arguments.device == "cpu" else "bfloat16,float32"
    settings = suite.Settings(
        device=arguments.device,
        dtypes=tuple((arguments.dtype or default).split(",")),
        cases=arguments.cases,
        quick=arguments.quick,
        budget=arguments.budget or (150.0 if arguments.quick else 1800.0),
        networks=arguments.networks,
        blocks=arguments.blocks,
        compiles=arguments.compiles,
        threads=arguments.threads,
    )
    found = suite.run(
        settings,
        say=lambda line: print(line, flush=True),
        keep=lambda r: record.save(r, arguments.output) if arguments.output else None,
    )
    print(table.summary_lines(found))
    if arguments.html:
        arguments.html.write_text(report.render([found]))
        print(f"report: {arguments.html}")
    return 1 if record.gates(found)["red"] else 0


def _report(arguments) -> int:
    try:
        records = [record.load(path) for path in arguments.records]
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    for found in records:
        print(table.terminal(found))
    arguments.html.write_text(report.render(records))
    print(f"report: {arguments.html}")
    return 0


def _readme(arguments) -> int:
    if arguments.write is None:
        for name in readme.BLOCKS:
            print(f"<!-- {name} -->\n{readme.block(name)}\n<!-- /{name} -->")
    else:
        arguments.write.write_text(readme.filled(arguments.write.read_text()))
    return 0


def _stale(_) -> int:
    for path in record.not_yet_run_on_a_gpu():
        print(f"{path}: not yet run on a GPU")
    return 0


def main(arguments: list[str]) -> int:
    if not arguments or arguments[0] not in {"run", "report", "readme", "stale", "-h", "--help"}:
        arguments = ["run", *arguments]
    parsed = _parser().parse_args(arguments)
    return {"run": _run, "report": _report, "readme": _readme, "stale": _stale}[parsed.command](parsed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
