"""What every convolution operator has: schemas, fake kernels, gradients and double backward.

Every argument is already normalised: 4-D input, stride and dilation (h, w), padding (top, bottom, left, right).
"""

from __future__ import annotations

from collections.abc import Callable

from fastseg.ops.activation import activation_backward, needs_preactivation
from fastseg.ops.geometry import empty_gradients, empty_output, output_size
from fastseg.ops.library import OVERLOADS, define

_FORWARD = "(Tensor input, Tensor weight, Tensor? bias, int[] stride, int[] padding, int[] dilation, str activation"
_BACKWARD = (
    "(Tensor grad_output, Tensor input, Tensor weight, int[] stride, int[] padding, int[] dilation, bool[] output_mask)"
    " -> (Tensor, Tensor, Tensor)"
)


def define_convolution(
    operator: str, forward_kernels: dict[str, Callable], backward_kernels: dict[str, Callable], *, scaled: bool = False
) -> None:
    """Define `fastseg::<operator>` and `fastseg::<operator>_backward` with the Python kernels given, by backend.

    With `scaled` the operator takes one more argument: scale [K], in the accumulator's dtype, multiplied to the sum
    before the bias is added. It is for norms in eval mode, and has no gradient. The bias may then be one of each image,
    [N, K], and in the accumulator's dtype.
    """
    define(
        operator,
        _FORWARD + (", Tensor? scale=None" if scaled else "") + ") -> Tensor",
        fake=_fake_forward,
        setup_context=_setup_forward,
        backward=lambda backend: _backward_of_forward(operator, backend),
        python_kernels=forward_kernels,
        autocast=True,
    )
    define(
        f"{operator}_backward",
        _BACKWARD,
        fake=_fake_backward,
        setup_context=_setup_backward,
        backward=lambda backend: _backward_of_backward(operator, backend),
        python_kernels=backward_kernels,
    )


def _fake_forward(input, weight, bias, stride, padding, dilation, activation, scale=None):
    size = output_size(input.shape[2:], weight.shape[2:], stride, padding, dilation)
    return empty_output(input, weight, size)


def _fake_backward(grad_output, input, weight, stride, padding, dilation, output_mask):
    return empty_gradients(input, weight, output_mask)


def _setup_forward(ctx, inputs, output):
    input, weight, bias, ctx.stride, ctx.padding, ctx.dilation, ctx.activation, *scale = inputs
    if scale and scale[0] is not None:
        raise NotImplementedError("fastseg: a convolution with scale has no gradient: call it without gradients")
    ctx.others = (None,) * (len(inputs) - 3)
    ctx.bias_of_images = None if bias is None or bias.dim() == 1 else bias.dtype
    value = None
    if needs_preactivation(ctx.activation):
        value = bias  # the pre-activation is computed again in backward
    elif ctx.activation != "none":
        value = output
    ctx.save_for_backward(input, weight, value)


def _backward_of_forward(operator: str, backend: str):
    def backward(ctx, grad_output):
        input, weight, value = ctx.saved_tensors
        geometry = (ctx.stride, ctx.padding, ctx.dilation)
        if needs_preactivation(ctx.activation):
            value = OVERLOADS[operator][backend](input, weight, value, *geometry, "none")
        grad_output = activation_backward(grad_output, value, ctx.activation)
        needs_input, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        mask = [needs_input, needs_weight, needs_bias and ctx.bias_of_images is None]
        grads = OVERLOADS[f"{operator}_backward"][backend](grad_output, input, weight, *geometry, mask)
        if needs_bias and ctx.bias_of_images is not None:
            grads = *grads[:2], grad_output.sum((2, 3), dtype=ctx.bias_of_images)
        return *grads, *ctx.others

    return backward


def _setup_backward(ctx, inputs, output):
    grad_output, input, weight, ctx.stride, ctx.padding, ctx.dilation, _ = inputs
    ctx.save_for_backward(grad_output, input, weight)


def _backward_of_backward(operator: str, backend: str):
    def backward(ctx, grad_grad_input, grad_grad_weight, grad_grad_bias):
        """The backward pass is bilinear in (grad_output, weight) and (grad_output, input): so are its gradients."""
        grad_output, input, weight = ctx.saved_tensors
        geometry = (ctx.stride, ctx.padding, ctx.dilation)
        forward = OVERLOADS[operator][backend]
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
        grad_input, grad_weight, _ = OVERLOADS[f"{operator}_backward"][backend](
            grad_output,
            input if grad_grad_input is None else grad_grad_input,
            weight if grad_grad_weight is None else grad_grad_weight,
            *geometry,
            mask,
        )
        return sum(terms) if terms else None, grad_input, grad_weight, None, None, None, None

    return backward
