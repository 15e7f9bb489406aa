"""summary: what a network costs and sees, from a run in which no number is computed.

The network is copied without data (tensors on PyTorch's "meta" device), and every operator that the copy calls is
looked at: convolutions and linear layers give the rows, all of them the graph of fastseg/models/receptive_field.py.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator
from fractions import Fraction
from math import prod

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

import fastseg.nn
from fastseg import dispatch
from fastseg.accelerate import restore
from fastseg.models.receptive_field import Graph, tensors_in
from fastseg.nn.aspp import PyramidModule
from fastseg.ops.geometry import live_pairs
from fastseg.report import aligned, geometry_text


@dataclasses.dataclass(frozen=True)
class Row:
    """One convolution or linear layer with one input shape. Counts are of all its calls together."""

    name: str
    kind: str  # "convolution", "transposed" or "linear"
    kernel: tuple[int, ...]  # (height, width), as those below; () of a linear layer
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    input: tuple[int, ...]  # [N, C, H, W]
    output: tuple[int, ...]  # [N, K, P, Q]
    parameters: int
    calls: int
    macs: int
    macs_space_to_batch: int
    macs_live: int

    @property
    def live(self) -> float:
        """The share of (output, tap) pairs that lie inside the image."""
        return self.macs_live / self.macs if self.macs else 1.0


@dataclasses.dataclass(frozen=True)
class Feature:
    """The output of a stage or layer."""

    name: str
    shape: tuple[int, ...]


@dataclasses.dataclass
class Summary:
    """What `fastseg.models.summary` found; str() is a table, `.to_json()` the same as JSON text."""

    model: str
    input: tuple[int, ...]  # [N, C, H, W]
    parameters: int
    macs: int
    macs_space_to_batch: int
    macs_live: int
    output_stride: int | None
    receptive_field: tuple[int, int]  # rows, columns
    whole_image: list[str]  # modules that look at the whole image
    features: list[Feature]
    rows: list[Row]
    warnings: list[str]

    def to_dict(self) -> dict:
        """Plain numbers, texts, lists and dicts; each row has its share of live taps, "live", as well."""
        rows = [dataclasses.asdict(row) | {"live": row.live} for row in self.rows]
        return dataclasses.asdict(self) | {"rows": rows}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    def __str__(self) -> str:
        return "\n".join([
            f"{self.model} on {_by(self.input)}", "",
            *aligned(["layer", "convolution", "input", "output", "parameters", "M mult-adds", "live"],
                      [_cells(row) for row in self.rows], right=(4, 5, 6)), "",
            *aligned(["stage", "output"], [[feature.name, _by(feature.shape)] for feature in self.features]), "",
            *self._totals(),
            *(f"warning: {warning}" for warning in self.warnings),
        ])  # fmt: skip

    def _totals(self) -> list[str]:
        field = f"receptive field: {_by(self.receptive_field)} pixels"
        if self.whole_image:
            shown = ", ".join(self.whole_image[:3]) + (", ..." if len(self.whole_image) > 3 else "")
            field += f"; the whole image through {shown}"
        return [
            f"parameters: {_spaced(self.parameters)}",
            f"multiply-adds: {self.macs / 1e9:.3f} G; {self.macs_space_to_batch / 1e9:.3f} G as TensorFlow's "
            f"space-to-batch counts; {self.macs_live / 1e9:.3f} G on live taps",
            f"output stride: {'unknown' if self.output_stride is None else self.output_stride}",
            field,
        ]


def summary(
    model: nn.Module, size: int | tuple[int, int], in_channels: int | None = None, *, batch: int = 1
) -> Summary:
    """Count what `model` costs on an image, and what it sees of it, without computing or changing anything.

    A copy without data runs in eval mode, without the model's hooks; parameters, buffers, modes and the random state
    stay as they are and no memory is needed. An accelerated model is counted as the plain one.

    Args:
        model: any module from an image to a tensor, or to a dict or list of tensors, of which the first counts as the
            logits.
        size: height and width of the image in pixels, or one int for both.
        in_channels: of the image; None means those of the model's first convolution.
        batch: how many images; multiply-adds are those of all of them.

    Returns:
        A Summary: `print` it for the table. Its attributes:
        parameters: all that the model has, those included that `forward` does not use.
        macs: multiply-adds of convolutions, transposed convolutions and linear layers; of nothing else.
        macs_space_to_batch: the same as TensorFlow counts them, and with it the DeepLab v3+ paper: each side of a
            dilated convolution's output is rounded up to a multiple of its rate.
        macs_live: those of filter taps that look at the image, not at padding.
        output_stride: image pixels a pixel of the coarsest features. Strides count; resizing to something smaller and
            pooling to a given size do not. None where the model has no features with rows and columns.
        receptive_field: the most rows and columns of the image that a single logit looks at, before a last resize:
            exact, by the windows of every operation, joined where branches meet. It is that of a large image, and may
            exceed this one. Paths through `whole_image` are not in it; where there are no others it is the image.
        whole_image: names of the modules that look at the whole image: pooling, norms over the image, and also
            attention and whatever takes the image apart in a way that is not followed.
        features: name and shape of what stages and layers give, down to the second level of the model.
        rows: a Row for each convolution and linear layer (and input shape, if it runs with several).
        warnings: dilation rates that leave most taps in the padding; rates of an ASPP that do not fit its output
            stride.
        `.to_dict()` and `.to_json()` give all of it.

    Raises:
        TypeError: `model` is no torch.nn.Module, or a part of it is compiled by torch.jit, or it gives no tensor.
        ValueError: a size, number of channels or batch below 1.
        Whatever `model` raises on such an image; RuntimeError where it has to look at the values of a tensor.

    Counts follow the DeepLab papers (arXiv:1706.05587, arXiv:1802.02611); receptive fields arXiv:1603.07285.

    Example:
        >>> import torch, fastseg.models
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, stride=2), torch.nn.Conv2d(8, 8, 3, dilation=4))
        >>> found = fastseg.models.summary(model, 65)
        >>> found.parameters, found.macs, found.receptive_field, found.output_stride
        (808, 552960, (19, 19), 2)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected model to be a torch.nn.Module, but got {type(model).__name__}")
    if any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
        raise TypeError("expected a model in Python, but a part of this one is a torch.jit.ScriptModule")
    plain = _plain_copy(_bare(model))
    shape = _input_shape(plain, size, in_channels, batch)
    recorder = _run(plain, shape)
    rows = recorder.rows()
    field, whole_image = recorder.graph.field(recorder.logits)
    return Summary(
        model=type(plain).__name__,
        input=shape,
        parameters=sum(parameter.numel() for parameter in plain.parameters()),
        macs=sum(row.macs for row in rows),
        macs_space_to_batch=sum(row.macs_space_to_batch for row in rows),
        macs_live=sum(row.macs_live for row in rows),
        output_stride=recorder.output_stride(),
        receptive_field=field,
        whole_image=whole_image,
        features=recorder.features,
        rows=rows,
        warnings=[*_unfit_rates(recorder), *_dead_taps(rows)],
    )


