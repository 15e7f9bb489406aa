"""Atrous spatial pyramid pooling on fastseg's operators: ASPP (DeepLab v3 and v2) and SeparableASPP (DeepLab v3+)."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch

from fastseg.nn.pyramid import Link, Pyramid, norm_of_pooled, run_pyramid
from fastseg.nn.separable import ACTIVATION_MODULES, SeparableConv2d, batch_norm
from fastseg.ops.activation import check_activation


class PyramidModule(torch.nn.Module):
    """What both classes share: `convs` and `project`, named as torchvision names them."""

    def __init__(self, in_channels, out_channels, dilations, branch, *, pooling, norm, activation, dropout,
                 single_image, reduction, bias, backend):  # fmt: skip
        super().__init__()
        check_activation(activation)
        _check("pooling", pooling, ("last", "first", None))
        _check("norm", norm, ("batch", None))
        _check("single_image", single_image, ("error", "running_stats"))
        self.pooling = pooling
        self.activation = activation
        self.single_image = single_image
        self.reduction = reduction
        self.backend = backend
        bias = norm is None if bias is None else bias
        convs = [branch(dilation) for dilation in dilations]
        if pooling is not None:
            pool = torch.nn.Sequential(
                torch.nn.AdaptiveAvgPool2d(1),
                torch.nn.Conv2d(in_channels, out_channels, 1, bias=bias),
                *batch_norm(norm, out_channels),
                *ACTIVATION_MODULES[activation](),
            )
            convs.insert(0 if pooling == "first" else len(convs), pool)
        self.convs = torch.nn.ModuleList(convs)
        if reduction == "concat":
            self.project = torch.nn.Sequential(
                torch.nn.Conv2d(len(convs) * out_channels, out_channels, 1, bias=bias),
                *batch_norm(norm, out_channels),
                *ACTIVATION_MODULES[activation](),
                torch.nn.Dropout(dropout),
            )

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        apart = functools.partial(self.module_by_module, input)
        y = None if torch.compiler.is_compiling() else run_pyramid(self.pyramid(), input, self.backend, apart)
        return apart() if y is None else y

    def module_by_module(self, input: torch.Tensor) -> torch.Tensor:
        """What run_pyramid computes, module by module, for calls that it leaves alone."""
        found = []
        for conv in self.convs:
            pooled = isinstance(conv[0], torch.nn.AdaptiveAvgPool2d)
            found.append(self._pooled(conv, input) if pooled else conv(input))
        if self.reduction == "sum":
            return ACTIVATION_MODULES[self.activation].function(sum(found))
        return self.project(torch.cat(found, -3))

    def _pooled(self, conv, input):
        by_running_stats = self.single_image == "running_stats" and input.dim() == 4
        y = input
        for module in conv:
            norm = isinstance(module, torch.nn.modules.batchnorm._BatchNorm)
            y = norm_of_pooled(module, y, by_running_stats) if norm else module(y)
        return y.expand(*y.shape[:-2], *input.shape[-2:])

    def pyramid(self) -> Pyramid:
        """The parts, as they are now."""
        branches, pool = [], None
        for conv in self.convs:
            modules = [m for child in conv for m in (child if isinstance(child, SeparableConv2d) else [child])]
            links = Link.chain(modules)
            if isinstance(modules[0], torch.nn.AdaptiveAvgPool2d):
                pool = links[0]
            else:
                branches.append(tuple(links))
        project = Link.chain(self.project)[0] if self.reduction == "concat" else None
        return Pyramid(
            branches, pool, self.pooling == "first", project, self.activation, self.reduction,
            self.project[-1] if project is not None else None, self.single_image == "running_stats",
        )  # fmt: skip


class ASPP(PyramidModule):
    """Atrous spatial pyramid pooling, one operator call for all branches; see `fastseg.ops.aspp`.

    Args:
        in_channels, out_channels: of the input, and of each branch and the result.
        dilations: of the 3x3 branches, in pixels.
        pointwise: whether a 1x1 branch comes before them.
        pooling: where the pooled branch stands among the others: "last" (torchvision, segmentation_models_pytorch),
            "first" (TensorFlow, mmsegmentation), or None for none.
        norm: "batch" or None, behind every convolution.
        activation: "none", "relu", "relu6", "hardswish" or "silu", behind every norm.
        dropout: probability, behind the projection: 0.5 in torchvision, 0.1 in TensorFlow.
        reduction: "concat" (v3), or "sum" (v2: 3x3 branches alone, with bias, added up and nothing behind them; give
            pointwise=False, pooling=None, norm=None, activation="none").
        single_image: in training a batch norm cannot take the one value a channel of a batch of one pooled image.
            "error" raises as torch.nn.BatchNorm2d does; "running_stats" lets that norm use its running statistics
            whenever the batch is one image, without updating them.
        bias: of the convolutions; None means where there is no norm.
        backend: as in `fastseg.ops.aspp`; None takes the surrounding choice.

    Shapes: [N, in_channels, H, W] -> [N, out_channels, H, W]. The pooled branch is one vector an image: how it would be
    resized (align_corners or not) makes no difference to a constant. Parameters are named as torchvision's.

    Example:
        >>> import torch, fastseg
        >>> fastseg.nn.ASPP(64, 32, (6, 12, 18)).eval()(torch.randn(1, 64, 33, 33)).shape
        torch.Size([1, 32, 33, 33])
    """

    def __init__(
        self, in_channels: int, out_channels: int = 256, dilations: Sequence[int] = (6, 12, 18), *,
        pointwise: bool = True, pooling: str | None = "last", norm: str | None = "batch", activation: str = "relu",
        dropout: float = 0.5, reduction: str = "concat", single_image: str = "error", bias: bool | None = None,
        backend: str | None = None,
    ):  # fmt: skip
        _check("reduction", reduction, ("concat", "sum"))
        if reduction == "sum" and (pooling is not None or norm is not None):
            raise ValueError('expected pooling=None and norm=None with reduction "sum"')
        with_bias = norm is None if bias is None else bias

        def branch(dilation):
            kernel, padding = (1, 0) if dilation == 0 else (3, dilation)
            return torch.nn.Sequential(
                torch.nn.Conv2d(
                    in_channels, out_channels, kernel, padding=padding, dilation=max(1, dilation), bias=with_bias
                ),
                *batch_norm(norm, out_channels),
                *(ACTIVATION_MODULES[activation]() if reduction == "concat" else ()),
            )

        check_activation(activation)
        super().__init__(
            in_channels, out_channels, [0] * pointwise + list(dilations), branch, pooling=pooling, norm=norm,
            activation=activation, dropout=dropout, single_image=single_image, reduction=reduction, bias=bias,
            backend=backend,
        )  # fmt: skip


class SeparableASPP(PyramidModule):
    """`ASPP` with depthwise-separable branches; see `fastseg.ops.separable_aspp`.

    Args:
        As `ASPP`, and:
        depthwise_norm: "batch" (TensorFlow, mmsegmentation) or None (segmentation_models_pytorch), between the halves.
        depthwise_activation: behind it; None means `activation` with a norm, and "none" without.

    Example:
        >>> import torch, fastseg
        >>> fastseg.nn.SeparableASPP(64, 32, (6, 12, 18)).eval()(torch.randn(1, 64, 33, 33)).shape
        torch.Size([1, 32, 33, 33])
    """

    def __init__(
        self, in_channels: int, out_channels: int = 256, dilations: Sequence[int] = (6, 12, 18), *,
        pooling: str | None = "last", norm: str | None = "batch", activation: str = "relu",
        depthwise_norm: str | None = None, depthwise_activation: str | None = None, dropout: float = 0.5,
        single_image: str = "error", bias: bool | None = None, backend: str | None = None,
    ):  # fmt: skip
        with_bias = norm is None if bias is None else bias
        if depthwise_activation is None:
            depthwise_activation = "none" if depthwise_norm is None else activation

        def branch(dilation):
            if dilation == 0:
                conv = torch.nn.Conv2d(in_channels, out_channels, 1, bias=with_bias)
            else:
                conv = SeparableConv2d(
                    in_channels, out_channels, 3, padding=dilation, dilation=dilation, bias=with_bias,
                    depthwise_norm=depthwise_norm, depthwise_activation=depthwise_activation, backend=backend,
                )  # fmt: skip
            return torch.nn.Sequential(conv, *batch_norm(norm, out_channels), *ACTIVATION_MODULES[activation]())

        check_activation(activation)
        super().__init__(
            in_channels, out_channels, [0, *dilations], branch, pooling=pooling, norm=norm, activation=activation,
            dropout=dropout, single_image=single_image, reduction="concat", bias=bias, backend=backend,
        )  # fmt: skip


def _check(what: str, value, allowed) -> None:
    if value not in allowed:
        raise ValueError(f"expected {what} to be one of {', '.join(map(repr, allowed))}, but got {value!r}")
