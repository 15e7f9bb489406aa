"""Dense convolution in plain PyTorch: the truth that the kernels are compared with. Slow and obvious on purpose.

y[n, k, p, q] = bias[k] + scale[k] * sum over (c, r, s) of w[k, c, r, s] * x[n, c, p*stride - pad + r*dilation, ...]

A bias [N, K] is one of each image. Sums run in float64, are rounded once, and taps outside the image are skipped rather
than multiplied by zero.
"""

from __future__ import annotations

import torch

from fastseg.ops.activation import apply_activation
from fastseg.ops.geometry import empty_gradients, empty_output, output_size, tap_slices


def forward(input, weight, bias, stride, padding, dilation, activation, scale=None):
    x, w = input.double(), weight.double()
    size = output_size(input.shape[2:], weight.shape[2:], stride, padding, dilation)
    acc = x.new_zeros(input.shape[0], weight.shape[0], *size)
    for (r, s), outputs, inputs in tap_slices(input, weight, size, stride, padding, dilation):
        acc[outputs] += torch.einsum("kc,nchw->nkhw", w[:, :, r, s], x[inputs])
    if scale is not None:
        acc *= scale.double().view(-1, 1, 1)
    if bias is not None:
        acc += bias.double().view(-1, weight.shape[0], 1, 1)
    y = empty_output(input, weight, size)
    return y.copy_(apply_activation(acc, activation))


def backward(grad_output, input, weight, stride, padding, dilation, output_mask):
    gy, x, w = grad_output.double(), input.double(), weight.double()
    grad_x, grad_w = torch.zeros_like(x), torch.zeros_like(w)
    for (r, s), outputs, inputs in tap_slices(input, weight, grad_output.shape[2:], stride, padding, dilation):
        grad_x[inputs] += torch.einsum("kc,nkhw->nchw", w[:, :, r, s], gy[outputs])
        grad_w[:, :, r, s] = torch.einsum("nkhw,nchw->kc", gy[outputs], x[inputs])
    exact = (grad_x, grad_w, gy.sum((0, 2, 3)))
    grads = empty_gradients(input, weight, output_mask)
    return tuple(None if grad is None else grad.copy_(value) for grad, value in zip(grads, exact, strict=True))