def _bare(model: nn.Module) -> nn.Module:
    """The model inside wrappers that only say where and how it runs."""
    while isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)) or hasattr(model, "_orig_mod"):
        model = getattr(model, "_orig_mod", None) or model.module
    return model


_WITH_BACKEND = (fastseg.nn.Conv2d, fastseg.nn.SeparableConv2d, fastseg.nn.BilinearUpsample, PyramidModule)


class _WithoutData(TorchFunctionMode):
    """In this mode copies of tensors are tensors of the same kind on the "meta" device."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.clone:
            return torch.empty_like(args[0], device="meta")
        if func is torch.Tensor.__deepcopy__:
            tensor, memo = args
            return memo.setdefault(id(tensor), torch.empty_like(tensor, device="meta"))
        return func(*args, **(kwargs or {}))


def _plain_copy(model: nn.Module) -> nn.Module:
    """`model` in eval mode, without data, hooks and fastseg's kernels."""
    hooks = [vars(m)[registry] for m in model.modules() for registry in ("_forward_hooks", "_forward_pre_hooks")]
    with _WithoutData(), torch.no_grad():
        plain = restore(copy.deepcopy(model, {id(found): OrderedDict() for found in hooks}))
    for module in plain.modules():
        module.training = False
        if isinstance(module, _WITH_BACKEND):
            module.backend = None
    return plain


def _input_shape(model, size, in_channels, batch) -> tuple[int, int, int, int]:
    if in_channels is None:
        convolutions = (m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d)))
        in_channels = next((m.in_channels for m in convolutions), 3)
    size = tuple(size) if isinstance(size, (tuple, list)) else (size, size)
    shape = (batch, in_channels, *size)
    if len(shape) != 4 or not all(isinstance(n, int) and n >= 1 for n in shape):
        raise ValueError(
            "expected size to be a positive int or (height, width), and positive in_channels and batch, "
            f"but got size {size}, in_channels {in_channels}, batch {batch}"
        )
    return shape


