"""A model whose labels are known, and the command on it: shared by the tests of `python -m fastseg segment`."""

from __future__ import annotations

import collections

import pytest
import torch
from torch import nn

import fastseg.models
from fastseg import __main__ as command_line
from fastseg import named
from fastseg.models.layers import finish
from fastseg.models.model import SegmentationModel

pytest.importorskip("PIL")
from PIL import Image

DARK, RED, GREEN, BLUE = range(4)
SQUARES = {DARK: (10, 0, 0), RED: (250, 0, 10), GREEN: (0, 240, 0), BLUE: (20, 0, 255)}


class Colours(SegmentationModel):
    """Labels known without training: which of red, green and blue is above a half, class 0 where none is."""

    def __init__(self, num_classes, encoder, layers):
        super().__init__(num_classes, layers)
        self.encoder = encoder
        self.classifier = nn.Conv2d(3, num_classes, 1)
        self.sizes: list[tuple[int, ...]] = []
        with torch.no_grad():
            self.classifier.weight.zero_()
            self.classifier.bias.fill_(-1)
            self.classifier.bias[:4] = torch.tensor([0.5, 0, 0, 0])
            self.classifier.weight[1:4, :, 0, 0] = torch.eye(3)

    def logits(self, images):
        self.sizes.append(tuple(images.shape))
        return self.classifier(images)


@pytest.fixture(autouse=True)
def colours(monkeypatch):
    """Registers the model `colours`; the list gets each one that is built."""
    built = []

    def builder(num_classes=4, *, encoder="plain", layers="fastseg"):
        if encoder not in ("plain", "fancy"):
            raise ValueError(f"expected encoder to be one of 'plain', 'fancy', but got {encoder!r}")
        built.append(finish(Colours(num_classes, encoder, layers), layers))
        return built[-1]

    monkeypatch.setattr(fastseg.models, "colours", builder, raising=False)
    monkeypatch.setattr(named, "MODELS", (*named.MODELS, "colours"))
    return built


@pytest.fixture
def weights(tmp_path):
    """A file of weights for `colours`."""
    path = tmp_path / "colours.pth"
    torch.save(Colours(4, "plain", "native").state_dict(), path)
    return path


@pytest.fixture
def run(capsys, tmp_path):
    """Runs the command on the model `colours` into the folder `out`, unless the arguments say otherwise."""

    def call(*arguments):
        arguments = [str(argument) for argument in arguments]
        defaults = {"--out": tmp_path / "out", "--model": "colours", "--pixels": "unit", "--device": "cpu"}
        for option, value in defaults.items():
            arguments += [] if option in arguments else [option, str(value)]
        code = command_line.main(["segment", *arguments])
        return collections.namedtuple("Result", "code out err")(code, *capsys.readouterr())

    return call


def quarters(width=8, height=6):
    """Dark, red, green and blue in reading order."""
    image = Image.new("RGB", (width, height))
    for index, colour in enumerate(SQUARES.values()):
        left, top = index % 2 * width // 2, index // 2 * height // 2
        image.paste(colour, (left, top, left + width // 2, top + height // 2))
    return image


def saved(path, image=None, **options):
    exactly = {".jpg": {"quality": 95, "subsampling": 0}, ".webp": {"lossless": True}}.get(path.suffix, {})
    (quarters() if image is None else image).save(path, **(exactly | options))
    return path


def labels_of(path):
    with Image.open(path) as image:
        return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(image.height, image.width)


def quarter_labels(width=8, height=6):
    rows = [torch.tensor(pair).repeat_interleave(width // 2) for pair in ((DARK, RED), (GREEN, BLUE))]
    return torch.stack(rows).repeat_interleave(height // 2, 0).to(torch.uint8)


def mistake(result, *parts):
    """The command printed one sentence that has all parts, and did nothing."""
    assert result.code == 2
    assert result.out == ""
    assert result.err.startswith("fastseg: ")
    assert result.err.count("\n") == 1
    for part in parts:
        assert str(part) in result.err
