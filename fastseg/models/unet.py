"""U-Net (Ronneberger, Fischer, Brox, "U-Net: Convolutional Networks for Biomedical Image Segmentation", 2015).

    images - convs --------------------------------------------- join - convs - 1x1 - logits
               pool - convs ---------------------- join - convs - up
                        pool - convs ---- join - convs - up
                                 pool - convs - up

`convs` is a pair of 3x3 convolutions, a level down has twice the channels, `join` puts the features of the contracting
path in front of those that come up. Without padding they are cropped to that, and logits are smaller than images.

With an encoder the contracting path is a classification network's, and what comes up is that of
segmentation_models_pytorch's Unet.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from fastseg.models.backbones.mobilenet_v2 import MobileNetV2
from fastseg.models.backbones.resnet import RESNETS, ResNet
from fastseg.models.backbones.timm import TimmBackbone
from fastseg.models.layers import Resize, check_choice, conv_norm_act, finish
from fastseg.models.model import SegmentationModel


def unet(
    in_channels: int = 1, num_classes: int = 2, *, base_channels: int = 64, depth: int | None = None,
    padding: str | None = None, norm: str | None = None, up: str | None = None, dropout: float = 0.0,
    encoder: str | None = None, decoder_channels: Sequence[int] | None = None, layers: str = "fastseg",
) -> SegmentationModel:  # fmt: skip
    """U-Net in the paper's form, in the padded form with batch norm that people use, or with an encoder of your choice.

    Args:
        in_channels: C of the images.
        num_classes: K.
        base_channels: channels of the first level; each level down has twice as many.
        depth: how often the contracting path pools; None for 4. An encoder has its own, 5.
        padding: "valid", the paper's: logits are smaller than images, and only some sizes work. "same": logits of the
            images' size, any size (what comes up a pixel short is padded with zeros). None is "valid", or "same" with
            an encoder.
        norm: "batch" behind every 3x3 convolution, which then has no bias; or None. With an encoder it is always there.
        up: "transpose", the paper's 2x2 transposed convolutions; "bilinear" (align_corners=True), where the
            convolutions in front halve the channels; with an encoder "nearest" or "bilinear" (align_corners=False).
            None is "transpose", or "nearest" with an encoder.
        dropout: probability at the end of the contracting path.
        encoder: "resnet18", "resnet34", "resnet50", "resnet101", "mobilenet_v2", or "timm:NAME" for a network of the
            package timm; `base_channels` means nothing then. None for the paper's contracting path.
        decoder_channels: with an encoder, of each step up, the last one last; None for 16 there and twice as many in
            each step before.
        layers: "fastseg" or "native".

    Returns:
        A `SegmentationModel`. With padding="valid" its `forward` gives logits [N, K, P, Q], (P, Q) being
        `output_size((H, W))`, `predict` labels of that size, and `loss` looks at the middle of targets [N, H, W], or at
        all of targets [N, P, Q].

    Raises:
        ValueError: an unknown option, or one that does not go with the others; in a call with padding="valid", images
            whose size does not work.
        ImportError: "timm:NAME" where timm is not installed.

    Example:
        >>> import torch
        >>> model = unet(1, 2, base_channels=4, depth=2)
        >>> model(torch.randn(1, 1, 60, 64)).shape, model.output_size((60, 64))
        (torch.Size([1, 2, 20, 24]), (20, 24))
        >>> unet(3, 5, base_channels=4, padding="same", norm="batch").predict(torch.randn(1, 3, 37, 50)).shape
        torch.Size([1, 37, 50])
    """
    if encoder is not None:
        check_choice("padding with an encoder", padding, (None, "same"))
        check_choice("up with an encoder", up, (None, "nearest", "bilinear"))
        check_choice("depth with an encoder", depth, (None, 5))
        backbone = _encoder(encoder, in_channels)
        return finish(EncoderUNet(backbone, num_classes, decoder_channels, up or "nearest", dropout, layers), layers)
    check_choice("padding", padding, (None, "valid", "same"))
    check_choice("norm", norm, (None, "batch"))
    check_choice("up", up, (None, "transpose", "bilinear"))
    depth = 4 if depth is None else depth
    if depth < 1 or base_channels < 1:
        raise ValueError(f"expected depth and base_channels to be positive, but got {depth} and {base_channels}")
    if decoder_channels is not None:
        raise ValueError(f"expected decoder_channels to be None without an encoder, but got {decoder_channels}")
    kind = UNet if padding == "same" else UnpaddedUNet
    return finish(
        kind(in_channels, num_classes, base_channels, depth, norm, up or "transpose", dropout, layers), layers
    )


class UNet(SegmentationModel):
    """U-Net whose convolutions keep the size; see `unet`."""

    padding = 1

    def __init__(
        self, in_channels: int, num_classes: int, base_channels: int, depth: int, norm: str | None, up: str,
        dropout: float, layers: str,
    ):  # fmt: skip
        super().__init__(num_classes, layers)
        widths = [base_channels * 2**level for level in range(depth + 1)]
        # A resize keeps the channels, so what comes in has those of the level above already.
        before_up = widths[:-1] if up == "bilinear" else widths[1:]
        self.pool = nn.MaxPool2d(2)
        self.contracting = nn.ModuleList(
            self._convs(inputs, outputs, outputs, norm)
            for inputs, outputs in itertools.pairwise([in_channels, *widths[:-1], before_up[-1]])
        )
        self.dropout = nn.Dropout(dropout)
        self.up = nn.ModuleList()
        self.expanding = nn.ModuleList()
        for level in reversed(range(depth)):
            self.up.append(
                nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)
                if up == "bilinear"
                else nn.ConvTranspose2d(before_up[level], widths[level], 2, 2)
            )
            outputs = before_up[level - 1] if level > 0 else base_channels
            self.expanding.append(self._convs(2 * widths[level], widths[level], outputs, norm))
        self.join = self._join()
        self.classifier = nn.Conv2d(base_channels, num_classes, 1)
        self.apply(_initialize)

    def _convs(self, in_channels, width, out_channels, norm) -> nn.Sequential:
        modules: list[nn.Module] = []
        for inputs, outputs in itertools.pairwise((in_channels, width, out_channels)):
            modules.append(nn.Conv2d(inputs, outputs, 3, padding=self.padding, bias=norm is None))
            modules += [] if norm is None else [nn.BatchNorm2d(outputs)]
            modules.append(nn.ReLU(inplace=True))
        return nn.Sequential(*modules)

    def _join(self) -> nn.Module:
        return _PaddingJoin()

    def logits(self, images: torch.Tensor) -> torch.Tensor:
        """[N, C, H, W] -> [N, K, P, Q], (P, Q) being the `output_size` of (H, W)."""
        x, skips = images, []
        for level, convs in enumerate(self.contracting):
            x = convs(self.pool(x) if level > 0 else x)
            skips.append(x)
        x = self.dropout(skips.pop())
        for up, convs in zip(self.up, self.expanding, strict=True):
            x = convs(self.join(skips.pop(), up(x)))
        return self.classifier(x)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.logits(images)

    def _labels(self, logits, images, dtype) -> torch.Tensor:
        return super()._labels(logits, logits, dtype)

    def output_size(self, size: Sequence[int]) -> tuple[int, int]:
        """The size of the logits for images of size (H, W)."""
        height, width = size
        return height, width


class UnpaddedUNet(UNet):
    """The paper's form, each of whose 3x3 convolutions takes a pixel off every side; see `unet`."""

    padding = 0

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.sizes = _UnpaddedSizes(len(self.up))

    def _join(self) -> nn.Module:
        return _CroppingJoin()

    def logits(self, images: torch.Tensor) -> torch.Tensor:
        return super().logits(self.sizes(images))

    def output_size(self, size: Sequence[int]) -> tuple[int, int]:
        """The size of the logits for images of size (H, W); ValueError where that does not work."""
        return self.sizes.output_size(size)

    def loss(self, images: torch.Tensor, targets: torch.Tensor, **options) -> torch.Tensor:
        """As `SegmentationModel.loss`, of targets of the logits' size, or of the middle of targets of the images'.

        Raises:
            ValueError: targets of another size.
        """
        outputs, inputs, got = self.output_size(images.shape[-2:]), tuple(images.shape[-2:]), tuple(targets.shape[-2:])
        if got not in (inputs, outputs):
            raise ValueError(f"expected targets of the images' size {inputs} or the logits' {outputs}, but got {got}")
        return super().loss(images, _middle(targets, outputs), **options)


