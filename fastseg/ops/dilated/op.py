"""Registers `fastseg::dilated_conv2d` and its backward operator."""

from __future__ import annotations

from fastseg.ops.conv_operator import define_convolution
from fastseg.ops.dilated import reference


def _triton_forward(*args):
    from fastseg.ops.dilated import triton  # imported when first used: Triton may be absent

    return triton.forward(*args)


def _triton_backward(*args):
    from fastseg.ops.dilated import triton

    return triton.backward(*args)


define_convolution(
    "dilated_conv2d",
    {"reference": reference.forward, "triton": _triton_forward},
    {"reference": reference.backward, "triton": _triton_backward},
    scaled=True,
)
