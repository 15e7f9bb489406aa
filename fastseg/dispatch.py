"""Which backend runs a call, and why.

A backend is named by argument, else by `with fastseg.backend(name):`, else by the environment variable FASTSEG_BACKEND
(read once, at import), else it is "auto". A named backend that cannot run raises BackendError; "auto" takes native
instead and counts it.
"""

from __future__ import annotations

import contextlib
import math
import os
from typing import NamedTuple

import torch

from fastseg import extension, winners
from fastseg.counters import native_calls
from fastseg.gpu_choice import kernel_on_gpu
from fastseg.measuring import Attempt

BACKENDS = ("auto", "native", "reference", "cpu", "triton", "cuda")

_FLOATING = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


class BackendError(RuntimeError):
    """The backend asked for by name cannot run this call; the message says why."""


class Choice(NamedTuple):
    """The backend that runs a call.

    margin: where it was measured, how many times faster than native; of native, how many times faster than kernels.
    provisional: whether the next call of the same problem may be measured.
    """

    backend: str
    reason: str
    margin: float | None = None
    provisional: bool = False


class Geometry(NamedTuple):
    """The sizes of one convolution, and how its image lies in memory."""

    input: tuple[int, ...]  # [N, C, H, W]
    weight: tuple[int, ...]  # [K, C / groups, R, S]
    stride: tuple[int, ...]
    padding: tuple[int, ...]  # top, bottom, left, right
    dilation: tuple[int, ...]
    output: tuple[int, int]  # height and width
    channels_last: bool


class Sizes(NamedTuple):
    """The sizes of a call that is not one convolution: those of its images, and whatever else decides its time."""

    input: tuple[int, ...]  # [N, C, H, W]
    output: tuple[int, ...]  # height and width of a resize; of what keeps the image's size, nothing
    detail: tuple
    channels_last: bool


class Problem(NamedTuple):
    """What a backend is chosen from: one call of one operator."""

    operator: str  # of fastseg.ops.library.OVERLOADS, or "grouped_conv2d"
    device_type: str
    dtype: torch.dtype
    geometry: Geometry | Sizes | None = None  # None while tracing, where sizes may be symbols, and where any is meant
    gradient: bool = False  # whether a backward pass may follow; looked at with a geometry only
    epilogue: str = "none"  # the activation behind a convolution, "norm+" and one where a norm is folded in


def _check_name(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"expected {source} to be one of {', '.join(BACKENDS)}, but got {name!r}")
    return name


_requested = _check_name(os.environ.get("FASTSEG_BACKEND", "auto"), "the environment variable FASTSEG_BACKEND")


@contextlib.contextmanager
def backend(name: str):
    """Run every fastseg operator inside the block on backend `name` where the call itself names none.

    Args:
        name: "auto", "native", "reference", "cpu", "triton" or "cuda".

    Raises:
        ValueError: `name` is none of these.
        BackendError: raised by an operator call inside, when the backend cannot run it.

    Example:
        >>> import torch, fastseg
        >>> x, w = torch.randn(1, 8, 9, 9), torch.randn(8, 1, 3, 3)
        >>> with fastseg.backend("reference"):
        ...     y = fastseg.ops.depthwise_conv2d(x, w)
    """
    global _requested
    _check_name(name, "backend")
    previous, _requested = _requested, name
    try:
        yield
    finally:
        _requested = previous


