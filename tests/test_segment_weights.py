# ruff: noqa: F401, F811 -- imported fixtures, and arguments that have their names
"""Weights of `python -m fastseg segment`, of our own and of other libraries, and our models by their names."""

from __future__ import annotations

import collections
import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import fastseg.models
from fastseg import __main__ as command_line
from fastseg import pictures
from tests.networks import lively, one_thread
from tests.segment_command import BLUE, Colours, Image, colours, labels_of, mistake, quarter_labels, run, saved, weights

TINY_UNET = {"base_channels": 4, "depth": 2}


class TestWeights:
    """Which files of weights are taken, and what is said of the others."""

    def state(self, **changes):
        state = dict(Colours(4, "plain", "native").state_dict())
        return {key: value for key, value in (state | changes).items() if value is not None}

    @pytest.mark.parametrize(
        "wrap",
        [
            lambda state: state,
            lambda state: {"state_dict": state, "epoch": 3, "best": torch.tensor(0.5)},
            lambda state: {"model": state, "optimizer": {"state": {}}},
            lambda state: {"model_state": state, "best_score": 0.7},
            lambda state: {"model": {"state_dict": state}},
            lambda state: {f"module.{key}": value for key, value in state.items()},
            lambda state: {"state_dict": {f"module.{key}": value for key, value in state.items()}},
            lambda state: {f"module._orig_mod.{key}": value for key, value in state.items()},
            lambda state: state | {"mask_values": [0, 1]},
            lambda state: collections.OrderedDict(state),
            lambda state: {key: value.half() for key, value in state.items()},
        ],
        ids=["bare", "state_dict", "model", "model_state", "nested", "module.", "both", "compiled", "other entries",
             "ordered", "half"],
    )  # fmt: skip
    def test_wrapped(self, run, tmp_path, wrap):
        torch.save(wrap(self.state()), tmp_path / "w.pth")
        result = run(saved(tmp_path / "a.png"), "--weights", tmp_path / "w.pth")
        assert result.code == 0, result.err
        assert torch.equal(labels_of(tmp_path / "out" / "a.labels.png"), quarter_labels())

    def test_safetensors(self, run, tmp_path):
        pytest.importorskip("safetensors.torch").save_file(self.state(), tmp_path / "w.safetensors")
        assert run(saved(tmp_path / "a.png"), "--weights", tmp_path / "w.safetensors").code == 0
        assert torch.equal(labels_of(tmp_path / "out" / "a.labels.png"), quarter_labels())

    def test_safetensors_is_not_installed(self, run, tmp_path, monkeypatch):
        (tmp_path / "w.safetensors").write_bytes(b"")
        monkeypatch.setitem(sys.modules, "safetensors.torch", None)
        mistake(run(saved(tmp_path / "a.png"), "--weights", tmp_path / "w.safetensors"), "pip install safetensors")

    def test_weights_are_really_loaded(self, run, tmp_path):
        """Red and blue change places."""
        state = self.state()
        state["classifier.weight"] = state["classifier.weight"][[0, 3, 2, 1]]
        torch.save(state, tmp_path / "w.pth")
        run(saved(tmp_path / "a.png"), "--weights", tmp_path / "w.pth")
        assert labels_of(tmp_path / "out" / "a.labels.png")[0, -1] == BLUE

    def test_nothing_in_a_file_is_executed(self, run, tmp_path):
        class Bomb:
            def __reduce__(self):
                return Path.touch, (tmp_path / "executed",)

        torch.save({"state_dict": self.state(), "args": Bomb()}, tmp_path / "w.pth")
        result = run(saved(tmp_path / "a.png"), "--weights", tmp_path / "w.pth")
        mistake(result, "holds Python objects (", "could run code", "torch.save(model.state_dict(), file)")
        assert not (tmp_path / "executed").exists()

    @pytest.mark.parametrize(
        ("name", "data", "said"),
        [
            ("w.pth", b"", "is no checkpoint that torch.load reads"),
            ("w.pth", b"neither zip nor pickle", "is no checkpoint that torch.load reads"),
            ("w.pth", b"PK\x03\x04 a broken zip", "is no checkpoint that torch.load reads"),
            ("w.safetensors", b"\xff" * 64, "is no safetensors file that can be read"),
        ],
        ids=["empty", "text", "broken zip", "broken safetensors"],
    )
    def test_no_checkpoint(self, run, tmp_path, name, data, said):
        (tmp_path / name).write_bytes(data)
        mistake(run(saved(tmp_path / "a.png"), "--weights", tmp_path / name), tmp_path / name, said)

    @pytest.mark.parametrize("content", [3, [torch.zeros(1)], {"epoch": 3}], ids=["number", "list", "no tensors"])
    def test_no_state_dict(self, run, tmp_path, content):
        torch.save(content, tmp_path / "w.pth")
        mistake(run(saved(tmp_path / "a.png"), "--weights", tmp_path / "w.pth"), "holds no state dict")

    def test_missing(self, run, tmp_path):
        mistake(run(saved(tmp_path / "a.png"), "--weights", tmp_path / "w.pth"), "there is no file", "w.pth")

    def test_folder(self, run, tmp_path):
        mistake(run(saved(tmp_path / "a.png"), "--weights", tmp_path), "is a folder, not a file of weights")

    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            ({"classifier.bias": None}, ["got no classifier.bias"]),
            (
                {f"aux.{i}": torch.zeros(1) for i in range(5)},
                ["got an unexpected aux.0, aux.1, aux.2 and 2 more"],
            ),
            ({"classifier.weight": torch.zeros(4, 3, 3, 3)}, ["classifier.weight [4, 3, 3, 3] where [4, 3, 1, 1] is"]),
            (
                {"classifier.weight": torch.zeros(7, 3, 1, 1), "classifier.bias": torch.zeros(7)},
                ["classifier.weight [7, 3, 1, 1] where [4, 3, 1, 1] is wanted", "of 7 classes: --classes 7"],
            ),
            (
                {"classifier.weight": None, "classifier.bias": torch.zeros(1), "x": torch.zeros(1)},
                ["got no classifier.weight; an unexpected x; classifier.bias [1] where [4] is wanted"],
            ),
            (
                {"classifier.weight": None, "classifier.bias": None, "x": torch.zeros(1)},
                ["expected keys of one of 'fastseg', 'torchvision', ", "got of none that we know: x"],
            ),
        ],
        ids=["missing", "unexpected", "another shape", "classes", "all", "nothing in common"],
    )
    def test_mismatch(self, run, tmp_path, changes, said):
        torch.save(self.state(**changes), tmp_path / "w.pth")
        result = run(saved(tmp_path / "a.png"), "--weights", tmp_path / "w.pth")
        mistake(result, f"{tmp_path / 'w.pth'} does not fit colours: ", *said)
        assert ("--classes" in result.err) == ("--classes" in "".join(said))
        assert not (tmp_path / "out").exists()

    def test_classes(self, run, tmp_path):
        torch.save(Colours(7, "plain", "native").state_dict(), tmp_path / "w.pth")
        assert run(saved(tmp_path / "a.png"), "--weights", tmp_path / "w.pth", "--classes", 7).code == 0
        assert torch.equal(labels_of(tmp_path / "out" / "a.labels.png"), quarter_labels())

    def test_random_weights_are_announced(self, run, tmp_path, monkeypatch):
        notes = []
        overlay = pictures.overlay
        monkeypatch.setattr(pictures, "overlay", lambda *args: notes.append(args[-1]) or overlay(*args))
        result = run(saved(tmp_path / "a.png"), "--random-weights")
        assert result.code == 0
        assert "RANDOM WEIGHTS" in result.out
        assert "fastseg: random weights: the labels mean nothing" in result.err
        assert notes == ["random weights: the labels mean nothing"]

    def test_trained_weights_are_not_called_random(self, run, tmp_path, weights):
        result = run(saved(tmp_path / "a.png"), "--weights", weights)
        assert "random" not in (result.out + result.err).lower()


