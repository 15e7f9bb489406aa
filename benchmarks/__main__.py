"""python -m benchmarks: the quick run. `--help` lists the other commands, `COMMAND --help` their options."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks import (
    command,
    compare,
    markdown,
    never_slower,
    readme,
    record,
    report,
    table,
    train,
    train_report,
    winners,
)


def _report_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("records", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--html", type=Path, default=Path("report.html"))
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables here as well")


def _report(arguments: argparse.Namespace) -> int:
    try:
        records = [record.load(path) for path in arguments.records]
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    for found in records:
        print(train_report.terminal(found) if "training" in found else table.terminal(found))
    arguments.html.write_text(report.render(records))
    print(f"report: {arguments.html}")
    if arguments.markdown:
        tables = [markdown.side_by_side(records)] if len(records) > 1 else []
        arguments.markdown.write_text("\n\n".join([*tables, *map(markdown.markdown, records)]) + "\n")
        print(f"tables: {arguments.markdown}")
    return 0


def _readme_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--write", type=Path, metavar="README.md", help="put them into the marked blocks of this file")


def _readme(arguments: argparse.Namespace) -> int:
    if arguments.write is None:
        for name in readme.BLOCKS:
            print(f"<!-- {name} -->\n{readme.block(name)}\n<!-- /{name} -->")
    else:
        arguments.write.write_text(readme.filled(arguments.write.read_text()))
    return 0


def _stale(_: argparse.Namespace) -> int:
    for path in record.not_yet_run_on_a_gpu():
        print(f"{path}: not yet run on a GPU")
    return 0


# name -> what it does, its options, what runs it (arguments -> exit status).
COMMANDS = {
    "run": ("measure (the default)", command.add_arguments, command.main),
    "report": ("print records, several side by side, and write their report", _report_arguments, _report),
    "compare": ("measure this tree and another revision in turns", compare.add_arguments, compare.main),
    "readme": ("print the README's tables, made from the newest records", _readme_arguments, _readme),
    "never-slower": ("check that nothing is slower than native", never_slower.add_arguments, never_slower.main),
    "winners": ("the winners that come with fastseg, from the records", winners.add_arguments, winners.main),
    "train": ("train networks on native and on fastseg's layers", train.add_arguments, train.main),
    "stale": ("list the kernel files not yet run on a GPU", lambda parser: None, _stale),
}


def main(arguments: list[str]) -> int:
    if not arguments or arguments[0] not in {*COMMANDS, "-h", "--help"}:
        arguments = ["run", *arguments]
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", metavar=f"{{{','.join(COMMANDS)}}}")
    for name, (text, add_arguments, _) in COMMANDS.items():
        add_arguments(commands.add_parser(name, help=text, description=text))
    parsed = parser.parse_args(arguments)
    return COMMANDS[parsed.command][2](parsed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
