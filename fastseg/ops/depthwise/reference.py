"""Depthwise convolution in plain PyTorch: the truth that the kernels are compared with. Slow and obvious on purpose.

y[n, k, p, q] = bias[k] + sum over (r, s) of weight[k, 0, r, s] * x[n, k // m, p*stride - pad + r*dilation, ...]

Sums run in float64, are rounded once, and taps outside the image are skipped rather than multiplied by zero.
"""

from __future__ import annotations

import torch

from fastseg.ops.activation import apply_activation
from fastseg.ops.geometry import empty_gradients, empty_output, output_size, tap_slices


def forward(input, weight, bias, stride, padding, dilation, activation):
    x, w = input.double(), weight.double()
    multiplier = weight.shape[0] // input.shape[1]
    x = x.repeat_interleave(multiplier, dim=1)
    size = output_size(input.shape[2:], weight.shape[2:], stride, padding, dilation)
    acc = x.new_zeros(input.shape[0], weight.shape[0], *size)
    for (r, s), outputs, inputs in tap_slices(input, weight, size, stride, padding, dilation):
        acc[outputs] += w[:, :, r, s].unsqueeze(-1) * x[inputs]
    if bias is not None:
        acc += bias.double().view(-1, 1, 1)
    y = empty_output(input, weight, size)
    return y.copy_(apply_activation(acc, activation))


def backward(grad_output, input, weight, stride, padding, dilation, output_mask):
    gy, x, w = grad_output.double(), input.double(), weight.double()
    channels = input.shape[1]
    multiplier = weight.shape[0] // channels
    x = x.repeat_interleave(multiplier, dim=1)
    grad_x, grad_w = torch.zeros_like(x), torch.zeros_like(w)
    for (r, s), outputs, inputs in tap_slices(input, weight, grad_output.shape[2:], stride, padding, dilation):
        grad_x[inputs] += w[:, :, r, s].unsqueeze(-1) * gy[outputs]
        grad_w[:, 0, r, s] = (x[inputs] * gy[outputs]).sum((0, 2, 3))
    grad_x = grad_x.unflatten(1, (channels, multiplier)).sum(2)
    exact = (grad_x, grad_w, gy.sum((0, 2, 3)))
    grads = empty_gradients(input, weight, output_mask)
    return tuple(None if grad is None else grad.copy_(value) for grad, value in zip(grads, exact, strict=True))
