"""Dense convolution in Triton: forward, input gradient and weight gradient as implicit matrix products.

    y[n, k, p, q] = act(bias[k] + scale[k] * sum over (r, s, c) of w[k, c, r, s] * x[n, c, ih, iw])
    ih = p * stride - pad + r * dilation, and so for columns

Only live taps are loaded and multiplied. The targets (outputs in forward, inputs in grad_input) are cut into rectangles
on which the set of live taps is constant, and a tile of the product belongs to one of them. A 3x3 filter with "same"
padding and dilation d leaves nine, each with taps x taps:

            d    columns    d
        d   2x2    2x3     2x2          a tile: BLOCK_M pixels of all images x BLOCK_N channels
      rows  3x2    3x3     3x2          one step of its sum: BLOCK_D source channels of one live tap
        d   2x2    2x3     2x2          source of pixel (j_h, j_w) at tap (r, s): a constant away from that at (0, 0)

So a tile finds its pixels once, and each step moves all of them by the same distance: no bounds tests and no index
arithmetic inside the loop. Taps are the inner axis of the sum and channels the outer one, because the taps of a
tile read nearly the same pixels: they come from L2, and DRAM sees x about once. Column blocks of a tile are neighbours
in the grid for the same reason. All rectangles share one launch, the longest sums first, so that a small image fills
the device. A rectangle without taps is a sum without steps, and holds act(bias).

Forward and grad_input are one product: the planner (live_taps.py) turns the index map around, and the weight tile is
transposed or not. Two kernels compute it (triton_product.py): one loads by pointers, the other loads boxes of pixels by
tensor descriptors, where device and tensors allow it and few pixels are in vain. The programs of a third
(triton_shared.py) share the steps of all tiles evenly, where these are few and of unequal length. grad_weight is a
product for each tap, over the rectangle of outputs that read the image through it, gy^T [K, pixels] x x [pixels, C].
Its pixels are split over programs that leave fp32 partial sums, which a second stage adds in a fixed order: no atomics,
the same bits every time.

Every tensor has its channels adjacent (channels_last), and is copied once where it has not, targets too: written
straight into a contiguous tensor, a tile takes an address for each element, and spills. What limits all three is the
matrix unit for tiles of 128 x 128, else loads from L2.

Addresses of taps are 64-bit scalars, coordinates of boxes have 32 bits. Offsets of pixels have 32 bits unless
IS_INDEX_64, which the host sets from the sizes. Tile shapes and tables are triton_plan.py's business.
"""

from __future__ import annotations

import contextlib
import math

import torch

from fastseg.ops.dilated.triton_grad_weight import (
    dilated_grad_weight,
    dilated_grad_weight_boxes,
    dilated_grad_weight_reduce,
)
from fastseg.ops.dilated.triton_plan import (
    BOX_CONFIGS,
    CONFIGS,
    FINISH_BLOCK_M,
    FINISH_BLOCK_N,
    GRAD_BOX_CONFIGS,
    IEEE_CONFIGS,
    MAX_REDUCE_SPLITS,
    NARROW_CONFIGS,
    REDUCE_BLOCK,
    SHARED,
    SHARED_CONFIG,
    WIDE_CONFIGS,
    BoxConfig,
    Config,
    GradBoxConfig,
    GradWeightLayout,
    Layout,
    device_limits,
    plan_grad_weight,
    plan_product,
    power_of_two,
)
from fastseg.ops.dilated.triton_product import (
    can_describe,
    describe,
    dilated_product,
    dilated_product_boxes,
    dilated_product_finish,
    outer_spacing,
)
from fastseg.ops.dilated.triton_shared import dilated_product_shared
from fastseg.ops.geometry import empty_gradients, empty_output
from fastseg.ops.triton_common import (
    MAX_INT32,
    ConvShape,
    cdiv,
    check_like,
    coalesced,
    conv_shape,
    fail,
    group_size,
    launch,
    needs_index_64,
    on_device,
    scratch_context,
    strides,
)

__all__ = [
    "BOX_CONFIGS",
    "CONFIGS",
    "GRAD_BOX_CONFIGS",
    "IEEE_CONFIGS",
    "NARROW_CONFIGS",
    "SHARED",
    "SHARED_CONFIG",
    "WIDE_CONFIGS",
    "BoxConfig",
    "Config",
    "GradBoxConfig",
    "backward",
    "forced_config",
    "forward",
]

forced: Config | BoxConfig | GradBoxConfig | None = None
forced_splits = 1


