"""The head of PyTorch's own operators: the backend "native". Full-size logits exist in memory here."""

from __future__ import annotations

import torch.nn.functional as F


def upsample_bilinear2d(input, size, scale_factor, align_corners):
    return F.interpolate(input, size, scale_factor, mode="bilinear", align_corners=align_corners)


def argmax(logits, size, align_corners, dtype):
    return _scores(logits, size, align_corners).argmax(1).to(dtype)


def cross_entropy(logits, target, weight, ignore_index, reduction, label_smoothing, align_corners, resize=None):
    """`resize` replaces upsample_bilinear2d."""
    scores = _scores(logits, target.shape[-2:], align_corners, resize or upsample_bilinear2d)
    return F.cross_entropy(scores, target, weight, None, ignore_index, None, reduction, label_smoothing)


def _scores(logits, size, align_corners, resize=upsample_bilinear2d):
    """The resized logits; themselves where they have the size, as whoever uses PyTorch alone would write it."""
    if isinstance(size, tuple) and logits.dim() == 4 and logits.shape[-2:] == size:
        return logits
    return resize(logits, size, None, align_corners)
