"""explain: what every convolution of a model runs on, why, how fast, and how fast it could be."""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

from fastseg import dispatch, extension
from fastseg.accelerate import kernel_choice, own_forward_reason, requested
from fastseg.ceilings import copy_bandwidth, matmul_rate, median_ms
from fastseg.chains import find_chains, undisturbed
from fastseg.nn.conv import Conv2d, convolve, folded
from fastseg.nn.folding import Chain, Operands, pays, scales_weight
from fastseg.nn.fused_module import FusedModule
from fastseg.nn.head import BilinearUpsample, resizing_class
from fastseg.ops.arguments import ConvArguments, normalise
from fastseg.ops.batch_norm import INPLACE_ACTIVATIONS
from fastseg.ops.convolution import geometry_of
from fastseg.ops.geometry import conv_memory_format, live_outputs
from fastseg.ops.live_taps import live_share, rectangles
from fastseg.pyramids import find_pyramids


@dataclasses.dataclass
class Row:
    """One convolution layer with one input shape."""

    name: str
    input: tuple[int, ...]  # [N, C, H, W]
    output: tuple[int, ...]  # [N, K, P, Q]
    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    kernel: str  # the backend that runs it
    reason: str  # why that one
    fold: str  # the norm and activation it applies as well, and where
    ms: float
    native_ms: float  # native in the faster of its two layouts, with the same norm and activation
    live_taps: float  # share of (output, tap) pairs that lie inside the image
    megabytes: float  # input, weight and output, once each
    gflop: float  # of live taps
    bound_ms: float  # the larger of the time to move the bytes and the time to do the arithmetic
    calls: int

    @property
    def share_of_bound(self) -> float:
        return self.bound_ms / self.ms


@dataclasses.dataclass
class Report:
    """What `fastseg.explain` found; str() is a table, `.to_json()` the same as JSON text."""

    model: str
    accelerated: bool
    device: str
    dtype: str
    bandwidth: float  # bytes a second
    rate: float  # floating-point operations a second
    rows: list[Row]
    fused: list[str]  # modules that run as a whole; their convolutions are timed one by one above
    resizes: list[str]  # modules that resize bilinearly, and on what
    warnings: list[str]

    @property
    def ms(self) -> float:
        return sum(row.ms * row.calls for row in self.rows)

    @property
    def native_ms(self) -> float:
        return sum(row.native_ms * row.calls for row in self.rows)

    def to_json(self) -> str:
        rows = [dataclasses.asdict(row) | {"share_of_bound": row.share_of_bound} for row in self.rows]
        totals = {"ms": self.ms, "native_ms": self.native_ms}
        return json.dumps(dataclasses.asdict(self) | totals | {"rows": rows}, indent=2)

    def __str__(self) -> str:
        return "\n".join([self._title(), "", *_table(self.rows), "", *self._summary()])

    def _title(self) -> str:
        state = "accelerated" if self.accelerated else "not accelerated; this is what fastseg.accelerate would do"
        return f"{self.model} ({state}), {self.dtype} on {self.device}"

    def _summary(self) -> list[str]:
        lines = []
        if self.rows:
            lines.append(
                f"{len(self.rows)} convolutions: {self.ms:.2f} ms, native {self.native_ms:.2f} ms in the faster layout "
                f"of each, {self.native_ms / self.ms:.2f}x"
            )
        for (kernel, reason), count in Counter((row.kernel, row.reason) for row in self.rows).most_common():
            lines.append(f"{count} on {kernel}: {reason}")
        lines.append(
            f"bound: the slower of {self.bandwidth / 1e9:.1f} GB/s (measured by a copy) and {self.rate / 1e9:.0f} "
            "GFLOP/s (measured by a matrix product); more than 100 % means that the tensors stay in a cache"
        )
        lines += [f"fused: {line}" for line in self.fused]
        lines += [f"resize: {line}" for line in self.resizes]
        lines += [f"warning: {warning}" for warning in self.warnings]
        return lines


