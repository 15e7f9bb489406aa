"""python -m benchmarks train: both kinds of layers learn from the same, alone and in a group, and records say what."""

from __future__ import annotations

import copy
import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import learner, record, report, shapes, train, train_report
from benchmarks.__main__ import main
from fastseg.models.model import SegmentationModel
from fastseg.testing import assert_alike

ROOT = Path(__file__).parent.parent.parent
NETWORKS = pytest.mark.parametrize("name", learner.RECIPES)
ALONE = learner.Group("cpu")
TINY = {"size": 32, "batch": 4, "pictures": 12, "held_out": 4, "seeds": 1, "steps": 6}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    _make_quick(monkeypatch)


def _make_quick(patch) -> None:
    """One step is enough to choose a layout, and the linear classifiers are tested by themselves."""
    patch.setattr(train, "PROBED", 1)
    patch.setattr(shapes, "linear_miou", lambda *given: 0.125)


@pytest.fixture(scope="module")
def measured() -> dict:
    with pytest.MonkeyPatch.context() as patch:
        _make_quick(patch)
        return train.run(train.Settings(**TINY), sys.stdout, lambda found: None)


@pytest.fixture
def found(measured) -> dict:
    return copy.deepcopy(measured)


@pytest.fixture
def small(monkeypatch):
    """The command trains on few pictures."""
    real = train.Settings
    few = {name: TINY[name] for name in ("pictures", "held_out")}
    monkeypatch.setattr(train, "Settings", lambda *given: real(*given, **few))


def command(*arguments: str) -> int:
    return main(["train", "--device", "cpu", "--size", "32", "--batch", "4", "--seeds", "1", *arguments])


# The pictures


def test_pictures_follow_from_the_seed():
    images, labels = shapes.make(18, 32, seed=3)
    again, other = shapes.make(18, 32, seed=3), shapes.make(18, 32, seed=4)
    assert torch.equal(images, again[0])
    assert torch.equal(labels, again[1])
    assert not torch.equal(images, other[0])
    assert (images.shape, labels.shape) == ((18, 3, 32, 32), (18, 32, 32))
    assert labels.unique().tolist() == list(range(len(shapes.CLASSES)))


@pytest.mark.parametrize("patch", [1, 7], ids=["pixel", "patch"])
def test_a_linear_classifier_fails(patch, monkeypatch):
    """It does no better than calling everything background, whose mIoU is a quarter of the background's share."""
    monkeypatch.undo()
    pictures, held_out = shapes.make(48, 64, seed=0), shapes.make(16, 64, seed=1)
    background = float((held_out[1] == 0).float().mean()) / len(shapes.CLASSES)
    assert shapes.linear_miou(pictures, held_out, patch, pixels=6000) < background + 0.03


def test_a_linear_classifier_finds_what_is_linear(monkeypatch):
    monkeypatch.undo()
    images, labels = shapes.make(8, 32, seed=0)
    tinted = torch.tensor(shapes.COLOURS)[labels.long()].permute(0, 3, 1, 2) / 64 + 0.1 * images
    assert shapes.linear_miou((tinted, labels), (tinted, labels), 1) > 0.9


def test_iou_by_class():
    labels = torch.tensor([0, 0, 1, 1, 2, 2])
    predicted = torch.tensor([0, 1, 1, 1, 2, 0])
    assert shapes.iou(shapes.confusion(predicted, labels)).tolist() == pytest.approx([1 / 3, 2 / 3, 1 / 2, 0])


# Learning


def test_batches_have_every_picture_once_before_any_again():
    order = learner.batches(12, 4, steps=6, seed=1)
    assert all(sorted(part.flatten().tolist()) == list(range(12)) for part in order.split(3))
    assert torch.equal(order, learner.batches(12, 4, steps=6, seed=1))
    assert not torch.equal(order, learner.batches(12, 4, steps=6, seed=2))


@NETWORKS
def test_native_and_fastseg_start_alike_and_part_by_rounding_alone(name):
    images, labels = shapes.make(4, 48, seed=0)
    learners = [learner.Learner(name, layers, "NCHW", 5, 10, ALONE) for layers in ("native", "fastseg")]
    for native, fastseg in zip(*(one.model.state_dict().values() for one in learners), strict=True):
        assert torch.equal(native, fastseg)
    for one in learners:
        one.train(images, labels, torch.arange(4)[None])
    assert_alike(*(torch.tensor(one.losses) for one in learners))


@NETWORKS
def test_seeds_are_different(name):
    first, second = (next(learner.build(name, "native", seed).parameters()) for seed in (0, 1))
    assert not torch.equal(first, second)


@NETWORKS
@pytest.mark.parametrize("amp", [False, True], ids=["float32", "amp"])
def test_training_learns(name, amp):
    images, labels = shapes.make(4, 48, seed=0)
    one = learner.Learner(name, "fastseg", "channels_last", 0, 15, ALONE, amp)
    for _ in range(3):
        one.train(images, labels, torch.arange(4).expand(5, 4))
    assert one.losses[-1] < 0.8 * one.losses[0]
    assert one.model.classifier.weight.dtype == torch.float32


