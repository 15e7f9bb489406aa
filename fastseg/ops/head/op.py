"""Registers the operators of the segmentation head: bilinear resize and its gradient, argmax and cross entropy on top.

Sizes are (height, width) in pixels. `scales` are the scale factors that the caller gave, or None: ATen computes
sampling positions from them, not from the sizes.
"""

from __future__ import annotations

import torch
from torch._prims_common import suggest_memory_format

from fastseg.ops.head import reference
from fastseg.ops.head.sampling import position_dtype
from fastseg.ops.library import OVERLOADS, define


def empty_resized(like: torch.Tensor, size) -> torch.Tensor:
    """An uninitialised [N, C, *size] in the memory format that torch.nn.functional.interpolate gives."""
    return torch.empty(
        (*like.shape[:2], *size), dtype=like.dtype, device=like.device, memory_format=suggest_memory_format(like)
    )


def _fake_forward(input, size, scales, align_corners):
    return empty_resized(input, size)


def _fake_backward(grad_output, input_size, scales, align_corners):
    return empty_resized(grad_output, input_size[2:])


def _setup_forward(ctx, inputs, output):
    input, ctx.size, ctx.scales, ctx.align_corners = inputs
    ctx.input_size = list(input.shape)


def _backward_of_forward(backend: str):
    def backward(ctx, grad_output):
        run = OVERLOADS["upsample_bilinear2d_backward"][backend]
        return run(grad_output, ctx.input_size, ctx.scales, ctx.align_corners), None, None, None

    return backward


def _setup_backward(ctx, inputs, output):
    grad_output, _, ctx.scales, ctx.align_corners = inputs
    ctx.size = list(grad_output.shape[2:])


def _backward_of_backward(backend: str):
    def backward(ctx, grad_grad_input):
        run = OVERLOADS["upsample_bilinear2d"][backend]
        return run(grad_grad_input, ctx.size, ctx.scales, ctx.align_corners), None, None, None

    return backward


def _fake_argmax(logits, size, align_corners, dtype):
    return logits.new_empty((logits.shape[0], *size), dtype=dtype)


def _fake_cross_entropy(
    logits, target, weight, ignore_index, label_smoothing, align_corners, reduction, with_gradient
):  # fmt: skip
    dtype = position_dtype(logits.dtype)
    loss = logits.new_empty(target.shape if reduction == "none" else (), dtype=dtype)
    gradient = empty_resized(logits, logits.shape[2:]) if with_gradient else logits.new_empty(0)
    return loss, logits.new_empty((), dtype=dtype), gradient.to(dtype), target.new_empty(())


def _fake_cross_entropy_backward(
    grad_losses, logits, target, weight, ignore_index, label_smoothing, align_corners
):  # fmt: skip
    return empty_resized(logits, logits.shape[2:]).to(position_dtype(logits.dtype))


def _setup_cross_entropy(ctx, inputs, output):
    logits, target, weight, ctx.ignore_index, ctx.label_smoothing, ctx.align_corners, ctx.reduction, _ = inputs
    _, total_weight, gradient, offender = output
    ctx.mark_non_differentiable(total_weight, gradient, offender)
    ctx.save_for_backward(logits, target, weight, total_weight, gradient)


def _backward_of_cross_entropy(backend: str):
    def backward(ctx, grad_loss, *_):
        logits, target, weight, total_weight, gradient = ctx.saved_tensors
        options = (ctx.ignore_index, ctx.label_smoothing, ctx.align_corners)
        none = (None,) * 7
        if ctx.reduction == "mean":  # where every pixel is ignored native's loss is NaN, and its gradient zero
            grad_loss = torch.where(total_weight == 0, 0, grad_loss / total_weight)
        if torch.is_grad_enabled():  # to be differentiated again
            from fastseg.ops.head.native import cross_entropy

            # On a GPU neither native's sum of losses nor the gradient of its resize is repeatable.
            resize = OVERLOADS["upsample_bilinear2d"][backend]
            losses = cross_entropy(logits, target, weight, ctx.ignore_index, "none", *options[1:], resize)
            grad_losses = grad_loss.expand(losses.shape).to(losses.dtype)
            return torch.autograd.grad(losses, logits, grad_losses, create_graph=True)[0], *none
        if gradient.numel() == 0 or ctx.reduction == "none":
            run = OVERLOADS["upsample_cross_entropy_backward"][backend]
            gradient = run(grad_loss.expand(target.shape), logits, target, weight, *options)
        else:
            gradient = gradient * grad_loss
        return gradient.to(logits.dtype), *none

    return backward


def _no_gradient(backend: str):
    def backward(ctx, *_):
        raise NotImplementedError(
            "fastseg: upsample_cross_entropy_backward is differentiated through upsample_cross_entropy alone"
        )

    return backward


def _triton(name: str):
    def run(*args):
        from fastseg.ops.head import triton  # imported when first used: Triton may be absent

        return getattr(triton, name)(*args)

    return run


define(
    "upsample_bilinear2d",
    "(Tensor input, SymInt[] size, float[]? scales, bool align_corners) -> Tensor",
    fake=_fake_forward,
    setup_context=_setup_forward,
    backward=_backward_of_forward,
    python_kernels={"reference": reference.forward, "triton": _triton("forward")},
)
define(
    "upsample_bilinear2d_backward",
    "(Tensor grad_output, SymInt[] input_size, float[]? scales, bool align_corners) -> Tensor",
    fake=_fake_backward,
    setup_context=_setup_backward,
    backward=_backward_of_backward,
    python_kernels={"reference": reference.backward, "triton": _triton("backward")},
)
define(
    "upsample_argmax",
    "(Tensor logits, SymInt[] size, bool align_corners, ScalarType dtype) -> Tensor",
    fake=_fake_argmax,
    python_kernels={"reference": reference.argmax, "triton": _triton("argmax")},
)
# Returns the loss, the sum of the target's weights and the gradient of the sum of all losses (without elements unless
# `with_gradient`), all in the positions' dtype; and a target that is no class where a GPU has met one, else
# ignore_index. A CPU raises IndexError.
define(
    "upsample_cross_entropy",
    "(Tensor logits, Tensor target, Tensor? weight, int ignore_index, float label_smoothing, bool align_corners,"
    " str reduction, bool with_gradient) -> (Tensor, Tensor, Tensor, Tensor)",
    fake=_fake_cross_entropy,
    setup_context=_setup_cross_entropy,
    backward=_backward_of_cross_entropy,
    python_kernels={"reference": reference.cross_entropy, "triton": _triton("cross_entropy")},
)
define(
    "upsample_cross_entropy_backward",
    "(Tensor grad_losses, Tensor logits, Tensor target, Tensor? weight, int ignore_index, float label_smoothing,"
    " bool align_corners) -> Tensor",
    fake=_fake_cross_entropy_backward,
    setup_context=lambda ctx, inputs, output: None,
    backward=_no_gradient,
    python_kernels={"reference": reference.cross_entropy_backward, "triton": _triton("cross_entropy_backward")},
)
