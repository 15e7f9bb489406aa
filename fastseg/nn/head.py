"""The segmentation head's modules, and what `fastseg.accelerate` makes of modules that resize bilinearly.

torch.nn.Upsample and torch.nn.UpsamplingBilinear2d get a class whose forward runs fastseg's operator. Modules of other
libraries that call torch.nn.functional.interpolate in their own forward are known by that very function: they get a
class with the same code, in which `F.interpolate` is ours.
"""

from __future__ import annotations

import functools
import sys
import types

import torch
import torch.nn.functional as F

from fastseg import ops
from fastseg.nn.conv import under_transform
from fastseg.nn.folding import original_class


class BilinearUpsample(torch.nn.Upsample):
    """torch.nn.Upsample(mode="bilinear") that runs on `fastseg.ops.upsample_bilinear2d`.

    Args:
        size: (height, width) of the output in pixels, or one int for both; or None.
        scale_factor: (height, width) multipliers, or one for both; or None. One of the two has to be given.
        align_corners: whether the centres of the corner pixels of input and output coincide, instead of the corners.
        backend: as in `fastseg.ops.upsample_bilinear2d`; None takes the surrounding choice.

    Shapes: [N, C, H, W] -> [N, C, P, Q]. Dtypes, errors and promises: see `fastseg.ops.upsample_bilinear2d`.

    Example:
        >>> import torch, fastseg
        >>> up = fastseg.nn.BilinearUpsample(scale_factor=4)
        >>> up(torch.randn(1, 21, 33, 33)).shape
        torch.Size([1, 21, 132, 132])
    """

    def __init__(self, size=None, scale_factor=None, align_corners: bool = False, *, backend: str | None = None):
        super().__init__(size, scale_factor, mode="bilinear", align_corners=align_corners)
        self.backend = backend

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return upsample(self, input, self.backend)

    def extra_repr(self) -> str:
        extra = super().extra_repr()
        if self.align_corners:
            extra += ", align_corners=True"
        return extra if self.backend is None else f"{extra}, backend={self.backend}"


class UpsampleCrossEntropyLoss(torch.nn.CrossEntropyLoss):
    """torch.nn.CrossEntropyLoss of low-resolution logits against full-resolution targets, without full-size logits.

    Equals `CrossEntropyLoss(...)(interpolate(logits, target.shape[-2:], mode="bilinear"), target)`; see
    `fastseg.ops.upsample_cross_entropy`.

    Args:
        weight: [C], what a pixel of each class counts, kept as a buffer; or None.
        ignore_index: the target of pixels that count nothing.
        reduction: "none", "mean" (over the weights of the pixels) or "sum".
        label_smoothing: in [0, 1], the share of the target that is spread over all classes.
        align_corners: as in `fastseg.ops.upsample_bilinear2d`.
        backend: as in `fastseg.ops.upsample_cross_entropy`; None takes the surrounding choice.

    Shapes: logits [N, C, h, w] and target [N, H, W] -> a scalar, or [N, H, W] for "none". Dtypes, errors and promises:
    see `fastseg.ops.upsample_cross_entropy`.

    Example:
        >>> import torch, fastseg
        >>> criterion = fastseg.nn.UpsampleCrossEntropyLoss(ignore_index=255)
        >>> logits, target = torch.randn(2, 21, 33, 33, requires_grad=True), torch.randint(21, (2, 129, 129))
        >>> criterion(logits, target).backward()
    """

    def __init__(
        self, weight: torch.Tensor | None = None, ignore_index: int = -100, reduction: str = "mean",
        label_smoothing: float = 0.0, align_corners: bool = False, *, backend: str | None = None,
    ):  # fmt: skip
        super().__init__(weight, None, ignore_index, None, reduction, label_smoothing)
        self.align_corners = align_corners
        self.backend = backend

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return ops.upsample_cross_entropy(
            input, target, self.weight, self.ignore_index, self.reduction, self.label_smoothing,
            align_corners=self.align_corners, backend=self.backend,
        )  # fmt: skip


def upsample(layer: torch.nn.Upsample, input: torch.Tensor, backend: str | None) -> torch.Tensor:
    """What a torch.nn.Upsample of mode "bilinear" computes, all but its mode as the layer says."""
    return ops.upsample_bilinear2d(input, layer.size, layer.scale_factor, layer.align_corners, backend=backend)