def settings(options):
    return [argument for key, value in options.items() for argument in ("--set", f"{key}={value}")]


def picture_of_noise(path, height, width):
    """The file of a picture, and its pixels as models take them, [1, 3, height, width] in [0, 1]."""
    pixels = torch.randint(256, (height, width, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    saved(path, Image.frombytes("RGB", (width, height), bytes(pixels.flatten().tolist())))
    return path, pictures.normalised(pixels[None], "unit")


class TestModels:
    """The command on the reference models, with weights of our own and of other libraries."""

    def labels(self, tmp_path):
        return labels_of(tmp_path / "out" / "a.labels.png")

    def test_own_weights(self, run, tmp_path):
        torch.manual_seed(1)
        options = {"encoder": "mobilenet_v2", "output_stride": 8, "dropout": 0.3}
        model = lively(fastseg.models.deeplab_v3plus(3, **options))
        torch.save({"state_dict": model.state_dict()}, tmp_path / "w.pth")
        path, pixels = picture_of_noise(tmp_path / "a.png", 40, 33)
        result = run(
            path, "--weights", tmp_path / "w.pth", "--model", "deeplab_v3plus:mobilenet_v2", "--classes", 3,
            "--output-stride", 8, "--set", "dropout=0.3",
        )  # fmt: skip
        assert result.code == 0, result.err
        assert "note: " not in result.out
        with torch.inference_mode():
            assert torch.equal(self.labels(tmp_path), model.predict(pixels, torch.uint8)[0])

    def test_grey_model(self, run, tmp_path):
        model = fastseg.models.unet(1, 2, padding="same", **TINY_UNET)
        torch.save(model.state_dict(), tmp_path / "w.pth")
        path, pixels = picture_of_noise(tmp_path / "a.png", 21, 30)
        result = run(
            path, "--weights", tmp_path / "w.pth", "--model", "unet", *settings(TINY_UNET), "--set", "padding=same"
        )
        assert result.code == 0, result.err
        grey = pictures.normalised(pictures.to_tensor(Image.open(path), 1)[None], "unit")
        assert (grey - pixels.mean(1, keepdim=True)).abs().mean() < 0.1
        assert torch.equal(self.labels(tmp_path), model.predict(grey, torch.uint8)[0])

    @pytest.mark.parametrize(("size", "more"), [((32, 40), (0, 0)), ((33, 38), (3, 2))], ids=str)
    def test_unpadded_unet_sees_a_mirrored_picture(self, run, tmp_path, size, more):
        """As its paper has it, labels cover the picture: 20 pixels more on each side, and up to a size that works."""
        model = fastseg.models.unet(3, 4, **TINY_UNET)
        torch.save(model.state_dict(), tmp_path / "w.pth")
        path, pixels = picture_of_noise(tmp_path / "a.png", *size)
        result = run(
            path, "--weights", tmp_path / "w.pth", "--model", "unet", "--classes", 4, *settings(TINY_UNET), "--set",
            "in_channels=3",
        )  # fmt: skip
        assert result.code == 0, result.err
        mirrored = nn.functional.pad(pixels, (20, 20 + more[1], 20, 20 + more[0]), mode="reflect")
        expected = model.predict(mirrored, torch.uint8)[0]
        assert expected.shape == (size[0] + more[0], size[1] + more[1])
        assert torch.equal(self.labels(tmp_path), expected[: size[0], : size[1]])

    @pytest.mark.parametrize("size", [(1, 1), (3, 50), (33, 35)], ids=str)
    def test_unpadded_unet_takes_any_picture(self, run, tmp_path, size):
        path, _ = picture_of_noise(tmp_path / "a.png", *size)
        assert run(path, "--random-weights", "--model", "unet", *settings(TINY_UNET)).code == 0
        assert self.labels(tmp_path).shape == size

    def test_weights_of_segmentation_models_pytorch(self, run, tmp_path):
        """They say what they are of; encoder, classes and form come from them."""
        smp = pytest.importorskip("segmentation_models_pytorch")
        torch.manual_seed(1)
        theirs = lively(smp.DeepLabV3Plus("mobilenet_v2", encoder_weights=None, classes=5)).eval()
        torch.save(theirs.state_dict(), tmp_path / "w.pth")
        path, pixels = picture_of_noise(tmp_path / "a.png", 64, 48)
        result = run(path, "--weights", tmp_path / "w.pth", "--model", "deeplab_v3plus")
        assert result.code == 0, result.err
        assert "deeplab_v3plus, 5 classes" in result.out
        assert result.out.count("note: ") > 1
        with torch.inference_mode():
            same = self.labels(tmp_path) == theirs(pixels).argmax(1)[0]
        assert same.double().mean() > 0.999

    def test_weights_of_torchvision(self, run, tmp_path):
        models = pytest.importorskip("torchvision.models.segmentation")
        torch.manual_seed(1)
        theirs = models.deeplabv3_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=7, aux_loss=True)
        torch.save({"model": lively(theirs).eval().state_dict()}, tmp_path / "w.pth")
        path, pixels = picture_of_noise(tmp_path / "a.png", 48, 65)
        result = run(path, "--weights", tmp_path / "w.pth", "--model", "deeplab_v3", "--source", "torchvision")
        assert result.code == 0, result.err
        with torch.inference_mode():
            same = self.labels(tmp_path) == theirs(pixels)["out"].argmax(1)[0]
        assert same.double().mean() > 0.999

    @pytest.fixture
    def milesial(self, tmp_path):
        """A file as training writes it there, and the model in it."""
        model = lively(fastseg.models.unet(3, 2, padding="same", norm="batch", **TINY_UNET))
        state = fastseg.models.to_state_dict(model, "milesial")
        torch.save(state | {"mask_values": [0, 255]}, tmp_path / "w.pth")
        return tmp_path / "w.pth", model

    def test_weights_of_milesial(self, capsys, tmp_path, milesial):
        weights, model = milesial
        path, pixels = picture_of_noise(tmp_path / "a.png", 33, 40)
        arguments = [path, "--weights", weights, "--model", "unet", "--out", tmp_path / "out", "--device", "cpu"]
        assert command_line.main(["segment", *map(str, arguments)]) == 0
        assert "unit pixels" in capsys.readouterr().out
        assert torch.equal(self.labels(tmp_path), model.predict(pixels, torch.uint8)[0])

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (["--model", "deeplab_v3plus:mobilenet_v2"], "does not fit deeplab_v3plus: it holds weights of unet"),
            (["--model", "unet", "--classes", 3], "expected num_classes=2, as the weights have it, but got 3"),
            (["--model", "unet", "--source", "smp"], "does not fit unet: expected "),
            (["--model", "unet", "--source", "fastseg"], "expected the state dict of this model, but got no "),
        ],
        ids=["model", "classes", "source", "ours"],
    )
    def test_weights_of_something_else(self, run, tmp_path, milesial, arguments, said):
        mistake(run(saved(tmp_path / "a.png"), "--weights", milesial[0], *arguments), milesial[0], said)

    def test_weights_of_an_encoder_alone(self, run, tmp_path):
        models = pytest.importorskip("torchvision.models")
        torch.save(models.mobilenet_v2(weights=None).state_dict(), tmp_path / "w.pth")
        model = ("--model", "deeplab_v3plus:mobilenet_v2")
        result = run(saved(tmp_path / "a.png"), "--weights", tmp_path / "w.pth", *model)
        mistake(result, "holds the weights of an encoder alone: the rest of deeplab_v3plus would be random")

    def test_old_weights_without_counters(self, run, tmp_path):
        model = fastseg.models.unet(3, 2, padding="same", norm="batch", **TINY_UNET)
        state = {key: value for key, value in model.state_dict().items() if "num_batches" not in key}
        torch.save(state, tmp_path / "w.pth")
        options = {"in_channels": 3, "padding": "same", "norm": "batch"} | TINY_UNET
        result = run(saved(tmp_path / "a.png"), "--weights", tmp_path / "w.pth", "--model", "unet", *settings(options))
        assert result.code == 0, result.err

    def test_five_channels(self, run, tmp_path):
        options = {"in_channels": 5} | TINY_UNET
        result = run(saved(tmp_path / "a.png"), "--random-weights", "--model", "unet", *settings(options))
        mistake(result, "unet takes 5 channels, and pictures have 3")


