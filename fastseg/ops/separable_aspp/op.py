"""Registers `fastseg::separable_aspp_branches`: parallel separable convolutions of one image.

As in fastseg/ops/separable/op.py the gradient computes the depthwise results again, one branch after the other, so
that only one of them exists at a time.
"""

from __future__ import annotations

import torch

from fastseg.ops.activation import activation_backward, needs_preactivation
from fastseg.ops.geometry import POINTWISE, empty_output, same_padding
from fastseg.ops.library import OVERLOADS, define
from fastseg.ops.separable.op import gradients
from fastseg.ops.separable_aspp import reference

_SCHEMA = (
    "(Tensor input, Tensor[] depthwise_weights, Tensor[] weights, Tensor? depthwise_bias, Tensor? bias,"
    " int[] dilations, str depthwise_activation, str activation, bool statistics, Tensor? depthwise_scale,"
    " Tensor? scale) -> (Tensor, Tensor)"
)


def _fake(input, depthwise_weights, weights, depthwise_bias, bias, dilations, _, __, statistics, *scales):
    channels = sum(weight.shape[0] for weight in weights)
    y = empty_output(input, weights[0], input.shape[2:], channels)
    return y, input.new_empty((2, channels) if statistics else (0,), dtype=torch.float64)


def _setup(ctx, inputs, output):
    (
        input, depthwise_weights, weights, depthwise_bias, bias, ctx.dilations,
        ctx.depthwise_activation, ctx.activation, _, *scales,
    ) = inputs  # fmt: skip
    if any(scale is not None for scale in scales):
        raise NotImplementedError("fastseg: a convolution with scale has no gradient: call it without gradients")
    ctx.branches = len(depthwise_weights), len(weights)
    value = None
    if needs_preactivation(ctx.activation):
        value = bias
    elif ctx.activation != "none":
        value = output[0]
    ctx.save_for_backward(input, depthwise_bias, value, *depthwise_weights, *weights)


def _backward(backend: str):
    def backward(ctx, grad_output, _):
        input, depthwise_bias, value, *filters = ctx.saved_tensors
        depthwise_weights, weights = filters[: ctx.branches[0]], filters[ctx.branches[0] :]
        needs_input, needs_depthwise, needs_weights, needs_depthwise_bias, needs_bias = ctx.needs_input_grad[:5]
        if needs_preactivation(ctx.activation):
            value, _ = OVERLOADS["separable_aspp_branches"][backend](
                input, depthwise_weights, weights, depthwise_bias, value, ctx.dilations, ctx.depthwise_activation,
                "none", False, None, None,
            )  # fmt: skip
        grad = activation_backward(grad_output, value, ctx.activation)
        channels, plain = input.shape[1], len(weights) - len(depthwise_weights)
        grad_input, grad_depthwise, grad_weights, grad_depthwise_biases = None, [], [], []
        parts = grad.split([weight.shape[0] for weight in weights], 1)
        for part, weight, needs_weight in zip(parts[:plain], weights[:plain], needs_weights[:plain], strict=True):
            grad_x, grad_weight, _ = OVERLOADS["dilated_conv2d_backward"][backend](
                part, input, weight, *POINTWISE, [needs_input, needs_weight, False]
            )
            grad_input = _sum(grad_input, grad_x)
            grad_weights.append(grad_weight)
        for b, (part, depthwise_weight, weight) in enumerate(
            zip(parts[plain:], depthwise_weights, weights[plain:], strict=True)
        ):
            depthwise_vector = None if depthwise_bias is None else depthwise_bias.narrow(0, b * channels, channels)
            needed = (needs_input, needs_depthwise[b], needs_weights[plain + b], needs_depthwise_bias, False)
            grad_x, *grads, _ = gradients(
                backend, part, input, depthwise_weight, depthwise_vector, weight,
                same_padding(depthwise_weight, ctx.dilations[b]), ctx.depthwise_activation, needed,
            )  # fmt: skip
            grad_input = _sum(grad_input, grad_x)
            for found, one in zip((grad_depthwise, grad_weights, grad_depthwise_biases), grads, strict=True):
                found.append(one)
        return (
            grad_input,
            grad_depthwise,
            grad_weights,
            torch.cat(grad_depthwise_biases) if needs_depthwise_bias else None,
            grad.sum((0, 2, 3)) if needs_bias else None,
            *(None,) * 6,
        )

    return backward


def _sum(total, grad):
    if total is None or grad is None:
        return grad
    return total + grad if torch.is_grad_enabled() else total.add_(grad)


def _triton(*args):
    from fastseg.ops.separable_aspp import triton  # imported when first used: Triton may be absent

    return triton.forward(*args)


define(
    "separable_aspp_branches",
    _SCHEMA,
    fake=_fake,
    setup_context=_setup,
    backward=_backward,
    python_kernels={"reference": reference.forward, "triton": _triton},
    autocast=True,
)
