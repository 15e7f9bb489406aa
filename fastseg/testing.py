"""How right is right: error bounds, input makers and comparisons. Used by fastseg's tests, benchmarks and by users.

There are no tolerances here that somebody tuned. A result is compared element by element with the same sum in float64
on the already rounded inputs, and may differ from it by

    u_out * |ref| + FACTOR * terms * u_acc * a        a = the same sum over absolute values

where u is the unit roundoff of the output's and the accumulator's dtype. One wrong border pixel breaks it. TF32 rounds
both factors of a product to 11 bits first, which adds 2 * 2^-11 * a.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from fastseg.ops.activation import activation_backward, apply_activation, needs_preactivation
from fastseg.ops.aspp import reference as aspp_reference
from fastseg.ops.depthwise import reference as depthwise_reference
from fastseg.ops.dilated import reference as dilated_reference
from fastseg.ops.geometry import POINTWISE
from fastseg.ops.head import reference as head_reference
from fastseg.ops.head.sampling import position_dtype, samples

UNIT_ROUNDOFF = {
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8,
    torch.float32: 2.0**-24,
    torch.float64: 2.0**-53,
}
# The smallest positive (subnormal) number of each dtype: half of it may be lost to underflow.
SMALLEST = {torch.float16: 2.0**-24, torch.bfloat16: 2.0**-133, torch.float32: 2.0**-149, torch.float64: 2.0**-1074}
# Each term of a sum is rounded at most twice: once as a product and once when it is added.
FACTOR = 2.0
# The largest slope of any activation (hardswish): how much it can enlarge the error of what it is given.
STEEPEST_ACTIVATION = 1.5
# The largest change of any activation's slope from one place to another, over their distance (silu).
MOST_CURVED_ACTIVATION = 0.5
# What rounding both factors of a product to TF32 adds to its relative error.
TF32_PRODUCT = 2 * 2.0**-11


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype sums are kept in for tensors of `dtype`: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Expected(NamedTuple):
    """A result in float64 and how far a kernel may be from it, element by element."""

    value: torch.Tensor
    bound: torch.Tensor


def expected(
    value: torch.Tensor, absolute: torch.Tensor, terms: int, dtype: torch.dtype, roundoff=None, tf32: bool = False
) -> Expected:
    """The bound for a sum of `terms` products whose absolute values add up to `absolute`, stored as `dtype`.

    `roundoff` replaces the output dtype's unit roundoff, for arithmetic that truncates where it should round. `tf32`
    says that the products are TF32's.
    """
    roundoff = UNIT_ROUNDOFF[dtype] if roundoff is None else roundoff
    accumulated = FACTOR * max(terms, 1) * UNIT_ROUNDOFF[accumulator_dtype(dtype)] * absolute
    if tf32:
        accumulated = accumulated + TF32_PRODUCT * absolute
    return Expected(value, roundoff * value.abs() + accumulated * (1 + roundoff) + SMALLEST[dtype])


def assert_within(actual: torch.Tensor, wanted: Expected, what: str) -> None:
    """Raise AssertionError where `actual` leaves the bound, is not finite where it should be, or the reverse."""
    actual, value, bound = actual.double(), wanted.value, wanted.bound
    if actual.shape != value.shape:
        raise AssertionError(f"{what}: got shape {tuple(actual.shape)}, wanted {tuple(value.shape)}")
    same = (actual == value) | (actual.isnan() & value.isnan())
    wrong = ~same & ~((actual - value).abs() <= bound)
    if wrong.any():
        worst = torch.where(wrong, ((actual - value).abs() / bound).nan_to_num(torch.inf), 0).argmax()
        where = tuple(int(i) for i in torch.unravel_index(worst, value.shape))
        raise AssertionError(
            f"{what}: {int(wrong.sum())} of {value.numel()} elements leave the bound; the worst, at {where}, is "
            f"{actual[where]:.9g}, wanted {value[where]:.9g} +- {bound[where]:.3g}"
        )


def assert_no_less_accurate(actual, native, exact, times: float, what: str) -> None:
    """Raise AssertionError when the largest error exceeds `times` native's own, or one unit in the last place."""
    roundoff = UNIT_ROUNDOFF[actual.dtype]
    largest = float(exact.abs().max()) if exact.numel() else 0.0
    own = float((native.double() - exact).abs().max()) if exact.numel() else 0.0
    error = float((actual.double() - exact).abs().max()) if exact.numel() else 0.0
    allowed = max(times * own, 2 * roundoff * largest)
    if error > allowed:
        raise AssertionError(
            f"{what}: the largest error is {error:.3g}; native's is {own:.3g}, so {allowed:.3g} is allowed"
        )


