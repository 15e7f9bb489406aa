"""Batch norm of several branches at once, from the statistics that their convolutions left, in training."""

from __future__ import annotations

import torch

from fastseg.ops.activation import activation_backward, needs_preactivation
from fastseg.ops.batch_norm import batch_norm_activation_


def takes_together(norms, input: torch.Tensor) -> bool:
    """Whether these norms are one of their joined channels: plain ones that all use this batch's statistics."""
    first = norms[0]
    return (
        all(isinstance(norm, torch.nn.BatchNorm2d) and norm.training for norm in norms)
        and all(norm.eps == first.eps and norm.affine == first.affine for norm in norms)
        and all(norm.weight is None or norm.weight.dtype == input.dtype for norm in norms)
        and not torch.compiler.is_compiling()
        and input.numel() > 0
    )


def joint_norm(z: torch.Tensor, sums: torch.Tensor, norms, activation: str) -> torch.Tensor:
    """activation(norm of each part of z's channels), with the statistics `sums` [2, K]: sums and sums of squares.

    Updates the norms' running statistics as their own forward would.
    """
    count = z.numel() // z.shape[1]
    if count == 1:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {z.shape}")
    mean, square = sums / count  # float64
    variance = (square - mean * mean).clamp_(min=0)
    widths = [norm.num_features for norm in norms]
    parts = zip(norms, mean.split(widths), (variance * (count / (count - 1))).split(widths), strict=True)
    with torch.no_grad():
        for norm, mean_part, variance_part in parts:
            _update(norm, mean_part, variance_part)
    gamma = beta = None
    if norms[0].affine:
        gamma, beta = (torch.cat([getattr(norm, name) for norm in norms]) for name in ("weight", "bias"))
    wide = torch.float64 if z.dtype == torch.float64 else torch.float32
    return _Normalise.apply(z, mean.to(wide), variance.to(wide), gamma, beta, norms[0].eps, activation)


def _update(norm, mean, variance) -> None:
    if not norm.track_running_stats or norm.running_mean is None:
        return
    norm.num_batches_tracked.add_(1)
    share = 1.0 / float(norm.num_batches_tracked) if norm.momentum is None else norm.momentum
    norm.running_mean.mul_(1 - share).add_(mean.to(norm.running_mean.dtype), alpha=share)
    norm.running_var.mul_(1 - share).add_(variance.to(norm.running_var.dtype), alpha=share)


class _Normalise(torch.autograd.Function):
    """activation((z - mean) / sqrt(variance + eps) * gamma + beta), where mean and variance are z's own."""

    @staticmethod
    def forward(ctx, z, mean, variance, gamma, beta, eps, activation):
        y = batch_norm_activation_(z.clone(), None, mean, variance, gamma, beta, eps, activation)
        ctx.eps, ctx.activation = eps, activation
        invstd = torch.rsqrt(variance + eps)
        ctx.save_for_backward(z, y if activation != "none" else None, mean, invstd, gamma, beta)
        return y

    @staticmethod
    def backward(ctx, grad):
        z, value, mean, invstd, gamma, beta = ctx.saved_tensors
        if needs_preactivation(ctx.activation):
            scale = (invstd if gamma is None else gamma * invstd).view(-1, 1, 1)
            value = (z - mean.view(-1, 1, 1).to(z.dtype)) * scale.to(z.dtype)
            value = value if beta is None else value + beta.view(-1, 1, 1)
        grad = activation_backward(grad, value, ctx.activation)
        mask = [ctx.needs_input_grad[0], gamma is not None, beta is not None]
        grads = torch.ops.aten.native_batch_norm_backward(grad, z, gamma, None, None, mean, invstd, True, ctx.eps, mask)
        return grads[0], None, None, grads[1], grads[2], None, None
