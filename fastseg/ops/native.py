"""ATen's convolution with an activation after it: the backend "native"."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fastseg.ops.activation import apply_activation

# The activation's name and scalars in oneDNN's fused convolution.
_ONEDNN = {
    "relu": ("relu", []),
    "relu6": ("hardtanh", [0.0, 6.0]),
    "hardswish": ("hardswish", []),
    "silu": ("swish", []),
}


def native_conv2d(input, weight, bias, stride, padding, dilation, groups, activation="none"):
    """torch.nn.functional.conv2d on the caller's own arguments: its checks, its exceptions, its result.

    Where oneDNN runs the convolution and no gradient is wanted, the activation is applied inside it.
    """
    if activation != "none" and _onednn_fuses(input, weight, bias, padding):
        pair = torch.nn.modules.utils._pair
        name, scalars = _ONEDNN[activation]
        return torch.ops.mkldnn._convolution_pointwise(
            input, weight, bias, pair(padding), pair(stride), pair(dilation), groups, name, scalars, ""
        )
    return apply_activation(F.conv2d(input, weight, bias, stride, padding, dilation, groups), activation)


def _onednn_fuses(input, weight, bias, padding) -> bool:
    tensors = (input, weight) if bias is None else (input, weight, bias)
    return (
        torch.backends.mkldnn.is_available()
        and torch.backends.mkldnn.enabled
        and not torch.compiler.is_compiling()
        and not isinstance(padding, str)
        and all(type(t) in (torch.Tensor, torch.nn.Parameter) for t in tensors)
        and all(t.device.type == "cpu" and t.dtype == torch.float32 for t in tensors)
        and input.dim() == 4
        and input.numel() > 0
        and not torch.is_autocast_enabled("cpu")
        and not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))
    )
