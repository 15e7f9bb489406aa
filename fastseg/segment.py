"""python -m fastseg segment: pictures in, label maps and overlays out.

    files - read, resized - batches of one size - model.predict - labels of the picture's own size - files

What is wrong with the command is said before anything is computed. What is wrong with one picture is said when its turn
comes, and the others are done.
"""

from __future__ import annotations

import argparse
import ast
import itertools
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastseg import checkpoint, pictures
from fastseg.errors import UserError, first_line, package
from fastseg.models.unet import UNet
from fastseg.models.weights import SOURCES
from fastseg.named import MODELS, channels_of, reference_model, reference_options
from fastseg.palette import PALETTES, VOC_CLASSES
from fastseg.pictures import PictureError
from fastseg.progress import Progress

DESCRIPTION = """Writes DIR/NAME.labels.png, a palette PNG of label indices at the picture's own size, and
DIR/NAME.overlay.png, the picture under the labels' colours with a legend. A picture that cannot be read is refused with
a sentence, the others are done, and the exit status is 1. It is 2 when the command itself is wrong, and then nothing is
written."""
RANDOM = "random weights: the labels mean nothing"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="pictures of any kind that Pillow reads")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the results; made if need be")
    parser.add_argument("--force", action="store_true", help="overwrite results that are there")

    model = parser.add_argument_group("the model")
    model.add_argument("--model", required=True, metavar="NAME", help=f"{', '.join(MODELS)}, or NAME:ENCODER")
    model.add_argument("--encoder", help="of the model, where it has a choice")
    model.add_argument("--classes", type=positive, metavar="N", help="how many classes the weights have")
    model.add_argument("--output-stride", type=positive, metavar="N", help="of the model, where it has a choice")
    model.add_argument(
        "--set", type=_setting, action="append", default=[], metavar="OPTION=VALUE",
        help="any other option of the model's builder, such as padding=same or rates=(6,12,18)",
    )  # fmt: skip
    model.add_argument("--layers", choices=("fastseg", "native"), default="fastseg", help="what it runs on (fastseg)")
    weights = model.add_mutually_exclusive_group()
    weights.add_argument("--weights", type=Path, metavar="FILE", help="a state dict, of torch.save or safetensors")
    weights.add_argument("--random-weights", action="store_true", help="do without: labels then mean nothing")
    model.add_argument("--source", choices=SOURCES, help="whose weights they are; guessed from their names otherwise")

    run = parser.add_argument_group("the run")
    run.add_argument(
        "--size", type=_size, default="keep", metavar="N|HxW|keep",
        help="what the model sees: a shorter side of N pixels, HxW whatever the shape, or every pixel (keep)",
    )  # fmt: skip
    run.add_argument(
        "--pixels", choices=tuple(pictures.PIXELS),
        help="what the weights were trained on: values in [0, 1] (unit; the default of unet without encoder), or those "
        "less ImageNet's mean, over its deviation (imagenet; the default of all others)",
    )  # fmt: skip
    run.add_argument("--batch", type=positive, default=1, metavar="N", help="pictures of one size at a time (1)")
    run.add_argument("--device", choices=("cpu", "cuda"), help="cuda where PyTorch sees one, else cpu")

    look = parser.add_argument_group("the results")
    look.add_argument("--palette", choices=tuple(PALETTES), default="voc", help="colours of the labels (voc)")
    look.add_argument("--labels", metavar="FILE", help="names of the classes, one a line; or voc")
    look.add_argument("--overlay", choices=("png", "jpg", "none"), default="png", help="kind of the overlays (png)")
    parser.set_defaults(run=run_command)


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer, but got {text!r}")
    return int(text)


def _size(text: str) -> int | tuple[int, int] | None:
    if text == "keep":
        return None
    found = re.fullmatch(r"([1-9]\d*)(?:x([1-9]\d*))?", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"expected keep, pixels, or height x width as in 512x1024, but got {text!r}")
    return (int(found[1]), int(found[2])) if found[2] else int(found[1])


