"""The activations a convolution can apply to its accumulator, and their gradients, in ATen's own operators."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def _hardswish(z):
    if z.dtype == torch.float64:  # on a GPU ATen multiplies by a sixth in float32, whatever the dtype
        return z * F.relu6(z + 3) / 6
    return F.hardswish(z)


_FORWARD = {
    "none": lambda z: z,
    "relu": torch.relu,
    "relu6": F.relu6,
    "hardswish": _hardswish,
    "silu": F.silu,
}
ACTIVATIONS = tuple(_FORWARD)

# Gradients of these need only the output, so the pre-activation values are never stored.
_FROM_OUTPUT = {
    "none": lambda grad, y: grad,
    "relu": lambda grad, y: torch.ops.aten.threshold_backward(grad, y, 0),
    "relu6": lambda grad, y: torch.ops.aten.hardtanh_backward(grad, y, 0.0, 6.0),
}


def _silu_backward(grad, z):
    if not torch.is_grad_enabled():
        return torch.ops.aten.silu_backward(grad, z)
    sigmoid = torch.sigmoid(z)  # ATen's operator has no derivative of its own
    return grad * sigmoid * (1 + z * (1 - sigmoid))


_FROM_PREACTIVATION = {
    "hardswish": torch.ops.aten.hardswish_backward,
    "silu": _silu_backward,
}


def check_activation(activation: str) -> None:
    """Raise ValueError unless `activation` is one of ACTIVATIONS."""
    if activation not in _FORWARD:
        raise ValueError(f"expected activation to be one of {', '.join(ACTIVATIONS)}, but got {activation!r}")


def apply_activation(z: torch.Tensor, activation: str) -> torch.Tensor:
    return _FORWARD[activation](z)


def needs_preactivation(activation: str) -> bool:
    """Whether the gradient of `activation` cannot be had from its output alone."""
    return activation in _FROM_PREACTIVATION


def activation_backward(grad: torch.Tensor, value: torch.Tensor, activation: str) -> torch.Tensor:
    """The gradient before the activation; `value` is the output, or the pre-activation where that is needed."""
    table = _FROM_PREACTIVATION if needs_preactivation(activation) else _FROM_OUTPUT
    return table[activation](grad, value)