class _UnpaddedSizes(nn.Module):
    """Lets images through that an unpadded U-Net can work on.

    Every pooling has to halve evenly, and something has to be left. A pair of convolutions takes 4 pixels off, so on
    the way up n becomes 2 n - 4: the 4 that a bottom of 4 leaves at every level is the least, except that one level
    makes 2 of a bottom of 3.
    """

    def __init__(self, depth: int):
        super().__init__()
        self.step = 2**depth
        self.margin = 12 * self.step - 8  # by which logits are smaller than images
        self.smallest = self.margin + min(4, self.step)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.output_size(images.shape[-2:])
        return images

    def output_size(self, size: Sequence[int]) -> tuple[int, int]:
        height, width = size
        nearest = {n: self.nearest(n) for n in (height, width)}
        if any(found != [n] for n, found in nearest.items()):
            raise ValueError(
                f"expected images whose sides are {self.smallest} + {self.step} k, but got {height} x {width}; nearest "
                "are " + ", ".join(f"{' and '.join(map(str, found))} for {n}" for n, found in nearest.items())
            )
        return height - self.margin, width - self.margin

    def nearest(self, n: int) -> list[int]:
        """`n` where it works, else what works below and above it."""
        steps, rest = divmod(max(n, self.smallest) - self.smallest, self.step)
        below = self.smallest + steps * self.step
        return [below] if rest == 0 else [below, below + self.step]


