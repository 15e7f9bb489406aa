"""Pictures in and out of files: any kind that PIL reads as 8-bit pixels, label maps, overlays with a legend.

PIL is imported where it is used: it is an optional dependency.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import torch

# What networks were trained on, as (mean, standard deviation) of red, green and blue in [0, 1].
PIXELS = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "unit": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
}
OPACITY = 0.6  # of the colours in an overlay
_WHITE, _BLACK, _RED = (255, 255, 255), (0, 0, 0), (200, 0, 0)


class PictureError(Exception):
    """A file that is no picture, or none that can be used; the message is one sentence."""


def read(path: Path):
    """The picture as PIL's RGB image, upright by its EXIF orientation, transparent pixels on white.

    16-bit grey levels are scaled from 0..65535; of an animation the first picture is taken.

    Raises:
        PictureError: the file is missing, broken, no picture, or of float pixels, whose range nobody knows.
    """
    from PIL import Image, ImageOps

    try:
        with warnings.catch_warnings():
            # PIL warns of large pictures, and raises for those it takes for an attack on memory.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as file:
                file.load()
                image = ImageOps.exif_transpose(file)
    except FileNotFoundError as error:
        raise PictureError(f"there is no file {path}") from error
    except PermissionError as error:
        raise PictureError(f"{path} may not be read") from error
    except Image.UnidentifiedImageError as error:
        raise PictureError(f"{path} is not a picture, or of a kind that Pillow does not know") from error
    # Decoders meet broken files with whatever exception comes up: OSError, SyntaxError, struct.error, IndexError, ...
    except Exception as error:
        raise PictureError(f"{path} is broken: {error}") from error
    return _rgb(image, path)


def _rgb(image, path):
    from PIL import Image

    if image.mode == "F" or (image.mode == "I" and not 0 <= image.getextrema()[0] <= image.getextrema()[1] < 2**16):
        raise PictureError(f"{path} has pixels in PIL's mode {image.mode!r}, of unknown range: save it in 8 or 16 bits")
    if image.mode.startswith("I"):
        # PIL's own conversion cuts 16 bits off at 255.
        image = image.convert("I").point(lambda value: value * (1 / 257) + 0.5).convert("L")
        image.info.pop("transparency", None)  # a grey level of 16 bits
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (*_WHITE, 255)), image)
    return image.convert("RGB")


def resized(image, size: int | tuple[int, int] | None):
    """`image` with a shorter side of `size` pixels, or of (height, width), or as it is."""
    from PIL import Image

    if size is None:
        return image
    if isinstance(size, int):
        shorter = min(image.size)
        width, height = (max(1, round(side * size / shorter)) for side in image.size)
    else:
        height, width = size
    return image if image.size == (width, height) else image.resize((width, height), Image.Resampling.BILINEAR)


def to_tensor(image, channels: int) -> torch.Tensor:
    """[H, W, channels] uint8: red, green and blue, or the grey level."""
    image = image.convert("L") if channels == 1 else image
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.view(image.height, image.width, channels)


def normalised(pixels: torch.Tensor, kind: str) -> torch.Tensor:
    """uint8 [N, H, W, C] -> float32 [N, C, H, W] in channels_last, as networks trained on `kind` of PIXELS expect."""
    channels = pixels.shape[-1]
    mean, std = (torch.tensor(values, device=pixels.device) for values in PIXELS[kind])
    if channels == 1:
        mean, std = mean.mean(0, keepdim=True), std.mean(0, keepdim=True)
    return ((pixels.float() / 255 - mean) / std).permute(0, 3, 1, 2)


def label_map(labels: torch.Tensor, palette: Sequence[int], size: tuple[int, int]):
    """Labels [h, w] as a PIL image of `size` (width, height): palette colours, or grey of 16 bits for more than 256."""
    from PIL import Image

    wide = labels.dtype != torch.uint8
    labels = labels.to(torch.int32) if wide else labels
    height, width = labels.shape
    buffer = bytearray(labels.numel() * labels.element_size())
    torch.frombuffer(buffer, dtype=labels.dtype).copy_(labels.flatten())
    image = Image.frombytes("I" if wide else "P", (width, height), bytes(buffer))
    if wide:
        image = image.convert("I;16")
    else:
        image.putpalette(palette)
    return image if image.size == size else image.resize(size, Image.Resampling.NEAREST)


def overlay(image, colours, entries: Sequence[tuple[str, tuple[int, ...]]], note: str = ""):
    """`image` under `colours`, and below it a legend.

    Args:
        image: PIL's RGB.
        colours: of its labels, as `label_map` gives them for at most 256.
        entries: text and colour of each line of the legend.
        note: a sentence for the end of the legend.
    """
    from PIL import Image

    mixed = Image.blend(image, colours.convert("RGB"), OPACITY)
    legend = _legend(entries, note, mixed.width)
    canvas = Image.new("RGB", (max(mixed.width, legend.width), mixed.height + legend.height), _WHITE)
    canvas.paste(mixed, (0, 0))
    canvas.paste(legend, (0, mixed.height))
    return canvas


def _legend(entries, note: str, width: int):
    """The entries in as many columns as fit into `width` pixels; wider where one entry does not."""
    from PIL import Image, ImageDraw

    line = max(12, min(32, width // 32))  # pixels; also a swatch's side
    font = _font(line)
    gap = line // 2
    column = max(2 * gap + line + int(font.getlength(text)) + gap for text, _ in entries)
    columns = max(1, min(len(entries), width // column))
    rows = -(-len(entries) // columns)
    width = max(width, column * columns, 2 * gap + int(font.getlength(note)))
    legend = Image.new("RGB", (width, (rows + bool(note)) * (line + gap) + gap), _WHITE)
    draw = ImageDraw.Draw(legend)
    for index, (text, colour) in enumerate(entries):
        left, top = index % columns * column + gap, index // columns * (line + gap) + gap
        draw.rectangle((left, top, left + line - 1, top + line - 1), fill=colour, outline=_BLACK)
        draw.text((left + line + gap, top + line // 2), text, _BLACK, font, anchor="lm")
    if note:
        draw.text((gap, legend.height - gap - line // 2), note, _RED, font, anchor="lm")
    return legend


def _font(size: int):
    from PIL import ImageFont

    try:
        return ImageFont.truetype("DejaVuSans.ttf", size)
    except OSError:
        return ImageFont.load_default(size)  # has few letters beyond ASCII
