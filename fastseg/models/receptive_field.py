"""How far a value of a network's output looks: the windows of all operations that ran, put together backwards.

Along one axis, the outputs first..last of an operation read a range of its input, and a table of operations says which.
Starting from every logit by itself and going back to the image, ranges of branches that meet are joined. They are exact
integers, strides that a transposed convolution or a resize undoes included, and go on beyond the image where padding
does, so that they are those of a large image; a logit at the border sees less.

A mean over the image, and whatever the table does not know (attention, a reshape that takes the image apart), reads
everything: such paths are listed by name and end there, and the range is that of the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction
from math import ceil, floor, prod
from typing import NamedTuple

import torch

Range = tuple[int, int]  # first, last
Axes = tuple[int, int]  # which dimensions of a tensor are the image's rows and columns


class Window(NamedTuple):
    """Output p reads inputs p * stride - pad ... + extent - 1."""

    stride: int = 1
    pad: int = 0
    extent: int = 1

    def __call__(self, first: int, last: int) -> Range | None:
        return first * self.stride - self.pad, last * self.stride - self.pad + self.extent - 1


class Spread(NamedTuple):
    """A transposed convolution: input i reaches outputs i * stride - pad ... + extent - 1."""

    stride: int
    pad: int
    extent: int

    def __call__(self, first: int, last: int) -> Range | None:
        low, high = -((self.extent - 1 - first - self.pad) // self.stride), (last + self.pad) // self.stride
        return (low, high) if low <= high else None


class Bins(NamedTuple):
    """Adaptive pooling from `size` to `bins`."""

    size: int
    bins: int

    def __call__(self, first: int, last: int) -> Range | None:
        return first * self.size // self.bins, -(-(last + 1) * self.size // self.bins) - 1


class Resize(NamedTuple):
    """Output p reads the neighbours of p * ratio + offset."""

    ratio: Fraction
    offset: Fraction
    reach: int  # 0: the one at or below it, 1: the two around it, 2: four

    def __call__(self, first: int, last: int) -> Range | None:
        low, high = first * self.ratio + self.offset, last * self.ratio + self.offset
        if self.reach == 0:
            return floor(low), floor(high)
        return floor(low) - (self.reach - 1) * (low % 1 > 0), ceil(high) + (self.reach - 1) * (high % 1 > 0)


Map = Callable[[int, int], Range | None]
_SAME = (Window(), Window())


class Step(NamedTuple):
    """What an operation does to the image's axes."""

    axes: Axes  # in its result
    maps: tuple[Map, Map] = _SAME  # of rows and columns
    scale: tuple[Fraction | int, Fraction | int] = (1, 1)  # how many steps of the input one of the output is
    everything: bool = False  # whether it looks at the whole image as well, for a statistic
    resizes: bool = False


class Edge(NamedTuple):
    source: int
    maps: tuple[Map, Map] | None  # None: it is read as a whole


class Node(NamedTuple):
    """The result of an operation."""

    name: str
    axes: Axes | None  # None: its values belong to no place in the image
    size: tuple[int, int]
    stride: tuple[Fraction, Fraction]
    edges: list[Edge]
    resizes: bool = False