def assert_alike(actual: torch.Tensor, wanted: torch.Tensor) -> None:
    """Raise AssertionError unless two ways to compute the same layers agree in size, dtype and up to their rounding.

    The largest difference may be 2^14 unit roundoffs, and at most a sixteenth, of the largest value: several layers of
    long sums in another order stay far below, and anything left out or computed twice is far above.
    """
    if actual.shape != wanted.shape or actual.dtype != wanted.dtype:
        raise AssertionError(
            f"got {tuple(actual.shape)} in {actual.dtype}, wanted {tuple(wanted.shape)} in {wanted.dtype}"
        )
    if actual.numel() == 0 or torch.equal(actual, wanted):
        return
    if not actual.is_floating_point():
        raise AssertionError("the values differ")
    difference = float((actual.double() - wanted.double()).abs().max())
    largest = float(wanted.double().abs().max())
    allowed = min(2.0**14 * UNIT_ROUNDOFF[actual.dtype], 2.0**-4) * largest
    if not difference <= allowed:
        raise AssertionError(f"the largest difference is {difference:.3g}, {allowed:.3g} is allowed")


class ConvExpected(NamedTuple):
    """What forward and backward of one convolution have to give."""

    output: Expected
    grad_input: Expected
    grad_weight: Expected
    grad_bias: Expected


def expected_conv(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    activation: str = "none",
    grad_output: torch.Tensor | None = None,
    *,
    roundoff: float | None = None,
    tf32: bool = False,
    depthwise: bool | None = None,
    dtype: torch.dtype | None = None,
) -> ConvExpected:
    """Values and bounds in float64 of a dense convolution or, with a weight [C * m, 1, R, S], of a depthwise one.

    `padding` is (top, bottom, left, right); `grad_output` is the gradient before the activation, and without it there
    are no gradients; `roundoff` and `tf32` are those of `expected`. `depthwise` says what the weight's shape leaves
    open; `dtype` is that of the tensors where they stand in for others.
    """
    dtype = dtype or input.dtype
    reference = depthwise_reference if (weight.shape[1] == 1 if depthwise is None else depthwise) else dilated_reference
    geometry = (stride, padding, dilation)
    products = weight[0].numel()

    def bounded(value, absolute, terms):
        return expected(value, absolute, terms, dtype, roundoff, tf32)

    def double(t):
        return None if t is None else t.detach().double()

    def absolute(t):
        return None if t is None else t.detach().double().abs()

    z = reference.forward(double(input), double(weight), double(bias), *geometry, "none")
    a = reference.forward(absolute(input), absolute(weight), absolute(bias), *geometry, "none")
    if activation == "none":
        output = bounded(z, a, products + 1)
    else:
        # The activation's own arithmetic in the accumulator's dtype costs a few roundings of its value.
        value = apply_activation(z, activation)
        output = bounded(value, STEEPEST_ACTIVATION * a + 4 * value.abs(), products + 1)
    if grad_output is None:
        return ConvExpected(output, None, None, None)

    mask = (True, True, True)
    grads = reference.backward(double(grad_output), double(input), double(weight), *geometry, mask)
    sizes = reference.backward(absolute(grad_output), absolute(input), absolute(weight), *geometry, mask)
    pixels = grad_output.shape[0] * grad_output.shape[2] * grad_output.shape[3]
    reached = weight.numel() // input.shape[1]  # output channels and taps that an input reaches
    terms = (reached, pixels, pixels)
    return ConvExpected(output, *(bounded(g, s, t) for g, s, t in zip(grads, sizes, terms, strict=True)))


