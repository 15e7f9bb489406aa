"""Atrous spatial pyramid pooling in one call: DeepLab v3's concatenated form and DeepLab v2's sum."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastseg import dispatch
from fastseg.ops import dilated  # noqa: F401  the operators of projection and gradient
from fastseg.ops.activation import apply_activation, check_activation
from fastseg.ops.aspp import op as _op  # noqa: F401  registers the operators
from fastseg.ops.convolution import call_operator, chosen_by_size
from fastseg.ops.geometry import POINTWISE, same_padding
from fastseg.ops.library import OVERLOADS
from fastseg.ops.native import native_conv2d

REDUCTIONS = ("concat", "sum")


def aspp(
    input: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None] | None,
    dilations: Sequence[int],
    pool_weight: torch.Tensor | None = None,
    pool_bias: torch.Tensor | None = None,
    project_weight: torch.Tensor | None = None,
    project_bias: torch.Tensor | None = None,
    *,
    activation: str = "relu",
    reduction: str = "concat",
    pooling: str = "last",
    backend: str | None = None,
) -> torch.Tensor:
    """Parallel convolutions of one image at several dilations, and what DeepLab makes of them.

    With reduction "concat" (DeepLab v3), where `|` puts channels side by side:

        y = activation(project(activation(branch_0(x)) | activation(branch_1(x)) | ... | pooled) + project_bias)
        pooled = activation(pool_weight @ mean of x over the image + pool_bias), the same at every pixel

    and without `project_weight` the branches side by side. With "sum" (DeepLab v2) y = activation(branch_0(x) + ...).

    Args:
        input: [N, C, H, W] or [C, H, W]; float32, float16, bfloat16 or float64; any strides. channels_last is fastest.
        weights: one [K_b, C, R, S] per branch with odd R and S, in the input's dtype; for "sum" all of one K.
        biases: one [K_b] or None per branch, or None.
        dilations: one int per branch, in pixels. The image keeps its size: padding is dilation * (R // 2).
        pool_weight, pool_bias: [K_p, C, 1, 1] and [K_p] or None: the branch that sees the whole image.
        project_weight, project_bias: [K, sum of K_b + K_p, 1, 1] and [K] or None.
        activation: "none", "relu", "relu6", "hardswish" or "silu".
        reduction: "concat" or "sum".
        pooling: "last" or "first": where the pooled channels stand in project_weight.
        backend: "auto", "native", "reference", "cpu", "triton" or "cuda"; None takes the surrounding choice
            (`fastseg.backend`, FASTSEG_BACKEND, "auto").

    Returns:
        [N, K, H, W]; without a projection [N, sum of K_b, H, W], for "sum" [N, K_b, H, W]. channels_last when input or
        the first weight is.

    Raises:
        RuntimeError: shapes, dtypes or devices do not fit; pool_weight without project_weight.
        ValueError: unknown activation, reduction, pooling or `backend`.
        BackendError: the backend named cannot run this call.

    The branches are one operator that writes into one buffer, which is the largest tensor alive. The pooled branch is
    one vector an image that enters the projection as a bias: it never has the image's size. Sums are accumulated in
    float32 (float64 for float64); everything is bitwise repeatable and can be differentiated twice. As in Chen et al.,
    "Rethinking Atrous Convolution" (2017) and "DeepLab" (2016).

    Example:
        >>> import torch, fastseg
        >>> x = torch.randn(1, 16, 33, 33)
        >>> weights = [torch.randn(8, 16, 1, 1), torch.randn(8, 16, 3, 3), torch.randn(8, 16, 3, 3)]
        >>> fastseg.ops.aspp(x, weights, None, (1, 6, 12)).shape
        torch.Size([1, 24, 33, 33])
    """
    check_activation(activation)
    _check_name("reduction", reduction, REDUCTIONS)
    biases = [None] * len(weights) if biases is None else biases
    check_branches(input, weights, biases, dilations, reduction)
    x = input if input.dim() == 4 else input.unsqueeze(0)

    def run(name):
        return aspp(
            x, weights, biases, dilations, pool_weight, pool_bias, project_weight, project_bias,
            activation=activation, reduction=reduction, pooling=pooling, backend=name,
        )  # fmt: skip

    ends = (pool_weight, pool_bias, project_weight, project_bias)
    detail = (*map(shape_of, (*weights, pool_weight, project_weight)), *dilations, activation, reduction)
    choice = chosen_by_size("aspp_branches", x, backend, detail, (x, *weights, *biases, *ends), run)
    if choice.backend == "native":
        dispatch.count_native("aspp_branches", choice.reason)
        y = _native_branches(x, weights, biases, dilations, activation, reduction)
    else:
        bias = join_biases(weights, biases, reduction)
        y, _ = call_operator(
            OVERLOADS["aspp_branches"][choice.backend], (x, *weights, bias),
            x, list(weights), bias, list(dilations), activation, reduction, False, None,
        )  # fmt: skip
    y = project(
        y, x, pool_weight, pool_bias, project_weight, project_bias, activation, pooling, choice.backend, reduction
    )
    return y if input.dim() == 4 else y.squeeze(0)


def check_branches(input, weights, biases, dilations, reduction: str) -> None:
    """Raise unless these are parallel convolutions of one image."""
    if not isinstance(input, torch.Tensor) or input.dim() not in (3, 4):
        got = f"{input.dim()}-D" if isinstance(input, torch.Tensor) else type(input).__name__
        raise RuntimeError(f"expected input [N, C, H, W] or [C, H, W], but got {got}")
    if not len(weights) == len(biases) == len(dilations) or len(weights) == 0:
        raise RuntimeError(
            "expected one weight, bias and dilation for each of one or more branches, but got "
            f"{len(weights)} weights, {len(biases)} biases and {len(dilations)} dilations"
        )
    channels = input.shape[-3]
    for weight, bias, dilation in zip(weights, biases, dilations, strict=True):
        if (
            weight.dim() != 4
            or weight.shape[0] < 1
            or weight.shape[1] != channels
            or any(k % 2 == 0 for k in weight.shape[2:])
        ):
            raise RuntimeError(f"expected weights [K, {channels}, R, S] with odd R and S, but got {list(weight.shape)}")
        if not isinstance(dilation, int) or dilation < 1:
            raise RuntimeError(f"expected dilations to be positive ints, but got {dilation!r}")
        check_vector("bias", bias, weight)
    if reduction == "sum" and len({weight.shape[0] for weight in weights}) > 1:
        raise RuntimeError(f"expected branches of one width, but got {[weight.shape[0] for weight in weights]}")
    check_alike(input, *weights)


def shape_of(weight: torch.Tensor | None) -> tuple[int, ...] | None:
    return None if weight is None else tuple(weight.shape)


def check_vector(name: str, bias, weight) -> None:
    """Raise unless `bias` is None or fits the output channels of `weight`."""
    if bias is not None and (bias.shape != weight.shape[:1]):
        raise RuntimeError(f"expected {name} of shape [{weight.shape[0]}], but got {list(bias.shape)}")


def check_alike(input, *tensors) -> None:
    """Raise unless all tensors have one device and, where autocast does not see to it, one dtype."""
    for tensor in tensors:
        if tensor is None or (tensor.device == input.device and tensor.dtype == input.dtype):
            continue
        if tensor.device != input.device or not _autocasts(input.device.type):
            raise RuntimeError(
                f"expected weights and biases like the input, {input.dtype} on {input.device}, "
                f"but got {tensor.dtype} on {tensor.device}"
            )


def _autocasts(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


def join_biases(weights, biases, reduction: str) -> torch.Tensor | None:
    """The branches' biases as the operator takes them: side by side, or their sum."""
    if all(bias is None for bias in biases):
        return None
    if reduction == "sum":
        return sum(bias for bias in biases if bias is not None)
    return torch.cat([w.new_zeros(w.shape[0]) if b is None else b for w, b in zip(weights, biases, strict=True)])


def project(y, x, pool_weight, pool_bias, weight, bias, activation, pooling, backend, reduction="concat"):
    """The projection of the branches `y` [N, sum of K_b, H, W], with the pooled image of `x` as a part of its bias."""
    _check_name("pooling", pooling, ("last", "first"))
    if weight is None:
        if pool_weight is not None:
            raise RuntimeError("expected project_weight beside pool_weight: the pooled branch exists in it alone")
        return y
    if reduction == "sum":
        raise RuntimeError('expected no project_weight with reduction "sum"')
    pooled_channels = 0 if pool_weight is None else pool_weight.shape[0]
    wanted = (y.shape[1] + pooled_channels, 1, 1)
    if weight.dim() != 4 or tuple(weight.shape[1:]) != wanted:
        raise RuntimeError(f"expected project_weight of shape [K, {wanted[0]}, 1, 1], but got {list(weight.shape)}")
    check_vector("project_bias", bias, weight)
    check_alike(x, weight, bias, pool_weight, pool_bias)
    if pool_weight is not None:
        if tuple(pool_weight.shape[1:]) != (x.shape[1], 1, 1):
            raise RuntimeError(
                f"expected pool_weight of shape [K, {x.shape[1]}, 1, 1], but got {list(pool_weight.shape)}"
            )
        check_vector("pool_bias", pool_bias, pool_weight)
        pooled = pool(x, pool_weight, pool_bias, activation)
        first = pooled_channels if pooling == "first" else 0
        last = 0 if pooling == "first" else y.shape[1]
        seen = weight[:, last : last + pooled_channels].flatten(1)
        bias = torch.nn.functional.linear(pooled, seen, bias)  # [N, K]
        weight = weight[:, first : first + y.shape[1]]
    if backend == "native":
        return _native_projection(y, weight, bias, activation)
    return call_operator(
        OVERLOADS["dilated_conv2d"][backend], (y, weight, bias), y, weight, bias, *POINTWISE, activation
    )


def pool(x, weight, bias, activation: str) -> torch.Tensor:
    """The pooled branch: one vector [N, K_p] an image."""
    return apply_activation(torch.nn.functional.linear(x.mean((2, 3)), weight.flatten(1), bias), activation)


def _native_projection(y, weight, bias, activation):
    if bias is None or bias.dim() == 1:
        return native_conv2d(y, weight, bias, 1, 0, 1, 1, activation)
    z = native_conv2d(y, weight, None, 1, 0, 1, 1)
    return apply_activation(z + bias[:, :, None, None], activation)


def _native_branches(x, weights, biases, dilations, activation, reduction):
    each = "none" if reduction == "sum" else activation
    branches = []
    for weight, bias, dilation in zip(weights, biases, dilations, strict=True):
        stride, (rows, _, columns, _), dilation_pair = same_padding(weight, dilation)
        branches.append(native_conv2d(x, weight, bias, stride, (rows, columns), dilation_pair, 1, each))
    if reduction == "sum":
        return apply_activation(sum(branches), activation)
    return torch.cat(branches, 1) if len(branches) > 1 else branches[0]


def _check_name(what: str, name: str, names) -> None:
    if name not in names:
        raise ValueError(f"expected {what} to be one of {', '.join(names)}, but got {name!r}")
