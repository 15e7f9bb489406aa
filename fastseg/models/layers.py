"""What the reference models are built of: plain torch.nn, which `layers="fastseg"` then runs through `accelerate`.

There is one definition of every model, so that both kinds of layers have the same parameters under the same names, and
come out of the same random numbers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

import fastseg.nn
from fastseg.accelerate import accelerate
from fastseg.nn.separable import ACTIVATION_MODULES

LAYERS = ("fastseg", "native")


def finish(model: nn.Module, layers: str) -> nn.Module:
    """`model` on the layers asked for: "native" as it is, "fastseg" accelerated."""
    check_choice("layers", layers, LAYERS)
    return accelerate(model) if layers == "fastseg" else model


def check_choice(what: str, value, allowed: Sequence) -> None:
    if value not in allowed:
        raise ValueError(f"expected {what} to be one of {', '.join(map(repr, allowed))}, but got {value!r}")


def conv_norm_act(
    in_channels: int, out_channels: int, kernel_size: int = 3, stride: int = 1, dilation: int = 1, *, groups: int = 1,
    activation: str = "relu", eps: float = 1e-5,
) -> list[nn.Module]:  # fmt: skip
    """Convolution without bias that keeps the size (at stride 1), BN, activation: modules of a Sequential."""
    padding = dilation * (kernel_size - 1) // 2
    return [
        nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias=False),
        nn.BatchNorm2d(out_channels, eps=eps),
        *ACTIVATION_MODULES[activation](),
    ]


def separable_norm_act(
    in_channels: int, out_channels: int, stride: int = 1, dilation: int = 1, *, between: str | None = "relu",
    activation: str = "relu", eps: float = 1e-5,
) -> list[nn.Module]:  # fmt: skip
    """A depthwise 3x3 and a pointwise convolution, BN and activation behind each: modules of a Sequential.

    `between` is the activation behind the depthwise BN; None leaves that BN out as well.
    """
    depthwise = conv_norm_act(
        in_channels, in_channels, 3, stride, dilation, groups=in_channels, activation=between or "none", eps=eps
    )
    return [
        *(depthwise[:1] if between is None else depthwise),
        *conv_norm_act(in_channels, out_channels, 1, activation=activation, eps=eps),
    ]


class ASPP(fastseg.nn.ASPP):
    """fastseg.nn.ASPP whose forward runs module by module."""

    forward = fastseg.nn.ASPP.module_by_module


class SeparableASPP(fastseg.nn.SeparableASPP):
    """fastseg.nn.SeparableASPP whose forward runs module by module."""

    forward = fastseg.nn.SeparableASPP.module_by_module


class Resize(nn.Module):
    """Bilinear resize to a size given in the call.

    Args:
        align_corners: as in torch.nn.functional.interpolate.
    """

    def __init__(self, align_corners: bool = False):
        super().__init__()
        self.align_corners = align_corners

    def forward(self, x: torch.Tensor, size: Sequence[int]) -> torch.Tensor:  # [N, C, h, w] -> [N, C, *size]
        return F.interpolate(x, size, mode="bilinear", align_corners=self.align_corners)

    def extra_repr(self) -> str:
        return f"align_corners={self.align_corners}"
