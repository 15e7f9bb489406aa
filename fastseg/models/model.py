"""What every reference model offers: logits, loss and labels."""

from __future__ import annotations

import torch
from torch import nn

from fastseg import ops
from fastseg.models.layers import Resize


class SegmentationModel(nn.Module):
    """A network from images to a class for each pixel; the base of `fastseg.models`.

    Calling it gives logits of the images' size. `loss` and `predict` work on the logits of the network's own resolution
    and never have the others in memory.

    Subclasses define `logits`, and call modules alone there: convolutions and their norms belong into submodules, where
    `fastseg.accelerate` folds them whichever method is called.

    Attributes:
        num_classes: K, how many classes there are.
        layers: "fastseg" or "native", as the model was built; `loss` and `predict` follow it.
        resize: from the logits' own size to the images'.
    """

    def __init__(self, num_classes: int, layers: str, align_corners: bool = False):
        super().__init__()
        self.num_classes = num_classes
        self.layers = layers
        self.resize = Resize(align_corners)

    def logits(self, images: torch.Tensor) -> torch.Tensor:
        """[N, C, H, W] -> [N, K, h, w], at the network's own resolution."""
        raise NotImplementedError

    def training_logits(self, images: torch.Tensor) -> list[tuple[torch.Tensor, float]]:
        """Everything that `loss` looks at, at its own resolution, with the weight of each in the loss."""
        return [(self.logits(images), 1.0)]

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """[N, C, H, W] -> logits [N, K, H, W]."""
        return self.resize(self.logits(images), images.shape[-2:])

    def loss(
        self, images: torch.Tensor, targets: torch.Tensor, *, weight: torch.Tensor | None = None,
        ignore_index: int = -100, label_smoothing: float = 0.0,
    ) -> torch.Tensor:  # fmt: skip
        """The mean cross entropy of the logits at the targets' resolution; see `fastseg.ops.upsample_cross_entropy`.

        Args:
            images: [N, C, H, W] float.
            targets: [N, H, W] int64 class indices.
            weight: [K], what a pixel of each class counts; or None.
            ignore_index: the target of pixels that count nothing.
            label_smoothing: in [0, 1].

        Returns a scalar, the sum of the weighted losses where the model has several outputs.
        """
        return sum(
            share * ops.upsample_cross_entropy(
                logits, targets, weight, ignore_index, "mean", label_smoothing,
                align_corners=self.resize.align_corners, backend=self._head_backend(),
            )
            for logits, share in self.training_logits(images)
        )  # fmt: skip

    @torch.no_grad()
    def predict(self, images: torch.Tensor, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        """The labels [N, H, W] of images [N, C, H, W], in eval mode whatever the mode is, as int64 or uint8."""
        modes = {module: module.training for module in self.modules()}
        self.eval()
        try:
            logits = self.logits(images)
        finally:
            for module, mode in modes.items():
                module.training = mode
        return self._labels(logits, images, dtype)

    def _labels(self, logits, images, dtype) -> torch.Tensor:
        return ops.upsample_argmax(
            logits, images.shape[-2:], align_corners=self.resize.align_corners, dtype=dtype,
            backend=self._head_backend(),
        )  # fmt: skip

    def _head_backend(self) -> str | None:
        return "native" if self.layers == "native" else None
