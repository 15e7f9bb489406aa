"""The branches of separable atrous spatial pyramid pooling in plain PyTorch: the truth.

The first weights without a depthwise filter are 1x1 convolutions of x; each of the others is the pointwise half of a
separable convolution at its dilation. y has all of them side by side:

z_b = depthwise_activation(depthwise_scale_b * depthwise_b(x) + depthwise_bias_b)        x itself in the first ones
y_b = activation(scale_b * sum over c of weights_b[k, c] * z_b[n, c, h, w] + bias_b[k])

All of it in float64, rounded once. Statistics as in fastseg/ops/aspp/reference.py.
"""

from __future__ import annotations

import torch

from fastseg.ops.activation import apply_activation
from fastseg.ops.aspp import reference as aspp
from fastseg.ops.depthwise import reference as depthwise
from fastseg.ops.geometry import empty_output, same_padding


def forward(
    input, depthwise_weights, weights, depthwise_bias, bias, dilations, depthwise_activation, activation, statistics,
    depthwise_scale, scale,
):  # fmt: skip
    x, channels = input.double(), input.shape[1]
    plain = len(weights) - len(depthwise_weights)
    branches = [x] * plain
    for b, (weight, dilation) in enumerate(zip(depthwise_weights, dilations, strict=True)):
        z = depthwise.forward(x, weight.double(), None, *same_padding(weight, dilation), "none")
        if depthwise_scale is not None:
            z *= depthwise_scale[b * channels : (b + 1) * channels].double().view(-1, 1, 1)
        if depthwise_bias is not None:
            z += depthwise_bias[b * channels : (b + 1) * channels].double().view(-1, 1, 1)
        branches.append(apply_activation(z, depthwise_activation))
    y = empty_output(input, weights[0], input.shape[2:], sum(weight.shape[0] for weight in weights))
    first, sums = 0, []
    for z, weight in zip(branches, weights, strict=True):
        part = slice(first, first + weight.shape[0])
        first = part.stop
        vectors = [None if vector is None else vector[part] for vector in (bias, scale)]
        y[:, part], part_sums = aspp.forward(
            z, [weight.double()], vectors[0], [1], activation, "concat", statistics, vectors[1]
        )
        sums.append(part_sums)
    return y, torch.cat(sums, -1)
