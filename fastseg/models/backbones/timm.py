"""Backbones of timm, an optional package with several hundred of them."""

from __future__ import annotations

import torch
from torch import nn


class TimmBackbone(nn.Module):
    """A backbone that timm builds, with `features_only=True` and random weights.

    Args:
        name: as in `timm.list_models()`.
        output_stride: of the last features; where it is less than the network's own, timm has to know how to dilate it.
        in_channels: of the images.
        options: more arguments of `timm.create_model`.

    Shapes: [N, in_channels, H, W] -> features [N, channels[i], ~H / strides[i], ~W / strides[i]], all that timm gives.

    Raises:
        ImportError: timm is not installed.
        ValueError: timm does not know the name, gives no features of it, or not at this output stride.

    Example:
        >>> from fastseg.models.backbones.timm import TimmBackbone  # doctest: +SKIP
        >>> TimmBackbone("resnet18", output_stride=16).strides      # doctest: +SKIP
        (2, 4, 8, 16, 16)
    """

    def __init__(self, name: str, output_stride: int = 32, *, in_channels: int = 3, **options):
        super().__init__()
        self.name = name
        try:
            import timm
        except ImportError as error:
            raise ImportError(
                f"encoder 'timm:{name}' needs the package timm: pip install 'fastseg-kernels[timm]'"
            ) from error
        if not timm.is_model(name):
            raise ValueError(f"expected a name of timm.list_models(), but got {name!r}")
        if output_stride != 32:
            options["output_stride"] = output_stride
        try:
            self.model = timm.create_model(name, features_only=True, in_chans=in_channels, **options)
        except Exception as error:  # of whatever type its many constructors raise
            reason = str(error) or type(error).__name__
            raise ValueError(
                f"timm gives no features of {name!r} at output stride {output_stride}: {reason}"
            ) from error
        info = self.model.feature_info
        self.channels: tuple[int, ...] = tuple(info.channels())
        self.strides: tuple[int, ...] = tuple(info.reduction())
        if self.strides[-1] != output_stride:
            raise ValueError(
                f"expected output stride {self.strides[-1]}, which is all that timm has of {name!r}, "
                f"but got {output_stride}"
            )
        self.channels_last = getattr(self.model, "output_fmt", "NCHW") == "NHWC"

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        features = self.model(images)
        return [y.permute(0, 3, 1, 2) for y in features] if self.channels_last else list(features)
