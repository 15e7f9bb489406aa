"""Registers `fastseg::aspp_branches` and its backward operator: the parallel convolutions of one image."""

from __future__ import annotations

import torch

from fastseg.ops.activation import activation_backward, needs_preactivation
from fastseg.ops.aspp import reference
from fastseg.ops.geometry import empty_output, same_padding
from fastseg.ops.library import OVERLOADS, define

_FORWARD = (
    "(Tensor input, Tensor[] weights, Tensor? bias, int[] dilations, str activation, str reduction,"
    " bool statistics, Tensor? scale) -> (Tensor, Tensor)"
)
_BACKWARD = (
    "(Tensor grad_output, Tensor input, Tensor[] weights, int[] dilations, str reduction, bool needs_input,"
    " bool needs_weights) -> (Tensor, Tensor[])"
)


def output_channels(weights, reduction: str) -> int:
    """K of the branches' common output."""
    return sum(weight.shape[0] for weight in weights) if reduction == "concat" else weights[0].shape[0]


def empty_input_gradient(input, weights, needed: bool) -> torch.Tensor:
    """An uninitialised gradient of the input, in conv2d's memory format; without elements where it is not needed."""
    return empty_output(input, weights[0], input.shape[2:], input.shape[1]) if needed else input.new_empty(0)


def _fake(input, weights, bias, dilations, activation, reduction, statistics, scale):
    channels = output_channels(weights, reduction)
    y = empty_output(input, weights[0], input.shape[2:], channels)
    return y, input.new_empty((2, channels) if statistics else (0,), dtype=torch.float64)


def _fake_backward(grad_output, input, weights, dilations, reduction, needs_input, needs_weights):
    grad_input = empty_input_gradient(input, weights, needs_input)
    return grad_input, [torch.empty_like(weight) for weight in weights] if needs_weights else []


def _setup(ctx, inputs, output):
    input, weights, bias, ctx.dilations, ctx.activation, ctx.reduction, _, scale = inputs
    if scale is not None:
        raise NotImplementedError("fastseg: a convolution with scale has no gradient: call it without gradients")
    value = None
    if needs_preactivation(ctx.activation):
        value = bias  # the pre-activation is computed again in backward
    elif ctx.activation != "none":
        value = output[0]
    ctx.save_for_backward(input, value, *weights)


def _backward(backend: str):
    def backward(ctx, grad_output, _):
        input, value, *weights = ctx.saved_tensors
        needs_input, needs_each, needs_bias = ctx.needs_input_grad[:3]
        needs_weights = any(needs_each)
        branches = (input, weights, ctx.dilations, ctx.reduction)
        if needs_preactivation(ctx.activation):
            value, _ = OVERLOADS["aspp_branches"][backend](
                input, weights, value, ctx.dilations, "none", ctx.reduction, False, None
            )
        grad = activation_backward(grad_output, value, ctx.activation)
        # What will be differentiated again is made of operators that can be.
        run = _differentiable(backend) if torch.is_grad_enabled() else OVERLOADS["aspp_branches_backward"][backend]
        grad_input, grad_weights = run(grad, *branches, needs_input, needs_weights)
        return (
            grad_input if needs_input else None,
            list(grad_weights) if needs_weights else [None] * len(weights),
            grad.sum((0, 2, 3)) if needs_bias else None,
            *(None,) * 5,
        )

    return backward


def _differentiable(backend: str):
    def backward(grad_output, input, weights, dilations, reduction, needs_input, needs_weights):
        grad_inputs, grad_weights, first = [], [], 0
        for weight, dilation in zip(weights, dilations, strict=True):
            grad = grad_output.narrow(1, first, weight.shape[0])
            first += weight.shape[0] if reduction == "concat" else 0
            grads = OVERLOADS["dilated_conv2d_backward"][backend](
                grad, input, weight, *same_padding(weight, dilation), [needs_input, needs_weights, False]
            )
            grad_inputs.append(grads[0])
            grad_weights.append(grads[1])
        return sum(grad_inputs) if needs_input else None, grad_weights

    return backward


def _no_gradient(backend: str):
    def backward(ctx, *_):
        raise NotImplementedError("fastseg: aspp_branches_backward is differentiated through aspp_branches alone")

    return backward


def _triton_forward(*args):
    from fastseg.ops.aspp import triton  # imported when first used: Triton may be absent

    return triton.forward(*args)


def _triton_backward(*args):
    from fastseg.ops.aspp import triton

    return triton.backward(*args)


define(
    "aspp_branches",
    _FORWARD,
    fake=_fake,
    setup_context=_setup,
    backward=_backward,
    python_kernels={"reference": reference.forward, "triton": _triton_forward},
    autocast=True,
)
define(
    "aspp_branches_backward",
    _BACKWARD,
    fake=_fake_backward,
    setup_context=lambda ctx, inputs, output: None,
    backward=_no_gradient,
    python_kernels={"reference": reference.backward, "triton": _triton_backward},
)