def _run(model: nn.Module, shape) -> _Recorder:
    native_calls = dispatch.native_calls.copy()
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    image = torch.empty(shape, dtype=dtype, device="meta")
    recorder = _Recorder(model, image)
    try:
        with torch.no_grad(), torch.device("meta"), dispatch.backend("native"), recorder:
            output = model(image)
    finally:
        dispatch.native_calls.clear()
        dispatch.native_calls.update(native_calls)
    recorder.logits = next(tensors_in(output), None)
    if recorder.logits is None:
        raise TypeError(
            f"expected the model to give a tensor, or a dict or list of them, but got {type(output).__name__}"
        )
    return recorder


# Operators that multiply matrices, and the place of the first one among their arguments.
_PRODUCTS = {
    torch.ops.aten.mm.default: 0,
    torch.ops.aten.bmm.default: 0,
    torch.ops.aten.addmm.default: 1,
    torch.ops.aten.baddbmm.default: 1,
}


class _Recorder(TorchDispatchMode):
    """Sees every operator call of a model without data, and the module it is made in."""

    def __init__(self, model: nn.Module, image: torch.Tensor):
        super().__init__()
        self.graph = Graph(image)
        self.features: list[Feature] = []
        self.logits: torch.Tensor | None = None
        self.strides: list[Fraction] = []  # of what convolutions give
        # The dilated 3x3 convolutions, with the stride of their input, by the node of the graph that they read.
        self.dilated: dict[int, list[tuple[Row, Fraction | None]]] = {}
        self._counts: Counter[Row] = Counter()
        self._image = image
        self._weights = {p.untyped_storage()._cdata for p in model.parameters()}
        self._names = {module: name or type(module).__name__ for name, module in model.named_modules()}
        self._calls: list[nn.Module] = [model]
        for module in model.modules():
            module.register_forward_pre_hook(lambda module, args: self._calls.append(module))
            module.register_forward_hook(self._left)
        for module in set(_stages(model)):
            module.register_forward_hook(self._stage)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        args, kwargs = _all_without_data(args, kwargs or {})
        result = func(*args, **kwargs)
        self.graph.record(func, args, kwargs, result, self._name())
        if func is torch.ops.aten.convolution.default:
            self._convolution(*args, result)
        elif func in _PRODUCTS:
            self._product(*args[_PRODUCTS[func] :][:2], result)
        return result

    def rows(self) -> list[Row]:
        """In the order of the first call of each kind."""
        return [
            dataclasses.replace(
                row, calls=calls, macs=calls * row.macs, macs_live=calls * row.macs_live,
                macs_space_to_batch=calls * row.macs_space_to_batch,
            )
            for row, calls in self._counts.items()
        ]  # fmt: skip

    def output_stride(self) -> int | None:
        return round(max(self.strides)) if self.strides else None

    def _convolution(self, x, weight, bias, stride, padding, dilation, transposed, _, groups, y) -> None:
        kernel = tuple(weight.shape[2:])
        narrow, wide = (x, y) if transposed else (y, x)  # every pixel of `narrow` meets each filter tap once
        macs = narrow.numel() * prod(weight.shape[1:])
        axes = [*zip(wide.shape[2:], narrow.shape[2:], stride, padding, dilation, kernel, strict=True)]
        pairs = prod(narrow.shape[2:]) * prod(kernel)
        row = Row(
            self._name(), "transposed" if transposed else "convolution", kernel, tuple(stride), tuple(dilation), groups,
            tuple(x.shape), tuple(y.shape), _parameters(weight, bias), 1, macs,
            macs if transposed else _space_to_batch(macs, y.shape[2:], kernel, dilation),
            macs * prod(live_pairs(*axis) for axis in axes) // max(1, pairs),
        )  # fmt: skip
        self._counts[row] += 1
        reads = self.graph.number(x)
        if kernel == (3, 3) and max(dilation) > 1 and reads is not None:
            self.dilated.setdefault(reads, []).append((row, self.graph.stride(x)))
        stride = self.graph.stride(y)
        if stride is None and y.shape[-1] > 1:
            stride = Fraction(self._image.shape[-1], y.shape[-1])
        if stride is not None:
            self.strides.append(stride)

    def _product(self, a, b, y) -> None:
        """Counts where one of the matrices is a parameter, or the module a linear layer."""
        module = self._calls[-1]
        weight = next((t for t in (b, a) if t.untyped_storage()._cdata in self._weights), None)
        if weight is None and not isinstance(module, nn.Linear):
            return
        bias = module.bias if isinstance(module, nn.Linear) else None
        macs = y.numel() * a.shape[-1]
        parameters = _parameters(b if weight is None else weight, bias)
        row = Row(
            self._name(), "linear", (), (), (), 1, tuple(a.shape), tuple(y.shape), parameters, 1, macs, macs, macs
        )
        self._counts[row] += 1

    def _name(self) -> str:
        return self._names[self._calls[-1]]

    def _left(self, module, args, output) -> None:
        self._calls.pop()
        if isinstance(module, nn.Linear):
            self.graph.link(args[0], output, self._names[module])

    def _stage(self, module, args, output) -> None:
        """Note what a module gives that holds layers with weights, or changes its input's shape."""
        if not isinstance(output, torch.Tensor):
            return
        x = next(tensors_in(args), None)
        weighty = any(isinstance(m, (nn.modules.conv._ConvNd, nn.Linear)) for m in module.modules())
        if weighty or x is None or x.shape != output.shape:
            name, shape = self._names[module], tuple(output.shape)
            last = self.features[-1] if self.features else None
            if last is not None and last.name.startswith(f"{name}.") and last.shape == shape:
                self.features.pop()  # a part of this module, and its result
            self.features.append(Feature(name, shape))


