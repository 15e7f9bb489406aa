"""Schemas, fake kernels and gradients of `fastseg::depthwise_conv2d` and its backward operator.

Every argument is already normalised: 4-D input, stride and dilation (h, w), padding (top, bottom, left, right).
"""

from __future__ import annotations

import torch

from fastseg.ops.activation import activation_backward, needs_preactivation
from fastseg.ops.depthwise import reference
from fastseg.ops.geometry import empty_output, output_size
from fastseg.ops.library import define


def _triton_forward(*args):
    from fastseg.ops.depthwise import triton  # imported when first used: Triton may be absent

    return triton.forward(*args)


def _triton_backward(*args):
    from fastseg.ops.depthwise import triton

    return triton.backward(*args)


def _fake_forward(input, weight, bias, stride, padding, dilation, activation):
    size = output_size(input.shape[2:], weight.shape[2:], stride, padding, dilation)
    return empty_output(input, weight, size)


def _fake_backward(grad_output, input, weight, stride, padding, dilation, output_mask):
    grad_input = empty_output(input, weight, input.shape[2:], input.shape[1]) if output_mask[0] else None
    grad_weight = torch.empty_like(weight) if output_mask[1] else None
    grad_bias = weight.new_empty(weight.shape[0]) if output_mask[2] else None
    return grad_input, grad_weight, grad_bias


def _setup_forward(ctx, inputs, output):
    input, weight, bias, ctx.stride, ctx.padding, ctx.dilation, ctx.activation = inputs
    value = None
    if needs_preactivation(ctx.activation):
        value = bias  # the pre-activation is computed again in backward
    elif ctx.activation != "none":
        value = output
    ctx.save_for_backward(input, weight, value)


def _backward_of_forward(backend: str):
    def backward(ctx, grad_output):
        input, weight, value = ctx.saved_tensors
        geometry = (ctx.stride, ctx.padding, ctx.dilation)
        if needs_preactivation(ctx.activation):
            value = FORWARD[backend](input, weight, value, *geometry, "none")
        grad_output = activation_backward(grad_output, value, ctx.activation)
        mask = list(ctx.needs_input_grad[:3])
        grads = BACKWARD[backend](grad_output, input, weight, *geometry, mask)
        return *grads, None, None, None, None

    return backward


def _setup_backward(ctx, inputs, output):
    grad_output, input, weight, ctx.stride, ctx.padding, ctx.dilation, _ = inputs
    ctx.save_for_backward(grad_output, input, weight)


def _backward_of_backward(backend: str):
    def backward(ctx, grad_grad_input, grad_grad_weight, grad_grad_bias):
        """The backward pass is bilinear in (grad_output, weight) and (grad_output, input): so are its gradients."""
        grad_output, input, weight = ctx.saved_tensors
        geometry = (ctx.stride, ctx.padding, ctx.dilation)
        forward = FORWARD[backend]
        needs_grad_output, needs_input, needs_weight = ctx.needs_input_grad[:3]

        terms = []
        if needs_grad_output:
            if grad_grad_input is not None:
                terms.append(forward(grad_grad_input, weight, None, *geometry, "none"))
            if grad_grad_weight is not None:
                terms.append(forward(input, grad_grad_weight, None, *geometry, "none"))
            if grad_grad_bias is not None:
                terms.append(grad_grad_bias.view(-1, 1, 1).expand_as(grad_output))
        mask = [needs_input and grad_grad_weight is not None, needs_weight and grad_grad_input is not None, False]
        grad_input, grad_weight, _ = BACKWARD[backend](
            grad_output,
            input if grad_grad_input is None else grad_grad_input,
            weight if grad_grad_weight is None else grad_grad_weight,
            *geometry,
            mask,
        )
        return sum(terms) if terms else None, grad_input, grad_weight, None, None, None, None

    return backward


# The overloads by backend; the formulas above look them up when they run.
FORWARD = define(
    "depthwise_conv2d",
    "(Tensor input, Tensor weight, Tensor? bias, int[] stride, int[] padding, int[] dilation, str activation)"
    " -> Tensor",
    fake=_fake_forward,
    setup_context=_setup_forward,
    backward=_backward_of_forward,
    python_kernels={"reference": reference.forward, "triton": _triton_forward},
    autocast=True,
)
BACKWARD = define(
    "depthwise_conv2d_backward",
    "(Tensor grad_output, Tensor input, Tensor weight, int[] stride, int[] padding, int[] dilation, bool[] output_mask)"
    " -> (Tensor, Tensor, Tensor)",
    fake=_fake_backward,
    setup_context=_setup_backward,
    backward=_backward_of_backward,
    python_kernels={"reference": reference.backward, "triton": _triton_backward},
)
