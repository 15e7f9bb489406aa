# ruff: noqa: F401, F811 -- imported fixtures, and arguments that have their names
"""What `python -m fastseg segment` does with each kind of picture file, and with files that are none."""

from __future__ import annotations

import io
import zlib

import pytest
import torch

from fastseg import pictures
from tests.networks import one_thread
from tests.segment_command import (
    BLUE,
    RED,
    SQUARES,
    Colours,
    Image,
    colours,
    labels_of,
    quarter_labels,
    quarters,
    run,
    saved,
    weights,
)


class TestPictures:
    """Each kind of file gives the labels of its picture."""

    @pytest.mark.parametrize("kind", ["png", "jpg", "webp", "bmp", "tif", "gif", "ppm"])
    def test_formats(self, run, tmp_path, weights, kind):
        # Large enough that JPEG keeps its blocks of 8 x 8 pixels apart.
        assert run(saved(tmp_path / f"a.{kind}", quarters(64, 32)), "--weights", weights).code == 0
        assert torch.equal(labels_of(tmp_path / "out" / "a.labels.png"), quarter_labels(64, 32))

    def test_palette(self, run, tmp_path, weights):
        run(saved(tmp_path / "a.png", quarters().quantize(4)), "--weights", weights)
        assert torch.equal(labels_of(tmp_path / "out" / "a.labels.png"), quarter_labels())

    def test_cmyk(self, run, tmp_path, weights):
        run(saved(tmp_path / "a.tif", quarters().convert("CMYK")), "--weights", weights)
        assert torch.equal(labels_of(tmp_path / "out" / "a.labels.png"), quarter_labels())

    @pytest.mark.parametrize("mode", ["L", "1", "LA"])
    def test_grey(self, mode, tmp_path):
        image = Image.new("L", (4, 2), 0)
        image.paste(255, (2, 0, 4, 2))
        read = pictures.read(saved(tmp_path / "a.png", image.convert(mode)))
        assert (read.mode, read.size) == ("RGB", (4, 2))
        assert [read.getpixel((x, 0)) for x in (0, 3)] == [(0, 0, 0), (255, 255, 255)]

    @pytest.mark.parametrize(
        ("image", "options"),
        [
            (Image.new("RGBA", (2, 2), (250, 0, 0, 0)), {}),
            (Image.new("RGB", (2, 2), (250, 0, 0)), {"transparency": (250, 0, 0)}),
            (Image.new("RGB", (2, 2), (250, 0, 0)).quantize(2), {"transparency": 0}),
        ],
        ids=["alpha", "transparent-colour", "transparent-palette-entry"],
    )
    def test_what_is_transparent_is_white(self, tmp_path, image, options):
        assert pictures.read(saved(tmp_path / "a.png", image, **options)).getpixel((1, 1)) == (255, 255, 255)

    def test_half_transparent(self, tmp_path):
        image = Image.new("RGBA", (1, 1), (255, 0, 0, 51))
        assert pictures.read(saved(tmp_path / "a.png", image)).getpixel((0, 0)) == (255, 204, 204)

    @pytest.mark.parametrize("kind", ["png", "tif"])
    @pytest.mark.parametrize("mode", ["I;16", "I;16B"])
    def test_sixteen_bits(self, tmp_path, kind, mode):
        """Scaled from 65535 and rounded, where PIL's conversion would make white of all above 255."""
        image = Image.new("I;16", (5, 1))
        levels = {0: 0, 128: 0, 129: 1, 257 * 100: 100, 65535: 255}
        for x, level in enumerate(levels):
            image.putpixel((x, 0), level)
        if mode == "I;16B":
            image = image.convert("I").convert("I;16B")
        read = pictures.read(saved(tmp_path / f"a.{kind}", image))
        assert [read.getpixel((x, 0)) for x in range(5)] == [(level,) * 3 for level in levels.values()]

    @pytest.mark.parametrize("kind", ["jpg", "png", "tif"])
    @pytest.mark.parametrize("orientation", range(1, 9))
    def test_exif_orientation(self, run, tmp_path, weights, orientation, kind):
        """A picture stored in any of eight ways gives the labels of the upright one."""
        stored = {
            2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
            5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
            8: Image.Transpose.ROTATE_270,
        }  # fmt: skip
        image = quarters(64, 32)
        exif = Image.Exif()
        exif[0x0112] = orientation
        image = image.transpose(stored[orientation]) if orientation > 1 else image
        assert run(saved(tmp_path / f"a.{kind}", image, exif=exif), "--weights", weights).code == 0
        assert torch.equal(labels_of(tmp_path / "out" / "a.labels.png"), quarter_labels(64, 32))

    def test_first_picture_of_an_animation(self, run, tmp_path, weights):
        other = Image.new("RGB", (8, 6), SQUARES[BLUE])
        run(saved(tmp_path / "a.gif", save_all=True, append_images=[other]), "--weights", weights)
        assert torch.equal(labels_of(tmp_path / "out" / "a.labels.png"), quarter_labels())

    def test_large_pictures_are_not_warned_of(self, tmp_path, monkeypatch, recwarn):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40)
        assert pictures.read(saved(tmp_path / "a.png")).size == (8, 6)
        assert not recwarn

    def test_one_pixel(self, run, tmp_path, weights):
        assert run(saved(tmp_path / "a.png", Image.new("RGB", (1, 1), SQUARES[RED])), "--weights", weights).code == 0
        assert labels_of(tmp_path / "out" / "a.labels.png").tolist() == [[RED]]

    def test_name_with_dots_and_spaces(self, run, tmp_path, weights):
        run(saved(tmp_path / "two words.v1.png"), "--weights", weights)
        assert (tmp_path / "out" / "two words.v1.labels.png").exists()