def triton_interpreted() -> bool:
    """Whether Triton kernels run in Triton's interpreter, which also takes CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


# The kernels that are measured against native.
_MEASURED = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}
# Operators without kernels of their own, and what the user is told.
_NATIVE_ONLY = {
    "grouped_conv2d": "there are kernels for groups == 1 and groups == channels only",
}


def _cpu_reason(problem: Problem) -> str | None:
    if extension.EXTENSION is None:
        return extension.MISSING
    if problem.device_type != "cpu":
        return f"the C++ CPU kernels take CPU tensors, not {problem.device_type} tensors"
    if not _has_kernel(problem, "cpu"):
        return f"there is no C++ CPU kernel of {problem.operator}"
    return None


def _triton_reason(problem: Problem) -> str | None:
    if problem.dtype == torch.float64:
        return "the Triton kernels take float32, float16 and bfloat16, not float64"
    if problem.device_type != "cuda" and not (problem.device_type == "cpu" and triton_interpreted()):
        return (
            f"the Triton kernels take CUDA tensors, not {problem.device_type} tensors "
            "(TRITON_INTERPRET=1 runs them slowly on the CPU)"
        )
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"Triton does not import: {error}"
    if problem.operator in ("dilated_conv2d", "aspp_branches") and extension.EXTENSION is None:
        return f"the planner of live taps is part of the extension: {extension.MISSING}"
    return None


def _cuda_reason(problem: Problem) -> str | None:
    if _has_kernel(problem, "cuda"):
        return None
    missing = extension.cuda_missing()
    if missing is not None:
        return f"the CUDA C++ kernels are missing: {missing}"
    return f"the CUDA C++ kernels take CUDA tensors, not {problem.device_type} tensors"


def _has_kernel(problem: Problem, backend: str) -> bool:
    key = {"cpu": "CPU", "cuda": "CUDA"}.get(problem.device_type)
    return key is not None and _is_registered(f"fastseg::{problem.operator}.{backend}", key)


@torch.compiler.assume_constant_result  # torch.compile cannot look inside
def _is_registered(name: str, key: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(name, key)


_REASONS = {
    "reference": lambda problem: None,
    "cpu": _cpu_reason,
    "triton": _triton_reason,
    "cuda": _cuda_reason,
}


def reason_not(backend: str, problem: Problem) -> str | None:
    """Why `backend` cannot run `problem`, or None when it can."""
    if backend == "native":
        return None
    if problem.operator in _NATIVE_ONLY:
        return _NATIVE_ONLY[problem.operator]
    if problem.dtype not in _FLOATING:
        dtype = str(problem.dtype).removeprefix("torch.")
        return f"the kernels take float16, bfloat16, float32 and float64, not {dtype}"
    return _REASONS[backend](problem)


# Operators made of matrix products, which oneDNN has instructions for in low precision on processors that have them.
_PRODUCTS = ("separable_conv2d", "aspp_branches", "separable_aspp_branches")

# Whether this processor has no AVX-512, where oneDNN's 1x1 convolutions are as fast as ours or faster.
SHORT_VECTORS = extension.EXTENSION is not None and extension.EXTENSION.cpu_capability() != "avx512"


def _onednn_computes(dtype: str) -> bool:
    supported = getattr(torch.ops.mkldnn, f"_is_mkldnn_{dtype}_supported", None)
    return supported is not None and supported()


# The dtypes that oneDNN leaves to PyTorch's own loops on this processor: x86 without AVX-512, of float16 most others
# too. Their dense convolutions are 5 to 50 times slower there than in float32.
SLOW_ON_NATIVE = frozenset(
    dtype for dtype, name in ((torch.bfloat16, "bf16"), (torch.float16, "fp16")) if not _onednn_computes(name)
)


def _auto(problem: Problem, attempt: Attempt | None) -> Choice:
    if problem.operator in _NATIVE_ONLY:
        return Choice("native", _NATIVE_ONLY[problem.operator])
    if problem.geometry is None or not winners.consulted(problem.operator, problem.device_type):
        return _by_records(problem)
    candidates = ["native", *(b for b in _MEASURED[problem.device_type] if reason_not(b, problem) is None)]
    best = winners.winner(problem, candidates, attempt) if len(candidates) > 1 else None
    if best is not None and best.backend in candidates:
        return Choice(best.backend, best.reason, best.margin)
    awaited = best is None and len(candidates) > 1 and winners.is_awaited(problem)
    return _by_records(problem)._replace(provisional=awaited)


def _by_records(problem: Problem) -> Choice:
    """What the committed records show to be the faster, as rules on sizes."""
    if problem.device_type == "cpu":
        reason = reason_not("cpu", problem)
        if reason is None and problem.operator == "dilated_conv2d":
            reason = _dilated_is_native_on_cpu(problem)
        elif reason is None and problem.operator in _PRODUCTS and problem.dtype not in {torch.float32, *SLOW_ON_NATIVE}:
            reason = "products of other dtypes than float32 run on native on the CPU"
        elif reason is None and problem.operator == "upsample_bilinear2d" and problem.dtype == torch.float64:
            reason = "native resizes float64 as fast on the CPU"
        return Choice("native", reason) if reason else Choice("cpu", "faster than native in the committed records")
    if problem.device_type != "cuda":
        return Choice("native", f"there are no kernels for {problem.device_type} tensors")
    backends, reason = kernel_on_gpu(problem)
    return Choice(next((b for b in backends if reason_not(b, problem) is None), "native"), reason)


def depends_on_geometry(operator: str, device_type: str) -> bool:
    """Whether "auto" looks at the sizes of such a call."""
    return (
        operator == "dilated_conv2d"
        or (operator == "depthwise_conv2d" and device_type == "cuda")
        or winners.consulted(operator, device_type)
    )


def _dilated_is_native_on_cpu(problem: Problem) -> str | None:
    """Why a dense convolution is left to oneDNN, or None where the committed records show our kernel to be faster."""
    geometry = problem.geometry
    if problem.dtype in SLOW_ON_NATIVE:
        return "native is faster for few multiply-adds" if geometry is not None and _is_small(geometry) else None
    if problem.dtype != torch.float32:
        return "dense convolutions of other dtypes than float32 run on native on the CPU"
    if geometry is None:
        return "dense convolutions without known sizes run on native on the CPU"
    images, channels, height, width = geometry.input
    outputs, _, *kernel = geometry.weight
    pixels = images * geometry.output[0] * geometry.output[1]
    if pixels < 64 or channels < 32:
        return "native is faster for few pixels or channels"
    if kernel == [1, 1]:
        if problem.gradient and pointwise_trains_on_native(channels, outputs):
            return "native is faster in the backward pass of such 1x1 convolutions"
        if problem.epilogue == "none" and not problem.gradient and (channels >= 2048 or SHORT_VECTORS):
            return "native is as fast for 1x1 convolutions that nothing follows"
        if geometry.channels_last or channels * outputs <= 2**15:
            return None
        return "native is faster for large 1x1 convolutions of contiguous tensors"
    if extension.EXTENSION.winograd_forms(
        images, channels, outputs, (height, width), geometry.output, kernel, geometry.stride, geometry.padding,
        geometry.dilation,
    ):  # fmt: skip
        return None
    # How far the filter reaches over the image's size: the share of outputs some taps of which look at padding.
    reach = max(d * (k - 1) / size for d, k, size in zip(geometry.dilation, kernel, (height, width), strict=True))
    if geometry.channels_last:
        pays = reach >= 0.2 and channels >= 64 and (outputs >= 64 or channels >= 256)
    else:
        pays = channels >= 64 and outputs >= 64 and (reach >= 0.6 or (reach >= 0.35 and pixels >= 2048))
    return None if pays else "native is as fast where nearly all filter taps look at the image"


def _is_small(geometry: Geometry) -> bool:
    return geometry.input[0] * math.prod(geometry.output) * math.prod(geometry.weight) < 2**18


def pointwise_trains_on_native(channels: int, outputs: int) -> bool:
    """Whether oneDNN's backward pass of such a 1x1 convolution on the CPU is the faster one."""
    return min(channels, outputs) < 128 or (SHORT_VECTORS and channels < 1024)


