"""python -m fastseg info | explain NAME | tune NAME | summary NAME | segment IMAGE...: see each command's --help."""

from __future__ import annotations

import argparse
import sys

import torch

import fastseg
import fastseg.models
from fastseg import segment
from fastseg.errors import UserError, first_line
from fastseg.named import MODELS, channels_of, load_model
from fastseg.segment import positive
from fastseg.tune import tune_aloud


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        return options.run(options)
    except UserError as error:
        print(f"fastseg: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m fastseg", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="command")
    info = commands.add_parser("info", help="build, devices, and which backends can run and if not why")
    info.set_defaults(run=_info)
    explain = commands.add_parser("explain", help="one line a convolution: kernel, reason, time against native")
    _add_model(explain)
    which = explain.add_mutually_exclusive_group()
    which.add_argument("--accelerate", action="store_true", default=True, help="accelerate the model first (default)")
    which.add_argument("--plain", dest="accelerate", action="store_false", help="say what accelerate would do")
    explain.set_defaults(run=_explain)
    tune = commands.add_parser("tune", help="measure each distinct call on every backend, and remember the fastest")
    _add_model(tune)
    tune.add_argument("--training", action="store_true", help="with backward passes, in train mode")
    devices = ("cuda", "cpu") if torch.cuda.is_available() else ("cpu",)
    tune.add_argument("--device", choices=devices, default=devices[0], help=f"({devices[0]})")
    tune.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="(float32)")
    tune.set_defaults(run=_tune)
    summary = commands.add_parser("summary", help="parameters, multiply-adds, feature sizes and receptive field")
    _add_model(summary)
    summary.set_defaults(run=_summary)
    segment.add_arguments(
        commands.add_parser("segment", help="label maps and overlays of pictures", description=segment.DESCRIPTION)
    )
    return parser


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "name",
        help=f"{', '.join(MODELS)}, each also as NAME:ENCODER; a torchvision classification or segmentation model; "
        "timm:NAME; or smp:CLASS:ENCODER",
    )
    parser.add_argument("--size", type=positive, default=513, help="height and width of the input (513)")
    parser.add_argument("--batch", type=positive, default=1, help="images in the input (1)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")


def _info(options) -> int:
    print(fastseg.info())
    return 0


def _explain(options) -> int:
    model = load_model(options.name).eval()
    if options.accelerate:
        fastseg.accelerate(model)
    size = (options.batch, channels_of(model), options.size, options.size)
    try:
        report = fastseg.explain(model, torch.randn(size))
    except (RuntimeError, ValueError) as error:
        raise UserError(f"{options.name} does not run on an input of {list(size)}: {first_line(error)}") from error
    report.model = options.name
    print(report.to_json() if options.json else f"{report}\nrandom weights, random input")
    return 0


def _tune(options) -> int:
    model = load_model(options.name).to(options.device, getattr(torch, options.dtype))
    size = (options.batch, channels_of(model), options.size, options.size)
    image = torch.randn(size).to(options.device, getattr(torch, options.dtype))
    try:
        tune_aloud(fastseg.accelerate(model), image, options.training, options.json)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"{options.name} does not run on an input of {list(size)}: {first_line(error)}") from error
    return 0


def _summary(options) -> int:
    model = load_model(options.name)
    try:
        found = fastseg.models.summary(model, options.size, batch=options.batch)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"{options.name} does not run at {options.size}: {first_line(error)}") from error
    found.model = options.name
    print(found.to_json() if options.json else found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
