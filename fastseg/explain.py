"""explain: what every convolution of a model runs on, why, how fast, and how fast it could be.

What a layer runs on is asked of dispatch with the very problem that its call asks, so that what `fastseg.tune` found
is what is shown. Nothing is measured for the tables, and nothing in them changes.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

from fastseg import dispatch, extension, winners
from fastseg.accelerate import own_forward_reason, requested
from fastseg.ceilings import copy_bandwidth, matmul_rate, median_ms
from fastseg.chains import find_chains, undisturbed
from fastseg.counters import uncounted
from fastseg.nn.aspp import PyramidModule
from fastseg.nn.conv import Conv2d, convolve, folded, norm_epilogue
from fastseg.nn.folding import Chain, Operands, pays, scales_weight
from fastseg.nn.fused_module import FusedModule
from fastseg.nn.head import BilinearUpsample, resizing_class
from fastseg.nn.pyramid import Link, Pyramid, Separable
from fastseg.nn.separable import SeparableConv2d
from fastseg.ops.arguments import ConvArguments, normalise
from fastseg.ops.batch_norm import INPLACE_ACTIVATIONS
from fastseg.ops.conv2d import operator_of
from fastseg.ops.convolution import geometry_of, sized
from fastseg.ops.geometry import conv_memory_format, live_pairs
from fastseg.ops.live_taps import live_share, rectangles
from fastseg.pyramids import find_pyramids
from fastseg.report import Report, Row, times


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
    blocks = _blocks(model, accelerated)
    with winners.unmeasured(), uncounted(), undisturbed(model), torch.no_grad():
        calls, images = _record_calls(model, example, [block.module for block in blocks])
        rows = _rows(calls, chains, accelerated)
        fused, apart = _fusions(blocks, images)
        resizes = _resizes(model, accelerated, images)
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
        resizes=resizes,
        warnings=[*apart, *_warnings(rows)],
    )


@dataclasses.dataclass
class _Block:
    """A module that can run as a whole."""

    title: str
    module: torch.nn.Module
    whole: Pyramid | Separable
    backend: str | None
    layout: torch.memory_format | None  # of its input; None: as it comes
    reason_not: str | None  # why it cannot


def _blocks(model, accelerated: bool) -> list[_Block]:
    """The modules that run as a whole, or would when accelerated, none of them inside another."""
    recognised = {} if accelerated else find_pyramids(model)
    found, inside = [], set()
    for name, module in model.named_modules():
        settings = vars(module).get("_fastseg")
        reason = None
        if module in inside:
            continue
        if isinstance(module, FusedModule) and settings is not None:
            whole, reason = settings.fusion.whole, settings.fusion.reason_not()
            backend, layout = settings.backend, settings.memory_format
        elif module in recognised:
            whole, backend, layout = recognised[module].whole, None, torch.channels_last
        elif isinstance(module, PyramidModule) and type(module).forward is PyramidModule.forward:
            whole, backend, layout = module.pyramid(), module.backend, None
        elif isinstance(module, SeparableConv2d):
            whole, backend, layout = Separable(*Link.chain(module), adds_input=False), module.backend, None
        else:
            continue
        title = f"{name or type(module).__name__} ({whole.describe()})"
        found.append(_Block(title, module, whole, backend, layout, reason))
        inside |= set(module.modules())
    return found


def _fusions(blocks: list[_Block], images: _Images) -> tuple[list[str], list[str]]:
    """What the blocks that were called run on, and those that cannot run as a whole, with the reason."""
    fused, apart = [], []
    for block in blocks:
        if block.reason_not is not None:
            apart.append(f"{block.title} runs child by child: {block.reason_not}")
        elif block.module in images:
            fused.append(f"{block.title} {_how(block, images[block.module][0])}")
    return fused, apart


def _how(block: _Block, x: torch.Tensor) -> str:
    """How the block runs on `x`, and why."""
    if x.dim() != 4:
        return "runs child by child: it takes batches only"
    asked = block.whole.asks(x if block.layout is None else x.contiguous(memory_format=block.layout))
    if asked is None:
        return "runs child by child: its norms or dtypes do not go into one operator"
    choice = dispatch.choose(asked.problem, block.backend)
    how = "runs child by child" if choice.backend == "native" else f"runs as a whole on {choice.backend}"
    return f"{how}: {_why(choice)}"


def _reason(choice: dispatch.Choice) -> str:
    return f"{choice.reason}; its first call will be measured" if choice.provisional else choice.reason


def _why(choice: dispatch.Choice) -> str:
    return _reason(choice) if choice.margin is None else f"{choice.reason}, {times(choice.margin)}"


def _resizes(model, accelerated: bool, images: _Images) -> list[str]:
    """A line for each module that resizes bilinearly on fastseg's operator, or would when accelerated."""
    lines = []
    for name, module in model.named_modules():
        settings = vars(module).get("_fastseg")
        backend = module.backend if isinstance(module, BilinearUpsample) else getattr(settings, "backend", None)
        known = isinstance(module, BilinearUpsample) or resizing_class(module, backend) is not None
        if not known or module not in images:
            continue
        if accelerated and settings is None and not isinstance(module, BilinearUpsample):
            choice = dispatch.Choice("native", "this layer is not accelerated")
        else:
            choice = dispatch.choose(_resize_problem(module, *images[module]), backend)
        lines.append(f"{name or type(module).__name__} on {choice.backend}: {_why(choice)}")
    return lines


