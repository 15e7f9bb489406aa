"""python -m benchmarks train: networks trained on pictures of textured shapes, on native and on fastseg's layers.

Both kinds of layers start from the same parameters and see the same batches (benchmarks/learner.py). They take turns
every few steps in one process, so that whatever else the machine does hits both; a ratio is that of two such turns.
Native is in the layout in which a step is faster. The pictures (benchmarks/shapes.py) are such that a linear classifier
fails on them, which is measured too.

Under torchrun every process has its share of each batch, and the first one writes:

    torchrun --nproc-per-node 2 -m benchmarks train --output train.json
"""

from __future__ import annotations

import argparse
import base64
import io
import math
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TextIO

import torch

from benchmarks import memory, record, report, shapes, table, timing, train_report
from benchmarks.command import INTERRUPTED
from benchmarks.learner import RECIPES, Group, Learner, agreement, autocast_dtype, batches
from benchmarks.progress import Bar
from benchmarks.row import LAYOUTS

PROBED = 5  # steps of each candidate before anything is trained, after one to warm up
TURN = 5  # steps that a learner takes at a time
LOOKS = 4  # how often in a training the held-out pictures are looked at
LINES = 10  # how many lines of progress of each training stay
LINEAR_PICTURES = 128  # that the linear classifiers learn from
PICTURES = 3
CHECKED = 8  # images of the first step that native and fastseg have to agree on
# Pixels a side of the pictures, and pictures a step.
SIZES = {"cpu": (96, 8), "cuda": (192, 32)}
# The training set's seed and the held-out one's; those of parameters and batches count from 0.
DATA_SEEDS = 1000, 1001
# What a run of given minutes leaves to everything but training: gates, held-out pictures, what cannot be foreseen.
SHARE_OF_TRAINING = 0.8


@dataclass(frozen=True)
class Settings:
    """What to train. `steps` and `minutes`, where given, replace the number of steps of the recipes."""

    device: str = "cpu"
    models: tuple[str, ...] = tuple(RECIPES)
    seeds: int = 3
    amp: bool = False
    steps: int | None = None
    minutes: float | None = None
    size: int = 96
    batch: int = 8
    pictures: int = 1024
    held_out: int = 128

    @property
    def dtype(self) -> str:
        return f"{str(autocast_dtype(self.device)).removeprefix('torch.')} autocast" if self.amp else "float32"


@dataclass(frozen=True)
class Data:
    """Images [N, 3, H, W] float32 and labels [N, H, W] uint8, to train on and held out; on the device."""

    images: torch.Tensor
    labels: torch.Tensor
    held_out_images: torch.Tensor
    held_out_labels: torch.Tensor


def run(settings: Settings, out: TextIO, keep: Callable[[dict], None]) -> dict:
    """Train everything in `settings`; `keep` is given the record as it grows, also when the run is interrupted."""
    start = time.perf_counter()
    group = Group.joined(settings.device)
    if group.rank != 0:
        out, keep = io.StringIO(), lambda found: None
    if settings.device == "cuda":
        torch.backends.cudnn.benchmark = True  # native gets its own choice of kernels
    freed_memory_kept = memory.keep_freed_memory()
    found = record.start({**asdict(settings), "processes": group.size, "freed_memory_kept": freed_memory_kept})
    found["training"] = []
    print(table.machine_line(found), file=out, flush=True)
    data, found["data"] = _data(settings, group)
    print(train_report.data_line(found["data"]), file=out, flush=True)
    probes = {}
    for name in settings.models:
        probes[name] = _probe(name, settings, group, data)
        print(train_report.probe_line(name, probes[name]), file=out, flush=True)
    steps = group.agreed(_steps(settings, probes, time.perf_counter() - start))
    plan = [(seed, name) for seed in range(settings.seeds) for name in settings.models]
    bar = Bar([probes[name]["pair_seconds"] * n for _, name in plan for n in _turns(steps[name])], math.inf, out)
    try:
        for seed, name in plan:
            _Training(name, seed, steps[name], settings, group, data, probes[name], found, keep).run(bar)
    except BaseException:
        bar.clear()
        keep(found)
        raise
    record.finish(found)
    keep(found)
    group.leave()
    return found


