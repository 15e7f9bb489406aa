"""A real photograph as a network's input, and its masks as small pictures for the record."""

from __future__ import annotations

import base64
import io

import torch
import torch.nn.functional as F

from fastseg import palette

PICTURE = 257  # pixels a side of the pictures kept in the record
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CAPTIONS = ("photograph", "native", "fastseg", "difference")


def photograph(size: int):
    """Matplotlib's portrait of Grace Hopper (US Navy, public domain), cut to `size` x `size`; a PIL image."""
    from matplotlib.cbook import get_sample_data
    from PIL import Image, ImageOps

    with get_sample_data("grace_hopper.jpg") as file:
        image = Image.open(file).convert("RGB")
    return ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC, centering=(0.5, 0.3))


def to_tensor(image, channels: int = 3) -> torch.Tensor:
    """[1, channels, H, W] float32, normalised as torchvision's models expect; one channel is the colours' mean."""
    width, height = image.size
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(1, height, width, 3)
    x = pixels.permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (_MEAN, _STD))
    x = (x - mean) / std
    return (x if channels == 3 else x.mean(1, keepdim=True)).contiguous()


def pictures(image, native: torch.Tensor, fast: torch.Tensor) -> dict[str, str | int]:
    """The photograph, both masks of labels [H, W] and where they differ, as data URLs; how many labels differ.

    A differing pixel is never lost in making the pictures small.
    """
    from PIL import Image

    small = image.resize((PICTURE, PICTURE), Image.Resampling.LANCZOS)
    differ = native != fast
    spots = F.adaptive_max_pool2d(differ.float()[None, None], PICTURE)[0, 0]
    gray = Image.fromarray((255 * spots).to(torch.uint8).numpy()).convert("1")
    return {
        "photograph": _data_url(small, "JPEG", quality=80),
        "native": _data_url(_mask(native), "PNG", optimize=True),
        "fastseg": _data_url(_mask(fast), "PNG", optimize=True),
        "difference": _data_url(gray, "PNG", optimize=True),
        "differing_labels": int(differ.sum()),
    }


def _mask(labels: torch.Tensor):
    """The labels in PASCAL VOC's colours."""
    from PIL import Image

    mask = Image.fromarray(labels.to(torch.uint8).numpy()).resize((PICTURE, PICTURE), Image.Resampling.NEAREST)
    mask.putpalette(palette.voc())
    return mask


def _data_url(image, kind: str, **options) -> str:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"
