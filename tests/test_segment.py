# ruff: noqa: F401, F811 -- imported fixtures, and arguments that have their names
"""python -m fastseg segment: pictures in, label maps and overlays out, and a sentence for each mistake."""

from __future__ import annotations

import os
import re
import sys

import pytest
import torch

from fastseg import palette, pictures, segment
from fastseg.models.model import SegmentationModel
from tests.networks import one_thread
from tests.segment_command import (
    BLUE,
    DARK,
    GREEN,
    RED,
    SQUARES,
    Colours,
    Image,
    colours,
    labels_of,
    mistake,
    quarter_labels,
    quarters,
    run,
    saved,
    weights,
)


class TestLabels:
    def test_label_map_and_overlay(self, run, tmp_path, weights):
        result = run(saved(tmp_path / "a.png"), "--weights", weights)
        assert result.code == 0, result.err
        assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.labels.png", "a.overlay.png"]
        with Image.open(tmp_path / "out" / "a.labels.png") as image:
            assert (image.mode, image.size) == ("P", (8, 6))
            assert image.getpalette() == palette.voc()
        assert torch.equal(labels_of(tmp_path / "out" / "a.labels.png"), quarter_labels())
        assert f"colours, 4 classes, weights {weights}, fastseg layers, cpu, unit pixels" in result.out
        assert "1 picture segmented into" in result.out

    @pytest.mark.parametrize("layers", ["fastseg", "native"])
    def test_layers(self, run, tmp_path, weights, colours, layers):
        assert run(saved(tmp_path / "a.png"), "--weights", weights, "--layers", layers).code == 0
        assert colours[0].layers == layers
        assert torch.equal(labels_of(tmp_path / "out" / "a.labels.png"), quarter_labels())

    def test_every_inference_is_without_gradients(self, run, tmp_path, weights, monkeypatch):
        seen = []
        predict = SegmentationModel.predict

        def watched(model, images, dtype):
            seen.append((torch.is_inference_mode_enabled(), model.training, dtype))
            return predict(model, images, dtype)

        monkeypatch.setattr(SegmentationModel, "predict", watched)
        assert run(saved(tmp_path / "a.png"), "--weights", weights).code == 0
        assert seen == [(True, False, torch.uint8)]

    @pytest.mark.parametrize("size", ["24", "12x16", "7x5"])
    def test_labels_have_the_pictures_own_size(self, run, tmp_path, weights, colours, size):
        picture = saved(tmp_path / "a.png", quarters(32, 24))
        assert run(picture, "--weights", weights, "--size", size).code == 0
        shape = {"24": (1, 3, 24, 32), "12x16": (1, 3, 12, 16), "7x5": (1, 3, 7, 5)}[size]
        assert colours[0].sizes == [shape]
        labels = labels_of(tmp_path / "out" / "a.labels.png")
        assert labels.shape == (24, 32)
        if size != "7x5":
            assert torch.equal(labels, quarter_labels(32, 24))

    def test_shorter_side(self, run, tmp_path, weights, colours):
        run(saved(tmp_path / "a.png", quarters(40, 20)), "--weights", weights, "--size", "10")
        assert colours[0].sizes == [(1, 3, 10, 20)]

    def test_pictures_of_one_size_share_a_batch(self, run, tmp_path, weights, colours):
        wide = [saved(tmp_path / f"wide{i}.png") for i in range(3)]
        tall = [saved(tmp_path / f"tall{i}.png", quarters(6, 8)) for i in range(2)]
        mixed = [wide[0], tall[0], wide[1], tall[1], wide[2]]
        assert run(*mixed, "--weights", weights, "--batch", "2").code == 0
        assert sorted(colours[0].sizes) == [(1, 3, 6, 8), (2, 3, 6, 8), (2, 3, 8, 6)]
        for path in wide:
            assert torch.equal(labels_of(tmp_path / "out" / f"{path.stem}.labels.png"), quarter_labels())
        for path in tall:
            assert torch.equal(labels_of(tmp_path / "out" / f"{path.stem}.labels.png"), quarter_labels(6, 8))

    def test_few_pictures_wait_for_their_like(self, run, tmp_path, weights, monkeypatch):
        """Of twelve sizes, at most four batches' worth is in memory."""
        most = 0
        batches = segment.Run._batches

        def counted(self, paths):
            nonlocal most
            for number, path in enumerate(list(paths), 1):
                yielded = sum(map(len, seen))
                most = max(most, number - yielded)
                yield path

        seen = []

        def watched(self, paths):
            for items in batches(self, counted(self, paths)):
                seen.append(items)
                yield items

        monkeypatch.setattr(segment.Run, "_batches", watched)
        pictures = [saved(tmp_path / f"{i}.png", quarters(2 * i + 2, 4)) for i in range(12)]
        assert run(*pictures, "--weights", weights, "--batch", "2").code == 0
        assert sum(map(len, seen)) == 12
        assert most == 8

    def test_progress_of_each_batch(self, run, tmp_path, weights):
        images = [saved(tmp_path / f"{i}.png") for i in range(5)]
        lines = run(*images, "--weights", weights, "--batch", 2).err.splitlines()
        assert [re.match(r"\d/5 pictures, \S+ a second", line)[0].split()[0] for line in lines] == ["2/5", "4/5", "5/5"]

    def test_more_than_256_classes(self, run, tmp_path):
        assert run(saved(tmp_path / "a.png"), "--random-weights", "--classes", "300").code == 0
        with Image.open(tmp_path / "out" / "a.labels.png") as image:
            assert image.mode == "I;16"
            assert image.getextrema() == (0, 3)

    def test_the_index_of_a_high_label_is_kept(self):
        labels = torch.tensor([[0, 299], [256, 7]])
        assert pictures.label_map(labels, palette.voc(), (2, 2)).getpixel((1, 0)) == 299
        assert pictures.label_map(labels, palette.voc(), (8, 8)).getextrema() == (0, 299)
        assert len(pictures.label_map(labels, palette.voc(), (7, 7)).convert("I").getcolors()) == 4
        assert pictures.label_map((labels & 255).to(torch.uint8), palette.voc(), (2, 2)).getpixel((1, 1)) == 7

    @pytest.mark.parametrize("pixels", ["unit", "imagenet"])
    def test_what_the_model_sees(self, pixels):
        seen = pictures.normalised(pictures.to_tensor(Image.new("RGB", (2, 1), (255, 0, 51)), 3)[None], pixels)
        assert seen.shape == (1, 3, 1, 2)
        expected = torch.tensor([1.0, 0.0, 0.2])
        if pixels == "imagenet":
            expected = (expected - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
        torch.testing.assert_close(seen[0, :, 0, 0], expected)


class TestOverlay:
    def test_picture_under_its_colours_and_a_legend(self, run, tmp_path, weights):
        names = tmp_path / "names.txt"
        names.write_text("nothing\nred things\ngreen things\nblue things\n")
        picture = quarters(64, 48)
        run(saved(tmp_path / "a.png", picture), "--weights", weights, "--labels", names)
        with Image.open(tmp_path / "out" / "a.overlay.png") as overlay:
            assert overlay.mode == "RGB"
            assert overlay.height > 48
            for label, (x, y) in {DARK: (5, 5), RED: (60, 5), GREEN: (5, 40), BLUE: (60, 40)}.items():
                colour = palette.voc()[3 * label : 3 * label + 3]
                mixed = [0.4 * a + 0.6 * b for a, b in zip(SQUARES[label], colour, strict=True)]
                assert overlay.getpixel((x, y)) == pytest.approx(mixed, abs=1)
            legend = overlay.crop((0, 48, overlay.width, overlay.height))
            colours = {colour for _, colour in legend.getcolors(2**16)}
        assert {tuple(palette.voc()[3 * label :][:3]) for label in SQUARES} <= colours

    def test_legend_has_the_classes_present_and_their_shares(self, run, tmp_path, weights, monkeypatch):
        seen = []
        monkeypatch.setattr(
            pictures, "_legend", lambda entries, note, width: seen.append(entries) or Image.new("RGB", (1, 1))
        )
        image = Image.new("RGB", (20, 20), SQUARES[BLUE])
        image.putpixel((3, 3), SQUARES[RED])
        run(saved(tmp_path / "a.png", image), "--weights", weights)
        assert seen == [[("class 3  100 %", (128, 128, 0)), ("class 1  < 1 %", (128, 0, 0))]]

    def test_a_legend_wider_than_its_picture(self):
        image = Image.new("RGB", (4, 4))
        drawn = pictures.overlay(image, Image.new("P", (4, 4)), [("a name of some length 100 %", (9, 9, 9))], "a note")
        assert drawn.width > 100
        assert drawn.getpixel((drawn.width - 1, 0)) == (255, 255, 255)

    def test_a_long_legend_has_columns(self):
        entries = [(f"class {i}", (i, i, i)) for i in range(150)]
        assert 3 * pictures._legend(entries, "", 384).height < pictures._legend(entries, "", 100).height

    @pytest.mark.parametrize("kind", ["jpg", "none"])
    def test_kinds(self, run, tmp_path, weights, kind):
        run(saved(tmp_path / "a.png"), "--weights", weights, "--overlay", kind)
        expected = ["a.labels.png"] + (["a.overlay.jpg"] if kind == "jpg" else [])
        assert sorted(path.name for path in (tmp_path / "out").iterdir()) == expected

    def test_names_of_voc(self, run, tmp_path):
        assert run(saved(tmp_path / "a.png"), "--random-weights", "--classes", 21, "--labels", "voc").code == 0

    @pytest.mark.parametrize(
        ("label", "colour"),
        [(0, (0, 0, 0)), (1, (128, 0, 0)), (15, (192, 128, 128)), (20, (0, 64, 128)), (255, (224, 224, 192))],
    )
    def test_colours_of_voc(self, label, colour):
        assert tuple(palette.voc()[3 * label : 3 * label + 3]) == colour


class TestMistakes:
    """Nothing is computed, nothing is written, and the exit status is 2."""

    def test_missing_file(self, run, tmp_path, weights):
        there = saved(tmp_path / "a.png")
        mistake(run(there, tmp_path / "b.png", "--weights", weights), f"there is no file {tmp_path / 'b.png'}")
        assert not (tmp_path / "out").exists()

    def test_folder_for_a_picture(self, run, tmp_path, weights):
        mistake(run(tmp_path, "--weights", weights), f"{tmp_path} is a folder", "*.jpg")

    def test_two_pictures_of_one_name(self, run, tmp_path, weights):
        result = run(saved(tmp_path / "a.png"), saved(tmp_path / "a.jpg"), "--weights", weights)
        mistake(result, "a.png and ", "a.jpg would both write", "a.labels.png")

    def test_existing_output(self, run, tmp_path, weights):
        picture = saved(tmp_path / "a.png")
        assert run(picture, "--weights", weights).code == 0
        (tmp_path / "out" / "a.labels.png").write_bytes(b"precious")
        mistake(run(picture, "--weights", weights), "a.labels.png and 1 more would be overwritten: --force does that")
        assert (tmp_path / "out" / "a.labels.png").read_bytes() == b"precious"
        assert run(picture, "--weights", weights, "--force").code == 0
        assert torch.equal(labels_of(tmp_path / "out" / "a.labels.png"), quarter_labels())

    def test_out_is_a_file(self, run, tmp_path, weights):
        picture = saved(tmp_path / "a.png")
        (tmp_path / "out").write_text("")
        mistake(run(picture, "--weights", weights), f"cannot write into {tmp_path / 'out'}: ")

    def test_folder_without_write_permission(self, run, tmp_path, weights, monkeypatch):
        (tmp_path / "out").mkdir(mode=0o500)
        if os.geteuid() == 0:  # whom no permission stops

            def denied(dir):
                raise PermissionError(13, "Permission denied", dir)

            monkeypatch.setattr(segment.tempfile, "TemporaryFile", denied)
        mistake(run(saved(tmp_path / "a.png"), "--weights", weights), "cannot write into", "Permission denied")

    def test_full_disk(self, run, tmp_path, weights, monkeypatch):
        def full(*_, **__):
            raise OSError(28, "No space left on device")

        first = saved(tmp_path / "a.png")
        monkeypatch.setattr(Image.Image, "save", full)
        result = run(first, "--weights", weights)
        assert result.code == 2
        assert "a.labels.png: No space left on device" in result.err

    def test_no_weights(self, run, tmp_path):
        mistake(run(saved(tmp_path / "a.png")), "give --weights FILE, or --random-weights")

    def test_weights_and_random_weights(self, run, tmp_path, weights):
        with pytest.raises(SystemExit) as error:
            run(saved(tmp_path / "a.png"), "--weights", weights, "--random-weights")
        assert error.value.code == 2

    def test_no_cuda(self, run, tmp_path, weights, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        mistake(run(saved(tmp_path / "a.png"), "--weights", weights, "--device", "cuda"), "PyTorch sees no CUDA device")

    def test_no_pillow(self, run, tmp_path, weights, monkeypatch):
        picture = saved(tmp_path / "a.png")
        monkeypatch.setitem(sys.modules, "PIL", None)
        mistake(run(picture, "--weights", weights), "pip install pillow")

    @pytest.mark.parametrize(
        ("lines", "said"), [("a\nb\nc\n", "names 3 classes, and the model has 4"), (None, "can be read: ")]
    )
    def test_class_names(self, run, tmp_path, weights, lines, said):
        names = tmp_path / "names.txt"
        if lines is not None:
            names.write_text(lines)
        mistake(run(saved(tmp_path / "a.png"), "--weights", weights, "--labels", names), names, said)

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (["--model", "colour"], "no model of fastseg is called 'colour'; near it are colours"),
            (["--encoder", "resnet5"], "colours cannot be built: expected encoder to be one of 'plain', 'fancy'"),
            (
                ["--model", "colours:fancy", "--encoder", "plain"],
                "colours:fancy and the encoder 'plain' say two things",
            ),
            (["--output-stride", "8"], "colours takes no output_stride; it takes num_classes, encoder, layers"),
            (["--set", "dropout=0.5"], "colours takes no dropout"),
        ],
        ids=["model", "encoder", "two encoders", "output stride", "set"],
    )
    def test_model(self, run, tmp_path, arguments, said):
        mistake(run(saved(tmp_path / "a.png"), "--random-weights", *arguments), said)

    @pytest.mark.parametrize(
        "arguments",
        [
            ["--size", "0"],
            ["--size", "3x"],
            ["--batch", "0"],
            ["--classes", "-1"],
            ["--set", "dropout"],
            ["--set", "a b=1"],
        ],
        ids=" ".join,
    )
    def test_usage(self, run, tmp_path, arguments):
        with pytest.raises(SystemExit) as error:
            run(saved(tmp_path / "a.png"), "--random-weights", *arguments)
        assert error.value.code == 2
