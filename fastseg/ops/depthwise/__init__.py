"""Depthwise convolution: every channel is filtered by itself."""

from __future__ import annotations

import torch

from fastseg.ops.convolution import run_convolution
from fastseg.ops.depthwise import op as _op  # noqa: F401  registers the operators


def depthwise_conv2d(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | str = 0,
    dilation: int | tuple[int, int] = 1,
    *,
    activation: str = "none",
    backend: str | None = None,
) -> torch.Tensor:
    """Depthwise 2-D convolution, `torch.nn.functional.conv2d` with groups equal to the input's channels.

    Args:
        input: [N, C, H, W] or [C, H, W]; float32, float16, bfloat16 or float64; any strides. channels_last is fastest.
        weight: [C * m, 1, R, S] with channel multiplier m >= 1, in the input's dtype. Output channel k reads input
            channel k // m.
        bias: [C * m] or None.
        stride, dilation: one int or (height, width), in pixels.
        padding: one int, (height, width), "same" or "valid", in pixels. Padding is skipped, never multiplied.
        activation: "none", "relu", "relu6", "hardswish" or "silu", applied before rounding to the output's dtype.
        backend: "auto", "native", "reference", "cpu", "triton" or "cuda"; None takes the surrounding choice
            (`fastseg.backend`, FASTSEG_BACKEND, "auto").

    Returns:
        [N, C * m, P, Q] in the memory format that conv2d gives: channels_last when input or weight is.

    Raises:
        RuntimeError, TypeError: as conv2d does for the same mistake.
        ValueError: unknown `activation` or `backend`.
        BackendError: the backend named cannot run this call.

    Sums are accumulated in float32 (float64 for float64) and rounded once. Forward and all gradients are bitwise
    repeatable. Double backward is supported. Follows torch.nn.functional.conv2d's documentation; depthwise filters as
    in Chollet, "Xception" (2017).

    Example:
        >>> import torch, fastseg
        >>> x = torch.randn(2, 16, 33, 33).to(memory_format=torch.channels_last)
        >>> fastseg.ops.depthwise_conv2d(x, torch.randn(16, 1, 3, 3), padding=6, dilation=6).shape
        torch.Size([2, 16, 33, 33])
    """
    groups = input.shape[-3] if isinstance(input, torch.Tensor) and input.dim() >= 3 else 1
    return run_convolution(
        "depthwise_conv2d", input, weight, bias, stride, padding, dilation, groups, activation, backend
    )
