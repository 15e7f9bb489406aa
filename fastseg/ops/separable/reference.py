"""Depthwise-separable convolution in plain PyTorch: the truth that the kernels are compared with.

z = depthwise_activation(depthwise_scale * depthwise(x) + depthwise_bias)        [N, C * m, P, Q]
y = activation(scale * sum over c of pointwise_weight[k, c] * z[n, c, p, q] + bias[k])

All of it in float64, rounded once.
"""

from __future__ import annotations

from fastseg.ops.activation import apply_activation
from fastseg.ops.depthwise import reference as depthwise
from fastseg.ops.dilated import reference as dilated
from fastseg.ops.geometry import POINTWISE, empty_output


def forward(
    input, depthwise_weight, pointwise_weight, depthwise_bias, bias, stride, padding, dilation,
    depthwise_activation, activation, depthwise_scale=None, scale=None,
):  # fmt: skip
    geometry = (stride, padding, dilation)
    z = depthwise.forward(input.double(), depthwise_weight.double(), None, *geometry, "none")
    if depthwise_scale is not None:
        z *= depthwise_scale.double().view(-1, 1, 1)
    if depthwise_bias is not None:
        z += depthwise_bias.double().view(-1, 1, 1)
    z = apply_activation(z, depthwise_activation)
    exact = dilated.forward(z, pointwise_weight.double(), bias, *POINTWISE, activation, scale)
    y = empty_output(input, depthwise_weight, exact.shape[2:], pointwise_weight.shape[0])
    return y.copy_(exact)
