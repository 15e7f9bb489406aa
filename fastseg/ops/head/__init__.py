"""The segmentation head: logits to full resolution, and what is wanted there, without full-size logits in memory."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from fastseg import dispatch
from fastseg.ops.convolution import call_operator, chosen_by_size
from fastseg.ops.head import native, targets
from fastseg.ops.head import op as _op  # noqa: F401  registers the operators
from fastseg.ops.library import OVERLOADS

_REDUCTIONS = ("none", "mean", "sum")
# Where autocast lets PyTorch's resize compute in float32: the device types whose list has it.
_RESIZED_IN_FLOAT32 = [
    device
    for device in ("cpu", "cuda")
    if torch._C._dispatch_has_kernel_for_dispatch_key("aten::upsample_bilinear2d", f"Autocast{device.upper()}")
]
_LABELS = (torch.int64, torch.uint8)


def upsample_bilinear2d(
    input: torch.Tensor,
    size: int | Sequence[int] | None = None,
    scale_factor: float | Sequence[float] | None = None,
    align_corners: bool = False,
    *,
    backend: str | None = None,
) -> torch.Tensor:
    """Bilinear resize, `torch.nn.functional.interpolate` with mode="bilinear".

    Args:
        input: [N, C, H, W]; float32, float16, bfloat16 or float64 (other dtypes run native); any strides.
        size: (height, width) of the output in pixels, or one int for both; or None.
        scale_factor: (height, width) multipliers, or one for both; or None. One of the two has to be given.
        align_corners: whether the centres of the corner pixels of input and output coincide, instead of the corners.
        backend: "auto", "native", "reference", "cpu", "triton" or "cuda"; None takes the surrounding choice
            (`fastseg.backend`, FASTSEG_BACKEND, "auto").

    Returns:
        [N, C, P, Q] in the input's memory format.

    Raises:
        ValueError, RuntimeError, TypeError: as torch.nn.functional.interpolate does for the same mistake.
        ValueError: unknown `backend`.
        BackendError: the backend named cannot run this call.

    Sampling positions are ATen's, to the bit; sums are kept in float32 (float64 for float64) and rounded once. The
    backward pass gathers, so it is bitwise repeatable on every device. Double backward is supported. Follows
    torch.nn.functional.interpolate's documentation.

    Example:
        >>> import torch, fastseg
        >>> x = torch.randn(1, 21, 33, 33)
        >>> fastseg.ops.upsample_bilinear2d(x, scale_factor=4).shape
        torch.Size([1, 21, 132, 132])
    """
    outputs = _output_size(input, size, scale_factor)
    if outputs is None or not isinstance(align_corners, (bool, type(None))):
        return native.upsample_bilinear2d(input, size, scale_factor, align_corners)
    device = input.device.type
    if device in _RESIZED_IN_FLOAT32 and input.dtype in (torch.float16, torch.bfloat16):
        input = input.float() if torch.is_autocast_enabled(device) else input
    choice = _choose(
        "upsample_bilinear2d", input, backend, outputs, (scale_factor is None, bool(align_corners)), (input,),
        lambda name: upsample_bilinear2d(input, size, scale_factor, align_corners, backend=name),
    )  # fmt: skip
    if choice.backend == "native":
        return native.upsample_bilinear2d(input, size, scale_factor, align_corners)
    scales = None if scale_factor is None else _pair(scale_factor)
    overload = OVERLOADS["upsample_bilinear2d"][choice.backend]
    return call_operator(overload, (input,), input, outputs, scales, bool(align_corners))


def upsample_argmax(
    logits: torch.Tensor,
    size: int | Sequence[int],
    *,
    align_corners: bool = False,
    dtype: torch.dtype = torch.int64,
    backend: str | None = None,
) -> torch.Tensor:
    """The label of each pixel: `interpolate(logits, size, mode="bilinear").argmax(1)` without full-size logits.

    Args:
        logits: [N, C, h, w]; float32, float16, bfloat16 or float64; any strides. channels_last is fastest.
        size: (height, width) of the labels in pixels, or one int for both.
        align_corners: as in `upsample_bilinear2d`.
        dtype: torch.int64, or torch.uint8 for at most 256 classes.
        backend: as in `upsample_bilinear2d`.

    Returns:
        [N, height, width] in `dtype`. Of equal scores the first class wins, and NaN is larger than any number, as for
        torch.argmax. It has no gradient.

    Raises:
        ValueError, RuntimeError, TypeError: as torch.nn.functional.interpolate does for the same mistake.
        TypeError: `dtype` is neither torch.int64 nor torch.uint8.
        ValueError: more than 256 classes in torch.uint8; unknown `backend`.
        BackendError: the backend named cannot run this call.

    Scores of low-precision logits are compared in float32, before any rounding: PyTorch compares rounded ones, and
    gives a tie that rounding makes to the first class.

    Example:
        >>> import torch, fastseg
        >>> fastseg.ops.upsample_argmax(torch.randn(1, 21, 33, 33), (129, 129)).shape
        torch.Size([1, 129, 129])
    """
    if dtype not in _LABELS:
        raise TypeError(f"expected dtype to be torch.int64 or torch.uint8, but got {dtype}")
    outputs = _output_size(logits, size, None)
    if outputs is None or not isinstance(align_corners, (bool, type(None))):
        return native.argmax(logits, size, align_corners, dtype)
    if dtype == torch.uint8 and logits.shape[1] > 256:
        raise ValueError(f"expected at most 256 classes for labels in torch.uint8, but got {logits.shape[1]}")
    choice = _choose(
        "upsample_argmax", logits, backend, outputs, (str(dtype), bool(align_corners)), (),
        lambda name: upsample_argmax(logits, size, align_corners=align_corners, dtype=dtype, backend=name),
    )  # fmt: skip
    if choice.backend == "native":
        return native.argmax(logits, size, align_corners, dtype)
    overload = OVERLOADS["upsample_argmax"][choice.backend]
    return call_operator(overload, (), logits.detach(), outputs, bool(align_corners), dtype)


def upsample_cross_entropy(
    logits: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    align_corners: bool = False,
    backend: str | None = None,
) -> torch.Tensor:
    """`cross_entropy(interpolate(logits, target.shape[-2:], mode="bilinear"), target)` without full-size logits.

    Loss and gradient come out of one pass over the pixels; what exists at full resolution has no classes.

    Args:
        logits: [N, C, h, w]; float32, float16, bfloat16 or float64; any strides. channels_last is fastest.
        target: [N, H, W] int64, class indices in [0, C) or `ignore_index`. Class probabilities, [N, C, H, W], run
            native.
        weight: [C] in the logits' dtype, what a pixel of each class counts; or None.
        ignore_index: the target of pixels that count nothing.
        reduction: "none", "mean" (over the weights of the pixels) or "sum".
        label_smoothing: in [0, 1], the share of the target that is spread over all classes.
        align_corners, backend: as in `upsample_bilinear2d`.

    Returns:
        A scalar, or [N, H, W] for "none", in the logits' dtype, in float32 under autocast.

    Raises:
        ValueError, RuntimeError, TypeError: as PyTorch's two functions do for the same mistake.
        IndexError: a target is no class. On a GPU the loss is NaN then, and the error is raised by a later call or
            backward pass, once the device has reported it; the device stays usable.
        ValueError: unknown `backend`.
        BackendError: the backend named cannot run this call.

    Arithmetic is float32 (float64 for float64), also for low-precision logits; scores of any size are safe. Loss and
    gradient are bitwise repeatable. Double backward runs on PyTorch's operators, with full-size logits. Follows
    torch.nn.functional.cross_entropy's documentation.

    Example:
        >>> import torch, fastseg
        >>> logits = torch.randn(2, 21, 33, 33, requires_grad=True)
        >>> target = torch.randint(21, (2, 129, 129))
        >>> fastseg.ops.upsample_cross_entropy(logits, target, ignore_index=255).backward()
        >>> logits.grad.shape
        torch.Size([2, 21, 33, 33])
    """
    options = (weight, ignore_index, reduction, label_smoothing, align_corners)
    if not _is_plain_loss(logits, target, *options):
        return native.cross_entropy(logits, target, *options)
    choice = _choose(
        "upsample_cross_entropy", logits, backend, target.shape[1:], (reduction, bool(align_corners)), (logits,),
        lambda name: upsample_cross_entropy(
            logits, target, weight, ignore_index, reduction, label_smoothing, align_corners=align_corners, backend=name
        ),
    )  # fmt: skip
    if choice.backend == "native":
        return native.cross_entropy(logits, target, *options)
    watched = logits.is_cuda and not torch.compiler.is_compiling()
    if watched:
        targets.raise_reported()
    with_gradient = reduction != "none" and torch.is_grad_enabled() and logits.requires_grad
    loss, _, _, offender = call_operator(
        OVERLOADS["upsample_cross_entropy"][choice.backend], (logits,),
        logits, target, weight, ignore_index, float(label_smoothing), bool(align_corners), reduction, with_gradient,
    )  # fmt: skip
    if watched:
        targets.watch(offender, ignore_index)
    return loss if torch.is_autocast_enabled(logits.device.type) else loss.to(logits.dtype)


def _choose(operator, input, backend, output: Sequence[int], detail: tuple, tensors: tuple, run) -> dispatch.Choice:
    choice = chosen_by_size(
        operator, input, backend, detail, tensors, run, output=tuple(output), dtype=input.dtype
    )  # fmt: skip
    if choice.backend == "native":
        dispatch.count_native(operator, choice.reason)
    return choice


def _pair(value) -> list:
    return list(value) if isinstance(value, Sequence) else [value, value]


def _output_size(input, size, scale_factor) -> list | None:
    """(height, width) of the output, or None where PyTorch has the word: a mistake, or what has no kernel."""
    if not isinstance(input, torch.Tensor) or input.dim() != 4 or input.layout != torch.strided:
        return None
    if not input.is_floating_point() or min(input.shape[1:]) == 0 or (size is None) == (scale_factor is None):
        return None
    pair = _pair(scale_factor if size is None else size)
    kinds = (int, float) if size is None else (int, torch.SymInt)
    if len(pair) != 2 or any(isinstance(value, bool) or not isinstance(value, kinds) for value in pair):
        return None
    if size is None:
        pair = [math.floor(n * factor) for n, factor in zip(input.shape[2:], pair, strict=True)]
    return pair if min(pair) > 0 else None


def _is_plain_loss(logits, target, weight, ignore_index, reduction, label_smoothing, align_corners) -> bool:
    """Whether these are arguments that PyTorch takes, and that there are kernels for."""
    if not isinstance(target, torch.Tensor) or target.dim() != 3 or target.dtype != torch.int64:
        return False
    if _output_size(logits, target.shape[1:], None) is None or logits.shape[0] != target.shape[0]:
        return False
    if logits.device != target.device or target.layout != torch.strided:
        return False
    if weight is not None and not (
        isinstance(weight, torch.Tensor)
        and weight.shape == logits.shape[1:2]
        and weight.dtype == logits.dtype
        and weight.device == logits.device
    ):
        return False
    return (
        isinstance(ignore_index, int)
        and reduction in _REDUCTIONS
        and isinstance(label_smoothing, (int, float))
        and 0 <= label_smoothing <= 1
        and isinstance(align_corners, (bool, type(None)))
    )