@contextlib.contextmanager
def forced_config(config: Config | BoxConfig | GradBoxConfig, splits: int = 1):
    """Run every kernel with `config`, whatever the problem; with boxes only where a kernel can take them."""
    global forced, forced_splits
    previous = forced, forced_splits
    forced, forced_splits = config, splits
    try:
        yield
    finally:
        forced, forced_splits = previous


def forward(input, weight, bias, stride, padding, dilation, activation, scale=None):
    """Dense convolution; see fastseg.ops.conv2d.

    Args:
        input: [N, C, H, W], any strides; float16, bfloat16 or float32.
        weight: [K, C, R, S], the same dtype and device.
        bias: [K], [N, K] (one of each image) or None, in the weight's dtype or float32.
        stride, dilation: (height, width).
        padding: (top, bottom, left, right).
        activation: "none", "relu", "relu6", "hardswish" or "silu".
        scale: [K] in float32 or None, multiplied to the sum before the bias is added.

    Returns:
        [N, K, P, Q] in the memory format torch.nn.functional.conv2d would give it.
    """
    shape = _dense_shape(input, weight, stride, padding, dilation)
    if bias is not None:
        check_bias(bias, (shape.N, shape.K) if bias.dim() == 2 else (shape.K,), input)
    if scale is not None:
        check_scale(scale, shape.K, input)
    with on_device(input):
        output = empty_output(input, weight, (shape.P, shape.Q))
        if output.numel() > 0:
            _launch_product(
                "outputs", shape, padding, input, weight, output, vector(scale), vector(bias), activation
            )  # fmt: skip
    return output


def backward(grad_output, input, weight, stride, padding, dilation, output_mask):
    """The gradients of `forward` without activation and scale, as (grad_input, grad_weight, grad_bias).

    Args:
        grad_output: [N, K, P, Q], any strides.
        input, weight, stride, padding, dilation: as `forward` got them.
        output_mask: which of the three gradients to compute; the others are None.

    Returns:
        grad_input in the memory format of `forward`'s output, grad_weight with the strides of `weight`, and grad_bias.
    """
    shape = _dense_shape(input, weight, stride, padding, dilation)
    check_like("grad_output", grad_output, (shape.N, shape.K, shape.P, shape.Q), input)
    with on_device(input):
        grad_input, grad_weight, grad_bias = empty_gradients(input, weight, output_mask)
        if grad_output.numel() == 0:
            return tuple(None if g is None else g.zero_() for g in (grad_input, grad_weight, grad_bias))
        if grad_bias is not None:
            torch.sum(grad_output, (0, 2, 3), out=grad_bias)
        if shape.C == 0:
            return grad_input, grad_weight, grad_bias
        gy = coalesced(grad_output, torch.channels_last)
        if grad_input is not None:
            _launch_product("inputs", shape, padding, gy, weight, grad_input)
        if grad_weight is not None:
            launch_grad_weights([shape], [0], gy, coalesced(input, torch.channels_last), [grad_weight])
    return grad_input, grad_weight, grad_bias


