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
tensor descriptors, where device and tensors allow it and few pixels are in vain. grad_weight is a product for each tap,
over the rectangle of outputs that read the image through it, gy^T [K, pixels] x x [pixels, C]. Its pixels are split
over programs that leave fp32 partial sums, which a second stage adds in a fixed order: no atomics, the same bits every
time.

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
import triton
import triton.language as tl

from fastseg.ops.dilated.triton_plan import (
    BOX_CONFIGS,
    CONFIGS,
    IEEE_CONFIGS,
    NARROW_CONFIGS,
    REDUCE_BLOCK,
    REDUCE_BLOCK_SPLITS,
    TAP_FIELDS,
    BoxConfig,
    Config,
    GradWeightLayout,
    Layout,
    device_limits,
    plan_grad_weight,
    plan_product,
)
from fastseg.ops.dilated.triton_product import (
    can_describe,
    describe,
    dilated_product,
    dilated_product_boxes,
    find_row,
)
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
    in_groups,
    launch,
    multiply_add,
    needs_index_64,
    on_device,
    split_index,
    store_tile,
    strides,
    widen,
)

__all__ = [
    "BOX_CONFIGS",
    "CONFIGS",
    "IEEE_CONFIGS",
    "NARROW_CONFIGS",
    "BoxConfig",
    "Config",
    "backward",
    "forced_config",
    "forward",
]

# Arguments that change from layer to layer and gain nothing from being known when a kernel is compiled.
GRAD_WEIGHT_SIZES = (
    *("N", "C", "n_taps", "n_steps", "n_blocks_c", "stride_h", "stride_w"),
    *("s_gyn", "s_gyp", "s_gyq", "s_xn", "s_xh", "s_xw"),
)
_TAP_FIELDS = tl.constexpr(TAP_FIELDS)


# fmt: off
@triton.jit(do_not_specialize=GRAD_WEIGHT_SIZES)
def dilated_grad_weight(
    p_gy,  # [N, output channels, P, Q], channels adjacent
    p_x,  # [N, C, H, W], channels adjacent
    p_partials,  # [rows, C] fp32: for each tap [splits, K]
    p_taps,  # [n_taps + 1, TAP_FIELDS]
    N, C, n_taps,
    n_steps,  # of a program
    n_blocks_c,
    stride_h, stride_w,
    s_gyn, s_gyp, s_gyq,
    s_xn, s_xh, s_xw,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_TAPS: tl.constexpr,
    GROUP_GY: tl.constexpr, GROUP_X: tl.constexpr, PRECISION: tl.constexpr, IS_INDEX_64: tl.constexpr,
):
    # fmt: on
    ITEMSIZE: tl.constexpr = p_x.dtype.element_ty.primitive_bitwidth // 8
    p_tap = find_row(p_taps, tl.program_id(0), n_taps, _TAP_FIELDS, BLOCK_TAPS)
    i_channel, K = tl.load(p_tap + 2), tl.load(p_tap + 3)
    i_p, n_p, i_h = tl.load(p_tap + 4).to(tl.int64), tl.load(p_tap + 5), tl.load(p_tap + 6).to(tl.int64)
    i_q, n_q, i_w = tl.load(p_tap + 7).to(tl.int64), tl.load(p_tap + 8), tl.load(p_tap + 9).to(tl.int64)
    i_c, i_part = split_index(tl.program_id(0) - tl.load(p_tap), n_blocks_c)
    i_k, i_part = split_index(i_part, tl.cdiv(K, BLOCK_M))
    p_gy += i_p * s_gyp + i_q * s_gyq + i_channel
    p_x += i_h * s_xh + i_w * s_xw

    i_first = widen(i_part, IS_INDEX_64) * n_steps * BLOCK_D
    o_q, o_image = split_index(i_first + tl.arange(0, BLOCK_D), n_q)
    o_p, o_image = split_index(o_image, n_p)
    o_k = widen(i_k, IS_INDEX_64) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_c = widen(i_c, IS_INDEX_64) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_k = o_k < in_groups(K, GROUP_GY)
    m_c = o_c < in_groups(C, GROUP_X)

    # From one step to the next a pixel moves on by BLOCK_D: so many columns, rows and images, and two carries.
    jump_q, jump_p = split_index(BLOCK_D, n_q)
    jump_p, jump_image = split_index(jump_p, n_p)
    n_left = tl.cdiv(widen(N, IS_INDEX_64) * n_p * n_q - i_first, BLOCK_D)

    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for _ in tl.range(0, tl.minimum(n_left, n_steps).to(tl.int32)):
        m_pixel = (o_image < N)[:, None]
        o_gy = o_image * s_gyn + o_p * s_gyp + o_q * s_gyq
        o_x = o_image * s_xn + o_p * stride_h * s_xh + o_q * stride_w * s_xw
        p_gy_tile = tl.multiple_of(p_gy + (o_gy[:, None] + o_k[None, :]), [1, GROUP_GY * ITEMSIZE])
        p_x_tile = tl.multiple_of(p_x + (o_x[:, None] + o_c[None, :]), [1, GROUP_X * ITEMSIZE])
        b_gy = tl.load(p_gy_tile, mask=m_pixel & m_k[None, :], other=0.0)  # [BLOCK_D, BLOCK_M]
        b_x = tl.load(p_x_tile, mask=m_pixel & m_c[None, :], other=0.0)  # [BLOCK_D, BLOCK_N]
        acc = multiply_add(b_gy.T, b_x, acc, PRECISION)

        o_q += jump_q
        is_next_row = o_q >= n_q
        o_q = tl.where(is_next_row, o_q - n_q, o_q)
        o_p += jump_p + is_next_row.to(tl.int32)
        is_next_image = o_p >= n_p
        o_p = tl.where(is_next_image, o_p - n_p, o_p)
        o_image += jump_image + is_next_image.to(tl.int32)

    p_partials += (tl.load(p_tap + 1).to(tl.int64) + i_part.to(tl.int64) * K) * C
    o_partials = o_k[:, None] * C + o_c[None, :]
    store_tile(p_partials, o_partials, acc, (o_k < K)[:, None] & m_c[None, :], GROUP_X)  # [BLOCK_M, BLOCK_N]


