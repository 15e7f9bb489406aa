"""The Triton kernels that compile_table.py compiles: for each family its cases for a target.

An operator runs on meta tensors, and every launch it makes is caught with its arguments.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from functools import partial
from typing import NamedTuple
from unittest import mock

# What the forced tile shapes are compiled for: the other targets get the tiles that the planner chooses.
TILES_TARGET = 90


class DepthwiseCase(NamedTuple):
    """A depthwise convolution whose kernels are compiled. Its text names the rows."""

    dtype: str = "bfloat16"
    layout: str = "channels_last"
    filter: tuple[int, int] = (3, 3)
    stride: int = 1
    dilation: int = 1
    multiplier: int = 1
    activation: str = "none"
    bias: bool = False
    index_64: bool = False
    tile: tuple[int, ...] | None = None  # one of CONFIGS; None: what the planner chooses

    def __str__(self) -> str:
        words = [self.dtype, self.layout, "x".join(map(str, self.filter))]
        words += [f"{name} {value}" for name, value in self._asdict().items() if name in _NUMBERS and value != 1]
        words += [self.activation] if self.activation != "none" else []
        words += ["bias"] if self.bias else []
        words += ["64-bit"] if self.index_64 else []
        words += [f"tile {'x'.join(map(str, self.tile))}"] if self.tile else []
        return " ".join(words)

    def launches(self) -> list[tuple[object, dict]]:
        """Every (kernel, arguments) that forward and backward launch, on 16 images of Xception's middle flow."""
        import torch

        from fastseg.ops.depthwise import triton as operator

        memory_format = torch.channels_last if self.layout == "channels_last" else torch.contiguous_format
        options = {"dtype": getattr(torch, self.dtype), "device": "meta"}
        x = torch.empty(16, 728, 33, 33, memory_format=memory_format, **options)
        weight = torch.empty(728 * self.multiplier, 1, *self.filter, **options)
        bias = torch.empty(weight.shape[0], **options) if self.bias else None
        pad_h, pad_w = (self.dilation * (k - 1) // 2 for k in self.filter)
        geometry = ((self.stride,) * 2, (pad_h, pad_h, pad_w, pad_w), (self.dilation,) * 2)
        with caught_launches(operator, self.index_64, self.tile) as launches:
            y = operator.forward(x, weight, bias, *geometry, self.activation)
            operator.backward(torch.empty_like(y), x, weight, *geometry, (True, True, self.bias))
        return launches


_NUMBERS = ("stride", "dilation", "multiplier")


def depthwise_cases(target: int) -> list[DepthwiseCase]:
    """Each dtype, layout, filter size and stride that networks use, and one case for every other code path."""
    case = DepthwiseCase
    cases = [case(layout=layout, filter=(k, k)) for layout in ("channels_last", "contiguous") for k in (3, 5, 7)]
    cases += [case(layout=layout, stride=2) for layout in ("channels_last", "contiguous")]
    cases += [case(layout=layout, dtype="float32") for layout in ("channels_last", "contiguous")]
    cases += [
        case(dtype="float16"),
        case(dtype="float32", stride=2),
        case(dilation=12),
        case(filter=(9, 9)),  # taller than MAX_BLOCK_R: several turns
        case(multiplier=2),
        case(activation="silu", bias=True),
        case(index_64=True),
    ]
    if target == TILES_TARGET:
        from fastseg.ops.depthwise.triton import CONFIGS

        cases += [case(tile=tile) for tile in CONFIGS]
    return cases


class DilatedCase(NamedTuple):
    """A dense convolution, or the branches of a pyramid, whose kernels are compiled. Its text names the rows."""

    dtype: str = "bfloat16"
    tf32: bool = False
    channels: tuple[int, int] = (2048, 256)
    filter: tuple[int, int] = (3, 3)
    stride: int = 1
    images: int = 16
    rates: tuple[int, ...] = ()  # of the branches of a pyramid; (): no pyramid
    reduction: str = "concat"  # of branches
    activation: str = "none"
    scale: bool = False  # and bias
    image_bias: bool = False  # one of each image
    statistics: bool = False  # of branches
    index_64: bool = False
    tile: tuple[int, ...] | None = None  # one of the tables' configurations; None: what the planner chooses
    shared: bool = False  # whether programs share the work evenly, whatever the planner chooses
    target: int = TILES_TARGET  # what the planner takes the device for

    def __str__(self) -> str:
        words = [
            "tf32" if self.tf32 else self.dtype,
            "{} to {}".format(*self.channels),
            "x".join(map(str, self.filter)),
        ]
        words += [f"stride {self.stride}"] if self.stride != 1 else []
        words += [f"batch {self.images}"] if self.images != 16 else []
        words += [f"{len(self.rates)} branches"] if self.rates else []
        words += [self.reduction] if self.reduction != "concat" else []
        words += [self.activation] if self.activation != "none" else []
        flags = {"scale": self.scale, "image bias": self.image_bias, "statistics": self.statistics}
        flags |= {"64-bit": self.index_64, "shared": self.shared}
        words += [name for name, is_set in flags.items() if is_set]
        words += [f"tile {'x'.join(map(str, self.tile))}"] if self.tile else []
        return " ".join(words)

    def launches(self) -> list[tuple[object, dict]]:
        """Every (kernel, arguments) that forward and backward launch, for one or all branches of DeepLab's ASPP."""
        import torch

        from fastseg.ops.aspp import triton as pyramid
        from fastseg.ops.dilated import triton as operator

        options = {"dtype": getattr(torch, self.dtype), "device": "meta", "memory_format": torch.channels_last}
        x = torch.empty(self.images, self.channels[0], 33, 33, **options)
        weight = torch.empty(self.channels[1], self.channels[0], *self.filter, **options)
        scale = bias = None
        outputs = self.channels[1] * (len(self.rates) if self.rates and self.reduction == "concat" else 1)
        if self.scale:
            scale, bias = (torch.empty(outputs, device="meta") for _ in range(2))
        if self.image_bias:
            bias = torch.empty(self.images, outputs, device="meta")
        dilation = 6 if self.stride == 1 else 1
        pad_h, pad_w = (dilation * (k - 1) // 2 for k in self.filter)
        geometry = ((self.stride,) * 2, (pad_h, pad_h, pad_w, pad_w), (dilation,) * 2)
        torch.backends.cudnn.conv.fp32_precision = "tf32" if self.tf32 else "ieee"
        limits = operator.device_limits(x.device)._replace(capability=self.target // 10)
        forced = operator.forced_config(operator.SHARED_CONFIG, operator.SHARED)
        with (
            mock.patch.object(operator, "device_limits", return_value=limits),
            mock.patch.object(pyramid, "device_limits", return_value=limits),
            forced if self.shared else contextlib.nullcontext(),
            caught_launches(operator, self.index_64, self.tile) as launches,
            caught_launches(pyramid, self.index_64, None) as grouped,
        ):
            if self.rates:
                weights, rest = [weight] * len(self.rates), (list(self.rates), self.reduction)
                y, _ = pyramid.forward(x, weights, bias, rest[0], self.activation, rest[1], self.statistics, scale)
                pyramid.backward(torch.empty_like(y), x, weights, *rest, True, True)
                return grouped + launches[:1]  # the second stages are one kernel, compiled for a lone convolution
            y = operator.forward(x, weight, bias, *geometry, self.activation, scale)
            # What the tile is for: some are for gradients of weights alone, some for anything else.
            is_wide = self.tile in operator.WIDE_CONFIGS
            has_grad_weight = not is_wide and not self.shared and not isinstance(self.tile, operator.BoxConfig)
            has_product = not isinstance(self.tile, operator.GradBoxConfig)
            if not has_product or (self.tile == operator.WIDE_CONFIGS[0] and self.activation != "none"):
                launches.clear()
            operator.backward(torch.empty_like(y), x, weight, *geometry, (has_product, has_grad_weight, False))
        return launches


def dilated_cases(target: int) -> list[DilatedCase]:
    """Each dtype, wide and narrow channels, and one case for every other code path."""
    case = partial(DilatedCase, target=target)
    pyramid = partial(case, rates=(6, 12, 18))
    projection = partial(case, channels=(1280, 256), filter=(1, 1), image_bias=True, scale=True, activation="relu")
    cases = [case(dtype=dtype, tf32=tf32) for dtype, tf32 in _DILATED_TYPES]
    cases += [case(dtype=dtype, tf32=tf32, channels=(67, 19)) for dtype, tf32 in _DILATED_TYPES]
    cases += [
        case(dtype="float16"),
        case(images=1),
        case(channels=(2048, 21)),
        case(channels=(2048, 171)),
        case(channels=(3, 64), filter=(7, 7), stride=2),
        case(stride=2),
        case(filter=(1, 1)),
        case(activation="silu", scale=True),
        case(index_64=True),
        projection(),
        pyramid(channels=(2048, 21), reduction="sum", rates=(6, 12, 18, 24)),
        pyramid(images=1),
        pyramid(activation="silu", scale=True),
        pyramid(statistics=True, index_64=True),
    ]
    cases += [pyramid(dtype=dtype, tf32=tf32, statistics=True) for dtype, tf32 in _DILATED_TYPES]
    cases += [pyramid(dtype=dtype, tf32=tf32, channels=(67, 19)) for dtype, tf32 in _DILATED_TYPES]
    if target == TILES_TARGET:
        from fastseg.ops.dilated.triton import CONFIGS, IEEE_CONFIGS, NARROW_CONFIGS

        for tile in CONFIGS:
            cases += [case(tile=tile), projection(tile=tile), pyramid(tile=tile, statistics=True, scale=True)]
            cases += [kind(dtype="float32", tf32=True, tile=tile) for kind in (case, pyramid)]
        cases += [pyramid(channels=(67, 19), statistics=True, tile=tile) for tile in NARROW_CONFIGS]
        cases += [pyramid(dtype="float32", statistics=True, tile=tile) for tile in IEEE_CONFIGS]
        cases += [case(channels=(67, 19), tile=tile) for tile in NARROW_CONFIGS]
        cases += [case(dtype="float32", tf32=True, channels=(67, 19), tile=tile) for tile in NARROW_CONFIGS]
        cases += [case(dtype="float32", tile=tile) for tile in IEEE_CONFIGS]
    if target >= 90:
        from fastseg.ops.dilated.triton import BOX_CONFIGS, GRAD_BOX_CONFIGS, WIDE_CONFIGS
        from fastseg.ops.dilated.triton_plan import MAX_IMAGE_BIAS, MAX_RESULT_BYTES

        if target == 90:
            cases += [case(tile=tile, activation=act) for tile in WIDE_CONFIGS for act in ("none", "silu")]
            cases += [pyramid(tile=tile) for tile in WIDE_CONFIGS]
            lone = WIDE_CONFIGS[1]
            cases += [pyramid(tile=lone, activation="silu", scale=True), pyramid(tile=lone, statistics=True)]
            cases += [case(shared=True), case(shared=True, activation="silu", scale=True)]
        cases += [case(tile=tile) for tile in {c[3:]: c for c in GRAD_BOX_CONFIGS}.values()]

        # One box of each tile: they differ in a few constants of the epilogue.
        for tile in {(c.BLOCK_M, *c[3:]): c for c in BOX_CONFIGS}.values():
            cases += [case(tile=tile), case(tile=tile, channels=(2048, 171)), case(tile=tile, index_64=True)]
            cases += [case(tile=tile, activation="silu", scale=True)]
            cases += [projection(tile=tile)] if tile.results_per_thread <= MAX_IMAGE_BIAS else []
            if 4 * tile.results_per_thread <= MAX_RESULT_BYTES:
                cases += [kind(tile=tile, dtype="float32", tf32=True) for kind in (case, projection)]
                cases += [case(tile=tile, dtype="float32", tf32=True, activation="silu", scale=True, index_64=True)]
    return cases


_DILATED_TYPES = (("bfloat16", False), ("float32", True), ("float32", False))


class SeparableCase(NamedTuple):
    """A separable convolution, or the branches of a pyramid, whose kernel is compiled. Its text names the rows."""

    dtype: str = "bfloat16"
    tf32: bool = False
    channels: tuple[int, int] = (728, 728)
    filter: tuple[int, int] = (3, 3)
    stride: int = 1
    multiplier: int = 1
    images: int = 16
    branches: int = 0  # of a pyramid, besides one that is plain; 0: no pyramid
    activation: str = "none"
    scale: bool = False  # and bias, of both halves
    statistics: bool = False
    index_64: bool = False
    tile: tuple[int, ...] | None = None  # one of the tables' configurations; None: what the planner chooses
    target: int = TILES_TARGET  # what the planner takes the device for

    def __str__(self) -> str:
        dtype = "tf32" if self.tf32 else self.dtype
        words = [dtype, "{} to {}".format(*self.channels), "x".join(map(str, self.filter))]
        words += [f"{self.branches} branches"] if self.branches else []
        numbers = (("stride", self.stride, 1), ("multiplier", self.multiplier, 1), ("batch", self.images, 16))
        words += [f"{name} {value}" for name, value, usual in numbers if value != usual]
        words += [self.activation] if self.activation != "none" else []
        flags = {"scale": self.scale, "statistics": self.statistics, "64-bit": self.index_64}
        words += [name for name, is_set in flags.items() if is_set]
        words += [f"tile {'x'.join(map(str, self.tile))}"] if self.tile else []
        return " ".join(words)

    def launches(self) -> list[tuple[object, dict]]:
        """Every (kernel, arguments) that forward launches, for Xception's middle flow or a pyramid of DeepLab v3+."""
        import torch

        from fastseg.ops.separable import triton as operator
        from fastseg.ops.separable import triton_plan
        from fastseg.ops.separable_aspp import triton as pyramid

        options = {"dtype": getattr(torch, self.dtype), "device": "meta"}
        channels, outputs = self.channels
        depth = channels * self.multiplier
        x = torch.empty(self.images, channels, 33, 33, memory_format=torch.channels_last, **options)
        depthwise = torch.empty(depth, 1, *self.filter, **options)
        pointwise = torch.empty(outputs, depth, 1, 1, **options)

        def vectors(halves, wholes):
            sizes = (halves * depth, wholes * outputs)
            return [torch.empty(size, device="meta") if self.scale else None for size in sizes]

        torch.backends.cudnn.conv.fp32_precision = "tf32" if self.tf32 else "ieee"
        activations = (self.activation, self.activation)
        with (
            mock.patch.object(triton_plan, "is_hopper", return_value=self.target // 10 == 9),
            caught_launches(operator, self.index_64, self.tile) as launches,
        ):
            if self.branches:
                own = self.branches
                both, filters = vectors(own, own + 1), ([depthwise] * own, [pointwise] * (own + 1))
                pyramid.forward(x, *filters, *both, [6, 12, 18][:own], *activations, self.statistics, *both)
            else:
                pad_h, pad_w = (k // 2 for k in self.filter)
                geometry = ((self.stride,) * 2, (pad_h, pad_h, pad_w, pad_w), (1, 1))
                operator.forward(x, depthwise, pointwise, *vectors(1, 1), *geometry, *activations, *vectors(1, 1))
        return launches


def separable_cases(target: int) -> list[SeparableCase]:
    """Each dtype, wide and narrow channels, and one case for every other code path."""
    case = partial(SeparableCase, target=target)
    pyramid = partial(case, channels=(2048, 256), branches=3)
    cases = [case(dtype=dtype, tf32=tf32) for dtype, tf32 in _DILATED_TYPES]
    cases += [case(dtype=dtype, tf32=tf32, channels=(67, 19)) for dtype, tf32 in _DILATED_TYPES]
    cases += [
        case(dtype="float16"),
        case(images=1),
        case(channels=(96, 24)),
        case(channels=(728, 128)),
        case(filter=(5, 5)),
        case(filter=(7, 7)),
        case(stride=2),
        case(multiplier=2),
        case(activation="silu", scale=True),
        case(activation="silu", scale=True, index_64=True),
        pyramid(),
        pyramid(images=1),
        pyramid(activation="relu", scale=True),
        pyramid(statistics=True),
        pyramid(statistics=True, index_64=True),
        pyramid(dtype="float32", tf32=True),
        pyramid(channels=(67, 19)),
    ]
    if target == TILES_TARGET:
        from fastseg.ops.separable.triton import CONFIGS, IEEE_CONFIGS, NARROW_CONFIGS
        from fastseg.ops.separable.triton_plan import MAX_RESULTS_ELSE

        for tile in CONFIGS:
            cases += [case(tile=tile), pyramid(tile=tile, activation="relu", scale=True)]
            if tile.results_per_thread <= MAX_RESULTS_ELSE:
                cases += [case(dtype="float32", tf32=True, tile=tile), pyramid(statistics=True, tile=tile)]
        cases += [case(channels=(67, 19), tile=tile) for tile in NARROW_CONFIGS]
        cases += [case(dtype="float32", tile=tile) for tile in IEEE_CONFIGS]
    return cases


class HeadCase(NamedTuple):
    """A segmentation head whose kernels are compiled. Its text names the rows."""

    dtype: str = "bfloat16"
    layout: str = "contiguous"
    sizes: tuple[int, int] = (128, 512)  # of the logits, and of the labels; both square
    classes: int = 150
    align_corners: bool = False
    weight: bool = False  # and label smoothing, and gradients of each pixel's loss
    index_64: bool = False

    def __str__(self) -> str:
        words = [self.dtype, self.layout, f"{self.classes} classes", "{} to {}".format(*self.sizes)]
        flags = {"aligned": self.align_corners, "weight": self.weight, "64-bit": self.index_64}
        return " ".join(words + [name for name, is_set in flags.items() if is_set])

    def launches(self) -> list[tuple[object, dict]]:
        """Every (kernel, arguments) that resize, argmax, loss and their gradients launch, on 16 images."""
        import torch

        from fastseg.ops.head import triton as operator
        from fastseg.ops.head import triton_loss, triton_planes

        small, large = self.sizes
        options = {"dtype": getattr(torch, self.dtype), "device": "meta"}
        memory_format = torch.channels_last if self.layout == "channels_last" else torch.contiguous_format
        logits = torch.empty(16, self.classes, small, small, memory_format=memory_format, **options)
        target = torch.empty(16, large, large, dtype=torch.int64, device="meta")
        weight = torch.empty(self.classes, **options) if self.weight else None
        loss = (logits, target, weight, 255, 0.1 if self.weight else 0.0, self.align_corners)
        with contextlib.ExitStack() as stack:
            modules = (operator, triton_loss, triton_planes)
            caught = [stack.enter_context(caught_launches(module, self.index_64, None)) for module in modules]
            y = operator.forward(logits, (large, large), None, self.align_corners)
            operator.backward(y, logits.shape, None, self.align_corners)
            operator.argmax(logits, (large, large), self.align_corners, torch.int64)
            if self.weight:
                operator.cross_entropy(*loss, "none", False)
                operator.cross_entropy_backward(torch.empty_like(target, dtype=torch.float32), *loss)
            else:
                operator.cross_entropy(*loss, "mean", True)
        # Of several launches of a kernel the first is compiled.
        launches = {}
        for kernel, arguments in itertools.chain(*caught):
            launches.setdefault(id(kernel), (kernel, arguments))
        return list(launches.values())


def head_cases(target: int) -> list[HeadCase]:
    """Each layout, and every other code path on one target."""
    case = HeadCase
    cases = [case(), case(layout="channels_last", dtype="float16", classes=64), case(dtype="float32", weight=True)]
    if target == TILES_TARGET:
        cases += [
            case(dtype="float16"),
            case(layout="channels_last"),
            case(layout="channels_last", dtype="float32", classes=19, sizes=(193, 769), index_64=True),
            case(classes=21, sizes=(129, 513), align_corners=True),
            case(sizes=(128, 256), weight=True, index_64=True),  # two rows at once
            case(sizes=(128, 100)),  # smaller
        ]
    return cases


@contextlib.contextmanager
def caught_launches(operator, index_64: bool, tile: tuple[int, ...] | None):
    """A list that fills with the (kernel, arguments) that `operator`, a family's triton.py, would launch."""
    launches = []
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.dict(os.environ, {"FASTSEG_FORCE_INDEX64": str(int(index_64))}))
        stack.enter_context(
            mock.patch.object(operator, "launch", lambda kernel, _, **arguments: launches.append((kernel, arguments)))
        )
        if tile:
            stack.enter_context(operator.forced_config(tile))
        yield launches


# The families, each as its cases for a target.
TRITON_CASES = (depthwise_cases, dilated_cases, separable_cases, head_cases)

Case = DepthwiseCase | DilatedCase | SeparableCase | HeadCase