def _launch_product(
    targets, shape: ConvShape, padding, source, weight, target, scale=None, bias=None, activation="none"
) -> None:
    source, weight = coalesced(source, torch.channels_last), coalesced(weight, torch.channels_last)
    result = adjacent_channels(target)
    image, n_row = result, shape.Q if targets == "outputs" else shape.W
    if _is_pointwise(shape, padding) and _is_one_row(source) and _is_one_row(result):
        source, image, n_row = _as_one_row(source), _as_one_row(result), result.shape[2] * result.shape[3]
        shape = shape._replace(N=1, H=1, W=image.shape[3], P=1, Q=image.shape[3])
    layout = Layout(
        GROUP_SOURCE=group_size(source.shape[1], source),
        GROUP_WEIGHT=group_size(shape.C, weight),
        GROUP_TARGET=group_size(image.shape[1], image),
        IS_INDEX_64=needs_wide_offsets(source, weight, image),
        PRECISION=precision(source.dtype),
    )
    describable = can_describe(source) and can_describe(weight)
    limits = device_limits(source.device)
    has_image_bias = bias is not None and bias.dim() == 2
    plan = plan_product(
        targets, shape, tuple(padding), source.element_size(), layout, describable, limits, forced, forced_splits,
        has_image_bias, not (scale is bias is None and activation == "none"),
    )  # fmt: skip
    if plan.has_boxes:
        kernel, operands = dilated_product_boxes, _descriptors(source, weight, plan.arguments)
    else:
        strides_s, strides_w = outer_strides("s_sn s_sh s_sw", source), outer_strides("s_wk s_wr s_ws", weight)
        kernel, operands = dilated_product, {"p_source": source, "p_weight": weight, **strides_s, **strides_w}
    epilogue = {"p_scale": scale, "p_bias": bias, "ACTIVATION": activation}
    sums = image
    if plan.splits == SHARED:
        kernel = dilated_product_shared
        operands = {"p_source": source, **strides_s, "d_weight": _weight_descriptor(weight, plan.arguments)}
        block = plan.arguments["BLOCK_M"], plan.arguments["BLOCK_N"]
        operands |= {
            "p_sums": torch.empty((plan.programs, *block), dtype=torch.float32, device=image.device),
            "p_ready": torch.zeros(plan.programs, dtype=torch.int32, device=image.device),
        }
    if plan.splits > 1:
        sums = torch.empty((plan.splits, *image.shape), dtype=torch.float32, device=image.device)
        sums = sums.view(plan.splits, image.shape[0], *image.shape[2:], image.shape[1]).permute(0, 1, 4, 2, 3)
    launch(
        kernel,
        plan.programs,
        **operands,
        p_target=sums,
        p_rectangles=plan.table.on(source.device),
        n_row=n_row,
        **outer_strides("s_tn s_th s_tw", image if sums is image else sums[0]),
        **({} if plan.splits == SHARED else {"s_split": sums.stride(0)}),
        **(epilogue if sums is image else {"p_scale": None, "p_bias": None, "ACTIVATION": "none"}),
        **plan.arguments,
    )
    if sums is not image:
        _finish_product(sums, image, n_row, layout.GROUP_TARGET, epilogue)
    if result is not target:
        target.copy_(result)


def _finish_product(sums, image, n_row: int, group: int, epilogue: dict) -> None:
    """Adds `sums` [splits, N, K, height, width], each channels_last, into `image`."""
    N, K, height, width = image.shape
    n_blocks = cdiv(K, FINISH_BLOCK_N)
    launch(
        dilated_product_finish,
        cdiv(N * height * width, FINISH_BLOCK_M) * n_blocks,
        p_partials=sums,
        p_target=image,
        n_pixels=N * height * width,
        n_columns=K,
        n_blocks=n_blocks,
        n_h=height,
        n_w=width,
        n_row=n_row,
        n_splits=sums.shape[0],
        **outer_strides("s_tn s_th s_tw", image),
        BLOCK_M=FINISH_BLOCK_M,
        BLOCK_N=FINISH_BLOCK_N,
        GROUP_TARGET=group,
        **epilogue,
    )


def _descriptors(source, weight, arguments) -> dict:
    """The operands of dilated_product_boxes, in boxes of the plan's size."""
    block_d = arguments["BLOCK_D"]
    pixels = arguments["BOX_N"], arguments["BOX_H"], arguments["BOX_W"]
    return {"d_source": describe(source, "NHWC", [*pixels, block_d]), "d_weight": _weight_descriptor(weight, arguments)}


def _weight_descriptor(weight, arguments):
    block_n, block_d = arguments["BLOCK_N"], arguments["BLOCK_D"]
    filters = (block_d, block_n) if arguments["IS_GRAD_INPUT"] else (block_n, block_d)
    return describe(weight, "HWNC", [1, 1, *filters])


