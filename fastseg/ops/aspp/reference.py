"""The branches of atrous spatial pyramid pooling in plain PyTorch: the truth that the kernels are compared with.

z_b = scale_b * (sum over c, r, s of weights_b[k, c, r, s] * x[n, c, p + (r - R // 2) * d_b, ...]) + bias_b
reduction "concat": y = activation(z_0, z_1, ... side by side)        "sum": y = activation(z_0 + z_1 + ...)

All of it in float64, rounded once. The statistics are the sum and the sum of squares of y before the activation, in
float64, of each channel over images and pixels.
"""

from __future__ import annotations

import torch

from fastseg.ops.activation import apply_activation
from fastseg.ops.dilated import reference as dilated
from fastseg.ops.geometry import empty_output, same_padding


def forward(input, weights, bias, dilations, activation, reduction, statistics, scale):
    x = input.double()
    branches = [
        dilated.forward(x, weight.double(), None, *same_padding(weight, dilation), "none")
        for weight, dilation in zip(weights, dilations, strict=True)
    ]
    z = torch.cat(branches, 1) if reduction == "concat" else sum(branches)
    if scale is not None:
        z *= scale.double().view(-1, 1, 1)
    if bias is not None:
        z += bias.double().view(-1, 1, 1)
    y = empty_output(input, weights[0], input.shape[2:], z.shape[1]).copy_(apply_activation(z, activation))
    sums = torch.stack((z.sum((0, 2, 3)), z.square().sum((0, 2, 3)))) if statistics else z.new_empty(0)
    return y, sums


def backward(grad_output, input, weights, dilations, reduction, needs_input, needs_weights):
    """The gradients of input (or an empty tensor) and of the weights (or no tensors)."""
    gy, x = grad_output.double(), input.double()
    grad_x, grad_weights, first = torch.zeros_like(x), [], 0
    for weight, dilation in zip(weights, dilations, strict=True):
        grad = gy[:, first : first + weight.shape[0]]
        first += weight.shape[0] if reduction == "concat" else 0
        grads = dilated.backward(grad, x, weight.double(), *same_padding(weight, dilation), (True, True, False))
        grad_x += grads[0]
        grad_weights.append(torch.empty_like(weight).copy_(grads[1]))
    if needs_input:
        grad_input = empty_output(input, weights[0], input.shape[2:], input.shape[1]).copy_(grad_x)
    else:
        grad_input = input.new_empty(0)
    return grad_input, grad_weights if needs_weights else []
