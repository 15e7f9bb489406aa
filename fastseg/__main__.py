"""python -m fastseg info | explain NAME: the build and its reasons, and the layer table of a named model."""

from __future__ import annotations

import argparse
import difflib
import importlib
import inspect
import sys
from collections.abc import Iterable

import torch

import fastseg


class UserError(Exception):
    """A mistake in the command line; the message is one sentence."""


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
    explain.add_argument(
        "name",
        help="a torchvision classification or segmentation model, timm:NAME, or smp:CLASS:ENCODER",
    )
    explain.add_argument("--size", type=_positive, default=513, help="height and width of the input (513)")
    explain.add_argument("--batch", type=_positive, default=1, help="images in the input (1)")
    explain.add_argument("--json", action="store_true", help="print JSON instead of the table")
    which = explain.add_mutually_exclusive_group()
    which.add_argument("--accelerate", action="store_true", default=True, help="accelerate the model first (default)")
    which.add_argument("--plain", dest="accelerate", action="store_false", help="say what accelerate would do")
    explain.set_defaults(run=_explain)
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer, but got {text!r}")
    return int(text)


def _info(options) -> int:
    print(fastseg.info())
    return 0


def _explain(options) -> int:
    model = load_model(options.name).eval()
    if options.accelerate:
        fastseg.accelerate(model)
    size = (options.batch, 3, options.size, options.size)
    try:
        report = fastseg.explain(model, torch.randn(size))
    except RuntimeError as error:
        raise UserError(f"{options.name} does not run on an input of {list(size)}: {_first_line(error)}") from error
    report.model = options.name
    print(report.to_json() if options.json else f"{report}\nrandom weights, random input")
    return 0


def load_model(name: str) -> torch.nn.Module:
    """A model with random weights by its name on the command line; nothing is downloaded."""
    library, _, rest = name.partition(":")
    if library == "timm" and rest:
        return _timm(rest)
    if library == "smp" and rest:
        return _smp(*rest.partition(":")[::2])
    return _torchvision(name)


def _torchvision(name: str) -> torch.nn.Module:
    models = _package("torchvision.models", "torchvision")
    segmentation = _package("torchvision.models.segmentation", "torchvision")
    names = [*models.list_models(module=models), *models.list_models(module=segmentation)]
    if name not in names:
        raise UserError(_unknown(name, "torchvision model", names) + "; timm:NAME and smp:CLASS:ENCODER name others")
    builder = models.get_model_builder(name)
    without = {"weights": None, "weights_backbone": None, "init_weights": True}
    wanted = inspect.signature(builder).parameters
    # Classification models take anything in **kwargs and pass it on, so only what is named is given.
    return builder(**{key: value for key, value in without.items() if key in wanted})


def _timm(name: str) -> torch.nn.Module:
    timm = _package("timm", "timm")
    if not timm.is_model(name.partition(".")[0]):
        raise UserError(_unknown(name, "timm model", timm.list_models()))
    return timm.create_model(name, pretrained=False)


def _smp(name: str, encoder: str) -> torch.nn.Module:
    smp = _package("segmentation_models_pytorch", "segmentation-models-pytorch")
    names = [key for key, value in vars(smp).items() if isinstance(value, type) and issubclass(value, torch.nn.Module)]
    if name not in names:
        raise UserError(_unknown(name, "segmentation_models_pytorch class", names))
    encoder = encoder or "resnet34"
    try:
        return getattr(smp, name)(encoder, encoder_weights=None)
    except (KeyError, ValueError, RuntimeError) as error:
        encoders = smp.encoders.get_encoder_names()
        if encoder not in encoders:
            raise UserError(_unknown(encoder, "segmentation_models_pytorch encoder", encoders)) from error
        raise UserError(f"{name} cannot be built on {encoder}: {_first_line(error)}") from error


def _package(module: str, distribution: str):
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"{distribution} does not import ({error}): pip install {distribution}") from error


def _unknown(name: str, what: str, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    return f"no {what} is called {name!r}" + (f"; near it are {', '.join(near)}" if near else "")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


if __name__ == "__main__":
    sys.exit(main())