class TestNames:
    """`summary` and `explain` know our models by their names."""

    def run(self, capsys, *arguments):
        return command_line.main(list(arguments)), capsys.readouterr()

    @pytest.mark.parametrize(
        ("name", "size", "parameters"),
        [
            ("unet", "188", 31030658),
            ("deeplab_v1", "65", 20505429),
            ("deeplab_v1:7x7", "65", None),
            ("deeplab_v2", "65", 44048532),
            ("deeplab_v3:mobilenet_v3_large", "65", None),
            ("deeplab_v3plus:mobilenet_v2", "65", None),
        ],
    )
    def test_summary(self, capsys, name, size, parameters):
        with torch.device("meta"):
            code, output = self.run(capsys, "summary", name, "--size", size, "--json")
        assert code == 0
        found = json.loads(output.out)
        assert found["model"] == name
        assert parameters is None or found["parameters"] == parameters

    def test_summary_as_text(self, capsys):
        code, output = self.run(capsys, "summary", "unet", "--size", "188")
        assert code == 0
        assert "parameters: 31 030 658" in output.out

    def test_summary_of_a_batch(self, capsys):
        def macs(batch):
            output = self.run(capsys, "summary", "resnet18", "--size", "64", "--batch", batch, "--json")[1]
            return json.loads(output.out)["macs"]

        assert macs("3") == 3 * macs("1")

    def test_summary_of_a_size_that_does_not_work(self, capsys):
        code, output = self.run(capsys, "summary", "unet", "--size", "571")
        assert code == 2
        assert output.err.startswith("fastseg: unet does not run at 571: expected ")
        assert "556 and 572" in output.err
        assert output.err.count("\n") == 1

    @pytest.mark.parametrize("how", ["--plain", "--accelerate"])
    def test_explain(self, capsys, how):
        code, output = self.run(capsys, "explain", "deeplab_v3plus:mobilenet_v2", "--size", "33", how)
        assert code == 0
        assert output.out.startswith("deeplab_v3plus:mobilenet_v2 (")

    def test_explain_a_size_that_does_not_work(self, capsys):
        code, output = self.run(capsys, "explain", "unet", "--size", "33")
        assert code == 2
        assert output.err.startswith("fastseg: unet does not run on an input of [1, 1, 33, 33]: expected ")

    @pytest.mark.parametrize(
        ("name", "said"),
        [
            ("deeplab_v3pluss", "no model of fastseg is called 'deeplab_v3pluss'; near it are deeplab_v3plus"),
            ("deeplab_v3plus:mobilenet_v9", "deeplab_v3plus cannot be built: "),
            ("deeplab_v1:8x8", "deeplab_v1 cannot be built: expected variant to be one of "),
        ],
    )
    def test_mistakes(self, capsys, name, said):
        code, output = self.run(capsys, "summary", name)
        assert code == 2
        assert output.err.startswith(f"fastseg: {said}")
