"""What the Triton kernels of every family share: index arithmetic, activations, and the one way to launch a kernel.

Letters for the kinds of values inside kernels: i_ scalar index, o_ block of indices or offsets, m_ mask, p_ pointer,
b_ block of data, s_ stride of a tensor. Importing this module needs Triton and no GPU.
"""

from __future__ import annotations

import contextlib
import contextvars
import math
import os
from collections.abc import Sequence
from typing import ClassVar, NamedTuple, NoReturn

import torch
import triton
import triton.language as tl

from fastseg.ops.geometry import output_size

DTYPES = (torch.float16, torch.bfloat16, torch.float32)

# Axis 0 of a CUDA grid; the other two end at 65535, so every kernel puts its whole grid on axis 0.
MAX_PROGRAMS = 2**31 - 1
MAX_INT32 = 2**31 - 1

# Elements that one load can take: 16 bytes of 16-bit data. Every tile is at least as wide.
MAX_GROUP = 8


@triton.jit
def input_index(o_out, i_tap, STRIDE: tl.constexpr, i_pad, i_dilation):
    """The input position that output position `o_out` reads through filter tap `i_tap`, along one axis."""
    return o_out * STRIDE - i_pad + i_tap * i_dilation


# Whether Triton's interpreter runs the kernels; settled when this module was imported.
INTERPRETED = tl.constexpr(not isinstance(input_index, triton.JITFunction))


@triton.jit
def output_index(o_in, i_tap, STRIDE: tl.constexpr, i_pad, i_dilation):
    """The output position that reads `o_in` through tap `i_tap`: input_index solved for `o_out`.

    Only a live tap has one: the division must leave no remainder (first_live_tap finds those taps).
    """
    return (o_in + i_pad - i_tap * i_dilation) // STRIDE


@triton.jit
def first_live_tap(i_in, TAPS: tl.constexpr, STEP: tl.constexpr, STRIDE: tl.constexpr, i_pad, i_dilation):
    """The smallest tap through which some output reads input position `i_in`, or TAPS when there is none.

    With a stride not every tap has an output that meets `i_in`: those that do are STEP = stride / gcd(stride, dilation)
    apart, and they are the same for every input position of one residue class modulo the stride.
    """
    CANDIDATES: tl.constexpr = STEP if STEP < TAPS else TAPS
    i_tap = i_in * 0 + TAPS
    for i in tl.static_range(CANDIDATES):
        i_candidate = CANDIDATES - 1 - i
        is_live = (i_in + i_pad - i_candidate * i_dilation) % STRIDE == 0
        i_tap = tl.where(is_live, i_candidate, i_tap)
    return i_tap


@triton.jit
def split_index(i_flat, i_size):
    """Take the innermost axis, of `i_size` entries, off a flattened index: (index along it, index of the rest)."""
    return i_flat % i_size, i_flat // i_size


@triton.jit
def is_inside(index, size, IS_INDEX_64: tl.constexpr):
    """0 <= index < size. In 32 bits one comparison does: as an unsigned number a negative index exceeds every size."""
    if IS_INDEX_64:  # Triton's interpreter fails on masks made of uint64 comparisons
        inside = (index >= 0) & (index < size)
    else:
        inside = index.to(tl.uint32) < size.to(tl.uint32)
    return inside


@triton.jit
def widen(index, IS_INDEX_64: tl.constexpr):
    """`index` in 64 bits where some product with it would not fit 32."""
    return tl.cast(index, tl.int64) if IS_INDEX_64 else index


@triton.jit
def in_groups(size, GROUP: tl.constexpr):
    """`size` itself, which the host knows to be a multiple of GROUP, in a form that tells the compiler so."""
    return size // GROUP * GROUP