def _turns(steps: int) -> list[int]:
    """How many steps each turn has."""
    return [min(TURN, steps - done) for done in range(0, steps, TURN)]


def _data(settings: Settings, group: Group) -> tuple[Data, dict]:
    """The pictures, and what the record says of them."""
    train, held_out = (
        shapes.make(count, settings.size, seed)
        for count, seed in zip((settings.pictures, settings.held_out), DATA_SEEDS, strict=True)
    )
    described = {
        "classes": list(shapes.CLASSES),
        "colours": [list(colour) for colour in shapes.COLOURS],
        "pictures": settings.pictures,
        "held_out": settings.held_out,
        "size": settings.size,
        "linear_miou": {},
    }
    if group.rank == 0:
        some = [part[:LINEAR_PICTURES] for part in train]
        for name, patch in (("a pixel", 1), (f"{shapes.PATCH} x {shapes.PATCH} pixels", shapes.PATCH)):
            described["linear_miou"][name] = round(shapes.linear_miou(some, held_out, patch), 4)
    return Data(*(part.to(settings.device) for part in (*train, *held_out))), described


def _probe(name: str, settings: Settings, group: Group, data: Data) -> dict:
    """How long a step takes, by candidate; native's faster layout; the peak memory of a forward and backward pass."""
    kinds = {f"native {layout}": ("native", layout) for layout in LAYOUTS} | {"fastseg": ("fastseg", "channels_last")}
    steps = 2 * PROBED  # more than are taken
    learners = {key: Learner(name, *kind, 0, steps, group, settings.amp) for key, kind in kinds.items()}
    order = batches(settings.pictures, settings.batch, 1, 0)

    def sampler(learner: Learner) -> Callable[[], float]:
        def sample() -> float:
            learner.train(data.images, data.labels, order)
            return learner.seconds[-1]

        return sample

    samplers = {key: sampler(learner) for key, learner in learners.items()}
    for sample in samplers.values():
        sample()
    samples = timing.interleave(samplers, 0.0, (PROBED, PROBED))
    seconds = {key: timing.spread(taken).median for key, taken in samples.items()}
    native = group.agreed(min(LAYOUTS, key=lambda layout: seconds[f"native {layout}"]))
    given = {"native": learners[f"native {native}"], "fastseg": learners["fastseg"]}
    return {
        "seconds": seconds,
        "native_layout": native,
        "peak_bytes": {key: _peak(learner, data, order[0]) for key, learner in given.items()},
        "pair_seconds": seconds[f"native {native}"] + seconds["fastseg"],
        "parameters": sum(p.numel() for p in learners["fastseg"].model.parameters()),
    }


def _peak(learner: Learner, data: Data, chosen: torch.Tensor) -> int | None:
    learner.optimizer.zero_grad()
    given = learner.batch(data.images, data.labels, chosen)
    return memory.peak_bytes(lambda: learner.backward(*given), learner.group.device)


def _steps(settings: Settings, probes: dict[str, dict], spent: float) -> dict[str, int]:
    if settings.minutes is None:
        return {name: settings.steps or RECIPES[name].steps for name in probes}
    share = SHARE_OF_TRAINING * (60 * settings.minutes - spent) / (len(probes) * settings.seeds)
    return {name: max(TURN, round(share / probe["pair_seconds"])) for name, probe in probes.items()}