def _resize_problem(module, x, y) -> dispatch.Problem:
    """What the resize asks dispatch; its sizes are not known where the module does more than resize."""
    sizes = None
    if isinstance(y, torch.Tensor) and not any(module.children()):
        detail = (getattr(module, "scale_factor", None) is None, bool(getattr(module, "align_corners", False)))
        sizes = sized("upsample_bilinear2d", x, tuple(y.shape[2:]), detail)
    return dispatch.Problem("upsample_bilinear2d", x.device.type, x.dtype, sizes)


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


# Module -> input and output of its first call.
_Images = dict[torch.nn.Module, tuple[torch.Tensor, object]]


def _record_calls(model, example, blocks: list[torch.nn.Module]) -> tuple[Counter[_Call], _Images]:
    """What happens while `model` runs on `example`.

    The calls of convolutions, in the order of the first of each kind (hooks on these are why blocks run child by child
    meanwhile), and the images of `blocks` and of modules that may be resizes.
    """
    calls: Counter[_Call] = Counter()

    def recorder(name):
        def record(layer, args, kwargs, y):
            x = args[0] if args else kwargs["input"]
            shapes = [(1,) * (4 - t.dim()) + tuple(t.shape) for t in (x, y)]
            calls[_Call(name, layer, *shapes, conv_memory_format(x, x), x.dtype, x.device)] += 1

        return record

    images: _Images = {}

    def keep(module, args, y):
        if module not in images and args and isinstance(args[0], torch.Tensor):
            images[module] = (args[0], y)

    handles = [
        module.register_forward_hook(recorder(name), with_kwargs=True)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Conv2d)
    ]
    resizes = [module for module in model.modules() if resizing_class(module, None) is not None]
    handles += [module.register_forward_hook(keep) for module in {*blocks, *resizes}]
    try:
        if isinstance(example, dict):
            model(**example)
        else:
            model(*example) if isinstance(example, (tuple, list)) else model(example)
    finally:
        for handle in handles:
            handle.remove()
    return calls, images


class _Plan(NamedTuple):
    """How a layer runs: on what and why, what it asks dispatch for, the layout of its input, and what it folds."""

    choice: dispatch.Choice
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
        reason = f"{own_forward_reason(layer)}, so it is left as it is"
        return _Plan(dispatch.Choice("native", reason), "native", call.layout, None)
    elif accelerated:
        return _Plan(dispatch.Choice("native", "this layer is not accelerated"), "native", call.layout, None)
    else:
        backend, layout = requested(layer, "auto"), torch.channels_last
    if chain is not None and chain.enabled:
        choice = dispatch.choose(_problem(call, layout, _folded_epilogue(call, chain)), backend)
        if pays(layer, call.input, call.device.type, choice.backend):
            return _Plan(choice, backend, layout, chain)
    choice = dispatch.choose(_problem(call, layout, getattr(layer, "activation", "none")), backend)
    return _Plan(choice, backend, layout, None)


def _problem(call: _Call, layout: torch.memory_format, epilogue: str) -> dispatch.Problem:
    """What the call asks dispatch, in eval mode without gradients."""
    operator, device_type = operator_of(call.input[1], call.layer.groups), call.device.type
    arguments = _arguments(call, layout)
    sized = arguments is not None and dispatch.depends_on_geometry(operator, device_type)
    geometry = geometry_of(arguments, call.layer.weight) if sized else None
    return dispatch.Problem(operator, device_type, call.dtype, geometry, epilogue=epilogue)


def _folded_epilogue(call: _Call, chain: Chain) -> str:
    """What follows the convolution that `chain` is folded into; see `folded` in fastseg/nn/conv.py."""
    layer = call.layer
    if extension.EXTENSION is not None and layer.padding_mode == "zeros" and not isinstance(layer.padding, str):
        return norm_epilogue(chain)
    scales = scales_weight(layer, layer.weight, call.input, call.device.type)
    return chain.activation_name if scales else "none"


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
        kernel=plan.choice.backend,
        reason=_reason(plan.choice),
        margin=plan.choice.margin,
        fold=_fold_text(call, plan.choice.backend, plan.chain),
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
        share *= live_pairs(size, outputs, stride, pad, dilation, taps) / max(1, outputs * taps)
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