# Choices that were made, by problem and name. Those that depend on sizes are thrown away when they get many, as they do
# with images of ever new sizes; torch.compile looks at the others only, and would watch the length of these.
_choices: dict[tuple[Problem, str], Choice] = {}
_sized_choices: dict[tuple[Problem, str], Choice] = {}
_MOST_SIZED_CHOICES = 4096


def choose(problem: Problem, requested: str | None = None, attempt: Attempt | None = None) -> Choice:
    """The backend that runs `problem`, with the reason; `attempt` makes the call, where "auto" may try who is fastest.

    Raises:
        ValueError: `requested` names no backend.
        BackendError: the backend requested by name cannot run this problem.
    """
    name = _requested if requested is None else _check_name(requested, "backend")
    key = (problem, name)
    if problem.geometry is not None:
        return _choose_by_size(key, attempt)
    choice = _choices.get(key)
    if choice is None:
        choice = _choices[key] = _decide(problem, name)
    return choice


def _choose_by_size(key: tuple[Problem, str], attempt: Attempt | None) -> Choice:
    if winners.tuning():
        return _decide(*key, attempt)
    choice = _sized_choices.get(key)
    if choice is None or (choice.provisional and attempt is not None and winners.may_measure(key[0], attempt)):
        if len(_sized_choices) >= _MOST_SIZED_CHOICES:
            _sized_choices.clear()
        choice = _sized_choices[key] = _decide(*key, attempt)
    return choice


# Calls that went to native, by what they were made with and the name asked for: to look one up takes half the time
# of working out its problem, and what native is given are the caller's own arguments.
_calls_left_to_native: dict[tuple, Choice] = {}


def left_to_native(call: tuple, requested: str | None) -> Choice | None:
    """The choice that an earlier call like this one has met, where it was native and is still to be: else None."""
    if winners.tuning():
        return None
    try:
        return _calls_left_to_native.get((call, _requested if requested is None else requested))
    except TypeError:  # a list among the arguments
        return None


def leave_to_native(call: tuple, requested: str | None, choice: Choice) -> None:
    """Let later calls like this one meet `choice`, which is native, at once."""
    if choice.provisional or winners.tuning():
        return
    if len(_calls_left_to_native) >= _MOST_SIZED_CHOICES:
        _calls_left_to_native.clear()
    with contextlib.suppress(TypeError):
        _calls_left_to_native[call, _requested if requested is None else requested] = choice


def forget_sized_choices() -> None:
    """What was chosen from tables that have changed is chosen anew."""
    _sized_choices.clear()
    _calls_left_to_native.clear()


_BY_NAME = "asked for by name"


def _decide(problem: Problem, name: str, attempt: Attempt | None = None) -> Choice:
    if name == "auto":
        return _auto(problem, attempt)
    reason = reason_not(name, problem)
    if reason is not None:
        raise BackendError(f"backend {name!r} cannot run {problem.operator}: {reason}")
    return Choice(name, _BY_NAME)


def count_native(operator: str, reason: str) -> None:
    """Remember that "auto" left a call to native, for that reason.

    Not counted are calls of native by its name, and tracing: a graph is traced once and run many times.
    """
    if reason != _BY_NAME and not torch.compiler.is_compiling():
        native_calls[operator, reason] += 1