class _Training:
    """One network from one seed on both kinds of layers: a row of `record["training"]`, filled as it goes.

    The row says why the training `stopped`, or None; each of its two candidates has the `loss` and the time of every
    turn, `trained_seconds` of training alone, and in `looks` the held-out IoU of each class and their mean.
    """

    def __init__(self, name, seed, steps, settings, group, data, probe, found, keep):
        self.name, self.seed, self.steps = name, seed, steps
        self.settings, self.group, self.data = settings, group, data
        self.found, self.keep = found, keep
        self.learners = {
            "native": Learner(name, "native", probe["native_layout"], seed, steps, group, settings.amp),
            "fastseg": Learner(name, "fastseg", "channels_last", seed, steps, group, settings.amp),
        }
        self.looks: dict[str, list[dict]] = {key: [] for key in self.learners}
        self.row = {
            "id": f"{name}/seed-{seed}/{settings.dtype}",
            "model": name,
            "seed": seed,
            "dtype": settings.dtype,
            "device": settings.device,
            "processes": group.size,
            "shape": [settings.batch, 3, settings.size, settings.size],
            "parameters": probe["parameters"],
            "steps": steps,
            "turn": TURN,
            "probe": {key: probe[key] for key in ("seconds", "native_layout")},
            "stopped": "before the first step",
            "candidates": [
                {"name": key, "role": key, "layout": learner.layout, "peak_bytes": probe["peak_bytes"][key]}
                for key, learner in self.learners.items()
            ],
        }
        found["training"].append(self.row)

    def run(self, bar: Bar) -> None:
        self._check()
        if not self.row["candidates"][-1]["gate"]["green"]:
            self.row["stopped"] = "native and fastseg disagree"
            for _ in _turns(self.steps):
                bar.end(None, measured=False)
            bar.say(train_report.row_line(self.row))
            return
        order = batches(self.settings.pictures, self.settings.batch, self.steps, self.seed).split(TURN)
        looks = {len(order) * (k + 1) // LOOKS for k in range(LOOKS)}
        lines = {len(order) * (k + 1) // LINES for k in range(LINES)}
        for turn, chosen in enumerate(order, start=1):
            bar.begin(train_report.progress(self.row))
            learners = list(self.learners.values())
            for learner in learners if turn % 2 else reversed(learners):
                learner.train(self.data.images, self.data.labels, chosen)
            self._fill()
            if turn in looks:
                self._look(last=turn == len(order))
            bar.end(train_report.progress(self.row) if turn in lines else None)
            if turn in lines:
                self.keep(self.found)
        self.row["stopped"] = None
        bar.say(train_report.row_line(self.row))
        self.keep(self.found)

    def _check(self) -> None:
        gate = None
        if self.group.rank == 0:
            images, labels = self.data.images[:CHECKED], self.data.labels[:CHECKED].long()
            gate = agreement(self.name, self.seed, self.settings.device, self.settings.amp, images, labels)
        self.row["candidates"][-1]["gate"] = self.group.agreed(gate)

    def _fill(self) -> None:
        """What is known after this turn."""
        done = min(learner.done for learner in self.learners.values())
        self.row["stopped"] = f"after {done} of {self.steps} steps"
        for entry in self.row["candidates"]:
            learner = self.learners[entry["name"]]
            entry["loss"] = [round(value, 5) for value in learner.losses]
            entry["seconds"] = timing.spread(learner.seconds)._asdict()
            entry["trained_seconds"] = round(learner.spent, 2)
            entry["looks"] = self.looks[entry["name"]]
        fast, times = self.row["candidates"][-1], (learner.seconds for learner in self.learners.values())
        ratios = [native / fastseg for native, fastseg in zip(*times, strict=True)]
        fast["ratio"], fast["ratios"] = timing.spread(ratios)._asdict(), [round(ratio, 4) for ratio in ratios]

    def _look(self, last: bool) -> None:
        """Held-out mIoU, and in the end what both networks make of a few pictures."""
        if self.group.rank != 0:
            return
        labels = self.data.held_out_labels
        predicted = {}
        for key, learner in self.learners.items():
            predicted[key] = learner.predict(self.data.held_out_images, self.settings.batch)
            by_class = shapes.iou(shapes.confusion(predicted[key].cpu(), labels.cpu()))
            look = {"step": learner.done, "miou": round(float(by_class.mean()), 4)}
            self.looks[key].append(look | {"iou": [round(value, 4) for value in by_class.tolist()]})
        if last:
            same = predicted["native"] == predicted["fastseg"]
            self.row["same_labels"] = round(float(same.float().mean()), 4)
            self.row["pictures"] = _pictures(self.data, predicted) if self.seed == 0 else []


def _pictures(data: Data, predicted: dict[str, torch.Tensor]) -> list[dict[str, str]]:
    from PIL import Image

    def masked(labels):
        picture = Image.fromarray(labels.cpu().numpy())
        picture.putpalette([channel for colour in shapes.COLOURS for channel in colour])
        return _data_url(picture, "PNG", optimize=True)

    found = []
    for k in range(min(PICTURES, len(data.held_out_images))):
        pixels = (127.5 * (data.held_out_images[k].clamp(-1, 1) + 1)).to(torch.uint8).permute(1, 2, 0).cpu().numpy()
        found.append({"image": _data_url(Image.fromarray(pixels), "JPEG", quality=85)})
        found[-1]["truth"] = masked(data.held_out_labels[k])
        found[-1] |= {key: masked(labels[k]) for key, labels in predicted.items()}
    return found


def _data_url(picture, kind: str, **options) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: a GPU where there is one")
    parser.add_argument("--models", default=",".join(RECIPES), help="comma-separated; default %(default)s")
    parser.add_argument("--seeds", type=int, default=3, help="how many, from 0 on; default %(default)s")
    parser.add_argument("--amp", action="store_true", help="autocast, to float16 on a GPU and bfloat16 on a CPU")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, help="of each training; default " + _default_steps())
    length.add_argument("--minutes", type=float, help="about how long everything may take")
    parser.add_argument("--size", type=int, help="pixels a side of the pictures; " + _defaults(0))
    parser.add_argument("--batch", type=int, help="pictures a step; " + _defaults(1))
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--output", type=Path, help="write the JSON record here, as it grows")
    parser.add_argument("--html", type=Path, help="write the report here")


def _default_steps() -> str:
    return ", ".join(f"{recipe.steps} of {name}" for name, recipe in RECIPES.items())


def _defaults(index: int) -> str:
    return "default " + ", ".join(f"{sizes[index]} on {device}" for device, sizes in SIZES.items())


def main(arguments: argparse.Namespace) -> int:
    try:
        settings = _settings(arguments)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    if settings.device == "cuda" and not torch.cuda.is_available():
        print("PyTorch sees no CUDA device here: use --device cpu", file=sys.stderr)
        return 2
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    kept: list[dict] = []

    def keep(found: dict) -> None:
        kept[:] = [found]
        if arguments.output:
            record.save(found, arguments.output)

    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # torchrun passes an interruption on as this
    status = 0
    try:
        run(settings, sys.stdout, keep)
    except KeyboardInterrupt:
        where = f"; what was measured is in {arguments.output}" if kept and arguments.output else ""
        print(f"\ninterrupted{where}")
        status = INTERRUPTED
    finally:
        signal.signal(signal.SIGTERM, before)
    if kept and kept[0]["training"]:
        print(train_report.summary_lines(kept[0]))
        if arguments.html:
            arguments.html.write_text(report.render(kept))
            print(f"report: {arguments.html}")
        status = status or int(any(train_report.is_red(row) for row in kept[0]["training"]))
    return status


def _settings(arguments: argparse.Namespace) -> Settings:
    """Raises ValueError where an option makes no sense."""
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    size, batch = SIZES[device]
    chosen = Settings(
        device, tuple(arguments.models.split(",")), arguments.seeds, arguments.amp, arguments.steps, arguments.minutes,
        size if arguments.size is None else arguments.size, batch if arguments.batch is None else arguments.batch,
    )  # fmt: skip
    unknown = [name for name in chosen.models if name not in RECIPES]
    if unknown:
        raise ValueError(f"expected --models to name some of {', '.join(RECIPES)}, but got {', '.join(unknown)}")
    for name, least in (("seeds", 1), ("steps", 1), ("minutes", 0), ("size", 32), ("batch", 2)):
        value = getattr(chosen, name)
        if value is not None and not value >= least:
            raise ValueError(f"expected --{name} to be at least {least}, but got {value}")
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if chosen.batch % processes or chosen.batch < 2 * processes:
        raise ValueError(f"expected --batch to be a multiple of {processes} processes, 2 each, but got {chosen.batch}")
    return chosen