@NETWORKS
def test_agreement_is_green(name):
    images, labels = shapes.make(4, 32, seed=0)
    assert learner.agreement(name, 0, "cpu", False, images, labels.long())["green"]


def test_a_wrong_gradient_is_red_and_is_not_trained(monkeypatch, found):
    right = SegmentationModel.loss

    def wrong(self, *given):
        return right(self, *given) * (1.2 if self.layers == "fastseg" else 1)

    monkeypatch.setattr(SegmentationModel, "loss", wrong)
    wrong_run = train.run(train.Settings(**TINY, models=("unet",)), sys.stdout, lambda found: None)
    (row,) = wrong_run["training"]
    assert train_report.is_red(row)
    assert "gradients: the error is 0.2" in row["candidates"][-1]["gate"]["message"]
    assert not any("loss" in entry or "seconds" in entry for entry in row["candidates"])
    assert "RED, not trained" in train_report.summary_lines(wrong_run)
    assert "gradients: the error is" in report.render([wrong_run])


def test_another_start_is_red(monkeypatch):
    real = learner.build
    monkeypatch.setattr(learner, "build", lambda name, layers, seed: real(name, layers, seed + (layers == "fastseg")))
    gate = learner.agreement("unet", 0, "cpu", False, *shapes.make(4, 32, seed=0))
    assert gate["message"] == "native and fastseg start from different parameters"


def test_minutes_are_shared_by_every_training():
    settings = train.Settings(minutes=10, seeds=3, models=("unet", "deeplab_v3plus"))
    probes = {"unet": {"pair_seconds": 0.1}, "deeplab_v3plus": {"pair_seconds": 0.4}}
    steps = train._steps(settings, probes, spent=60)
    assert steps == {"unet": 720, "deeplab_v3plus": 180}
    assert 3 * (steps["unet"] * 0.1 + steps["deeplab_v3plus"] * 0.4) < 600 - 60


# Records and reports


def test_record_says_what_was_learned(found):
    assert [row["id"] for row in found["training"]] == ["unet/seed-0/float32", "deeplab_v3plus/seed-0/float32"]
    assert found["finished"] is not None
    for row, entry in itertools.product(found["training"], range(2)):
        entry = row["candidates"][entry]
        assert row["stopped"] is None
        assert len(entry["loss"]) == 2  # turns of 5 steps and 1
        assert entry["looks"][-1]["step"] == 6
        assert len(entry["looks"][-1]["iou"]) == len(shapes.CLASSES)
        assert entry["seconds"]["p20"] <= entry["seconds"]["median"] <= entry["seconds"]["p80"]
        assert entry["peak_bytes"] > 0
    for row in found["training"]:
        assert row["candidates"][1]["gate"]["green"]
        assert row["candidates"][1]["ratio"]["median"] > 0
        assert row["candidates"][0]["layout"] == row["probe"]["native_layout"]
        assert set(row["probe"]["seconds"]) == {"native NCHW", "native channels_last", "fastseg"}
        assert set(row["pictures"][0]) == {"image", "truth", "native", "fastseg"}


def test_report_shows_curves_a_table_and_pictures(found):
    page = report.render([json.loads(json.dumps(found))])
    assert page.count("<svg") == 2
    assert page.count("<figure>") == 2 * 4 * train.PICTURES
    assert not re.search(r"https?://|<link|@import|<script src", page)
    assert all(source.startswith("data:image/") for source in re.findall(r'src="([^"]*)"', page))
    for tag in ("table", "div", "svg", "details", "tr", "path", "p", "span"):
        assert page.count(f"<{tag}>") + page.count(f"<{tag} ") == page.count(f"</{tag}>") + page.count("/>") * (
            tag == "path"
        )


def test_command_writes_record_and_report(small, tmp_path, capsys):
    path, page = tmp_path / "record.json", tmp_path / "page.html"
    path.write_text("what was there before")
    assert command("--steps", "6", "--models", "unet", "--output", str(path), "--html", str(page)) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["page.html", "record.json"]
    text = path.read_text()
    assert str(ROOT) not in text
    assert str(Path.home()) not in text
    shown = capsys.readouterr().out
    assert "unet, seed 0, step 6 of 6: loss" in shown
    assert "held-out mIoU of 1 seed:" in shown
    assert main(["report", str(path), "--html", str(tmp_path / "again.html")]) == 0
    assert (tmp_path / "again.html").read_text() == page.read_text() == report.render([record.load(path)])
    assert "held-out mIoU of 1 seed:" in capsys.readouterr().out


def test_mixed_precision_is_recorded(small, tmp_path):
    path = tmp_path / "record.json"
    assert command("--steps", "1", "--models", "unet", "--amp", "--output", str(path)) == 0
    assert record.load(path)["training"][0]["dtype"] == "bfloat16 autocast"


