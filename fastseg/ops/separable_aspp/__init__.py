"""Separable atrous spatial pyramid pooling, DeepLab v3+'s, in one call."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastseg import dispatch
from fastseg.ops.activation import check_activation
from fastseg.ops.aspp import aspp, check_alike, check_branches, check_vector, join_biases, project, shape_of
from fastseg.ops.convolution import call_operator, chosen_by_size
from fastseg.ops.geometry import same_padding
from fastseg.ops.library import OVERLOADS
from fastseg.ops.native import native_conv2d
from fastseg.ops.separable_aspp import op as _op  # noqa: F401  registers the operator


def separable_aspp(
    input: torch.Tensor,
    depthwise_weights: Sequence[torch.Tensor | None],
    pointwise_weights: Sequence[torch.Tensor],
    depthwise_biases: Sequence[torch.Tensor | None] | None,
    pointwise_biases: Sequence[torch.Tensor | None] | None,
    dilations: Sequence[int],
    pool_weight: torch.Tensor | None = None,
    pool_bias: torch.Tensor | None = None,
    project_weight: torch.Tensor | None = None,
    project_bias: torch.Tensor | None = None,
    *,
    depthwise_activation: str = "none",
    activation: str = "relu",
    pooling: str = "last",
    backend: str | None = None,
) -> torch.Tensor:
    """`fastseg.ops.aspp` with depthwise-separable branches.

    Args:
        input: [N, C, H, W] or [C, H, W]; float32, float16, bfloat16 or float64; any strides. channels_last is fastest.
        depthwise_weights: one [C, 1, R, S] with odd R and S per branch; None for the first branches, those that are
            plain 1x1 convolutions.
        pointwise_weights: one [K_b, C, 1, 1] per branch.
        depthwise_biases: one [C] or None per branch, or None.
        pointwise_biases: one [K_b] or None per branch, or None.
        dilations: one int per branch, in pixels; without meaning for a plain branch.
        pool_weight, pool_bias, project_weight, project_bias, activation, pooling, backend: as in `fastseg.ops.aspp`.
        depthwise_activation: "none", "relu", "relu6", "hardswish" or "silu", between the two halves of a branch.

    Returns, Raises: as `fastseg.ops.aspp`.

    All depthwise filters read the image in one operator call, and their results never exist as a whole; the backward
    pass computes them again. Promises as for `fastseg.ops.aspp`. As in Chen et al., "Encoder-Decoder with Atrous
    Separable Convolution" (2018).

    Example:
        >>> import torch, fastseg
        >>> x = torch.randn(1, 16, 33, 33)
        >>> depthwise, pointwise = [None, torch.randn(16, 1, 3, 3)], [torch.randn(8, 16, 1, 1) for _ in range(2)]
        >>> fastseg.ops.separable_aspp(x, depthwise, pointwise, None, None, (1, 6)).shape
        torch.Size([1, 16, 33, 33])
    """
    check_activation(depthwise_activation)
    check_activation(activation)
    count = len(pointwise_weights)
    depthwise_biases = [None] * count if depthwise_biases is None else depthwise_biases
    pointwise_biases = [None] * count if pointwise_biases is None else pointwise_biases
    check_branches(input, pointwise_weights, pointwise_biases, dilations, "concat")
    plain = _check_depthwise(input, depthwise_weights, depthwise_biases, pointwise_weights)
    if plain == count:
        return aspp(
            input, pointwise_weights, pointwise_biases, dilations, pool_weight, pool_bias, project_weight, project_bias,
            activation=activation, pooling=pooling, backend=backend,
        )  # fmt: skip
    x = input if input.dim() == 4 else input.unsqueeze(0)

    def run(name):
        return separable_aspp(
            x, depthwise_weights, pointwise_weights, depthwise_biases, pointwise_biases, dilations, pool_weight,
            pool_bias, project_weight, project_bias, depthwise_activation=depthwise_activation, activation=activation,
            pooling=pooling, backend=name,
        )  # fmt: skip

    branches = (*depthwise_weights, *pointwise_weights)
    detail = (
        *map(shape_of, (*branches, pool_weight, project_weight)), *dilations, depthwise_activation, activation
    )  # fmt: skip
    ends = (pool_weight, pool_bias, project_weight, project_bias)
    tensors = (x, *branches, *depthwise_biases, *pointwise_biases, *ends)
    choice = chosen_by_size("separable_aspp_branches", x, backend, detail, tensors, run)
    if choice.backend == "native":
        dispatch.count_native("separable_aspp_branches", choice.reason)
        y = _native_branches(
            x, depthwise_weights, pointwise_weights, depthwise_biases, pointwise_biases, dilations,
            depthwise_activation, activation,
        )  # fmt: skip
    else:
        filters, weights = list(depthwise_weights[plain:]), list(pointwise_weights)
        depthwise_bias = join_biases(filters, depthwise_biases[plain:], "concat")
        bias = join_biases(weights, pointwise_biases, "concat")
        y, _ = call_operator(
            OVERLOADS["separable_aspp_branches"][choice.backend], (x, *filters, *weights, depthwise_bias, bias),
            x, filters, weights, depthwise_bias, bias, list(dilations[plain:]), depthwise_activation, activation,
            False, None, None,
        )  # fmt: skip
    y = project(y, x, pool_weight, pool_bias, project_weight, project_bias, activation, pooling, choice.backend)
    return y if input.dim() == 4 else y.squeeze(0)


def _check_depthwise(input, weights, biases, pointwise_weights) -> int:
    """The number of plain branches."""
    if not len(weights) == len(biases) == len(pointwise_weights):
        raise RuntimeError(
            "expected a depthwise weight, or None, and a bias for each branch, but got "
            f"{len(weights)} weights and {len(biases)} biases for {len(pointwise_weights)} branches"
        )
    plain = sum(weight is None for weight in weights)
    if any(weight is None for weight in weights[plain:]):
        raise RuntimeError("expected the branches without a depthwise weight to be the first ones")
    channels = input.shape[-3]
    for weight, bias in zip(weights[plain:], biases[plain:], strict=True):
        if weight.dim() != 4 or tuple(weight.shape[:2]) != (channels, 1) or any(k % 2 == 0 for k in weight.shape[2:]):
            raise RuntimeError(
                f"expected depthwise weights [{channels}, 1, R, S] with odd R and S, but got {list(weight.shape)}"
            )
        check_vector("depthwise bias", bias, weight)
    for weight in pointwise_weights:
        if tuple(weight.shape[2:]) != (1, 1):
            raise RuntimeError(f"expected pointwise weights [K, {channels}, 1, 1], but got {list(weight.shape)}")
    check_alike(input, *weights, *biases)
    return plain


def _native_branches(
    x, depthwise_weights, weights, depthwise_biases, biases, dilations, depthwise_activation, activation
):
    found = []
    for depthwise, weight, depthwise_bias, bias, dilation in zip(
        depthwise_weights, weights, depthwise_biases, biases, dilations, strict=True
    ):
        z = x
        if depthwise is not None:
            stride, (rows, _, columns, _), pair = same_padding(depthwise, dilation)
            z = native_conv2d(
                x, depthwise, depthwise_bias, stride, (rows, columns), pair, x.shape[1], depthwise_activation
            )
        found.append(native_conv2d(z, weight, bias, 1, 0, 1, 1, activation))
    return torch.cat(found, 1) if len(found) > 1 else found[0]