def _setting(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key.isidentifier():
        raise argparse.ArgumentTypeError(f"expected OPTION=VALUE, but got {text!r}")
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return key, value


def run_command(options) -> int:
    """Exit status 0, 1 when some pictures were refused, 130 when interrupted.

    Raises:
        UserError: something in the command is wrong, and nothing was computed; or a result cannot be written, and the
            pictures from there on are not done.
    """
    package("PIL", "pillow")
    outputs = _outputs(options)
    if options.weights is None and not options.random_weights:
        raise UserError("give --weights FILE, or --random-weights to see the command run without a trained model")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("PyTorch sees no CUDA device here: use --device cpu")
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    model, notes = _model(options)
    names = _class_names(options.labels, model.num_classes)
    pixels = options.pixels or ("unit" if isinstance(model, UNet) else "imagenet")
    _writable(options.out)

    origin = "RANDOM WEIGHTS" if options.random_weights else f"weights {options.weights}"
    print(f"{options.model}, {model.num_classes} classes, {origin}, {options.layers} layers, {device}, {pixels} pixels")
    for note in notes:
        print(f"note: {note}")
    if options.random_weights:
        print(f"fastseg: {RANDOM}", file=sys.stderr)
    look = Look(options.overlay, PALETTES[options.palette](), names, RANDOM if options.random_weights else "")
    return Run(model.to(device), device, pixels, options.size, options.batch, look).all(outputs, options.out)


@dataclass(frozen=True)
class Output:
    labels: Path
    overlay: Path


def _outputs(options) -> dict[Path, Output]:
    """Where each picture's results go; nothing is lost by writing there."""
    outputs: dict[Path, Output] = {}
    taken: dict[Path, Path] = {}
    for image in options.images:
        if image.is_dir():
            raise UserError(f"{image} is a folder: name the pictures in it, as in {image / '*.jpg'}")
        if not image.exists():
            raise UserError(f"there is no file {image}")
        kind = "png" if options.overlay == "none" else options.overlay
        output = Output(options.out / f"{image.stem}.labels.png", options.out / f"{image.stem}.overlay.{kind}")
        if output.labels in taken:
            raise UserError(f"{taken[output.labels]} and {image} would both write {output.labels}")
        taken[output.labels] = image
        outputs[image] = output
    there = [path for output in outputs.values() for path in _files(output, options.overlay) if path.exists()]
    if there and not options.force:
        others = f" and {len(there) - 1} more" if len(there) > 1 else ""
        raise UserError(f"{there[0]}{others} would be overwritten: --force does that")
    return outputs


def _files(output: Output, overlay: str) -> list[Path]:
    return [output.labels] if overlay == "none" else [output.labels, output.overlay]


def _writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"cannot write into {folder}: {error.strerror}") from error


def _model(options) -> tuple[torch.nn.Module, list[str]]:
    """The model with its weights in it, in eval mode, and what has to be said about them."""
    state = None if options.weights is None else checkpoint.read(options.weights)
    name, _, kind = options.model.partition(":")
    named = {"encoder": options.encoder, "num_classes": options.classes, "output_stride": options.output_stride}
    given = {key: value for key, value in named.items() if value is not None} | dict(options.set)
    given = reference_options(name, kind, given) | {"layers": options.layers}
    # The same labels in each run, also when there is nothing to load.
    torch.manual_seed(0)
    if state is None:
        model, notes = reference_model(name, given), []
    else:
        model, notes = checkpoint.model_with(
            state, options.weights, options.source, name, lambda: reference_model(name, given), **given
        )
    if channels_of(model) not in (1, 3):
        raise UserError(f"{name} takes {channels_of(model)} channels, and pictures have 3, or 1 made of them")
    return model.eval(), notes


def _class_names(labels: str | None, classes: int) -> Sequence[str]:
    if labels is None:
        return [f"class {index}" for index in range(classes)]
    if labels == "voc" and not Path(labels).exists():
        names = VOC_CLASSES
    else:
        try:
            names = Path(labels).read_text(encoding="utf-8").rstrip().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{labels} is no file of class names that can be read: {first_line(error)}") from error
    if len(names) != classes:
        raise UserError(f"{labels} names {len(names)} classes, and the model has {classes}")
    return names


@dataclass(frozen=True)
class Look:
    """What results look like; see the options of the same names."""

    overlay: str
    palette: Sequence[int]
    names: Sequence[str]
    note: str


@dataclass(frozen=True)
class Item:
    """A picture on its way: the file, the picture in it, what the model is to see of it."""

    path: Path
    image: Any
    pixels: torch.Tensor  # [h, w, C] uint8