class _AcceleratedUpsampling:
    """The forward of both classes below. Its settings are one attribute, `_fastseg` (see fastseg/accelerate.py)."""

    _fastseg = None

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        settings = self._fastseg
        plain = settings is None or not _is_bilinear(self) or not isinstance(input, torch.Tensor) or under_transform()
        return super().forward(input) if plain else upsample(self, input, settings.backend)


class AcceleratedUpsample(_AcceleratedUpsampling, torch.nn.Upsample):
    """What a torch.nn.Upsample becomes under `fastseg.accelerate`: the same object with this class."""


class AcceleratedUpsamplingBilinear2d(_AcceleratedUpsampling, torch.nn.UpsamplingBilinear2d):
    """What a torch.nn.UpsamplingBilinear2d becomes under `fastseg.accelerate`."""


# Exact classes only: a subclass may mean something else.
_ACCELERATED = {
    torch.nn.Upsample: AcceleratedUpsample,
    torch.nn.UpsamplingBilinear2d: AcceleratedUpsamplingBilinear2d,
}
# Modules, in both senses, whose forward calls `F.interpolate(..., mode="bilinear")`; whoever uses one has imported it.
_KNOWN = (
    ("fastseg.models.layers", "Resize"),
    ("torchvision.models.segmentation._utils", "_SimpleSegmentationModel"),
    ("torchvision.models.segmentation.lraspp", "LRASPP"),
    ("segmentation_models_pytorch.decoders.fpn.decoder", "Conv3x3GNReLU"),
    ("segmentation_models_pytorch.decoders.pspnet.decoder", "PSPBlock"),
    ("segmentation_models_pytorch.decoders.segformer.decoder", "SegformerDecoder"),
    ("segmentation_models_pytorch.decoders.upernet.decoder", "FPNLateralBlock"),
)


def _is_bilinear(layer: torch.nn.Upsample) -> bool:
    return layer.mode == "bilinear" and not layer.recompute_scale_factor


def resizing_class(module: torch.nn.Module, backend: str | None) -> type | None:
    """The class that `module` gets under `fastseg.accelerate`, or None where it is not known to resize bilinearly."""
    kind = original_class(module)
    if "forward" in vars(module) or isinstance(module, torch.jit.ScriptModule):
        return None
    if kind in _ACCELERATED:
        return _ACCELERATED[kind] if _is_bilinear(module) else None
    return _with_our_resize(kind, backend) if any(kind.forward is forward for forward in _known_forwards()) else None


def _known_forwards() -> list[types.FunctionType]:
    kinds = [getattr(sys.modules.get(module), name, None) for module, name in _KNOWN]
    return [kind.forward for kind in kinds if kind is not None and vars(sys.modules[kind.__module__]).get("F") is F]


class _Functional:
    """torch.nn.functional, with fastseg's bilinear resize."""

    def __init__(self, backend: str | None):
        self._backend = backend

    def __getattr__(self, name):
        return getattr(F, name)

    def interpolate(self, input, size=None, scale_factor=None, mode="nearest", align_corners=None, *args, **kwargs):
        plain = mode != "bilinear" or args or kwargs or not isinstance(input, torch.Tensor) or under_transform()
        if plain:
            return F.interpolate(input, size, scale_factor, mode, align_corners, *args, **kwargs)
        return ops.upsample_bilinear2d(input, size, scale_factor, align_corners, backend=self._backend)


class _Resizing:
    """What the class of a known module gets as a base."""

    _fastseg = None

    def __reduce_ex__(self, protocol):
        _, _, *state = super().__reduce_ex__(protocol)
        return _new, (original_class(self), type(self).backend), *state


@functools.cache
def _with_our_resize(original: type, backend: str | None) -> type:
    """A subclass of `original` whose forward has the same code, and another `F`."""
    forward = original.forward
    # Without its module's name: torch.compile would look for `F` in that module.
    seen = {name: value for name, value in forward.__globals__.items() if name != "__name__"}
    ours = types.FunctionType(
        forward.__code__, seen | {"F": _Functional(backend)}, forward.__name__, forward.__defaults__,
        forward.__closure__,
    )  # fmt: skip
    ours.__kwdefaults__ = forward.__kwdefaults__
    names = {"__module__": original.__module__, "__qualname__": original.__qualname__, "__doc__": original.__doc__}
    return type(original.__name__, (_Resizing, original), names | {"forward": ours, "backend": backend})


def _new(original: type, backend: str | None):
    """For copy and pickle, which cannot find a class that was made here."""
    kind = _with_our_resize(original, backend)
    return kind.__new__(kind)
