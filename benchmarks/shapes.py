"""A labelled set of pictures, made from a seed: shapes to be told apart by their texture, which no colour gives away.

Every region, the background too, has two random colours, mixed by a pattern of random phase. So a pixel, and each pixel
of a patch, is distributed alike in every class; what differs is how neighbours go together, and no linear function of
colours sees that. Some shapes have the background's own pattern and count as background, so an outline says nothing.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

# Stripes within 25 degrees of lying and of upright, and checks turned likewise.
CLASSES = ("background", "lying stripes", "upright stripes", "checks")
# Red, green and blue of each class in pictures of labels.
COLOURS = ((32, 32, 40), (235, 95, 60), (245, 205, 70), (60, 150, 230))

SIDE = 2  # shapes a picture along each axis
BLOTCHED = 0.15  # the share of shapes that have the background's pattern
NOISE = 0.05  # standard deviation; colours are in 0 ... 1
AT_ONCE = 16  # pictures: few enough for a cache
PATCH = 7  # pixels along each side of what the larger linear classifier sees


def make(count: int, size: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images [count, 3, size, size] float32 in -1 ... 1 and noise, labels [count, size, size] uint8."""
    generator = torch.Generator().manual_seed(seed)
    parts = [_make(min(AT_ONCE, count - done), size, generator) for done in range(0, count, AT_ONCE)]
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
        u, v = _turned(x - column, y - row, uniform(0, 2 * math.pi))
        radius = uniform(0.32 * size / SIDE, 0.48 * size / SIDE)
        inside = _choose(integers(3), _outlines(u / radius, v / radius))
        label = torch.where(uniform(0, 1) < BLOTCHED, 0, 1 + integers(3))
        pattern = _choose(label, (_blotches(count, size, generator), *_textures(x, y, uniform)))
        images = torch.where(inside[:, None], _coloured(pattern, uniform), images)
        labels = torch.where(inside, label, labels)
    images = images + NOISE * torch.randn(images.shape, generator=generator)
    return 2 * images - 1, labels.to(torch.uint8)


def _turned(x, y, angle):
    return x * angle.cos() + y * angle.sin(), y * angle.cos() - x * angle.sin()


def _outlines(u, v):
    """Where points of a shape's own frame are inside a disc, a box and a triangle of the same area."""
    box = math.sqrt(math.pi) / 2
    inner = math.sqrt(math.pi / (3 * math.sqrt(3)))  # radius of the circle in a triangle with three equal sides
    triangle = torch.maximum(v, math.sqrt(0.75) * u.abs() - 0.5 * v) < inner
    return torch.hypot(u, v) < 1, torch.maximum(u.abs(), v.abs()) < box, triangle


def _textures(x, y, uniform):
    """Lying stripes, upright ones and checks, -1 on one half and 1 on the other, with smooth edges."""
    tilt = uniform(-1, 1) * math.radians(25)
    frequency = 2 * math.pi / uniform(6, 8)
    across, along = ((frequency * t + uniform(0, 2 * math.pi)).sin() for t in _turned(x, y, tilt))
    return tuple((3 * wave).clamp(-1, 1) for wave in (along, across, 1.7 * across * along))


def _blotches(count, size, generator):
    """The sign of smooth noise, with smooth edges."""
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


def confusion(predicted: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """[K, K] counts: pixels of each class, by what they were taken for."""
    k = len(CLASSES)
    return torch.bincount((k * labels.long() + predicted.long()).flatten(), minlength=k * k).view(k, k)


def iou(counts: torch.Tensor) -> torch.Tensor:
    """[K]: of each class, what is right over what belongs to it or was taken for it. The mean is the mIoU."""
    right = counts.diag()
    return right / (counts.sum(0) + counts.sum(1) - right).clamp_min(1)


def linear_miou(train, held_out, patch: int, pixels: int = 20_000) -> float:
    """Held-out mIoU of multinomial logistic regression on the colours of a patch around each pixel and its position.

    `train` and `held_out` are (images, labels) on a CPU. Of a fit to the pixels as they are, and one where all classes
    weigh the same, the better counts.
    """
    generator = torch.Generator().manual_seed(0)
    rows = [
        _some_rows(_features(images, patch), labels.flatten().long(), pixels * len(images) // len(train[0]), generator)
        for images, labels in zip(*(part.split(AT_ONCE) for part in train), strict=True)
    ]
    inputs, targets = (torch.cat(parts) for parts in zip(*rows, strict=True))
    shares = torch.bincount(targets, minlength=len(CLASSES)) / len(targets)
    found = []
    for weight in (None, 1 / shares.clamp_min(1 / len(targets))):
        model = _fitted(inputs, targets, weight)
        counts = sum(
            confusion(model(_features(images, patch)).argmax(1), labels.flatten())
            for images, labels in zip(*(part.split(AT_ONCE) for part in held_out), strict=True)
        )
        found.append(float(iou(counts).mean()))
    return max(found)


def _some_rows(inputs, targets, count, generator):
    chosen = torch.randperm(len(targets), generator=generator)[:count]
    return inputs[chosen], targets[chosen]


def _features(images, patch):
    """[N, 3, H, W] -> [N * H * W, 3 * patch * patch + 2]"""
    n, _, height, width = images.shape
    around = F.pad(images, [patch // 2] * 4, mode="reflect") if patch > 1 else images
    colours = F.unfold(around, patch).transpose(1, 2).flatten(0, 1)
    position = torch.cartesian_prod(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width))
    return torch.cat([colours, position.repeat(n, 1)], 1)


@torch.no_grad()
def _fitted(inputs, targets, weight):
    model = torch.nn.Linear(inputs.shape[1], len(CLASSES))
    model.weight.zero_()
    model.bias.zero_()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(inputs), targets, weight)
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return model
