"""Registers `fastseg::separable_conv2d`.

Its gradient has no operator of its own: the depthwise result is computed again instead of being stored, and from there
it is the pointwise convolution's backward pass, then the depthwise one's. Both can be differentiated once more.
"""

from __future__ import annotations

from fastseg.ops.activation import activation_backward, needs_preactivation
from fastseg.ops.geometry import POINTWISE, empty_output, output_size
from fastseg.ops.library import OVERLOADS, define
from fastseg.ops.separable import reference

_SCHEMA = (
    "(Tensor input, Tensor depthwise_weight, Tensor pointwise_weight, Tensor? depthwise_bias, Tensor? bias,"
    " int[] stride, int[] padding, int[] dilation, str depthwise_activation, str activation,"
    " Tensor? depthwise_scale=None, Tensor? scale=None) -> Tensor"
)


def _fake(input, depthwise_weight, pointwise_weight, depthwise_bias, bias, stride, padding, dilation, *_):
    size = output_size(input.shape[2:], depthwise_weight.shape[2:], stride, padding, dilation)
    return empty_output(input, depthwise_weight, size, pointwise_weight.shape[0])


def _setup(ctx, inputs, output):
    (
        input, depthwise_weight, pointwise_weight, depthwise_bias, bias, *ctx.geometry,
        ctx.depthwise_activation, ctx.activation, depthwise_scale, scale,
    ) = inputs  # fmt: skip
    if depthwise_scale is not None or scale is not None:
        raise NotImplementedError("fastseg: a convolution with scale has no gradient: call it without gradients")
    value = None
    if needs_preactivation(ctx.activation):
        value = bias
    elif ctx.activation != "none":
        value = output
    ctx.save_for_backward(input, depthwise_weight, pointwise_weight, depthwise_bias, value)


def gradients(
    backend, grad, input, depthwise_weight, depthwise_bias, pointwise_weight, geometry, depthwise_activation, needed
):
    """The gradients of the operator's five tensors, from that of the pointwise convolution's result.

    `needed` says which, in the operator's order; the others are None.
    """
    needs_input, needs_depthwise, needs_pointwise, needs_depthwise_bias, needs_bias = needed[:5]
    needs_z = needs_input or needs_depthwise or needs_depthwise_bias
    depthwise = OVERLOADS["depthwise_conv2d"][backend]
    operands = (input, depthwise_weight, depthwise_bias, *geometry)

    z = depthwise(*operands, depthwise_activation)
    grad_z, grad_pointwise, grad_bias = OVERLOADS["dilated_conv2d_backward"][backend](
        grad, z, pointwise_weight, *POINTWISE, [needs_z, needs_pointwise, needs_bias]
    )
    if not needs_z:
        return None, None, grad_pointwise, None, grad_bias
    if needs_preactivation(depthwise_activation):
        z = depthwise(*operands, "none")
    grad_z = activation_backward(grad_z, z, depthwise_activation)
    grad_input, grad_depthwise, grad_depthwise_bias = OVERLOADS["depthwise_conv2d_backward"][backend](
        grad_z, input, depthwise_weight, *geometry, [needs_input, needs_depthwise, needs_depthwise_bias]
    )
    return grad_input, grad_depthwise, grad_pointwise, grad_depthwise_bias, grad_bias


def _backward(backend: str):
    def backward(ctx, grad_output):
        input, depthwise_weight, pointwise_weight, depthwise_bias, value = ctx.saved_tensors
        if needs_preactivation(ctx.activation):
            z = OVERLOADS["depthwise_conv2d"][backend](
                input, depthwise_weight, depthwise_bias, *ctx.geometry, ctx.depthwise_activation
            )
            value = OVERLOADS["dilated_conv2d"][backend](z, pointwise_weight, value, *POINTWISE, "none")
        grad = activation_backward(grad_output, value, ctx.activation)
        filters = (depthwise_weight, depthwise_bias, pointwise_weight)
        grads = gradients(backend, grad, input, *filters, ctx.geometry, ctx.depthwise_activation, ctx.needs_input_grad)
        return *grads, *(None,) * 7

    return backward


def _triton(*args):
    from fastseg.ops.separable import triton  # imported when first used: Triton may be absent

    return triton.forward(*args)


define(
    "separable_conv2d",
    _SCHEMA,
    fake=_fake,
    setup_context=_setup,
    backward=_backward,
    python_kernels={"reference": reference.forward, "triton": _triton},
    autocast=True,
)
