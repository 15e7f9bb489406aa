"""Bilinear resize, its argmax and its cross entropy, in plain PyTorch: slow and obvious."""

from __future__ import annotations

import torch
from torch._prims_common import suggest_memory_format

from fastseg.ops.head.sampling import position_dtype, samples


def forward(input, size, scales, align_corners):
    y = resize(input.double(), size, scales, align_corners, position_dtype(input.dtype))
    return y.to(input.dtype).contiguous(memory_format=suggest_memory_format(input))


def backward(grad_output, input_size, scales, align_corners):
    dtype = position_dtype(grad_output.dtype)
    grad = resize_backward(grad_output.double(), input_size, scales, align_corners, dtype)
    return grad.to(grad_output.dtype).contiguous(memory_format=suggest_memory_format(grad_output))


def argmax(logits, size, align_corners, dtype):
    return resize(logits.double(), size, None, align_corners, position_dtype(logits.dtype)).argmax(1).to(dtype)


def cross_entropy(logits, target, weight, ignore_index, label_smoothing, align_corners, reduction, with_gradient):
    check_target(target, logits.shape[1], ignore_index)
    dtype = position_dtype(logits.dtype)
    options = (logits, target, weight, ignore_index, label_smoothing, align_corners)
    log_p, wanted, total_weight = _distributions_of(*options)
    losses = -torch.where(wanted == 0, 0, wanted * log_p).sum(1)
    loss = losses if reduction == "none" else losses.sum()
    if reduction == "mean":
        loss = loss / total_weight
    gradient = cross_entropy_backward(torch.ones_like(losses), *options) if with_gradient else log_p.new_empty(0)
    return loss.to(dtype), total_weight.to(dtype), gradient.to(dtype), target.new_tensor(ignore_index)


def cross_entropy_backward(grad_losses, logits, target, weight, ignore_index, label_smoothing, align_corners):
    log_p, wanted, _ = _distributions_of(logits, target, weight, ignore_index, label_smoothing, align_corners)
    grad = (log_p.exp() * wanted.sum(1, keepdim=True) - wanted) * grad_losses.double()[:, None]
    dtype = position_dtype(logits.dtype)
    gradient = resize_backward(grad, logits.shape, None, align_corners, dtype).to(dtype)
    return gradient.contiguous(memory_format=suggest_memory_format(logits))


def _distributions_of(logits, target, weight, ignore_index, label_smoothing, align_corners):
    scores = resize(logits.double(), target.shape[1:], None, align_corners, position_dtype(logits.dtype))
    return distributions(scores, target, weight, ignore_index, label_smoothing)


def distributions(scores, target, weight, ignore_index, label_smoothing):
    """[N, C, H, W]: log of the softmax, and the weight of each class in the loss; the sum of the targets' weights."""
    classes = scores.shape[1]
    weights = scores.new_ones(classes) if weight is None else weight.double()
    kept = (target != ignore_index)[:, None]
    chosen = (torch.arange(classes, device=target.device).view(-1, 1, 1) == target[:, None]) & kept
    chosen = chosen * weights.view(-1, 1, 1)
    spread = kept * weights.view(-1, 1, 1) / classes
    return scores.log_softmax(1), (1 - label_smoothing) * chosen + label_smoothing * spread, chosen.sum()


def check_target(target, classes: int, ignore_index: int) -> None:
    """Raise what torch.nn.functional.cross_entropy raises on a CPU for a target that is no class."""
    wrong = target[(target != ignore_index) & ((target < 0) | (target >= classes))]
    if wrong.numel() > 0:
        raise IndexError(f"Target {int(wrong[0])} is out of bounds.")


def resize(input, size, scales, align_corners, dtype):
    """[N, C, H, W] float64 -> [N, C, *size]; `dtype` is that of positions."""
    for axis in (2, 3):
        shape = [*input.shape[:axis], size[axis - 2], *input.shape[axis + 1 :]]
        places = _samples(input.shape[axis], size[axis - 2], scales, axis, align_corners, dtype, input)
        first, second, share = (t.expand(shape) for t in places)
        input = input.gather(axis, first) * (1 - share) + input.gather(axis, second) * share
    return input


def resize_backward(grad, input_size, scales, align_corners, dtype):
    """The gradient of `resize`'s input."""
    for axis in (2, 3):
        shape = [*grad.shape[:axis], input_size[axis], *grad.shape[axis + 1 :]]
        places = _samples(input_size[axis], grad.shape[axis], scales, axis, align_corners, dtype, grad)
        first, second, share = (t.expand_as(grad) for t in places)
        zeros = grad.new_zeros(shape)
        grad = zeros.scatter_add(axis, first, grad * (1 - share)).scatter_add(axis, second, grad * share)
    return grad


def _samples(inputs, outputs, scales, axis, align_corners, dtype, like):
    """`samples` with shares in float64, shaped to go along `axis`."""
    scale = None if scales is None else scales[axis - 2]
    first, second, share = samples(inputs, outputs, scale, align_corners, dtype, like.device)
    return (t.view(-1, *(1,) * (3 - axis)) for t in (first, second, share.double()))