# fmt: off
@triton.jit(do_not_specialize=("K", "C", "S", "i_first_tap"))
def dilated_grad_weight_reduce(
    p_partials,  # [rows, C] fp32: for each tap [splits, K]
    p_gw,  # [K, C, R, S]
    p_taps,  # [taps + 1, TAP_FIELDS], R * S of them of this weight
    K, C, S,
    i_first_tap,
    s_gwk, s_gwc, s_gwr, s_gws,
    BLOCK_SPLITS: tl.constexpr, BLOCK: tl.constexpr,
):
    # fmt: on
    i_block, i_tap = split_index(tl.program_id(0), tl.cdiv(tl.cast(K, tl.int64) * C, BLOCK).to(tl.int32))
    p_tap = p_taps + (i_first_tap + i_tap) * _TAP_FIELDS
    i_first = tl.load(p_tap + 1)
    n_splits = (tl.load(p_tap + _TAP_FIELDS + 1) - i_first) // K
    n_weights = tl.cast(K, tl.int64) * C
    p_partials += i_first.to(tl.int64) * C
    o_weight = i_block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    o_split = tl.arange(0, BLOCK_SPLITS)[:, None]
    m_weight = o_weight < n_weights

    acc = tl.zeros([BLOCK_SPLITS, BLOCK], tl.float32)
    for i_split in tl.range(0, n_splits, BLOCK_SPLITS):
        o_partials = (i_split + o_split) * n_weights + o_weight[None, :]
        m_partials = (i_split + o_split < n_splits) & m_weight[None, :]
        acc += tl.load(p_partials + o_partials, mask=m_partials, other=0)  # [BLOCK_SPLITS, BLOCK]
    b_sum = tl.sum(acc, 0)  # [BLOCK]

    o_c, o_k = split_index(o_weight, C)
    i_s, i_r = split_index(i_tap, S)
    o_gw = o_k * s_gwk + o_c * s_gwc + i_r.to(tl.int64) * s_gwr + i_s * s_gws
    tl.store(p_gw + o_gw, b_sum.to(p_gw.dtype.element_ty), mask=m_weight)  # [BLOCK]


forced: Config | BoxConfig | None = None


@contextlib.contextmanager
def forced_config(config: Config | BoxConfig):
    """Run every kernel with `config`, whatever the problem; with boxes only where a kernel can take them."""
    global forced
    previous, forced = forced, config
    try:
        yield
    finally:
        forced = previous


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
        targets, shape, tuple(padding), source.element_size(), layout, describable, limits, forced, has_image_bias
    )
    if plan.has_boxes:
        kernel, operands = dilated_product_boxes, _descriptors(source, weight, plan.arguments)
    else:
        strides_s, strides_w = outer_strides("s_sn s_sh s_sw", source), outer_strides("s_wk s_wr s_ws", weight)
        kernel, operands = dilated_product, {"p_source": source, "p_weight": weight, **strides_s, **strides_w}
    launch(
        kernel,
        plan.programs,
        **operands,
        p_scale=scale,
        p_bias=bias,
        p_target=image,
        p_rectangles=plan.table.on(source.device),
        n_row=n_row,
        **outer_strides("s_tn s_th s_tw", image),
        ACTIVATION=activation,
        **plan.arguments,
    )
    if result is not target:
        target.copy_(result)


def _descriptors(source, weight, arguments) -> dict:
    """The operands of dilated_product_boxes, in boxes of the plan's size."""
    block_n, block_d = arguments["BLOCK_N"], arguments["BLOCK_D"]
    pixels = arguments["BOX_N"], arguments["BOX_H"], arguments["BOX_W"]
    filters = (block_d, block_n) if arguments["IS_GRAD_INPUT"] else (block_n, block_d)
    return {
        "d_source": describe(source, "NHWC", [*pixels, block_d]),
        "d_weight": describe(weight, "HWNC", [1, 1, *filters]),
    }


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
    plan, rows = plan_grad_weight(
        tuple(shapes), tuple(channels), x.element_size(), layout, device_limits(x.device), forced
    )
    partials = gy.new_empty((rows, C), dtype=torch.float32)
    taps = plan.table.on(x.device)
    if plan.programs > 0:
        launch(
            dilated_grad_weight,
            plan.programs,
            p_gy=gy,
            p_x=x,
            p_partials=partials,
            p_taps=taps,
            **outer_strides("s_gyn s_gyp s_gyq", gy),
            **outer_strides("s_xn s_xh s_xw", x),
            **plan.arguments,
        )
    first_tap = 0
    for shape, grad_weight in zip(shapes, grad_weights, strict=True):
        launch(
            dilated_grad_weight_reduce,
            cdiv(shape.K * C, REDUCE_BLOCK) * shape.R * shape.S,
            p_partials=partials,
            p_gw=grad_weight,
            p_taps=taps,
            K=shape.K,
            C=C,
            S=shape.S,
            i_first_tap=first_tap,
            **strides("s_gwk s_gwc s_gwr s_gws", grad_weight),
            BLOCK_SPLITS=REDUCE_BLOCK_SPLITS,
            BLOCK=REDUCE_BLOCK,
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