class Run:
    """Pictures through one model."""

    def __init__(self, model, device: str, pixels: str, size, batch: int, look: Look):
        self.model = model
        self.device = device
        self.pixels = pixels
        self.size = size
        self.batch = batch
        self.look = look
        self.channels = channels_of(model)
        self.done = self.refused = 0

    def all(self, outputs: dict[Path, Output], folder: Path) -> int:
        self.progress = Progress(len(outputs), "pictures", sys.stderr)
        try:
            for items in self._batches(outputs):
                self._segment(items, outputs)
                self.progress.show(self.done + self.refused)
        except KeyboardInterrupt:
            self.progress.say(f"fastseg: interrupted, {self.done} of {len(outputs)} pictures done")
            return 130
        finally:
            self.progress.clear()
        print(f"{_count(self.done)} segmented into {folder}")
        if self.refused:
            print(f"fastseg: {_count(self.refused)} refused, {self.done} done", file=sys.stderr)
        return 1 if self.refused else 0

    def _batches(self, paths) -> Iterator[list[Item]]:
        """Pictures of one size, `batch` of them where there are as many; few wait in memory for their like."""
        waiting: dict[torch.Size, list[Item]] = {}
        for path in paths:
            try:
                image = pictures.read(path)
            except PictureError as error:
                self._refuse(str(error))
                continue
            item = Item(path, image, pictures.to_tensor(pictures.resized(image, self.size), self.channels))
            alike = waiting.setdefault(item.pixels.shape, [])
            alike.append(item)
            if len(alike) == self.batch:
                yield waiting.pop(item.pixels.shape)
            elif sum(map(len, waiting.values())) >= 4 * self.batch:
                yield waiting.pop(next(iter(waiting)))
        yield from waiting.values()

    def _segment(self, items: list[Item], outputs: dict[Path, Output]) -> None:
        height, width = items[0].pixels.shape[:2]
        try:
            labels = self._labels(torch.stack([item.pixels for item in items]))
        except (RuntimeError, ValueError) as error:
            reason = first_line(error)
            if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in reason:
                reason = f"memory does not suffice for a batch of {len(items)}: a smaller --batch or --size would"
            for item in items:
                self._refuse(f"{item.path} ({height}x{width}): {reason}")
            return
        for item, found in zip(items, labels, strict=True):
            self._write(item.image, found, outputs[item.path])
            self.done += 1

    @torch.inference_mode()
    def _labels(self, pixels: torch.Tensor) -> torch.Tensor:  # [N, h, w, C] uint8 -> [N, h, w]
        dtype = torch.uint8 if self.model.num_classes <= 256 else torch.int64
        height, width = pixels.shape[1:3]
        if hasattr(self.model, "output_size"):
            pixels = _with_surroundings(pixels, self.model.output_size)
        images = pictures.normalised(pixels.to(self.device), self.pixels)
        return self.model.predict(images, dtype)[:, :height, :width].cpu()

    def _write(self, image, labels: torch.Tensor, output: Output) -> None:
        palette, names = self.look.palette, self.look.names
        try:
            found = pictures.label_map(labels, palette, image.size)
            found.save(output.labels)
            if self.look.overlay == "none":
                return
            colours = pictures.label_map((labels & 255).to(torch.uint8), palette, image.size)
            shares = Counter(dict(enumerate(torch.bincount(labels.flatten()).tolist()))).most_common()
            entries = [
                (f"{names[label]}  {_percent(count / labels.numel())}", tuple(palette[3 * (label & 255) :][:3]))
                for label, count in shares
                if count
            ]
            pictures.overlay(image, colours, entries, self.look.note).save(output.overlay)
        except OSError as error:
            raise UserError(f"cannot write {output.labels}: {error.strerror or error}") from error

    def _refuse(self, sentence: str) -> None:
        self.refused += 1
        self.progress.say(f"fastseg: {sentence}")


def _with_surroundings(pixels: torch.Tensor, output_size) -> torch.Tensor:
    """Mirror pictures [N, h, w, C] outwards, as U-Net's paper does, until the labels of the result cover them.

    The first label belongs to the first pixel; there may be more labels than pixels behind the last.
    """
    for axis in (1, 2):
        wanted = pixels.shape[axis]
        total, labels = _smallest_input(wanted, output_size)
        positions = torch.arange(total) - (total - labels) // 2
        period = max(1, 2 * (wanted - 1))
        positions = positions % period
        pixels = pixels.index_select(axis, torch.where(positions < wanted, positions, period - positions))
    return pixels


def _smallest_input(wanted: int, output_size) -> tuple[int, int]:
    """Pixels a side, and labels a side of the result, of the smallest square that gives at least `wanted` labels."""
    for total in itertools.count(wanted):
        try:
            labels = output_size((total, total))[0]
        except ValueError:  # no size that this form takes
            continue
        if labels >= wanted:
            return total, labels
    raise AssertionError("there are infinitely many sizes")


def _count(pictures: int) -> str:
    return f"{pictures} picture" + ("" if pictures == 1 else "s")


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.005 else "< 1 %"