def explain(model: torch.nn.Module, example) -> Report:
    """Run `model` on `example` once, time each of its convolutions by itself, and report what runs it and why.

    Args:
        model: any module, accelerated or not; for one that is not, the report says what `fastseg.accelerate(model)`
            would do. It runs in eval mode without gradients, and is left as it was: parameters, buffers, training
            flags.
        example: the input, or a tuple of positional or a dict of keyword arguments, on the model's device.

    Returns:
        A Report: `print` it for the table, `.rows` has one Row a layer (and input shape, if it runs with several),
        `.warnings` what deserves a second look, `.to_json()` everything as JSON text. A layer that folds the batch norm
        and activation behind it is timed with them, and so is native.

    Raises:
        TypeError: `model` is no torch.nn.Module.
        BackendError: the backend asked for by name cannot run one of the layers.
        Whatever `model` raises on `example`.

    Example:
        >>> import torch, fastseg
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(8, 8, 3, padding=12, dilation=12, groups=8))
        >>> report = fastseg.explain(model, torch.randn(1, 8, 17, 17))
        >>> f"{report.rows[0].live_taps:.0%}"
        '28%'
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"expected model to be a torch.nn.Module, but got {type(model).__name__}")
    accelerated = any("_fastseg" in vars(module) for module in model.modules())
    chains = {} if accelerated else {layer: found.chain for layer, found in find_chains(model).items()}
    fused, apart = _fusions(model, accelerated)
    native_calls = dispatch.native_calls.copy()
    try:
        with undisturbed(model), torch.no_grad():
            calls = _record_calls(model, example)
            rows = _rows(calls, chains, accelerated)
    finally:
        dispatch.native_calls.clear()
        dispatch.native_calls.update(native_calls)
    device, dtype = _place(calls, model)
    return Report(
        model=type(model).__name__,
        accelerated=accelerated,
        device=_device_name(device),
        dtype=_dtype_name(dtype),
        bandwidth=copy_bandwidth(device),
        rate=matmul_rate(device, dtype),
        rows=rows,
        fused=fused,
        resizes=_resizes(model, accelerated, device, dtype),
        warnings=[*apart, *_warnings(rows)],
    )


def _fusions(model, accelerated: bool) -> tuple[list[str], list[str]]:
    """The modules that run as a whole, and those that were recognised and cannot, with the reason."""
    if accelerated:
        found = {m: m._fastseg.fusion for m in model.modules() if isinstance(m, FusedModule) and "_fastseg" in vars(m)}
    else:
        found = find_pyramids(model)
    fused, apart = [], []
    for name, module in model.named_modules():
        if module not in found:
            continue
        reason = found[module].reason_not() if accelerated else None
        title = f"{name or type(module).__name__} ({found[module].whole.describe()})"
        if reason is None:
            fused.append(f"{title} runs as a whole")
        else:
            apart.append(f"{title} runs child by child: {reason}")
    return fused, apart


def _resizes(model, accelerated: bool, device: torch.device, dtype: torch.dtype) -> list[str]:
    """A line for each module that resizes bilinearly on fastseg's operator, or would when accelerated."""
    lines = []
    for name, module in model.named_modules():
        settings = vars(module).get("_fastseg")
        backend = module.backend if isinstance(module, BilinearUpsample) else getattr(settings, "backend", None)
        known = isinstance(module, BilinearUpsample) or resizing_class(module, backend) is not None
        if known:
            if accelerated and settings is None and not isinstance(module, BilinearUpsample):
                kernel, reason = "native", "this layer is not accelerated"
            else:
                kernel, reason = dispatch.choose(dispatch.Problem("upsample_bilinear2d", device.type, dtype), backend)
            lines.append(f"{name or type(module).__name__} on {kernel}: {reason}")
    return lines


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{device.type} with {threads} {'thread' if threads == 1 else 'threads'}"


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _place(calls, model) -> tuple[torch.device, torch.dtype]:
    for call in calls:
        return call.device, call.dtype
    parameter = next(model.parameters(), torch.empty(0))
    return parameter.device, parameter.dtype


class _Call(NamedTuple):
    """A convolution layer and one kind of input it was called with."""

    name: str
    layer: torch.nn.Conv2d
    input: tuple[int, ...]  # [N, C, H, W]
    output: tuple[int, ...]  # [N, K, P, Q]
    layout: torch.memory_format
    dtype: torch.dtype
    device: torch.device


def _record_calls(model, example) -> Counter[_Call]:
    """The calls of convolutions while `model` runs on `example`, in the order of the first of each kind."""
    calls: Counter[_Call] = Counter()

    def recorder(name):
        def record(layer, args, kwargs, y):
            x = args[0] if args else kwargs["input"]
            shapes = [(1,) * (4 - t.dim()) + tuple(t.shape) for t in (x, y)]
            calls[_Call(name, layer, *shapes, conv_memory_format(x, x), x.dtype, x.device)] += 1

        return record

    handles = [
        module.register_forward_hook(recorder(name), with_kwargs=True)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Conv2d)
    ]
    try:
        if isinstance(example, dict):
            model(**example)
        else:
            model(*example) if isinstance(example, (tuple, list)) else model(example)
    finally:
        for handle in handles:
            handle.remove()
    return calls


