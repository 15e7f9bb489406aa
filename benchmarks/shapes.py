"""A labelled set of pictures, made from a seed: textured shapes, told apart by texture and outline but not by colour.

Every region, the background too, has two random colours, mixed by a binary pattern at a random phase and angle. So
each pixel, and each pixel of a patch, is distributed alike in every class: what differs is how neighbours go together
(stripes or checks) and the outline around them (disc, box or triangle), which no linear function of colours sees.
Blotched shapes have the background's own pattern and count as background, so an outline alone is not enough either.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

OUTLINES = ("disc", "triangle")
TEXTURES = ("lying", "upright", "checked")
CLASSES = ("background", *TEXTURES)
# Red, green and blue of each class in pictures of labels.
COLOURS = ((32, 32, 40), (230, 75, 60), (245, 160, 40), (235, 220, 90), (60, 130, 230), (70, 190, 200), (150, 100, 220))

SIDE = 2  # shapes a picture along each axis
BLOTCHED = 0.15  # the share of shapes that are blotched
NOISE = 0.05  # standard deviation; colours are in 0 ... 1
AT_ONCE = 16  # pictures: few enough for a cache


def make(count: int, size: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images [count, 3, size, size] float32 in -1 ... 1 (or little more) and labels [count, size, size] uint8."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [min(AT_ONCE, count - done) for done in range(0, count, AT_ONCE)]
    parts = [_make(number, size, generator) for number in sizes]
    images, labels = zip(*parts, strict=True)
    return torch.cat(images), torch.cat(labels)


def _make(count, size, generator):
    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(count, *shape, 1, 1, generator=generator)

    def integers(high):
        return torch.randint(high, (count, 1, 1), generator=generator)

    y, x = torch.meshgrid(*[torch.arange(size) + 0.5] * 2, indexing="ij")
    images = _coloured(_blotches(count, size, generator), uniform)
    labels = torch.zeros(count, size, size, dtype=torch.int64)
    for cell in range(SIDE**2):
        # Somewhere in its cell of the picture, so that shapes cover each other and leave the picture a little.
        row, column = (size * (k + uniform(0.3, 0.7)) / SIDE for k in divmod(cell, SIDE))
        radius, angle = uniform(0.32 * size / SIDE, 0.48 * size / SIDE), uniform(0, 2 * math.pi)
        u, v = _turned(x - column, y - row, angle)
        outline = integers(len(OUTLINES))
        inside = _choose(outline, _outlines(u / radius, v / radius))
        texture = integers(len(TEXTURES))
        tilt = uniform(-0.14 * math.pi, 0.14 * math.pi)
        stripes, checks = _patterns(*_turned(x, y, tilt + math.pi / 2 * (texture == 0)), uniform)
        blotched = uniform(0, 1) < BLOTCHED
        pattern = torch.where(blotched, _blotches(count, size, generator), torch.where(texture == 2, checks, stripes))
        images = torch.where(inside[:, None], _coloured(pattern, uniform), images)
        labels = torch.where(inside, torch.where(blotched, 0, 1 + texture), labels)
    images = images + NOISE * torch.randn(images.shape, generator=generator)
    return 2 * images - 1, labels.to(torch.uint8)


def _turned(x, y, angle):
    return x * angle.cos() + y * angle.sin(), y * angle.cos() - x * angle.sin()


def _outlines(u, v):
    """Where points of a shape's own frame are inside, for each outline; all have the disc's area."""
    inner = math.sqrt(math.pi / (3 * math.sqrt(3)))  # radius of the circle in a triangle with three equal sides
    triangle = torch.maximum(v, math.sqrt(0.75) * u.abs() - 0.5 * v) < inner
    return torch.hypot(u, v) < 1, triangle


def _patterns(u, v, uniform):
    """Stripes and checks of the same period, each -1 on one half and 1 on the other; the edges are smooth."""
    frequency, phase_u, phase_v = 2 * math.pi / uniform(6, 8), uniform(0, 2 * math.pi), uniform(0, 2 * math.pi)
    wave_u, wave_v = (frequency * u + phase_u).sin(), (frequency * v + phase_v).sin()
    return (3 * wave_u).clamp(-1, 1), (5 * wave_u * wave_v).clamp(-1, 1)


def _blotches(count, size, generator):
    """The sign of smooth noise, its edges softened."""
    noise = torch.randn(count, 1, size // 3 + 2, size // 3 + 2, generator=generator)
    return (3 * F.interpolate(noise, (size, size), mode="bicubic")[:, 0]).clamp(-1, 1)


def _coloured(pattern, uniform):
    """[N, H, W] in -1 ... 1 -> [N, 3, H, W], from one random colour to another."""
    one = uniform(0, 1, 3)
    other = (one + uniform(0.3, 0.7, 3)) % 1  # distributed as `one` is, and far from it
    return one + (other - one) * (pattern[:, None] + 1) / 2


def _choose(index, options):
    """Of [N, H, W] each, the option that index [N, 1, 1] names."""
    return torch.stack(options).gather(0, index.expand(options[0].shape)[None])[0]
