"""conv2d: one entry for every 2-D convolution, sent to the operator family that fits it."""

from __future__ import annotations

import torch

from fastseg.ops import depthwise, dilated  # noqa: F401  their operators
from fastseg.ops.convolution import run_convolution


def operator_of(channels: int, groups: int) -> str:
    """The operator that runs a convolution of `channels` input channels in `groups` groups."""
    if groups == 1:
        return "dilated_conv2d"
    return "depthwise_conv2d" if groups == channels else "grouped_conv2d"


def conv2d(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | str = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    *,
    activation: str = "none",
    backend: str | None = None,
) -> torch.Tensor:
    """2-D convolution, a drop-in of torch.nn.functional.conv2d with an activation in the epilogue.

    Args:
        input: [N, C, H, W] or [C, H, W]; any dtype and strides that torch.nn.functional.conv2d takes.
        weight: [K, C / groups, R, S] in the input's dtype.
        bias: [K] or None.
        stride, dilation: one int or (height, width), in pixels.
        padding: one int, (height, width), "same" or "valid", in pixels.
        groups: groups == C runs the depthwise kernels, groups == 1 the dilated ones (at any dilation, 1 as well);
            everything else runs ATen's convolution.
        activation: "none", "relu", "relu6", "hardswish" or "silu", applied to the result.
        backend: "auto", "native", "reference", "cpu", "triton" or "cuda"; None takes the surrounding choice
            (`fastseg.backend`, FASTSEG_BACKEND, "auto").

    Returns:
        [N, K, P, Q] in the memory format that torch.nn.functional.conv2d gives.

    Raises:
        RuntimeError, TypeError: as torch.nn.functional.conv2d does for the same mistake.
        ValueError: unknown `activation` or `backend`.
        BackendError: the backend named cannot run this call.

    Promises of the depthwise kernels: see `depthwise_conv2d`. Follows torch.nn.functional.conv2d's documentation.

    Example:
        >>> import torch, fastseg
        >>> x = torch.randn(1, 8, 33, 33)
        >>> fastseg.ops.conv2d(x, torch.randn(8, 1, 3, 3), padding="same", groups=8, activation="relu").shape
        torch.Size([1, 8, 33, 33])
    """
    channels = input.shape[-3] if isinstance(input, torch.Tensor) and input.dim() >= 3 else 0
    operator = operator_of(channels, groups)
    return run_convolution(operator, input, weight, bias, stride, padding, dilation, groups, activation, backend)