class _Plan(NamedTuple):
    """How a layer runs: its backend and why, what it asks dispatch for, the layout of its input, and what it folds."""

    kernel: str
    reason: str
    backend: str | None
    layout: torch.memory_format
    chain: Chain | None


def _plan(call: _Call, chain: Chain | None, accelerated: bool) -> _Plan:
    layer = call.layer
    settings = vars(layer).get("_fastseg")
    if settings is not None:
        backend, layout, chain = settings.backend, settings.memory_format or call.layout, settings.chain
    elif isinstance(layer, Conv2d):
        backend, layout = layer.backend, call.layout
    elif _is_foreign(layer):
        return _Plan("native", f"{own_forward_reason(layer)}, so it is left as it is", "native", call.layout, None)
    elif accelerated:
        return _Plan("native", "this layer is not accelerated", "native", call.layout, None)
    else:
        backend, layout = requested(layer, "auto"), torch.channels_last
    arguments = _arguments(call, layout)
    geometry = None if arguments is None else geometry_of(arguments, layer.weight)
    kernel, reason = kernel_choice(layer, backend, call.dtype, call.device.type, geometry)
    folds = chain is not None and chain.enabled and pays(layer, call.input, call.device.type, kernel)
    return _Plan(kernel, reason, backend, layout, chain if folds else None)


def _is_foreign(layer) -> bool:
    """Whether `layer` computes something that fastseg does not know."""
    return own_forward_reason(layer) is not None and not isinstance(layer, Conv2d)


def _rows(calls: Counter[_Call], chains, accelerated: bool) -> list[Row]:
    times: dict[tuple, tuple[float, float]] = {}  # layers of one kind are timed once
    rows = []
    for call, count in calls.items():
        plan = _plan(call, chains.get(call.layer), accelerated)
        key = (_signature(call.layer), call[2:], plan._replace(chain=plan.chain and plan.chain.activation_name))
        if key not in times:
            times[key] = _time(call, plan)
        rows.append(_row(call, plan, count, *times[key]))
    return rows


def _signature(layer) -> tuple:
    geometry = (layer.stride, layer.padding, layer.padding_mode, layer.dilation, layer.groups)
    return (type(layer), layer.weight.shape, layer.bias is None, getattr(layer, "activation", "none"), *geometry)


def _row(call: _Call, plan: _Plan, count: int, ms: float, native_ms: float) -> Row:
    layer, weight = call.layer, call.layer.weight
    live = _live_taps(call)
    elements = sum(math.prod(shape) for shape in (call.input, weight.shape, call.output))
    moved = elements * call.dtype.itemsize
    flop = 2 * math.prod(call.output) * math.prod(weight.shape[1:]) * live
    bound = max(moved / copy_bandwidth(call.device), flop / matmul_rate(call.device, call.dtype))
    return Row(
        name=call.name or type(layer).__name__,
        input=call.input,
        output=call.output,
        kernel_size=tuple(layer.kernel_size),
        stride=tuple(layer.stride),
        dilation=tuple(layer.dilation),
        groups=layer.groups,
        kernel=plan.kernel,
        reason=plan.reason,
        fold=_fold_text(call, plan.kernel, plan.chain),
        calls=count,
        ms=ms,
        native_ms=native_ms,
        live_taps=live,
        megabytes=moved / 1e6,
        gflop=flop / 1e9,
        bound_ms=bound * 1e3,
    )


def _arguments(call: _Call, layout: torch.memory_format) -> ConvArguments | None:
    """The call in normal form, with an input that has no data; None where padding holds values."""
    layer = call.layer
    if layer.padding_mode != "zeros":
        return None
    x = torch.empty(call.input, device="meta", memory_format=layout)
    weight = torch.empty(layer.weight.shape, device="meta")
    return normalise(x, weight, None, layer.stride, layer.padding, layer.dilation, layer.groups)


def _live_taps(call: _Call) -> float:
    """The share of (output, tap) pairs inside the image; 1 where padding holds values, or is a stranger's business."""
    arguments = None if _is_foreign(call.layer) else _arguments(call, call.layout)
    if arguments is None:
        return 1.0
    kernel = tuple(call.layer.kernel_size)
    geometry = (kernel, arguments.stride, arguments.padding, arguments.dilation)
    if extension.EXTENSION is not None:
        return live_share(rectangles("outputs", call.input[2:], *geometry), kernel)
    share = 1.0
    for axis in range(2):
        size, outputs, taps = call.input[2 + axis], call.output[2 + axis], kernel[axis]
        stride, pad, dilation = arguments.stride[axis], arguments.padding[2 * axis], arguments.dilation[axis]
        live = [live_outputs(size, outputs, stride, pad, tap * dilation)[0] for tap in range(taps)]
        share *= sum(part.stop - part.start for part in live) / max(1, outputs * taps)
    return share