def expected_separable(
    input, depthwise_weight, pointwise_weight, depthwise_bias, pointwise_bias, stride, padding, dilation,
    depthwise_activation="none", activation="none", grad_output=None, *, roundoff=None, tf32=False,
) -> tuple[Expected, ...]:  # fmt: skip
    """Output and gradients (in the order of the tensors) of a depthwise-separable convolution, as `expected_conv`.

    The bound of the depthwise half, rounded to the dtype, goes through the pointwise half, and back.
    """
    geometry, options = (stride, padding, dilation), dict(roundoff=roundoff, dtype=input.dtype)
    depthwise = (input, depthwise_weight, depthwise_bias, *geometry)
    z = expected_conv(*depthwise, depthwise_activation, depthwise=True, **options).output
    pointwise = expected_conv(
        z.value, pointwise_weight, pointwise_bias, *POINTWISE, activation, grad_output,
        depthwise=False, tf32=tf32, **options,
    )  # fmt: skip
    size = pointwise_weight.detach().double().abs()
    carried = STEEPEST_ACTIVATION * dilated_reference.forward(z.bound, size, None, *POINTWISE, "none")
    output = _widened(pointwise.output, carried)
    if grad_output is None:
        return (output,)

    mask = (True, True, True)
    carried = dilated_reference.backward(grad_output.double().abs(), z.bound, size, *POINTWISE, mask)
    grad_pointwise = _widened(pointwise.grad_weight, carried[1])
    t = expected_conv(*depthwise, depthwise=True, **options).output
    before = t if needs_preactivation(depthwise_activation) else z
    grad_z = pointwise.grad_input
    value = activation_backward(grad_z.value, before.value, depthwise_activation)
    bound = grad_z.bound
    if depthwise_activation != "none":
        # A few roundings of the activation's own, and its slope at a place that is off by t's bound.
        unit = UNIT_ROUNDOFF[input.dtype] if roundoff is None else roundoff
        bound = STEEPEST_ACTIVATION * bound + 4 * unit * grad_z.value.abs()
        if needs_preactivation(depthwise_activation):
            bound = bound + MOST_CURVED_ACTIVATION * t.bound * grad_z.value.abs()
    grads = expected_conv(*depthwise, grad_output=value, depthwise=True, **options)[1:]
    sizes = (bound, input.detach().double().abs(), depthwise_weight.detach().double().abs())
    carried = depthwise_reference.backward(*sizes, *geometry, mask)
    grad_input, grad_depthwise, grad_bias = (_widened(g, c) for g, c in zip(grads, carried, strict=True))
    return output, grad_input, grad_depthwise, grad_pointwise, grad_bias, pointwise.grad_bias


def _widened(wanted: Expected, bound: torch.Tensor) -> Expected:
    return Expected(wanted.value, wanted.bound + bound)


