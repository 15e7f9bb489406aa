"""SeparableConv2d: a depthwise convolution and a pointwise one as one layer, on one operator."""

from __future__ import annotations

import functools

import torch

from fastseg.nn.pyramid import Link, run_separable
from fastseg.ops.activation import apply_activation, check_activation


class _ActivationModule:
    """The module for an activation's name, in a list: empty for "none"."""

    def __init__(self, name: str, kind: type | None):
        self.name, self.kind = name, kind

    def __call__(self) -> list[torch.nn.Module]:
        return [] if self.kind is None else [self.kind()]

    def function(self, z):
        return apply_activation(z, self.name)


ACTIVATION_MODULES = {
    name: _ActivationModule(name, kind)
    for name, kind in {
        "none": None,
        "relu": torch.nn.ReLU,
        "relu6": torch.nn.ReLU6,
        "hardswish": torch.nn.Hardswish,
        "silu": torch.nn.SiLU,
    }.items()
}


def batch_norm(norm: str | None, channels: int) -> list[torch.nn.Module]:
    """The norm's module in a list, which is empty for None."""
    return [] if norm is None else [torch.nn.BatchNorm2d(channels)]


class SeparableConv2d(torch.nn.Sequential):
    """Depthwise convolution (norm, activation), then a 1x1 convolution, in one operator where that is right.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, bias: as torch.nn.Conv2d; the bias is the
            1x1 convolution's.
        multiplier: depthwise filters for each input channel.
        depthwise_norm: "batch" or None, between the two; without a norm the depthwise convolution has a bias only when
            `depthwise_bias` says so.
        depthwise_bias: see there.
        depthwise_activation: "none", "relu", "relu6", "hardswish" or "silu", behind the norm.
        backend: as in `fastseg.ops.separable_conv2d`; None takes the surrounding choice.

    A torch.nn.Sequential of its parts: without norm and activation keys are "0.weight" and "1.weight", as in
    segmentation_models_pytorch. In training a norm between the two needs the statistics of the whole batch, so that
    the parts run one by one; in eval mode the norm is folded.

    Example:
        >>> import torch, fastseg
        >>> layer = fastseg.nn.SeparableConv2d(16, 32, 3, padding=2, dilation=2, depthwise_activation="relu")
        >>> layer(torch.randn(1, 16, 20, 20)).shape
        torch.Size([1, 32, 20, 20])
    """

    def __init__(
        self, in_channels, out_channels, kernel_size, stride=1, padding=0, dilation=1, bias: bool = True, *,
        multiplier: int = 1, depthwise_norm: str | None = None, depthwise_bias: bool = False,
        depthwise_activation: str = "none", backend: str | None = None,
    ):  # fmt: skip
        check_activation(depthwise_activation)
        if depthwise_norm not in ("batch", None):
            raise ValueError(f"expected depthwise_norm to be 'batch' or None, but got {depthwise_norm!r}")
        middle = in_channels * multiplier
        super().__init__(
            torch.nn.Conv2d(
                in_channels, middle, kernel_size, stride, padding, dilation, groups=in_channels, bias=depthwise_bias
            ),
            *batch_norm(depthwise_norm, middle),
            *ACTIVATION_MODULES[depthwise_activation](),
            torch.nn.Conv2d(middle, out_channels, 1, bias=bias),
        )
        self.backend = backend

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        apart = functools.partial(super().forward, input)
        if torch.compiler.is_compiling():
            return apart()
        y = run_separable(*Link.chain(self), input, self.backend, apart)
        return apart() if y is None else y