def _all_without_data(args, kwargs):
    """The arguments of an operator, where a forward names a device by itself or has tensors of its own."""
    if kwargs.get("device") is not None:
        kwargs = kwargs | {"device": torch.device("meta")}
    if all(tensor.is_meta for tensor in tensors_in((args, kwargs))):
        return args, kwargs
    return tree_map_only(torch.Tensor, lambda t: t if t.is_meta else torch.empty_like(t, device="meta"), (args, kwargs))


def _stages(module: nn.Module, levels: int = 2) -> Iterator[nn.Module]:
    """The modules down to the second level; only children, and lists of modules, which nobody calls, are no levels."""
    children = list(module.children())
    for child in children:
        yield child
        uncalled = type(child).forward is nn.Module.forward
        left = levels if uncalled or len(children) == 1 else levels - 1
        if left:
            yield from _stages(child, left)


def _parameters(weight: torch.Tensor, bias: torch.Tensor | None) -> int:
    return weight.numel() + (0 if bias is None else bias.numel())


def _space_to_batch(macs: int, output: Iterable[int], kernel: Iterable[int], dilation: Iterable[int]) -> int:
    """As many, with each side of the output rounded up to a multiple of the rate there."""
    for size, taps, rate in zip(output, kernel, dilation, strict=True):
        if taps > 1:
            macs = macs // max(1, size) * (-(-size // rate) * rate)
    return macs


def _dead_taps(rows: list[Row]) -> Iterator[str]:
    for row in rows:
        rate = max((rate for rate, taps in zip(row.dilation, row.kernel, strict=True) if taps > 1), default=1)
        if rate > 1 and row.live < 0.5:
            size = "x".join(map(str, row.input[2:]))
            yield f"{row.name}: at {size} rate {rate} leaves {100 * row.live:.0f} % of taps live"


# DeepLab v3 has rates 6, 12 and 18 at output stride 16, and doubles them at 8.
_PIXELS_OF_FIRST_RATE = 96


def _unfit_rates(recorder: _Recorder) -> Iterator[str]:
    """Pyramids with rates as 1 : 2 : 3 that are not those of DeepLab v3 at their output stride."""
    for readers in recorder.dilated.values():
        rates = sorted(max(row.dilation) for row, _ in readers)
        stride = readers[0][1]
        if (
            rates != [rates[0], 2 * rates[0], 3 * rates[0]]
            or stride is None
            or rates[0] * stride == _PIXELS_OF_FIRST_RATE
        ):
            continue
        fitting = ", ".join(f"{float(i * _PIXELS_OF_FIRST_RATE / stride):g}" for i in (1, 2, 3))
        yield (
            f"{_common([row.name for row, _ in readers])}: rates {', '.join(map(str, rates))} at output stride "
            f"{float(stride):g}, where DeepLab v3 has {fitting}"
        )


def _common(names: list[str]) -> str:
    """The module that all of them are in."""
    levels = zip(*(name.split(".") for name in names), strict=False)
    return ".".join(level[0] for level in itertools.takewhile(lambda level: len(set(level)) == 1, levels)) or names[0]


def _by(shape: Iterable[int]) -> str:
    return "x".join(map(str, shape))


def _spaced(number: int) -> str:
    return f"{number:,}".replace(",", " ")


def _cells(row: Row) -> list[str]:
    """One line of the table."""
    kind = geometry_text(row.kernel, row.stride, row.dilation, row.groups) or row.kind
    kind += " transposed" if row.kind == "transposed" else ""
    return [
        row.name + (f" x{row.calls}" if row.calls > 1 else ""), kind, _by(row.input), _by(row.output),
        _spaced(row.parameters), f"{row.macs / 1e6:.2f}", f"{100 * row.live:.0f} %",
    ]  # fmt: skip