def broken(kind, path):
    """A file that looks like a picture, and what is said of it."""
    buffer = io.BytesIO()
    quarters(64, 64).save(buffer, "JPEG" if kind == "cut off" else "PNG")
    data = buffer.getvalue()
    if kind == "cut off":
        data = data[: len(data) // 2]
    elif kind == "damaged":
        start = data.index(b"IDAT") + 8
        data = data[:start] + b"\xff" * 16 + data[start + 16 :]
    else:
        data = {"empty": b"", "text": b"no picture at all\n"}.get(kind, data)
    if kind == "huge":  # a header of more pixels than Pillow takes
        header = b"IHDR" + (2**16).to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
        data = data[:8] + (13).to_bytes(4, "big") + header + zlib.crc32(header).to_bytes(4, "big") + data[33:]
    path.write_bytes(data)
    return path


class TestRefusedPictures:
    @pytest.mark.parametrize(
        ("kind", "sentence"),
        [
            ("empty", "is not a picture"),
            ("text", "is not a picture"),
            ("cut off", "is broken: "),
            ("damaged", "is broken: "),
            ("huge", "is broken: Image size (4294967296 pixels) exceeds limit"),
        ],
    )
    def test_the_others_are_done(self, run, tmp_path, weights, kind, sentence):
        first, bad, last = saved(tmp_path / "a.png"), broken(kind, tmp_path / "bad.png"), saved(tmp_path / "z.png")
        result = run(first, bad, last, "--weights", weights)
        assert result.code == 1
        assert f"fastseg: {bad} {sentence}" in result.err
        assert result.err.rstrip().endswith("fastseg: 1 picture refused, 2 done")
        names = {path.name for path in (tmp_path / "out").iterdir()}
        assert names == {"a.labels.png", "a.overlay.png", "z.labels.png", "z.overlay.png"}

    @pytest.mark.parametrize("mode", ["F", "I"])
    def test_pixels_of_unknown_range(self, run, tmp_path, weights, mode):
        image = Image.new(mode, (2, 2), 70000)
        result = run(saved(tmp_path / "a.tif", image), "--weights", weights)
        assert result.code == 1
        assert f"has pixels in PIL's mode '{mode}', of unknown range: save it in 8 or 16 bits" in result.err

    def test_a_size_that_the_model_does_not_take(self, run, tmp_path, weights, monkeypatch):
        def refuse(model, images):
            if images.shape[-1] == 8:
                raise ValueError("expected images of 6 pixels, but got 8; nearest 6")
            return model.classifier(images)

        monkeypatch.setattr(Colours, "logits", refuse)
        wide, tall = saved(tmp_path / "wide.png"), saved(tmp_path / "tall.png", quarters(6, 8))
        result = run(wide, tall, "--weights", weights)
        assert result.code == 1
        assert f"fastseg: {wide} (6x8): expected images of 6 pixels, but got 8; nearest 6" in result.err
        assert "1 picture refused, 1 done" in result.err

    @pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA"), RuntimeError("x: can't allocate memory: y")])
    def test_too_little_memory(self, run, tmp_path, weights, monkeypatch, error):
        def fail(*_):
            raise error

        monkeypatch.setattr(Colours, "logits", fail)
        result = run(saved(tmp_path / "a.png"), "--weights", weights)
        assert result.code == 1
        assert "memory does not suffice for a batch of 1: a smaller --batch or --size would" in result.err

    def test_interrupted(self, run, tmp_path, weights, monkeypatch):
        first, second = saved(tmp_path / "a.png"), saved(tmp_path / "b.png")
        read = pictures.read

        def interrupted(path):
            if path == second:
                raise KeyboardInterrupt
            return read(path)

        monkeypatch.setattr(pictures, "read", interrupted)
        result = run(first, second, "--weights", weights)
        assert result.code == 130
        assert "interrupted, 1 of 2 pictures done" in result.err