class Graph:
    """The operations that ran on an image, each with what it reads."""

    def __init__(self, image: torch.Tensor):  # [N, C, H, W]
        self.nodes: list[Node] = []
        self._number: dict[int, int] = {}  # of a tensor's node, by the tensor's id
        self._tensors: dict[int, list[torch.Tensor]] = {}  # by storage; kept, so that ids stay theirs
        axes = (image.dim() - 2, image.dim() - 1)
        self._assign(image, Node("input", axes, tuple(image.shape[-2:]), (Fraction(1),) * 2, []))

    def number(self, tensor: torch.Tensor) -> int | None:
        """Of the node that `tensor` is the result of; None where it does not depend on the image."""
        return self._number.get(id(tensor))

    def stride(self, tensor: torch.Tensor) -> Fraction | None:
        """How many pixels of the image one of `tensor` is, the larger of the two axes; None where it has no places.

        Strides of convolutions and poolings count and enlarging undoes them. Making an image smaller by a resize or by
        adaptive pooling counts nothing.
        """
        number = self.number(tensor)
        placed = number is not None and self.nodes[number].axes is not None
        return max(self.nodes[number].stride) if placed else None

    def record(self, func, args, kwargs, result, name: str) -> None:
        """The call func(*args, **kwargs) of an ATen operator inside the module `name`."""
        outputs = list(tensors_in(result))
        sources = {id(t): t for t in tensors_in((args, kwargs)) if id(t) in self._number}
        values = _arguments(func, args, kwargs)
        written = [values[a.name] for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
        for output in outputs:
            if sources:
                self._assign(output, self._node(name, list(sources.values()), func, values, output))
            else:
                self._keep(output)
        for tensor in tensors_in(written):
            if sources and id(tensor) in self._number:
                self._written(tensor)

    def link(self, input: torch.Tensor, output: torch.Tensor, name: str) -> None:
        """`output` is a function of `input` at each place by itself, whatever calls were recorded in between."""
        number = self.number(input)
        node = None if number is None else self.nodes[number]
        if node is not None and node.axes is not None and output.dim() - 1 not in node.axes:
            self._assign(output, node._replace(name=name, edges=[Edge(number, _SAME)], resizes=False))

    def field(self, output: torch.Tensor) -> tuple[tuple[int, int], list[str]]:
        """The most rows and columns of the image that one value looks at, and which modules look at all of it.

        The value is one of `output`, before the resizes that it may end with.
        """
        number = self.number(output)
        while number is not None and self.nodes[number].resizes:
            number = self.nodes[number].edges[0].source
        if number is None:
            return (0, 0), []
        reached, ranges, whole = {number}, {}, []
        if self.nodes[number].axes is not None:
            ranges[number] = [[(i, i) for i in range(size)] for size in self.nodes[number].size]
        for i in range(number, 0, -1):
            if i not in reached:
                continue
            for source, maps in self.nodes[i].edges:
                reached.add(source)
                if maps is None and self.nodes[source].axes is not None:
                    whole.append(self.nodes[i].name)
                elif maps is not None and i in ranges:
                    ranges[source] = _joined(ranges.get(source), maps, ranges[i])
        names = list(dict.fromkeys(reversed(whole)))
        if 0 not in ranges:
            return self.nodes[0].size, names
        return tuple(max(last - first + 1 for first, last in filter(None, axis)) for axis in ranges[0]), names

    def _keep(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """All tensors that share `tensor`'s memory."""
        alike = self._tensors.setdefault(tensor.untyped_storage()._cdata, [])
        if not any(tensor is other for other in alike):
            alike.append(tensor)
        return alike

    def _assign(self, tensor: torch.Tensor, node: Node) -> None:
        self.nodes.append(node)
        self._number[id(tensor)] = len(self.nodes) - 1
        self._keep(tensor)

    def _written(self, tensor: torch.Tensor) -> None:
        """Others that look at the memory of `tensor`, just written to, depend on what was written."""
        new = self._number[id(tensor)]
        for other in self._keep(tensor):
            if other is tensor:
                continue
            earlier = self.number(other)
            alike = other.dim() == tensor.dim() and other.shape[-2:] == tensor.shape[-2:]
            node = self.nodes[new if earlier is None else earlier]
            edges = [Edge(n, _SAME if alike else None) for n in {new, earlier} - {None}]
            axes = node.axes if alike else None
            self._assign(other, node._replace(edges=edges, axes=axes, resizes=False))

    def _node(self, name, sources, func, values, output) -> Node:
        numbers = [self._number[id(t)] for t in sources]
        placed = [t for t, n in zip(sources, numbers, strict=True) if self.nodes[n].axes is not None]
        step = self._step(placed, func, values, output) if placed else None
        if step is None:
            return Node(name, None, (1, 1), (Fraction(1),) * 2, [Edge(n, None) for n in numbers])
        size = tuple(output.shape[axis] for axis in step.axes)
        edges, strides = [], []
        for number in numbers:
            node = self.nodes[number]
            if node.axes is None:
                edges.append(Edge(number, None))
                continue
            maps = zip(step.maps, node.size, size, strict=True)
            edges.append(Edge(number, tuple(Window(0) if n == 1 < m and step.maps == _SAME else f for f, n, m in maps)))
            if step.everything:
                edges.append(Edge(number, None))
            strides.append([one * more for one, more in zip(node.stride, step.scale, strict=True)])
        return Node(name, step.axes, size, tuple(map(max, *strides, strides[0])), edges, step.resizes)

    def _step(self, placed, func, values, output) -> Step | None:
        """What the table says; None: nothing."""
        first = placed[0]
        axes = self.nodes[self._number[id(first)]].axes
        from_end = {tuple(a - t.dim() for a in self.nodes[self._number[id(t)]].axes) for t in placed}
        name = func._schema.name.removeprefix("aten::").removesuffix("_")
        rule = _RULES.get(name)
        if rule is None and _is_pointwise(func, name):
            rule = _pointwise
        if rule is None and "dim" in values and "keepdim" in values:
            rule = _reduction
        return rule(first, axes, values, output) if rule is not None and len(from_end) == 1 else None


def _joined(earlier, maps, ranges):
    """Per axis, the ranges that `ranges` read through `maps`, each joined with the one that is there."""
    read = [[None if r is None else f(*r) for r in axis] for f, axis in zip(maps, ranges, strict=True)]
    if earlier is None:
        return read
    return [
        [b if a is None else a if b is None else (min(a[0], b[0]), max(a[1], b[1])) for a, b in zip(*axis, strict=True)]
        for axis in zip(earlier, read, strict=True)
    ]


def tensors_in(value) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(item)


def _arguments(func, args, kwargs) -> dict:
    """The call's arguments by name, defaults included."""
    schema = func._schema.arguments
    given = {argument.name: value for argument, value in zip(schema, args, strict=False)} | kwargs
    return {argument.name: given.get(argument.name, argument.default_value) for argument in schema}


def _is_pointwise(func, name: str) -> bool:
    """Whether PyTorch's tags say so, which in-place operators sometimes lack."""
    twin = getattr(getattr(torch.ops.aten, name, None), func._overloadname, func)
    return name in _POINTWISE or torch.Tag.pointwise in (*func.tags, *twin.tags)


def _pair(value) -> tuple[int, int]:
    value = [value] if isinstance(value, int) else list(value)
    return tuple(value * 2)[:2]


def _pointwise(x, axes: Axes, values, output) -> Step:
    more = output.dim() - x.dim()
    return Step((axes[0] + more, axes[1] + more))


def _convolution(x, axes: Axes, values, output) -> Step | None:
    if values["input"] is not x or axes != (2, 3) or x.dim() != 4:
        return None
    kernel = values["weight"].shape[2:]
    strides, pads = _pair(values["stride"]), _pair(values["padding"])
    extents = [rate * (taps - 1) + 1 for rate, taps in zip(_pair(values["dilation"]), kernel, strict=True)]
    kind = Spread if values["transposed"] else Window
    maps = tuple(kind(*numbers) for numbers in zip(strides, pads, extents, strict=True))
    return Step(axes, maps, tuple(Fraction(1, s) if values["transposed"] else s for s in strides))


def _pool(x, axes: Axes, values, output) -> Step | None:
    if tuple(output.shape[axis] for axis in axes) == (1, 1):
        return None
    kernel, strides, pads = (_pair(values[key] or 1) for key in ("kernel_size", "stride", "padding"))
    strides = strides if values["stride"] else kernel
    extents = [rate * (k - 1) + 1 for rate, k in zip(_pair(values.get("dilation", 1)), kernel, strict=True)]
    return Step(axes, tuple(Window(*numbers) for numbers in zip(strides, pads, extents, strict=True)), strides)


def _adaptive_pool(x, axes: Axes, values, output) -> Step | None:
    sizes = [(x.shape[axis], output.shape[axis]) for axis in axes]
    whole = all(after == 1 for _, after in sizes)
    return None if whole else Step(axes, tuple(Bins(*size) for size in sizes))


def _resize(reach: int, half: bool):
    """The rule of a resize; `half`: pixels' centres lie between the corners of a grid, not on it."""

    def rule(x, axes: Axes, values, output) -> Step:
        maps, scale = [], []
        for axis, given in zip(axes, (values.get("scales_h"), values.get("scales_w")), strict=True):
            before, after = x.shape[axis], output.shape[axis]
            if before == 1:
                maps.append(Window(0))
            elif values.get("align_corners"):
                maps.append(Resize(Fraction(before - 1, max(1, after - 1)), Fraction(0), reach))
            else:
                ratio = 1 / Fraction(given) if given else Fraction(before, after)
                maps.append(Resize(ratio, ratio / 2 - (Fraction(1, 2) if reach else 0) if half else Fraction(0), reach))
            scale.append(min(Fraction(1), Fraction(before, after)))
        return Step(axes, tuple(maps), tuple(scale), resizes=True)

    return rule


def _pad(x, axes: Axes, values, output) -> Step:
    amounts = values.get("pad", values.get("padding"))
    before = [amounts[2 * i] if 2 * i < len(amounts) else 0 for i in (x.dim() - 1 - axis for axis in axes)]
    return Step(axes, tuple(Window(1, pad) for pad in before))


def _slice(x, axes: Axes, values, output) -> Step:
    start, dim = values["start"] or 0, values["dim"] % x.dim()
    start = max(0, start + x.shape[dim] if start < 0 else start)
    maps = tuple(Window(values["step"], -start) if axis == dim else Window() for axis in axes)
    return Step(axes, maps, tuple(values["step"] if axis == dim else 1 for axis in axes))


def _along(x, axes: Axes, values, output) -> Step | None:
    """What stays at its place unless it runs along one of the axes: cat, split, softmax."""
    return None if values["dim"] % x.dim() in axes else Step(axes)


def _stack(x, axes: Axes, values, output) -> Step:
    dim = values["dim"] % output.dim()
    return Step(tuple(axis + (dim <= axis) for axis in axes))


def _select(x, axes: Axes, values, output) -> Step | None:
    dim = values["dim"] % x.dim()
    return None if dim in axes else Step(tuple(axis - (dim < axis) for axis in axes))


def _reduction(x, axes: Axes, values, output) -> Step | None:
    dims = range(x.dim()) if values["dim"] is None or values["dim"] == [] else values["dim"]
    dims = {dim % x.dim() for dim in ([dims] if isinstance(dims, int) else dims)}
    if dims & set(axes):
        return None
    return Step(axes if values["keepdim"] else tuple(axis - sum(d < axis for d in dims) for axis in axes))


def _layer_norm(x, axes: Axes, values, output) -> Step:
    over = x.dim() - len(values["normalized_shape"])
    return Step(axes, everything=any(axis >= over for axis in axes))


def _group_norm(x, axes: Axes, values, output) -> Step | None:
    return Step(axes, everything=True) if output.dim() == x.dim() else None


def _batch_norm(x, axes: Axes, values, output) -> Step | None:
    return Step(axes, everything=bool(values.get("training"))) if output.dim() == x.dim() else None


def _permute(x, axes: Axes, values, output) -> Step:
    dims = [dim % x.dim() for dim in values["dims"]]
    return Step(tuple(dims.index(axis) for axis in axes))


def _transpose(x, axes: Axes, values, output) -> Step:
    a, b = values["dim0"] % x.dim(), values["dim1"] % x.dim()
    return Step(tuple({a: b, b: a}.get(axis, axis) for axis in axes))


def _view(x, axes: Axes, values, output) -> Step | None:
    """A new shape in which rows and columns are still dimensions by themselves."""

    def places(shape, axis_size, before) -> Iterable[int]:
        return (i for i, size in enumerate(shape) if size == axis_size and prod(shape[:i]) == before)

    if x.numel() == 0:
        return None
    found = tuple(next(iter(places(output.shape, x.shape[a], prod(x.shape[:a]))), None) for a in axes)
    return None if None in found or found[0] == found[1] else Step(found)


def _pixel_shuffle(x, axes: Axes, values, output) -> Step:
    factor = values["upscale_factor"]
    return Step(axes, (Resize(Fraction(1, factor), Fraction(0), 0),) * 2, (Fraction(1, factor),) * 2)


def _pixel_unshuffle(x, axes: Axes, values, output) -> Step:
    factor = values["downscale_factor"]
    return Step(axes, (Window(factor, 0, factor),) * 2, (factor, factor))


_RULES = {
    "convolution": _convolution,
    "max_pool2d_with_indices": _pool,
    "avg_pool2d": _pool,
    "_adaptive_avg_pool2d": _adaptive_pool,
    "adaptive_max_pool2d": _adaptive_pool,
    "upsample_nearest2d": _resize(0, half=False),
    "_upsample_nearest_exact2d": _resize(0, half=True),
    "upsample_bilinear2d": _resize(1, half=True),
    "upsample_bicubic2d": _resize(2, half=True),
    "constant_pad_nd": _pad,
    "reflection_pad2d": _pad,
    "replication_pad2d": _pad,
    "slice": _slice,
    "cat": _along,
    "stack": _stack,
    "select": _select,
    "unbind": _select,
    "split": _along,
    "split_with_sizes": _along,
    "_softmax": _along,
    "_log_softmax": _along,
    "native_layer_norm": _layer_norm,
    "native_group_norm": _group_norm,
    "native_batch_norm": _batch_norm,
    "_native_batch_norm_legit": _batch_norm,
    "permute": _permute,
    "transpose": _transpose,
    "view": _view,
    "_unsafe_view": _view,
    "unsqueeze": _view,
    "squeeze": _view,
    "expand": _pointwise,
    "pixel_shuffle": _pixel_shuffle,
    "pixel_unshuffle": _pixel_unshuffle,
}
# Pointwise without PyTorch's tag.
_POINTWISE = {
    "_native_batch_norm_legit_no_training", "_prelu_kernel", "_to_copy", "alias", "copy", "detach", "hardswish",
    "leaky_relu", "log_sigmoid_forward", "native_dropout",
}  # fmt: skip
