"""Conv2d on fastseg's operators."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fastseg import ops


class Conv2d(torch.nn.Conv2d):
    """torch.nn.Conv2d that runs on `fastseg.ops.conv2d`: same arguments, parameters and state-dict keys.

    Args:
        As torch.nn.Conv2d, and by keyword:
        activation: "none", "relu", "relu6", "hardswish" or "silu", applied to the output.
        backend: as in `fastseg.ops.conv2d`; None takes the surrounding choice.

    Shapes, dtypes, errors and promises: see `fastseg.ops.conv2d`. `padding_mode` other than "zeros" pads the input first,
    as torch.nn.Conv2d does.

    Example:
        >>> import torch, fastseg
        >>> layer = fastseg.nn.Conv2d(16, 16, 3, padding=2, dilation=2, groups=16, activation="relu")
        >>> layer(torch.randn(1, 16, 20, 20)).shape
        torch.Size([1, 16, 20, 20])
    """

    def __init__(self, *args, activation: str = "none", backend: str | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.activation = activation
        self.backend = backend

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self._convolve(input, self.weight, self.bias, self.activation, self.backend)

    def _convolve(self, input, weight, bias, activation, backend):
        padding = self.padding
        if self.padding_mode != "zeros":
            input = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = 0
        return ops.conv2d(
            input, weight, bias, self.stride, padding, self.dilation, self.groups, activation=activation, backend=backend
        )

    def extra_repr(self) -> str:
        extra = super().extra_repr()
        if self.activation != "none":
            extra += f", activation={self.activation}"
        return extra if self.backend is None else f"{extra}, backend={self.backend}"
