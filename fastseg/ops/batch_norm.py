"""Batch norm in eval mode behind a convolution: `fastseg::fold_batch_norm`, `batch_norm_activation_`, `folded_conv2d`.

Internal, without gradients. C++ registers kernels for CPU tensors; the functions here are for all others, and the
reference. folded_conv2d is for CPU tensors alone: everything in one call. The norm follows the convolution's bias, so
it is y * scale + shift with

    scale = gamma / sqrt(variance + eps)        shift = beta + (bias - mean) * scale
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fastseg.ops.library import LIBRARY

_STATISTICS = "Tensor? bias, Tensor mean, Tensor variance, Tensor? gamma, Tensor? beta, float eps"

# Written over their argument.
INPLACE_ACTIVATIONS = {
    "none": lambda y: y,
    "relu": torch.relu_,
    "relu6": lambda y: F.hardtanh_(y, 0.0, 6.0),
    "hardswish": lambda y: F.hardswish(y, inplace=True),
    "silu": lambda y: F.silu(y, inplace=True),
}


def scale_and_shift(bias, mean, variance, gamma, beta, eps):
    """The norm behind a convolution's bias as two factors [K], at least float32."""
    mean = _at_least_float(mean)
    scale = torch.rsqrt(_at_least_float(variance) + eps)
    if gamma is not None:
        scale = scale * gamma
    if bias is not None:
        mean = mean - bias
    if beta is None:
        return scale, -mean * scale
    return scale, torch.addcmul(_at_least_float(beta), mean, scale, value=-1)


def _at_least_float(t: torch.Tensor) -> torch.Tensor:
    return t.float() if t.dtype in (torch.float16, torch.bfloat16) else t


def _fold(weight, bias, mean, variance, gamma, beta, eps):
    scale, shift = scale_and_shift(bias, mean, variance, gamma, beta, eps)
    return (weight * scale.view(-1, 1, 1, 1)).to(weight.dtype), shift.to(weight.dtype)


def _apply_(y, bias, mean, variance, gamma, beta, eps, activation):
    scale, shift = scale_and_shift(bias, mean, variance, gamma, beta, eps)
    torch.addcmul(shift.view(-1, 1, 1), y, scale.view(-1, 1, 1), out=y)
    return INPLACE_ACTIVATIONS[activation](y)


LIBRARY.define(f"fold_batch_norm(Tensor weight, {_STATISTICS}) -> (Tensor, Tensor)")
LIBRARY.define(f"batch_norm_activation_(Tensor(a!) y, {_STATISTICS}, str activation) -> Tensor(a!)")
LIBRARY.define(
    f"folded_conv2d(Tensor input, Tensor weight, {_STATISTICS}, int[] stride, int[] padding, int[] dilation,"
    " int groups, str activation, bool scale_weight, str backend) -> Tensor"
)
LIBRARY.impl("fold_batch_norm", _fold, "CompositeExplicitAutograd")
LIBRARY.impl("batch_norm_activation_", _apply_, "CompositeExplicitAutograd")

# weight [K, C / groups, R, S] -> (weight * scale, shift [K]), both in the weight's dtype.
fold_batch_norm = torch.ops.fastseg.fold_batch_norm.default
# y [N, K, P, Q], contiguous or channels_last -> activation(y * scale + shift), rounded once, written over y.
batch_norm_activation_ = torch.ops.fastseg.batch_norm_activation_.default
# input [N, C, H, W] -> [N, K, P, Q]; padding is (height, width). See folded in fastseg/nn/conv.py.
folded_conv2d = torch.ops.fastseg.folded_conv2d.default