def launch_grad_weights(shapes, channels, gy, x, grad_weights) -> None:
    """The gradients of the weights of convolutions of one input with one stride, in one launch and a second stage each.

    Args:
        shapes: of each convolution.
        channels: where the output of each one begins in `gy`.
        gy, x: [N, output channels, P, Q] and [N, C, H, W], channels adjacent.
        grad_weights: what is filled, [K, C, R, S] each, any strides.
    """
    C = shapes[0].C
    layout = GradWeightLayout(
        GROUP_GY=math.gcd(group_size(gy.shape[1], gy), *(shape.K for shape in shapes)),
        GROUP_X=group_size(C, x),
        IS_INDEX_64=needs_wide_offsets(gy, x, *grad_weights),
        PRECISION=precision(x.dtype),
    )
    describable = can_describe(gy) and can_describe(x)
    plan, rows = plan_grad_weight(
        tuple(shapes), tuple(channels), x.element_size(), layout, describable, device_limits(x.device), forced
    )
    partials = gy.new_empty((rows, C), dtype=torch.float32)
    taps = plan.table.on(x.device)
    if plan.programs > 0:
        scratch_context(x.device).run(
            launch,
            dilated_grad_weight_boxes if plan.has_boxes else dilated_grad_weight,
            plan.programs,
            p_gy=gy,
            p_x=x,
            p_partials=partials,
            p_taps=taps,
            **dict(zip(("s_gyn", "s_gyp", "s_gyq"), outer_spacing(gy), strict=True)),
            **dict(zip(("s_xn", "s_xh", "s_xw"), outer_spacing(x), strict=True)),
            **plan.arguments,
        )
    splits = cdiv(rows, sum(shape.K * shape.R * shape.S for shape in shapes))  # of a tap, on average
    block_splits = min(power_of_two(splits, 1), MAX_REDUCE_SPLITS)
    block = REDUCE_BLOCK // block_splits
    first_tap = 0
    for shape, grad_weight in zip(shapes, grad_weights, strict=True):
        launch(
            dilated_grad_weight_reduce,
            cdiv(shape.K * C, block) * shape.R * shape.S,
            p_partials=partials,
            p_gw=grad_weight,
            p_taps=taps,
            K=shape.K,
            C=C,
            S=shape.S,
            i_first_tap=first_tap,
            **strides("s_gwk s_gwc s_gwr s_gws", grad_weight),
            BLOCK_SPLITS=block_splits,
            BLOCK=block,
            num_warps=4,
        )
        first_tap += shape.R * shape.S


def check_bias(bias, size: tuple[int, ...], like) -> None:
    """Raise unless `bias` has this size, the device of `like`, and its dtype or the accumulator's."""
    if bias.dtype != torch.float32:
        check_like("bias", bias, size, like)
    _check_size("bias", bias, size, like)


def check_scale(scale, channels: int, like) -> None:
    """Raise unless `scale` has one float32 a channel, on the device of `like`."""
    _check_size("scale", scale, (channels,), like)
    if scale.dtype != torch.float32:
        fail("scale in torch.float32", f"{scale.dtype}")


def _check_size(name: str, tensor, size: tuple[int, ...], like) -> None:
    if tensor.shape != size or tensor.device != like.device:
        fail(f"{name} of shape {list(size)} on {like.device}", f"{list(tensor.shape)} on {tensor.device}")


def _dense_shape(input, weight, stride, padding, dilation) -> ConvShape:
    shape = conv_shape(input, weight, stride, padding, dilation)
    if weight.shape[1] != shape.C:
        fail(f"weight [K, {shape.C}, R, S]", f"{list(weight.shape)}")
    return shape


def _is_pointwise(shape: ConvShape, padding) -> bool:
    return (shape.R, shape.S, shape.stride_h, shape.stride_w, *padding) == (1, 1, 1, 1, 0, 0, 0, 0)


def _is_one_row(tensor) -> bool:
    """Whether the pixels of all images are equally spaced in memory, and few enough to be columns of one row."""
    N, _, H, W = tensor.shape
    s_n, _, s_h, s_w = tensor.stride()
    return s_h == W * s_w and s_n == H * s_h and N * H * W <= MAX_INT32


def _as_one_row(tensor):
    """[1, C, 1, N * H * W], a view: where no pixel looks at its neighbours, tiles need not end with an image."""
    return tensor.permute(0, 2, 3, 1).flatten(0, 2).T[None, :, None]


def precision(dtype: torch.dtype) -> str:
    """How torch multiplies in convolutions of this dtype, at this moment."""
    if dtype == torch.float32 and torch.backends.cudnn.conv.fp32_precision == "tf32":
        return "tf32"
    return "ieee"


def needs_wide_offsets(*tensors) -> bool:
    """Whether an offset leaves 32 bits; tiles reach beyond the last pixel by less than 512."""
    offsets = [sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) for t in tensors]
    return needs_index_64(*(offset + 512 for offset in offsets))


def outer_strides(names: str, tensor) -> dict[str, int]:
    """The strides of images, rows and columns; channels are adjacent."""
    return dict(zip(names.split(), (tensor.stride(0), tensor.stride(2), tensor.stride(3)), strict=True))


def adjacent_channels(target):
    """`target` itself where its channels are adjacent, else another tensor for its values, channels_last."""
    if target.stride(1) == 1 or target.shape[1] == 1:
        return target
    return torch.empty_like(target, memory_format=torch.channels_last)


def vector(tensor):
    return None if tensor is None else tensor.contiguous()