def _fold_text(call: _Call, kernel: str, chain: Chain | None) -> str:
    if chain is None:
        return ""
    what = "bn" if chain.activation_name == "none" else f"bn+{chain.activation_name}"
    if kernel != "native" and call.layer.groups == 1:
        return f"{what} in the kernel"
    scales = scales_weight(call.layer, call.layer.weight, call.input, call.device.type)
    return f"{what} in {'weight' if scales else 'output'}"


def _time(call: _Call, plan: _Plan) -> tuple[float, float]:
    """Milliseconds of the layer as it runs, and of native in the faster of its two layouts."""
    x = torch.randn(call.input, device=call.device).to(call.dtype)
    layouts = (torch.contiguous_format, torch.channels_last)
    native_ms = min(median_ms(_native(call.layer, x, layout, plan.chain), call.device) for layout in layouts)
    return median_ms(_planned(call.layer, x, plan), call.device), native_ms


def _native(layer, x, layout, chain: Chain | None) -> Callable[[], object]:
    """The layer in PyTorch's operators, with the norm and activation of `chain`."""
    x = x.contiguous(memory_format=layout)
    if _is_foreign(layer):
        return lambda: layer(x)
    weight = layer.weight.contiguous(memory_format=layout)
    if chain is None:
        activation = getattr(layer, "activation", "none")
        return lambda: convolve(layer, x, weight, layer.bias, activation, "native")
    norm, activation = chain.norm, INPLACE_ACTIVATIONS[chain.activation_name]

    def run():
        y = convolve(layer, x, weight, layer.bias, "none", "native")
        statistics = (norm.running_mean, norm.running_var)
        return activation(F.batch_norm(y, *statistics, norm.weight, norm.bias, eps=norm.eps))

    return run


def _planned(layer, x, plan: _Plan) -> Callable[[], object]:
    """The layer as it runs, or would run."""
    if plan.backend == "native":
        return _native(layer, x, plan.layout, None)
    x = x.contiguous(memory_format=plan.layout)
    weight = layer.weight.contiguous(memory_format=plan.layout)
    if plan.chain is not None:
        operands = Operands.of(layer, plan.chain.norm)._replace(weight=weight)
        return lambda: folded(layer, plan.chain, x, operands, plan.backend)
    return lambda: convolve(layer, x, weight, layer.bias, getattr(layer, "activation", "none"), plan.backend)


def _warnings(rows: list[Row]) -> list[str]:
    found = []
    for row in rows:
        rate, size = max(row.dilation), "x".join(map(str, row.input[2:]))
        if rate > 1 and row.live_taps < 0.5:
            found.append(f"{row.name}: rate {rate} at {size} leaves {100 * row.live_taps:.0f} % of taps live")
    return found


def _table(rows: list[Row]) -> list[str]:
    if not rows:
        return ["no convolutions"]
    head = ["layer", "input", "convolution", "kernel", "ms", "native ms", "ratio", "live", "MB", "of bound", "folds"]
    lines = [head, *([*_cells(row)] for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    right = range(4, 10)
    padded = [
        "  ".join(
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    return [padded[0], "-" * max(map(len, padded)), *padded[1:]]


def _cells(row: Row) -> list[str]:
    """One line of the table."""
    times = f" x{row.calls}" if row.calls > 1 else ""
    convolution = "x".join(map(str, row.kernel_size))
    for letter, (vertical, horizontal) in (("s", row.stride), ("d", row.dilation)):
        if (vertical, horizontal) != (1, 1):
            convolution += f" {letter}{vertical}" if vertical == horizontal else f" {letter}{vertical},{horizontal}"
    if row.groups > 1:
        convolution += f" g{row.groups}"
    return [
        row.name + times,
        "x".join(map(str, row.input)),
        f"{convolution} -> {row.output[1]}",
        row.kernel,
        f"{row.ms:.3f}",
        f"{row.native_ms:.3f}",
        f"{row.native_ms / row.ms:.2f}x",
        f"{100 * row.live_taps:.0f} %",
        f"{row.megabytes:.2f}",
        f"{100 * row.share_of_bound:.0f} %",
        row.fold,
    ]