def expected_branches(
    input, weights, bias, dilations, activation="none", reduction="concat", grad_output=None, *, roundoff=None,
    tf32=False,
) -> tuple[Expected, ...]:  # fmt: skip
    """Output and gradients (of input, of each weight, of the joined bias) of parallel dense convolutions."""

    def bounded(value, absolute, terms):
        return expected(value, absolute, terms, input.dtype, roundoff, tf32)

    x, w = input.detach().double(), [weight.detach().double() for weight in weights]
    b = None if bias is None else bias.detach().double()
    sizes = (x.abs(), [weight.abs() for weight in w], None if b is None else b.abs())
    rest = (dilations, "none", reduction, False, None)
    z, a = aspp_reference.forward(x, w, b, *rest)[0], aspp_reference.forward(*sizes, *rest)[0]
    products = [weight[0].numel() for weight in weights]
    terms = (max(products) if reduction == "concat" else sum(products)) + 1
    if activation == "none":
        output = bounded(z, a, terms)
    else:
        value = apply_activation(z, activation)
        output = bounded(value, STEEPEST_ACTIVATION * a + 4 * value.abs(), terms)
    if grad_output is None:
        return (output,)
    gy, last = grad_output.detach().double(), (dilations, reduction, True, True)
    grad_x, grad_w = aspp_reference.backward(gy, x, w, *last)
    size_x, size_w = aspp_reference.backward(gy.abs(), *sizes[:2], *last)
    pixels = gy.shape[0] * gy.shape[2] * gy.shape[3]
    grads = [bounded(grad_x, size_x, sum(weight.numel() // weight.shape[1] for weight in weights))]
    grads += [bounded(g, s, pixels) for g, s in zip(grad_w, size_w, strict=True)]
    return output, *grads, bounded(gy.sum((0, 2, 3)), gy.abs().sum((0, 2, 3)), pixels)


# Roundings of one term of a bilinear sum beside its addition: both axes' 1 - share, and two products.
BILINEAR_ROUNDINGS = 4


def expected_upsample(
    input: torch.Tensor,
    size: Sequence[int],
    scales: Sequence[float] | None,
    align_corners: bool,
    grad_output: torch.Tensor | None = None,
    *,
    roundoff: float | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Expected, Expected | None]:
    """Output and gradient of the input of a bilinear resize to `size`; `scales` are the scale factors given, or None.

    Positions are the dtype's own, computed as ATen does: they are what is resized, not an error of it. `roundoff` is
    that of `expected`, `dtype` the output's where it is not the input's.
    """
    positions = position_dtype(input.dtype)
    geometry = (scales, align_corners, positions)
    x = input.detach().double()
    value, absolute = (head_reference.resize(t, size, *geometry) for t in (x, x.abs()))
    # Four terms: BILINEAR_ROUNDINGS and three additions are less than FACTOR times four.
    output = expected(value, absolute, 4, dtype or input.dtype, roundoff)
    slack = _position_slack(input.shape, positions)
    if slack > 0:
        output = _widened(output, slack * head_reference.resize(_largest_nearby(x.abs()), size, *geometry))
    if grad_output is None:
        return output, None
    g = grad_output.detach().double()
    value, absolute = (head_reference.resize_backward(t, input.shape, *geometry) for t in (g, g.abs()))
    terms = _most_readers(input.shape, size, *geometry) + BILINEAR_ROUNDINGS
    grad_input = expected(value, absolute, terms, dtype or input.dtype, roundoff)
    return output, _widened(grad_input, slack * 9 * _largest_nearby(absolute)) if slack > 0 else grad_input


def _position_slack(shape, positions: torch.dtype) -> float:
    """How far two evaluations of one position may be apart, in pixels.

    In float32 the reference rounds once, as a fused multiply-add does. In float64 it rounds twice, and that one once.
    """
    return 4 * UNIT_ROUNDOFF[torch.float64] * max(shape[2:]) if positions == torch.float64 else 0.0


def _largest_nearby(absolute: torch.Tensor) -> torch.Tensor:
    """The largest of the 3 x 3 around each pixel."""
    return torch.nn.functional.max_pool2d(absolute, 3, 1, 1) if absolute.numel() > 0 else absolute


def _most_readers(shape, size, scales, align_corners, dtype) -> int:
    """The largest number of outputs that look at one input."""
    most = 1
    for axis in range(2):
        inputs, scale = shape[2 + axis], None if scales is None else scales[axis]
        first, second, _ = samples(inputs, size[axis], scale, align_corners, dtype, "cpu")
        most *= int((first.bincount(minlength=inputs) + second.bincount(minlength=inputs)).max())
    return most


def expected_scores(logits: torch.Tensor, size: Sequence[int], align_corners: bool) -> Expected:
    """The scores that an argmax compares: resized logits that are not rounded to the logits' dtype."""
    return expected_upsample(logits, size, None, align_corners, dtype=accumulator_dtype(logits.dtype))[0]


def assert_argmax(labels: torch.Tensor, scores: Expected) -> None:
    """Raise AssertionError unless `labels` are the argmax of `scores`, or a class that ties with it within the bound.

    NaN counts as the largest score, as for torch.argmax.
    """
    value, bound = scores
    best, found = value.argmax(1, keepdim=True), labels.long()[:, None]
    gap = value.gather(1, best) - value.gather(1, found)
    wrong = (best != found) & ~(gap <= bound.gather(1, best) + bound.gather(1, found))
    if wrong.any():
        n, _, row, column = (int(i) for i in wrong.nonzero()[0])
        raise AssertionError(
            f"{int(wrong.sum())} of {wrong.numel()} labels are wrong; the first, at {(n, row, column)}, is "
            f"{int(found[n, 0, row, column])}, wanted {int(best[n, 0, row, column])}"
        )


# A few roundings: what exp, log and a weight's product with a share of the target cost, in units of the last place.
FEW_ROUNDINGS = 4


def expected_cross_entropy(
    logits: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    align_corners: bool = False,
    reduction: str = "mean",
    grad: torch.Tensor | None = None,
    *,
    roundoff: float | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Expected, Expected | None]:
    """Loss and gradient of the logits of the cross entropy of resized logits; `grad` is the loss's own gradient.

    `roundoff` is that of `expected`, `dtype` the loss's where it is not the logits'. Images are taken one by one, which
    keeps memory low.
    """
    options = (weight, ignore_index, label_smoothing, align_corners)
    per_pixel = grad is not None and reduction == "none"
    found = [
        _loss_of_image(logits[i : i + 1], target[i : i + 1], *options, grad[i : i + 1] if per_pixel else None)
        for i in range(len(logits))
    ] or [_loss_of_image(logits, target, *options, grad if per_pixel else None)]
    losses, loss_bounds, totals, grads, grad_bounds = zip(*found, strict=True)
    unit = UNIT_ROUNDOFF[accumulator_dtype(logits.dtype)]
    losses, loss_bounds = torch.cat(losses), torch.cat(loss_bounds)
    gradient, gradient_bound = torch.cat(grads), torch.cat(grad_bounds)
    value, bound = losses, loss_bounds
    sum_of_pixels = FACTOR * max(target.numel(), 1) * unit
    if reduction != "none":
        value, bound = losses.sum(), loss_bounds.sum() + sum_of_pixels * losses.abs().sum()
    scale = 1.0 if grad is None or reduction == "none" else grad.detach().double()
    if reduction == "mean":
        total = sum(totals)
        # Without class weights the total is a count, which is exact.
        slack = FEW_ROUNDINGS * unit + (0.0 if weight is None else sum_of_pixels)
        value, bound = value / total, bound / total + slack * (value / total).abs()
        scale = torch.where(total == 0, 0.0, scale / total)
        gradient_bound = gradient_bound + slack * gradient.abs()
    loss = _stored(value, bound, dtype or logits.dtype, roundoff, unit)
    if grad is None:
        return loss, None
    return loss, _stored(gradient * scale, gradient_bound * abs(scale), logits.dtype, roundoff, unit)


def _stored(value, bound, dtype, roundoff, unit) -> Expected:
    """The bound after the last few roundings in the accumulator's dtype, and the one to `dtype`."""
    roundoff = UNIT_ROUNDOFF[dtype] if roundoff is None else roundoff
    bound = bound + FEW_ROUNDINGS * unit * value.abs()
    return Expected(value, roundoff * value.abs() + bound * (1 + roundoff) + SMALLEST[dtype])


# Elements of a band of an image: what has classes at full resolution is large in float64.
_BAND = 2**22


def _loss_of_image(logits, target, weight, ignore_index, label_smoothing, align_corners, grad_losses):
    """Of one image: losses, their bound, the sum of targets' weights, the gradient of the losses' sum, its bound."""
    positions, (height, width) = position_dtype(logits.dtype), target.shape[1:]
    unit, geometry = UNIT_ROUNDOFF[positions], (None, align_corners, positions)
    scores = expected_upsample(logits, (height, width), None, align_corners, dtype=positions)[0]
    upstream = torch.ones_like(target, dtype=torch.float64) if grad_losses is None else grad_losses.detach().double()
    rows = max(1, _BAND // max(1, logits.shape[1] * width))
    bands = [
        _loss_of_band(
            Expected(*(t[:, :, top : top + rows] for t in scores)), target[:, top : top + rows], weight, ignore_index,
            label_smoothing, upstream[:, None, top : top + rows], unit,
        )
        for top in range(0, height, rows)
    ]  # fmt: skip
    losses, losses_bound, totals, grad, grad_bound, absolute = zip(*bands, strict=True)
    grad, grad_bound, absolute = (
        head_reference.resize_backward(torch.cat(parts, 2), logits.shape, *geometry)
        for parts in (grad, grad_bound, absolute)
    )
    readers = _most_readers(logits.shape, (height, width), *geometry) + BILINEAR_ROUNDINGS
    grad_bound = grad_bound + FACTOR * readers * unit * absolute
    slack = _position_slack(logits.shape, positions)
    if slack > 0:
        grad_bound = grad_bound + slack * 9 * _largest_nearby(absolute)
    return torch.cat(losses, 1), torch.cat(losses_bound, 1), sum(totals), grad, grad_bound


def _loss_of_band(scores: Expected, target, weight, ignore_index, label_smoothing, upstream, unit):
    """Of some pixels: losses, their bound, the sum of targets' weights, the scores' gradient, its bound, its size."""
    log_p, wanted, total = head_reference.distributions(scores.value, target, weight, ignore_index, label_smoothing)
    classes, finite = scores.value.shape[1], scores.value.isfinite()
    score, score_bound, size = scores.value, scores.bound.where(finite, 0), scores.value.abs().where(finite, 0)
    p, lse, largest = log_p.exp(), score.logsumexp(1, keepdim=True), score.amax(1, keepdim=True)
    # What errors of scores do to the logarithm of the sum is largest where all of them are positive.
    lse_bound = (score + score_bound).logsumexp(1, keepdim=True) - lse
    lse_bound = lse_bound.where(lse.isfinite(), 0).clamp_min(0)
    # exp(score - largest) inherits the rounding of its argument; a base other than e rounds it once more.
    arguments = torch.where(p > 0, p * 2 * (score - largest).abs(), 0).sum(1, keepdim=True)
    lse_bound = lse_bound + unit * (arguments + FACTOR * classes + FEW_ROUNDINGS * (1 + lse.abs()))
    # wanted * (lse - score), term by term or the two sums apart, over the classes that have a share in the target.
    shares = classes if label_smoothing > 0 else 1
    terms = (lse_bound + score_bound) + FACTOR * (shares + FEW_ROUNDINGS) * unit * (lse.abs() + size)
    losses = -torch.where(wanted == 0, 0, wanted * log_p).sum(1)
    losses_bound = torch.where(wanted == 0, 0, wanted * terms).sum(1)

    # p may be off by as much as its logarithm allows, and is at most 1; a GPU flushes the smallest numbers to zero.
    off = score_bound + lse_bound + unit * torch.where(p > 0, 2 * log_p.abs() + FEW_ROUNDINGS, FEW_ROUNDINGS)
    raised = torch.where(finite, (log_p + off).clamp_max(0).exp() - p, 0)
    smallest = torch.finfo(torch.float64 if unit == UNIT_ROUNDOFF[torch.float64] else torch.float32).tiny
    p_bound = torch.maximum(raised, -p * torch.expm1(-off)) + smallest
    both = wanted.sum(1, keepdim=True)
    parts = p * both + wanted
    grad_bound = both * p_bound + (FEW_ROUNDINGS + FACTOR * (shares - 1)) * unit * parts
    grad = (p * both - wanted) * upstream
    return losses, losses_bound, total, grad, grad_bound * upstream.abs(), parts * upstream.abs()


def random_tensor(shape, dtype, *, seed=0, device="cpu", memory_format=torch.contiguous_format) -> torch.Tensor:
    """Normal random numbers, the same for the same seed on every device and in every memory format."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).to(device)
    return values.contiguous(memory_format=memory_format) if len(shape) == 4 else values


def integer_tensor(shape, dtype, *, low=-3, high=3, seed=0, device="cpu") -> torch.Tensor:
    """Small random integers, whose sums of products are exact in every dtype that can hold them."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, high + 1, shape, generator=generator).to(dtype).to(device)


def strided_variants(tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same 4-D values in the memory layouts that kernels get wrong: each maps a name to an equal tensor."""
    n, c, h, w = tensor.shape
    wide = tensor.new_zeros(n + 1, c + 3, h + 2, w + 5)
    sliced = wide[1:, 2 : 2 + c, 1 : 1 + h, 3 : 3 + w]
    wide_last = wide.contiguous(memory_format=torch.channels_last)
    sliced_last = wide_last[1:, 2 : 2 + c, 1 : 1 + h, 3 : 3 + w]
    permuted = tensor.new_zeros(w, h, n, c).permute(2, 3, 1, 0)
    offset = tensor.new_zeros(tensor.numel() + 3)[3:].view(n, c, h, w)
    variants = {
        "contiguous": tensor.contiguous(),
        "channels_last": tensor.contiguous(memory_format=torch.channels_last),
        "sliced": sliced.copy_(tensor),
        "sliced_channels_last": sliced_last.copy_(tensor),
        "permuted": permuted.copy_(tensor),
        "storage_offset": offset.copy_(tensor),
    }
    if 1 in tensor.shape:
        # A dimension of size 1 may carry any stride at all.
        strides = [7 if size == 1 else stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)]
        variants["lying_strides"] = tensor.contiguous().as_strided(tensor.shape, strides)
    return variants