class _CroppingJoin(nn.Module):
    """The middle of the skipped features in front of those that come up."""

    def forward(self, skip: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([_middle(skip, x.shape[-2:]), x], 1)


class _PaddingJoin(nn.Module):
    """The skipped features in front of those that come up, with zeros around where they are smaller."""

    def forward(self, skip: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        rows, columns = (large - small for large, small in zip(skip.shape[-2:], x.shape[-2:], strict=True))
        if rows > 0 or columns > 0:
            x = F.pad(x, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))
        return torch.cat([skip, x], 1)


def _encoder(name: str, in_channels: int) -> nn.Module:
    if name.startswith("timm:"):
        return TimmBackbone(name.removeprefix("timm:"), in_channels=in_channels)
    if name == "mobilenet_v2":
        return MobileNetV2(in_channels=in_channels, tail=True)
    if name in RESNETS:
        return ResNet(name, in_channels=in_channels)
    known = ", ".join(map(repr, (*RESNETS, "mobilenet_v2")))
    raise ValueError(f"expected encoder to be one of {known} or 'timm:NAME', but got {name!r}")


class EncoderUNet(SegmentationModel):
    """The decoder of segmentation_models_pytorch's Unet behind an encoder; see `unet`."""

    def __init__(
        self, encoder: nn.Module, num_classes: int, decoder_channels: Sequence[int] | None, up: str, dropout: float,
        layers: str,
    ):  # fmt: skip
        super().__init__(num_classes, layers)
        self.encoder = encoder
        self.dropout = nn.Dropout(dropout)
        self.decoder = _Decoder(encoder.channels, encoder.strides, decoder_channels, up)
        self.classifier = nn.Conv2d(self.decoder.out_channels, num_classes, 3, padding=1)
        self.decoder.apply(_initialize)
        self.classifier.apply(_initialize)

    def logits(self, images: torch.Tensor) -> torch.Tensor:
        """[N, C, H, W] -> [N, K, H, W]"""
        *features, last = self.encoder(images)
        return self.classifier(self.decoder([*features, self.dropout(last)], images.shape[-2:]))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.logits(images)


class _Decoder(nn.Module):
    """Steps up from the last features to the images' size, each to half the stride.

    A step takes in the encoder's features of its stride, if there are any; of the images' own size there never are.
    """

    def __init__(self, channels: Sequence[int], strides: Sequence[int], widths: Sequence[int] | None, up: str):
        super().__init__()
        *skipped, last = strides
        self.strides = [2**step for step in reversed(range(last.bit_length() - 1))]
        self.sources = [skipped.index(stride) if stride in skipped and stride > 1 else None for stride in self.strides]
        widths = [16 * stride for stride in self.strides] if widths is None else list(widths)
        if len(widths) != len(self.strides):
            raise ValueError(f"expected decoder_channels to be {len(self.strides)} numbers, but got {widths}")
        self.out_channels = widths[-1]
        self.blocks = nn.ModuleList(
            _DecoderBlock(inputs + (0 if source is None else channels[source]), outputs, up)
            for inputs, outputs, source in zip([channels[-1], *widths[:-1]], widths, self.sources, strict=True)
        )

    def forward(self, features: list[torch.Tensor], size: Sequence[int]) -> torch.Tensor:
        x = features[-1]
        for block, stride, source in zip(self.blocks, self.strides, self.sources, strict=True):
            skip = None if source is None else features[source]
            x = block(x, (size[0] // stride, size[1] // stride) if skip is None else skip.shape[-2:], skip)
        return x


class _DecoderBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, up: str):
        super().__init__()
        self.resize = Resize() if up == "bilinear" else _NearestResize()
        self.convs = nn.Sequential(
            *conv_norm_act(in_channels, out_channels),
            *conv_norm_act(out_channels, out_channels),
        )

    def forward(self, x: torch.Tensor, size: Sequence[int], skip: torch.Tensor | None) -> torch.Tensor:
        x = self.resize(x, size)
        return self.convs(x if skip is None else torch.cat([x, skip], 1))


class _NearestResize(nn.Module):
    def forward(self, x: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
        return F.interpolate(x, size)


def _middle(x: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """[..., H, W] -> [..., *size]"""
    top, left = ((large - small) // 2 for large, small in zip(x.shape[-2:], size, strict=True))
    return x[..., top : top + size[0], left : left + size[1]]


def _initialize(module: nn.Module) -> None:
    """He's initialisation, as the paper has it: N(0, 2 / n) for n inputs of one output."""
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
        # A transposed convolution whose windows do not overlap has one tap for an output.
        inputs = module.in_channels if isinstance(module, nn.ConvTranspose2d) else module.weight[0].numel()
        nn.init.normal_(module.weight, 0, math.sqrt(2 / inputs))
        if module.bias is not None:
            nn.init.zeros_(module.bias)