@pytest.mark.parametrize("turns", [0, 3], ids=["before-the-first-turn", "in-the-second-turn"])
def test_an_interruption_keeps_what_was_measured(turns, small, tmp_path, monkeypatch, capsys):
    real, path = learner.Learner.train, tmp_path / "record.json"
    calls = itertools.count()

    def interrupted(self, images, labels, chosen):
        if self.steps == 11 and next(calls) == turns:
            signal.raise_signal(signal.SIGTERM if turns else signal.SIGINT)
        real(self, images, labels, chosen)

    monkeypatch.setattr(learner.Learner, "train", interrupted)
    before = signal.getsignal(signal.SIGTERM)
    assert (
        command("--steps", "11", "--models", "unet", "--output", str(path), "--html", str(tmp_path / "page.html"))
        == 130
    )
    assert signal.getsignal(signal.SIGTERM) is before
    assert f"interrupted; what was measured is in {path}" in capsys.readouterr().out
    left = record.load(path)
    assert left["finished"] is None
    (row,) = left["training"]
    assert row["stopped"] == ("after 5 of 11 steps" if turns else "before the first step")
    assert ("loss" in row["candidates"][0]) == (turns > 0)
    assert (tmp_path / "page.html").read_text() == report.render([left])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--models", "unet,resnet"], "expected --models to name some of unet, deeplab_v3plus, but got resnet"),
        (["--seeds", "0"], "expected --seeds to be at least 1, but got 0"),
        (["--steps", "0"], "expected --steps to be at least 1, but got 0"),
        (["--batch", "1"], "expected --batch to be at least 2, but got 1"),
        (["--size", "16"], "expected --size to be at least 32, but got 16"),
    ],
    ids=["models", "seeds", "steps", "batch", "size"],
)
def test_options_that_make_no_sense_are_refused(arguments, message, capsys):
    assert main(["train", "--device", "cpu", *arguments]) == 2
    assert capsys.readouterr().err.strip() == message


# In a group

_GROUP = """
import torch
from torch import nn
from benchmarks import learner, shapes
from fastseg.testing import assert_alike

group, alone = learner.Group.joined("cpu"), learner.Group("cpu")
images, labels = shapes.make(4, 32, seed=0)
for name in learner.RECIPES:
    for layers in ("native", "fastseg"):
        for norms in ("training", "frozen"):
            ours, single = (learner.Learner(name, layers, "channels_last", 0, 10, g) for g in (group, alone))
            for model in (ours.model, single.model):
                for module in model.modules():
                    if isinstance(module, nn.BatchNorm2d) and norms == "frozen":
                        module.eval()
            ours.backward(*ours.batch(images, labels, torch.arange(4)))
            # Training norms look at one process's share of the batch.
            parts = [torch.arange(4)] if norms == "frozen" else [torch.tensor([0, 2]), torch.tensor([1, 3])]
            for part in parts:
                single.backward(*single.batch(images, labels, part))
            try:
                for mine, theirs in zip(ours.model.parameters(), single.model.parameters()):
                    assert_alike(mine.grad, theirs.grad / len(parts))
                    assert mine.grad.stride() == mine.stride()
                print(f"{name} {layers} {norms}: alike", flush=True)
            except AssertionError as error:
                print(f"{name} {layers} {norms}: {error}", flush=True)
group.leave()
"""


@pytest.fixture(scope="module")
def gradients() -> list[str]:
    """What two processes over gloo say of their gradients beside those of a process alone."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", _GROUP],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment | {"RANK": str(rank), "WORLD_SIZE": "2"},
        )
        for rank in range(2)
    ]
    results = [process.communicate(timeout=240) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], results
    return [out for out, _ in results]


@NETWORKS
@pytest.mark.parametrize("layers", ["native", "fastseg"])
@pytest.mark.parametrize("norms", ["training", "frozen"])
def test_gradients_of_two_processes_equal_those_of_one(name, layers, norms, gradients):
    for said in gradients:
        assert f"{name} {layers} {norms}: alike\n" in said, said


_COMMAND = """
import functools, sys
from benchmarks import shapes, train
from benchmarks.__main__ import main

train.PROBED, shapes.linear_miou = 1, lambda *given: 0.125
train.Settings = functools.partial(train.Settings, pictures=12, held_out=4)
options = "--device cpu --models unet --seeds 1 --steps 2 --size 32 --batch 4 --output".split()
sys.exit(main(["train", *options, sys.argv[1]]))
"""


def test_torchrun(tmp_path):
    script, path = tmp_path / "command.py", tmp_path / "record.json"
    script.write_text(_COMMAND)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*torchrun, str(script), str(path)], cwd=ROOT, capture_output=True, text=True, timeout=240, check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("unet, seed 0, step 2 of 2: loss") == 1
    (row,) = record.load(path)["training"]
    assert (row["processes"], row["stopped"]) == (2, None)
    assert row["candidates"][1]["looks"][-1]["step"] == 2
