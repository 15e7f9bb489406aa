"""Colours and names of classes in pictures of labels."""

from __future__ import annotations

VOC_CLASSES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "dining table",
    "dog", "horse", "motorbike", "person", "potted plant", "sheep", "sofa", "train", "tv monitor",
)  # fmt: skip


def voc() -> list[int]:
    """PASCAL VOC's colours of the labels 0 to 255: 768 numbers, red, green and blue of each, as PIL's putpalette takes.

    Example:
        >>> from fastseg import palette
        >>> palette.voc()[3 * 15 : 3 * 16]  # a person
        [192, 128, 128]
    """
    colours = []
    for label in range(256):
        # The label's bits, three at a time, are spread over red, green and blue from the highest bit down.
        colours += [sum((label >> (3 * bit + channel) & 1) << (7 - bit) for bit in range(3)) for channel in range(3)]
    return colours


PALETTES = {"voc": voc}