@triton.jit
def tile_pointers(p_base, o_tile, GROUP: tl.constexpr):
    """Pointers of a 2-D tile whose last dimension falls into aligned groups of GROUP elements (see group_size)."""
    p_tile = p_base + o_tile
    if GROUP > 1:
        p_tile = tl.multiple_of(p_tile, [1, GROUP * p_base.dtype.element_ty.primitive_bitwidth // 8])
    return p_tile


@triton.jit
def load_tile(p_base, o_tile, m_tile, GROUP: tl.constexpr):
    """Load a 2-D tile as fp32. Elements that are masked off have no value: never compute with them."""
    return tl.load(tile_pointers(p_base, o_tile, GROUP), mask=m_tile).to(tl.float32)


@triton.jit
def store_tile(p_base, o_tile, b_tile, m_tile, GROUP: tl.constexpr):
    """Round a 2-D tile to the dtype of `p_base` and store it."""
    tl.store(tile_pointers(p_base, o_tile, GROUP), b_tile.to(p_base.dtype.element_ty), mask=m_tile)


@triton.jit
def round_to_tf32(b_x):
    """Round fp32 to the 10 bits of mantissa that TF32 keeps, to nearest: tl.dot drops the others."""
    if INTERPRETED:  # it knows no assembly
        bits = (b_x.to(tl.int32, bitcast=True) + 0x1000) & ~0x1FFF
        b_x = tl.where(b_x == b_x, bits.to(tl.float32, bitcast=True), b_x)
    else:
        b_x = tl.inline_asm_elementwise(
            "cvt.rna.tf32.f32 $0, $1;", "=r,r", [b_x], dtype=tl.float32, is_pure=True, pack=1
        )
    return b_x


@triton.jit
def multiply_add(b_left, b_right, acc, PRECISION: tl.constexpr):
    """acc + b_left @ b_right, with fp32 operands multiplied as PRECISION says: "tf32" or "ieee".

    Long sums of IEEE products are sums of blocks: in one chain every rounding is of the size of the whole sum.
    """
    if b_left.dtype == tl.float32 and PRECISION == "tf32":
        b_left, b_right = round_to_tf32(b_left), round_to_tf32(b_right)
    if INTERPRETED:  # its product of bfloat16 is that of the bits
        b_left, b_right = b_left.to(tl.float32), b_right.to(tl.float32)
    if b_left.dtype == tl.float32 and PRECISION == "ieee":
        # A zero, or acc's NaN. The compiler would make one chain of a plain zero.
        acc += tl.dot(b_left, b_right, tl.where(acc == acc, 0.0, acc), input_precision="ieee")
    else:
        acc = tl.dot(b_left, b_right, acc, input_precision=PRECISION)
    return acc


@triton.jit
def activate(b_acc, ACTIVATION: tl.constexpr):
    """The activation of an fp32 accumulator. NaN stays NaN: it compares false, so the comparisons let it through."""
    if ACTIVATION == "relu":
        b_acc = tl.where(b_acc < 0, 0.0, b_acc)
    elif ACTIVATION == "relu6":
        b_acc = tl.where(b_acc < 0, 0.0, tl.where(b_acc > 6, 6.0, b_acc))
    elif ACTIVATION == "hardswish":
        b_gate = b_acc + 3
        b_acc = b_acc * tl.where(b_gate < 0, 0.0, tl.where(b_gate > 6, 6.0, b_gate)) / 6
    elif ACTIVATION == "silu":
        b_acc = b_acc / (1 + tl.exp(-b_acc))
    else:
        tl.static_assert(ACTIVATION == "none")
    return b_acc


class ConvShape(NamedTuple):
    """The sizes of one 2-D convolution; csrc/common/conv_shape.h in Python."""

    N: int
    C: int
    H: int
    W: int
    K: int
    P: int
    Q: int
    R: int
    S: int
    stride_h: int
    stride_w: int
    pad_top: int
    pad_left: int
    dilation_h: int
    dilation_w: int


def conv_shape(input, weight, stride, padding, dilation) -> ConvShape:
    """Check what guards memory, and collect the sizes. The public functions have raised PyTorch's own errors before."""
    if input.dim() != 4 or weight.dim() != 4:
        fail("4-D input and weight", f"{input.dim()}-D and {weight.dim()}-D")
    if input.dtype not in DTYPES or weight.dtype != input.dtype or weight.device != input.device:
        fail(
            "float16, bfloat16 or float32 input and weight of one dtype and device",
            f"{input.dtype} on {input.device} and {weight.dtype} on {weight.device}",
        )
    if (len(stride), len(padding), len(dilation)) != (2, 4, 2) or min(*stride, *dilation) < 1 or min(padding) < 0:
        fail(
            "2 positive strides, 4 non-negative paddings and 2 positive dilations",
            f"stride {list(stride)}, padding {list(padding)}, dilation {list(dilation)}",
        )
    P, Q = output_size(input.shape[2:], weight.shape[2:], stride, padding, dilation)
    if P < 1 or Q < 1:
        fail("a kernel no larger than the padded input", f"an output of {P} x {Q}")
    K, _, R, S = weight.shape
    return ConvShape(*input.shape, K, P, Q, R, S, *stride, padding[0], padding[2], *dilation)


def check_like(name: str, tensor, size: tuple[int, ...], like) -> None:
    """Raise unless `tensor` has this size, and the dtype and device of `like`."""
    if tensor.shape != size or tensor.dtype != like.dtype or tensor.device != like.device:
        fail(
            f"{name} of shape {list(size)}, {like.dtype} on {like.device}",
            f"{list(tensor.shape)}, {tensor.dtype} on {tensor.device}",
        )


def fail(wanted: str, got: str) -> NoReturn:
    raise RuntimeError(f"fastseg: expected {wanted}, but got {got}")


def can_run(device_type: str, dtype: torch.dtype) -> str | None:
    """Why the Triton kernels cannot take tensors of this device type and dtype, or None when they can."""
    if dtype not in DTYPES:
        return f"the Triton kernels take float16, bfloat16 and float32, not {str(dtype).removeprefix('torch.')}"
    if device_type == "cpu":
        if is_interpreted():
            return None
        return "the Triton kernels take CPU tensors only in Triton's interpreter (TRITON_INTERPRET=1 before the import)"
    if device_type != "cuda":
        return f"the Triton kernels take CUDA tensors, not {device_type} tensors"
    if not torch.cuda.is_available():
        return "the Triton kernels need a CUDA device, and none is visible"
    return None


def is_interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels; settled when this module was imported."""
    return INTERPRETED.value


def on_device(tensor: torch.Tensor):
    """Make the tensor's device the current one: Triton launches there, whatever its arguments say."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def coalesced(tensor: torch.Tensor, memory_format: torch.memory_format) -> torch.Tensor:
    """`tensor` itself when its innermost dimension is contiguous, else a copy. Outer strides may be anything."""
    axis = 1 if memory_format == torch.channels_last else 3
    if tensor.stride(axis) == 1 or tensor.shape[axis] == 1:
        return tensor
    return tensor.contiguous(memory_format=memory_format)


def group_size(channels: int, *tensors: torch.Tensor) -> int:
    """How many neighbouring channels of channels_last tensors make one aligned group: 8, or a smaller power of two.

    Triton by itself asks whether numbers are divisible by 16, and misses the 728 channels of Xception.
    """
    strides = [s for t in tensors for axis, s in enumerate(t.stride()) if axis != 1 and t.shape[axis] > 1]
    addresses = [t.data_ptr() // t.element_size() for t in tensors]
    return math.gcd(MAX_GROUP, channels, *strides, *addresses)


def strides(names: str, tensor: torch.Tensor) -> dict[str, int]:
    """The strides of `tensor` as a kernel's arguments, by their names in one string."""
    return dict(zip(names.split(), tensor.stride(), strict=True))


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def needs_index_64(*extents: int) -> bool:
    """Whether some index or offset reaches 2^31. Tests force the wide path with FASTSEG_FORCE_INDEX64=1."""
    return max(extents) > MAX_INT32 or os.environ.get("FASTSEG_FORCE_INDEX64", "0") == "1"


class DeviceTable:
    """A small int32 table that kernels read: made once, copied to each device and stream that asks, never waited for.

    A captured CUDA graph reads a copy that an earlier call saw finished. Where there is none yet, the graph gets a
    tensor of its own and copies it whenever it is replayed. What it reads is kept for good.
    """

    _captured: ClassVar[set[DeviceTable]] = set()

    def __init__(self, rows: Sequence[Sequence[int]]):
        self._rows = torch.tensor(rows, dtype=torch.int32)
        self._copies: dict[tuple[int, int], tuple[torch.Tensor, torch.cuda.Event]] = {}
        self._finished: dict[int, torch.Tensor] = {}  # one of the copies on each device

    def on(self, device: torch.device) -> torch.Tensor:
        """The table, for kernels on the current stream of `device`."""
        if device.type != "cuda":
            return self._rows.to(device)
        if torch.cuda.is_current_stream_capturing():
            DeviceTable._captured.add(self)
            if device.index in self._finished:
                return self._finished[device.index]
            return self._pinned().to(device, non_blocking=True)
        stream = torch.cuda.current_stream(device)
        key = device.index, stream.cuda_stream
        if key not in self._copies:
            self._copies[key] = self._pinned().to(device, non_blocking=True), stream.record_event()
        table, copied = self._copies[key]
        if device.index not in self._finished and copied.query():
            self._finished[device.index] = table
        return table

    def _pinned(self) -> torch.Tensor:
        if not self._rows.is_pinned():
            self._rows = self._rows.pin_memory()
        return self._rows


def scratch_context(device: torch.device) -> contextvars.Context:
    """What to run a launch in whose kernel makes descriptors: Triton keeps them in memory that it asks for here.

    An allocator that the user has set stays as it is outside.
    """
    context = contextvars.copy_context()
    context.run(
        triton.set_allocator, lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device=device)
    )
    return context


def launch(kernel, programs: int, *args, **constants) -> None:
    """Launch `programs` programs on the current stream of the current device. No kernel is launched any other way."""
    if programs > MAX_PROGRAMS:
        raise RuntimeError(f"fastseg: a grid holds at most {MAX_PROGRAMS} programs, but this call needs {programs}")
    kernel[(programs,)](*args, **constants)
