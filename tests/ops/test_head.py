"""The segmentation head: bilinear resize, argmax and cross entropy. The promises are those of test_contract.py.

Its length is that of three operators under one list of promises, with cases that they share.
"""

from __future__ import annotations

import copy
import io
import pickle
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import fastseg
from benchmarks import memory
from fastseg import dispatch
from fastseg.ops.head import native
from fastseg.ops.library import OVERLOADS
from fastseg.testing import (
    assert_argmax,
    assert_no_less_accurate,
    assert_within,
    expected_cross_entropy,
    expected_scores,
    expected_upsample,
    integer_tensor,
    random_tensor,
    strided_variants,
)
from tests.conftest import SLOW_RUNG, TARGETS, on_threads

ALL_LAYOUTS = [torch.contiguous_format, torch.channels_last]
DTYPES = [
    dtype
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64)
    if any(target.takes(dtype) for target in TARGETS)
]
DRAWS = 2 if SLOW_RUNG else 8
# The image of a loss unless its case says otherwise.
IMAGE = (7, 9) if SLOW_RUNG else (17, 19)


def short(value) -> str:
    return str(value).removeprefix("torch.")


# A slow rung sees contiguous tensors in the key cases of accuracy alone.
LAYOUTS = pytest.mark.parametrize("layout", ALL_LAYOUTS[SLOW_RUNG:], ids=short)
EACH_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=short)
slow_rungs_skip = pytest.mark.skipif(SLOW_RUNG, reason="this does not depend on the kernel")


@dataclass(frozen=True)
class ResizeCase:
    shape: tuple[int, ...]  # [N, C, H, W]
    size: tuple[int, int] | None = None
    scale_factor: tuple[float, float] | None = None
    align_corners: bool = False

    @property
    def arguments(self):
        return self.size, self.scale_factor, self.align_corners

    @property
    def output(self) -> tuple[int, int]:
        if self.size is not None:
            return self.size
        return tuple(int(n * factor) for n, factor in zip(self.shape[2:], self.scale_factor, strict=True))


RESIZES = {
    "up": ResizeCase((2, 21, 7, 6), (17, 13)),
    "up-corners": ResizeCase((2, 3, 7, 6), (17, 13), align_corners=True),
    "up-16": ResizeCase((1, 2, 3, 2), (48, 33)),
    "down": ResizeCase((2, 5, 13, 12), (5, 7)),
    "down-corners": ResizeCase((1, 5, 13, 12), (5, 7), align_corners=True),
    "down-far": ResizeCase((1, 8, 19, 17), (2, 3)),
    "up-and-down": ResizeCase((1, 4, 9, 5), (4, 11)),
    "equal": ResizeCase((1, 3, 6, 5), (6, 5)),
    "from-one-pixel": ResizeCase((2, 3, 1, 1), (5, 4)),
    "to-one-pixel": ResizeCase((1, 3, 7, 5), (1, 1)),
    "to-one-pixel-corners": ResizeCase((1, 3, 7, 5), (1, 1), align_corners=True),
    "one-channel": ResizeCase((2, 1, 5, 6), (11, 12)),
    "129-channels": ResizeCase((1, 129, 3, 4), (7, 9)),
    "scale-2": ResizeCase((1, 9, 5, 6), None, (2.0, 2.0)),
    "scale-fractions": ResizeCase((1, 9, 7, 8), None, (1.7, 0.6)),
    "scale-corners": ResizeCase((1, 9, 5, 6), None, (2.0, 3.0), True),
}
KEY_RESIZES = ("up", "down", "scale-fractions")
FEW_RESIZES = KEY_RESIZES[:2] if SLOW_RUNG else KEY_RESIZES


@dataclass(frozen=True)
class LossCase:
    classes: int = 9 if SLOW_RUNG else 21  # more than one block of a kernel
    size: tuple[int, int] = (5, 6)
    image: tuple[int, int] = IMAGE
    batch: int = 2
    weighted: bool = False
    ignore_index: int | None = None  # with a border, and some pixels, that are ignored
    smoothing: float = 0.0
    reduction: str = "mean"
    align_corners: bool = False


LOSSES = {
    "plain": LossCase(),
    "sum": LossCase(reduction="sum"),
    "none": LossCase(reduction="none"),
    "weights": LossCase(weighted=True, ignore_index=255),
    "weights-none": LossCase(weighted=True, ignore_index=-100, reduction="none", align_corners=True),
    "ignore-a-class": LossCase(ignore_index=3, reduction="sum"),
    "smoothing": LossCase(smoothing=0.1, ignore_index=255),
    "everything": LossCase(smoothing=0.3, ignore_index=-1, weighted=True),
    "everything-none": LossCase(smoothing=0.3, ignore_index=-1, weighted=True, reduction="none"),
    "smoothing-all": LossCase(smoothing=1.0, weighted=True, reduction="sum", classes=5),
    "corners": LossCase(align_corners=True),
    "1-class": LossCase(classes=1),
    "2-classes": LossCase(classes=2, smoothing=0.1),
    "150-classes": LossCase(
        40 if SLOW_RUNG else 150, (2, 2), (3, 4) if SLOW_RUNG else (11, 9), batch=1, ignore_index=255
    ),
    "1000-classes": LossCase(classes=1000, size=(2, 2), image=(5, 6), batch=1),
    "down": LossCase(size=(13, 12), image=(5, 7)),
    "equal": LossCase(size=(7, 6), image=(7, 6)),
    "from-one-pixel": LossCase(size=(1, 1), image=(6, 5)),
    "to-one-pixel": LossCase(size=(4, 5), image=(1, 1)),
}
KEY_LOSSES = ("everything", "plain", "everything-none")
FEW_LOSSES = KEY_LOSSES[:1] if SLOW_RUNG else KEY_LOSSES
SLOW_CASES = {"up", "up-corners", "down", "scale-fractions", "129-channels", "everything", "none", "150-classes"}


def each(cases, keys, dtypes=DTYPES, layouts=ALL_LAYOUTS):
    """Cases in dtypes and layouts. On a slow rung few, in channels_last, and the first key case in each of both."""
    return [
        pytest.param(case, dtype, layout, id=f"{name}-{short(dtype)}-{short(layout)}")
        for name, case in cases.items()
        for dtype in dtypes
        for layout in layouts
        if not SLOW_RUNG
        or ((dtype, layout) == (torch.float32, torch.channels_last) and name in SLOW_CASES)
        or (name == keys[0] and (dtype == torch.float32 or layout == torch.channels_last))
    ]


def key(cases, keys):
    return pytest.mark.parametrize("case", [pytest.param(cases[name], id=name) for name in keys])


def views_of(tensor) -> dict[str, torch.Tensor]:
    """Strided variants; on a slow rung the two that are least alike."""
    views = strided_variants(tensor)
    return {name: views[name] for name in ("sliced", "permuted")} if SLOW_RUNG else views


def backend_of(target, operator: str) -> str:
    """The backend under test, where it has kernels of `operator`; on the CPU it must."""
    reason = dispatch.reason_not(target.backend, dispatch.Problem(operator, target.device, torch.float32))
    if reason is not None and target.backend not in ("reference", "cpu"):
        pytest.skip(reason)
    return target.backend


def skip_unless_taken(target, dtype):
    if not target.takes(dtype):
        pytest.skip(f"{target} has no kernels for {short(dtype)}")


def resize(target, x, case):
    return fastseg.ops.upsample_bilinear2d(x, *case.arguments, backend=backend_of(target, "upsample_bilinear2d"))


def make(target, case: ResizeCase, dtype=torch.float32, layout=torch.contiguous_format, seed=1, maker=random_tensor):
    skip_unless_taken(target, dtype)
    x = maker(case.shape, dtype, seed=seed, device=target.device)
    return x.contiguous(memory_format=layout).requires_grad_()


def random_like(y, seed=9):
    return random_tensor(tuple(y.shape), y.dtype, seed=seed, device=y.device)


def wanted_resize(target, x, case, grad_output=None):
    rest = (case.scale_factor, case.align_corners, grad_output)
    return expected_upsample(x, case.output, *rest, roundoff=target.roundoff(x.dtype))


def assert_resize(target, x, case, grad_output=None, what=""):
    y = resize(target, x, case)
    grad_output = random_like(y) if grad_output is None else grad_output
    (grad,) = torch.autograd.grad(y, x, grad_output)
    output, grad_input = wanted_resize(target, x, case, grad_output)
    assert_within(y.detach(), output, f"output{what}")
    assert_within(grad, grad_input, f"grad of the input{what}")
    return y.detach(), grad


class Loss:
    """The tensors of a case: logits [N, C, h, w], target [N, H, W], and what cross entropy is called with."""

    def __init__(self, target, case: LossCase, dtype=torch.float32, layout=torch.contiguous_format, seed=1):
        skip_unless_taken(target, dtype)
        self.case = case
        shape = (case.batch, case.classes, *case.size)
        logits = 3 * random_tensor(shape, dtype, seed=seed, device=target.device)
        self.logits = logits.contiguous(memory_format=layout).requires_grad_()
        generator = torch.Generator().manual_seed(seed + 1)
        labels = torch.randint(case.classes, (case.batch, *case.image), generator=generator)
        if case.ignore_index is not None:
            labels[:, :2], labels[:, :, -1:] = case.ignore_index, case.ignore_index
            labels[torch.rand(labels.shape, generator=generator) < 0.2] = case.ignore_index
        self.target = labels.to(target.device)
        self.weight = None
        if case.weighted:
            self.weight = random_tensor((case.classes,), dtype, seed=seed + 2, device=target.device).abs()
        self.backend = backend_of(target, "upsample_cross_entropy")
        self.roundoff = target.roundoff(dtype)

    @property
    def ignore_index(self):
        return -100 if self.case.ignore_index is None else self.case.ignore_index

    def run(self, logits=None, target=None, weight=None, **options):
        options = dict(backend=self.backend, align_corners=self.case.align_corners) | options
        return fastseg.ops.upsample_cross_entropy(
            self.logits if logits is None else logits,
            self.target if target is None else target,
            self.weight if weight is None else weight,
            self.ignore_index, self.case.reduction, self.case.smoothing, **options,
        )  # fmt: skip

    def native(self, logits=None):
        return native.cross_entropy(
            self.logits if logits is None else logits, self.target, self.weight, self.ignore_index,
            self.case.reduction, self.case.smoothing, self.case.align_corners,
        )  # fmt: skip

    def wanted(self, grad=None, **options):
        return expected_cross_entropy(
            self.logits, self.target, self.weight, self.ignore_index, self.case.smoothing, self.case.align_corners,
            self.case.reduction, grad, **dict(roundoff=self.roundoff) | options,
        )  # fmt: skip

    def assert_within_bound(self, loss=None, logits=None, grad=None, what=""):
        loss = self.run() if loss is None else loss
        grad = random_like(loss, seed=5).abs() if grad is None else grad
        (grad_logits,) = torch.autograd.grad(loss, self.logits if logits is None else logits, grad)
        assert grad_logits.dtype == self.logits.dtype
        value, gradient = self.wanted(grad)
        assert_within(loss.detach(), value, f"loss{what}")
        assert_within(grad_logits, gradient, f"grad of the logits{what}")
        return loss.detach(), grad_logits


# Bounds themselves: against ATen in float64.


@slow_rungs_skip
@pytest.mark.parametrize("case", RESIZES.values(), ids=RESIZES)
def test_expected_upsample_agrees_with_native(case):
    x = random_tensor(case.shape, torch.float64, seed=1).requires_grad_()
    y = native.upsample_bilinear2d(x, *case.arguments)
    grad_output = random_like(y)
    rest = (case.scale_factor, case.align_corners, grad_output)
    output, grad_input = expected_upsample(x, case.output, *rest)
    assert_within(y.detach(), output, "ATen")
    assert_within(torch.autograd.grad(y, x, grad_output)[0], grad_input, "ATen's gradient")


@slow_rungs_skip
@pytest.mark.parametrize("case", LOSSES.values(), ids=LOSSES)
def test_expected_cross_entropy_agrees_with_native(case):
    given = Loss(_NATIVE, case, torch.float64)
    given.assert_within_bound(given.native(), what=" of ATen")


class _Native:
    backend, device = "reference", "cpu"

    def takes(self, dtype):
        return True

    def roundoff(self, dtype):
        return None


_NATIVE = _Native()


# Promise 1: accuracy.


@pytest.mark.parametrize(("case", "dtype", "layout"), each(RESIZES, KEY_RESIZES))
def test_resize_within_bound(case, dtype, layout, target):
    x = make(target, case, dtype, layout)
    y, grad = assert_resize(target, x, case)
    like = native.upsample_bilinear2d(x, *case.arguments)
    assert (y.shape, y.dtype, grad.dtype) == (like.shape, dtype, dtype)
    for memory_format in ALL_LAYOUTS:
        assert y.is_contiguous(memory_format=memory_format) == like.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize(("case", "dtype", "layout"), each(LOSSES, KEY_LOSSES))
def test_loss_within_bound(case, dtype, layout, target):
    given = Loss(target, case, dtype, layout)
    loss, grad = given.assert_within_bound()
    assert (loss.shape, loss.dtype) == (given.native().shape, dtype)
    assert grad.is_contiguous(memory_format=layout)


def test_a_loss_without_gradient(target):
    given = Loss(target, LOSSES["everything"])
    with torch.no_grad():
        assert_within(given.run(), given.wanted()[0], "loss")
    assert not given.run(given.logits.detach()).requires_grad


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=short)
@key(RESIZES, FEW_RESIZES)
def test_resize_no_less_accurate_than_native(case, dtype, target):
    if target.roundoff(dtype) is not None:
        pytest.skip("the interpreter truncates to bfloat16 where a GPU rounds")
    ours, theirs, exact = [], [], []
    for seed in range(DRAWS):
        x = make(target, case, dtype, seed=10 * seed)
        results = resize(target, x, case), native.upsample_bilinear2d(x, *case.arguments)
        grad_output = random_like(results[0], 10 * seed + 9)
        for y, found in zip(results, (ours, theirs), strict=True):
            found.append((y.detach(), torch.autograd.grad(y, x, grad_output)[0]))
        exact.append([wanted.value for wanted in wanted_resize(target, x, case, grad_output)])
    _assert_no_less_accurate(ours, theirs, exact)


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=short)
@key(LOSSES, FEW_LOSSES)
def test_loss_no_less_accurate_than_native(case, dtype, target):
    if target.roundoff(dtype) is not None:
        pytest.skip("the interpreter truncates to bfloat16 where a GPU rounds")
    ours, theirs, exact = [], [], []
    for seed in range(DRAWS):
        given = Loss(target, case, dtype, seed=10 * seed)
        results = given.run(), given.native()
        grad = random_like(results[0], 10 * seed + 9)
        for loss, found in zip(results, (ours, theirs), strict=True):
            found.append((loss.detach(), torch.autograd.grad(loss, given.logits, grad)[0]))
        exact.append([wanted.value for wanted in given.wanted(grad)])
    _assert_no_less_accurate(ours, theirs, exact)


def _assert_no_less_accurate(ours, theirs, exact):
    """The largest error over a few draws: of one alone, native's may be small by luck."""
    parts = (zip(*results, strict=True) for results in (ours, theirs, exact))
    for name, own, other, value in zip(("result", "gradient"), *parts, strict=True):
        assert_no_less_accurate(torch.stack(own), torch.stack(other), torch.stack(value), 2, name)


# (classes, logits' size, image)
LABELS = {
    "21": (21, (3, 4), (7, 9)) if SLOW_RUNG else (21, (7, 6), (17, 13)),
    "150": (150, (3, 4), (5, 9)),
    "2-down": (2, (9, 8), (4, 5)),
    "1": (1, (2, 2), (3, 3)),
}


@LAYOUTS
@EACH_DTYPE
@pytest.mark.parametrize("align_corners", [False, True][: 2 - SLOW_RUNG])
@pytest.mark.parametrize("case", [LABELS["21"]] if SLOW_RUNG else LABELS.values(), ids=lambda case: str(case[0]))
def test_labels(case, align_corners, dtype, layout, target):
    skip_unless_taken(target, dtype)
    classes, size, image = case
    options = dict(align_corners=align_corners, backend=backend_of(target, "upsample_argmax"))
    logits = random_tensor((2, classes, *size), dtype, seed=classes, device=target.device)
    logits = logits.contiguous(memory_format=layout)
    labels = fastseg.ops.upsample_argmax(logits, image, **options)
    assert (labels.shape, labels.dtype) == ((2, *image), torch.int64)
    assert_argmax(labels, expected_scores(logits, image, align_corners))
    small = fastseg.ops.upsample_argmax(logits, image, dtype=torch.uint8, **options)
    assert small.dtype == torch.uint8
    assert torch.equal(small.long(), labels)


# Promise 2: exact on small integers, where positions are multiples of an eighth.


EXACT = {
    "up-2": ResizeCase((2, 5, 5, 6), (10, 12)),
    "up-4-corners": ResizeCase((1, 5, 3, 5), (9, 17), align_corners=True),
    "down-2": ResizeCase((1, 5, 8, 10), (4, 5)),
}


@LAYOUTS
@pytest.mark.parametrize("dtype", DTYPES[:1] if SLOW_RUNG else DTYPES, ids=short)
@pytest.mark.parametrize("case", EXACT.values(), ids=EXACT)
def test_exact_on_small_integers(case, dtype, layout, target):
    x = make(target, case, dtype, layout, maker=integer_tensor)
    y, like = resize(target, x, case), native.upsample_bilinear2d(x.detach().double(), *case.arguments)
    assert torch.equal(y, like.to(dtype))
    leaf = x.detach().double().requires_grad_()
    grad_output = integer_tensor(tuple(y.shape), dtype, low=-1, high=1, seed=4, device=target.device)
    (grad,) = torch.autograd.grad(y, x, grad_output)
    (exact,) = torch.autograd.grad(native.upsample_bilinear2d(leaf, *case.arguments), leaf, grad_output.double())
    assert torch.equal(grad, exact.to(dtype))


@LAYOUTS
@pytest.mark.parametrize("dtype", DTYPES[:1] if SLOW_RUNG else DTYPES, ids=short)
def test_ties_go_to_the_first_class(dtype, layout, target):
    """Small integers tie often, and a resize by a power of two keeps them exact in every dtype."""
    skip_unless_taken(target, dtype)
    backend = backend_of(target, "upsample_argmax")
    for classes in (3, 40):
        logits = integer_tensor((2, classes, 5, 4), dtype, low=-1, high=1, device=target.device)
        logits = logits.contiguous(memory_format=layout)
        assert torch.equal(
            fastseg.ops.upsample_argmax(logits, (10, 8), backend=backend),
            native.argmax(logits, (10, 8), False, torch.int64),
        )


# Promise 4: gradients.


@key(RESIZES, ("up", "down-corners", "scale-fractions", "to-one-pixel", "from-one-pixel"))
def test_resize_gradcheck(case, target):
    x = make(target, case, torch.float64)
    assert torch.autograd.gradcheck(lambda x: resize(target, x, case), (x,), fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda x: resize(target, x, case), (x,), fast_mode=True)


@key(LOSSES, ("plain", "sum", "everything", "everything-none", "ignore-a-class"))
def test_loss_gradcheck(case, target):
    given = Loss(target, case, torch.float64)
    assert torch.autograd.gradcheck(given.run, (given.logits,), fast_mode=True)
    assert torch.autograd.gradgradcheck(given.run, (given.logits,), fast_mode=True)


@LAYOUTS
def test_strided_and_expanded_grad_output(layout, target):
    """After torch.cat gradients are strided views, after sum() they are expanded: gradcheck sees neither."""
    case = RESIZES["up"]
    x = make(target, case, layout=layout)
    views = views_of(random_tensor((2, 21, 17, 13), torch.float32, seed=3, device=target.device))
    views["expanded"] = views["sliced"][:, :1, :1, :1].expand(2, 21, 17, 13)
    for name, grad_output in views.items():
        assert_resize(target, x, case, grad_output, f", {name} grad_output")


def test_strided_and_expanded_grad_of_losses(target):
    given = Loss(target, LOSSES["weights-none"])
    height, width = IMAGE
    wide = random_tensor((2, height, 2 * width), torch.float32, seed=3, device=target.device)
    for name, grad in {
        "sliced": wide[:, :, 1::2],
        "transposed": wide[:, :, :width].transpose(1, 2).contiguous().transpose(1, 2),
        "expanded": wide[:, :1, :1].expand(2, height, width),
    }.items():
        given.assert_within_bound(grad=grad, what=f", {name} grad of the losses")


def test_a_loss_scaled_and_summed(target):
    """Gradient accumulation, loss scaling: the loss's own gradient is any number."""
    given = Loss(target, LOSSES["everything"], torch.float32)
    for grad in (0.0, -3.0, 65536.0):
        given.assert_within_bound(grad=torch.tensor(grad, device=target.device))


# Promise 5: shapes.

SIZES = [1, 2, 3, 4, 7, 8, 9, 16, 17]


@given(data=st.data())
@LAYOUTS
def test_any_resize(layout, target, data):
    draw = data.draw
    shape = tuple(draw(st.sampled_from(values)) for values in ([0, 1, 1, 2], [1, 2, 3, 8, 21, 33], SIZES, SIZES))
    if draw(st.booleans()):
        sizes = {"size": tuple(draw(st.sampled_from([*SIZES, 33])) for _ in range(2))}
    else:
        factors = [draw(st.sampled_from([0.3, 0.5, 1.0, 1.5, 2.0, 2.7])) for _ in range(2)]
        sizes = {"scale_factor": tuple(max(f, 1.0 / n) for f, n in zip(factors, shape[2:], strict=True))}
        if any(int(f * n) < 1 for f, n in zip(sizes["scale_factor"], shape[2:], strict=True)):
            return
    case = ResizeCase(shape, align_corners=draw(st.booleans()), **sizes)
    assert_resize(target, make(target, case, layout=layout), case)


@given(data=st.data())
@LAYOUTS
def test_any_loss(layout, target, data):
    draw = data.draw
    case = LossCase(
        classes=draw(st.sampled_from([1, 2, 7, 8, 9, 21, 33])),
        size=(draw(st.sampled_from(SIZES)), draw(st.sampled_from(SIZES))),
        image=(draw(st.sampled_from([*SIZES, 33])), draw(st.sampled_from([*SIZES, 33]))),
        batch=draw(st.sampled_from([1, 2, 3])),
        weighted=draw(st.booleans()),
        ignore_index=draw(st.sampled_from([None, 255, 0])),
        smoothing=draw(st.sampled_from([0.0, 0.0, 0.2])),
        reduction=draw(st.sampled_from(["mean", "sum", "none"])),
        align_corners=draw(st.booleans()),
    )
    given = Loss(target, case, layout=layout)
    given.assert_within_bound()
    image = given.target.shape[1:]
    labels = fastseg.ops.upsample_argmax(
        given.logits, image, align_corners=case.align_corners, backend=backend_of(target, "upsample_argmax")
    )
    assert_argmax(labels, expected_scores(given.logits, image, case.align_corners))


@EACH_DTYPE
def test_empty_batch(dtype, target):
    case = ResizeCase((0, 3, 4, 5), (7, 9))
    x = make(target, case, dtype)
    y = resize(target, x, case)
    assert y.shape == (0, 3, 7, 9)
    y.sum().backward()
    assert x.grad.shape == x.shape
    labels = fastseg.ops.upsample_argmax(x, (7, 9), backend=backend_of(target, "upsample_argmax"))
    assert (labels.shape, labels.dtype) == ((0, 7, 9), torch.int64)
    for reduction in ("mean", "sum", "none"):
        given = Loss(target, LossCase(batch=0, reduction=reduction), dtype)
        loss = given.run()
        assert torch.equal(loss.nan_to_num(7), given.native().nan_to_num(7))
        (grad,) = torch.autograd.grad(loss.sum(), given.logits)
        assert grad.shape == given.logits.shape


# Promise 6: memory formats.


def test_any_strides(target):
    for case in (RESIZES["from-one-pixel"], RESIZES["one-channel"], RESIZES["up"])[: 3 - SLOW_RUNG]:
        for name, x in views_of(make(target, case).detach()).items():
            assert_resize(target, x.requires_grad_(), case, what=f", {name} input")


def test_any_strides_of_logits_and_target(target):
    given = Loss(target, LOSSES["everything"])
    backend = backend_of(target, "upsample_argmax")
    height, width = IMAGE
    wide = torch.full((3, 2 * width, 2 * width), 10**6, device=target.device)
    targets = {"sliced": wide[1:, 2 : 2 + height, 1::2], "transposed": wide.transpose(1, 2)[1:, :height, :width]}
    for name, logits in views_of(given.logits.detach()).items():
        logits.requires_grad_()
        given.assert_within_bound(given.run(logits), logits, what=f", {name} logits")
        labels = fastseg.ops.upsample_argmax(logits, IMAGE, backend=backend)
        assert_argmax(labels, expected_scores(logits, IMAGE, False))
    for name, labels in targets.items():
        given.assert_within_bound(given.run(target=labels.copy_(given.target)), what=f", {name} target")
    spread = torch.full((given.case.classes, 2), torch.nan, device=target.device)
    spread[:, 0] = given.weight
    given.assert_within_bound(given.run(weight=spread[:, 0]), what=", strided weight")


def test_expanded_input(target):
    case = RESIZES["up"]
    x = make(target, case)[:, :1].detach().expand(case.shape).requires_grad_()
    assert_resize(target, x, case)
    given = Loss(target, LOSSES["plain"])
    given.logits = given.logits.detach()[:, :1].expand_as(given.logits).requires_grad_()
    given.target = given.target[:1, :1].expand_as(given.target)
    given.assert_within_bound()


# Promise 7: nothing outside is written, no garbage is read.


@LAYOUTS
def test_every_element_is_written(layout, target, poison):
    for name in FEW_RESIZES:
        assert_resize(target, make(target, RESIZES[name], layout=layout), RESIZES[name])
    for name in FEW_LOSSES:
        given = Loss(target, LOSSES[name], layout=layout)
        given.assert_within_bound()
        labels = fastseg.ops.upsample_argmax(given.logits, IMAGE, backend=backend_of(target, "upsample_argmax"))
        assert_argmax(labels, expected_scores(given.logits, IMAGE, False))


@LAYOUTS
def test_nothing_outside_is_read(layout, target):
    """Every tensor is a window into a buffer of NaN, or of no class: one element read outside shows in the result."""

    def fenced(t, fence):
        t = t.detach()
        buffer = torch.full((t.numel() + 256,), fence, dtype=t.dtype, device=t.device)
        return buffer[128:-128].as_strided(t.shape, t.stride(), 128).copy_(t)

    for name in FEW_RESIZES:
        x = fenced(make(target, RESIZES[name], layout=layout), torch.nan).requires_grad_()
        y = resize(target, x, RESIZES[name])
        assert_resize(target, x, RESIZES[name], fenced(random_like(y).contiguous(memory_format=layout), torch.nan))
    for name in FEW_LOSSES:
        given = Loss(target, LOSSES[name], layout=layout)
        given.logits = fenced(given.logits, torch.nan).requires_grad_()
        given.target = fenced(given.target, 10**6)
        given.weight = None if given.weight is None else fenced(given.weight, torch.nan)
        given.assert_within_bound()
        labels = fastseg.ops.upsample_argmax(given.logits, IMAGE, backend=backend_of(target, "upsample_argmax"))
        assert_argmax(labels, expected_scores(given.logits, IMAGE, False))


# Promise 8: non-finite values reach exactly where native's do.

NON_FINITE = pytest.mark.parametrize("value", [torch.nan, torch.inf][: 2 - SLOW_RUNG], ids=str)


@NON_FINITE
@LAYOUTS
@pytest.mark.parametrize("where", [(0, 0), (2, 3), (-1, -1)], ids=["corner", "middle", "far-corner"])
@key(RESIZES, ("up", "down", "up-corners")[: 3 - 2 * SLOW_RUNG])
def test_non_finite_values_of_a_resize(case, where, value, layout, target):
    x, index = make(target, case, layout=layout).detach(), (0, 1, *where)
    x[index] = value
    x.requires_grad_()
    y, like = resize(target, x, case), native.upsample_bilinear2d(x, *case.arguments)
    assert torch.equal(y.isfinite(), like.isfinite())
    grad_output = random_like(y)
    grad_output[index] = value
    ours, theirs = (torch.autograd.grad(z, x, grad_output)[0] for z in (y, like))
    assert torch.equal(ours.isfinite(), theirs.isfinite())


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
@LAYOUTS
@pytest.mark.parametrize("name", ["none", "everything-none", "plain"][: 3 - 2 * SLOW_RUNG])
def test_non_finite_logits(name, value, layout, target):
    given = Loss(target, LOSSES[name], layout=layout)
    logits = given.logits.detach()
    logits[0, 1, 0, 0] = logits[1, 0, 2, 3] = logits[1, 4, 2, 3] = value
    logits.requires_grad_()
    loss, like = given.run(logits), given.native(logits)
    for kind in (torch.isnan, torch.isposinf, torch.isneginf):
        assert torch.equal(kind(loss), kind(like)), kind.__name__
    ours, theirs = (torch.autograd.grad(z.sum(), logits)[0] for z in (loss, like))
    assert torch.equal(ours.isfinite(), theirs.isfinite())


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
@LAYOUTS
def test_labels_of_non_finite_logits(value, layout, target):
    logits = integer_tensor((2, 5, 5, 4), torch.float32, device=target.device).contiguous(memory_format=layout)
    logits[0, 3, 0, 0] = logits[0, 1, 2, 2] = logits[1, 4, 2, 2] = logits[1, 2, 2, 2] = value
    labels = fastseg.ops.upsample_argmax(logits, (10, 8), backend=backend_of(target, "upsample_argmax"))
    assert torch.equal(labels, native.argmax(logits, (10, 8), False, torch.int64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16][: 2 - SLOW_RUNG], ids=short)
@pytest.mark.parametrize("name", ["plain", "everything-none"][: 2 - SLOW_RUNG])
def test_huge_logits(name, dtype, target):
    given = Loss(target, LOSSES[name], dtype)
    given.logits = (given.logits.detach() * 1e30).requires_grad_()
    loss, grad = given.assert_within_bound()
    assert loss.isfinite().all()
    assert grad.isfinite().all()


@LAYOUTS
def test_a_class_that_is_masked_by_a_large_negative_logit(layout, target):
    """As a mask, -1e30 leaves everything finite; -inf does not, because a resize multiplies it by zero."""
    given = Loss(target, LOSSES["none"], layout=layout)
    logits = given.logits.detach().clone()
    logits[:, 4] = -1e30
    given.logits = logits.requires_grad_()
    given.target = given.target.masked_fill(given.target == 4, 5)
    loss, grad = given.assert_within_bound()
    assert loss.isfinite().all()
    assert not grad[:, 4].any()


# Promise 9: the 64-bit path, forced.


@LAYOUTS
def test_64_bit_indices(layout, target, monkeypatch):
    monkeypatch.setenv("FASTSEG_FORCE_INDEX64", "1")
    for name in FEW_RESIZES:
        assert_resize(target, make(target, RESIZES[name], layout=layout), RESIZES[name])
    for name in FEW_LOSSES:
        given = Loss(target, LOSSES[name], layout=layout)
        given.assert_within_bound()
        labels = fastseg.ops.upsample_argmax(given.logits, IMAGE, backend=backend_of(target, "upsample_argmax"))
        assert_argmax(labels, expected_scores(given.logits, IMAGE, False))


# Promise 10: determinism.


def results_of(target, layout):
    backend = backend_of(target, "upsample_argmax")
    found = []
    for name in FEW_RESIZES:
        x = make(target, RESIZES[name], layout=layout)
        y = resize(target, x, RESIZES[name])
        found += [y.detach(), torch.autograd.grad(y, x, random_like(y))[0]]
    for name in FEW_LOSSES:
        given = Loss(target, LOSSES[name], layout=layout)
        loss = given.run()
        found += [loss.detach(), torch.autograd.grad(loss, given.logits, random_like(loss))[0]]
        found.append(fastseg.ops.upsample_argmax(given.logits, IMAGE, backend=backend))
    return found


@LAYOUTS
def test_bitwise_repeatable(layout, target):
    first = results_of(target, layout)
    with on_threads(1):
        second = results_of(target, layout)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# Targets.


@pytest.mark.parametrize("weighted", [False, True][SLOW_RUNG:])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"][: 3 - 2 * SLOW_RUNG])
def test_all_ignored(reduction, weighted, target):
    """What native gives: NaN for the mean, zero otherwise, and a gradient of zeros."""
    given = Loss(target, LossCase(reduction=reduction, weighted=weighted, ignore_index=255, smoothing=0.1))
    given.target.fill_(255)
    loss, like = given.run(), given.native()
    assert torch.equal(loss.nan_to_num(7), like.nan_to_num(7))
    ours, theirs = (torch.autograd.grad(z.sum(), given.logits)[0] for z in (loss, like))
    assert torch.equal(ours.nan_to_num(7), theirs.nan_to_num(7))


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("wrong", [21, -1, 2**40], ids=["classes", "negative", "huge"])
def test_a_target_that_is_no_class(wrong, reduction, target):
    given = Loss(target, LossCase(reduction=reduction))
    given.target[1, -1, -1] = wrong
    if target.backend in ("reference", "cpu"):
        with pytest.raises(IndexError) as theirs:
            given.native()
        with pytest.raises(IndexError) as ours:
            given.run()
        assert str(ours.value) == str(theirs.value)
        return
    options = (given.target, None, -100, 0.0, False, reduction, False)
    loss, _, _, offender = OVERLOADS["upsample_cross_entropy"][target.backend](given.logits.detach(), *options)
    assert int(offender) == wrong
    assert loss.isnan() if reduction == "mean" else loss[1, -1, -1].isnan()
    if target.device == "cuda":
        assert given.run().sum().isnan()
        torch.cuda.synchronize()
        with pytest.raises(IndexError, match=f"^Target {wrong} is out of bounds.$"):
            given.run()
        given.target[1, -1, -1] = 0
        given.assert_within_bound()  # the device is still of use, and the report was given once


# Memory.


@pytest.mark.skipif(SLOW_RUNG, reason="takes minutes in the interpreter; a GPU sees what Triton's launches allocate")
def test_full_size_logits_never_exist(target):
    """The peak of forward and backward is a small share of one tensor with classes at full resolution."""
    if target.backend == "reference":
        pytest.skip("the reference has them")
    classes, size, image = 64, 8, 128
    case = LossCase(classes, (size, size), (image, image), batch=1)
    given = Loss(target, case, layout=torch.channels_last)
    full = 4 * classes * image * image
    labels = backend_of(target, "upsample_argmax")

    def train():
        return torch.autograd.grad(given.run(), given.logits)

    def infer():
        return fastseg.ops.upsample_argmax(given.logits.detach(), (image, image), dtype=torch.uint8, backend=labels)

    for call in (train, infer):
        call()
        assert memory.peak_bytes(call, target.device) <= full / 8, call.__name__
    assert memory.peak_bytes(lambda: given.native(), target.device) >= full


# Promise 12: composition.


@LAYOUTS
@slow_rungs_skip
def test_opcheck(layout, target):
    """Schema, fake kernel (strides included), autograd registration and AOT dispatch with dynamic shapes."""
    given = Loss(target, LOSSES["everything"], layout=layout)
    logits, labels, weight = given.logits, given.target, given.weight
    for name in ("upsample_bilinear2d", "upsample_argmax", "upsample_bilinear2d_backward"):
        backend_of(target, name)
    names = ("upsample_bilinear2d", "upsample_bilinear2d_backward", "upsample_argmax", "upsample_cross_entropy")
    forward, backward, argmax, loss = (OVERLOADS[name][target.backend] for name in names)
    torch.library.opcheck(forward, (logits, list(IMAGE), None, False))
    torch.library.opcheck(forward, (logits, [10, 9], [2.0, 1.5], True))
    grad = random_tensor((2, 21, *IMAGE), torch.float32, device=target.device).contiguous(memory_format=layout)
    torch.library.opcheck(backward, (grad.requires_grad_(), list(logits.shape), None, False))
    torch.library.opcheck(argmax, (logits.detach(), list(IMAGE), False, torch.uint8))
    for reduction, with_gradient in (("mean", True), ("sum", False), ("none", False)):
        options = (weight, -1, 0.3, False, reduction, with_gradient)
        torch.library.opcheck(loss, (logits, labels, *options))
    grads = random_tensor((2, *IMAGE), torch.float32, device=target.device)
    losses_backward = OVERLOADS["upsample_cross_entropy_backward"][target.backend]
    torch.library.opcheck(losses_backward, (grads, logits.detach(), labels, weight, -1, 0.3, False))


@pytest.mark.parametrize(
    ("compiler", "layout"), [("inductor", torch.channels_last), ("aot_eager", torch.contiguous_format)], ids=short
)
@slow_rungs_skip
def test_compile_fullgraph_with_dynamic_shapes(compiler, layout, target):
    backend = backend_of(target, "upsample_cross_entropy")

    def head(logits, labels, weight):
        scaled = fastseg.ops.upsample_bilinear2d(logits * 2, scale_factor=2, backend=backend)
        loss = fastseg.ops.upsample_cross_entropy(scaled, labels, weight, 255, label_smoothing=0.1, backend=backend)
        return loss, fastseg.ops.upsample_argmax(scaled, labels.shape[-2:], backend=backend)

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(head, backend=compiler, fullgraph=True, dynamic=True)
    for size, image in (((5, 6), IMAGE), ((4, 7), (21, 16)), ((6, 6), (23, 23))):
        given = Loss(target, LossCase(size=size, image=image, weighted=True, ignore_index=255), layout=layout)
        (loss, labels), (traced, traced_labels) = (
            function(given.logits, given.target, given.weight) for function in (head, compiled)
        )
        torch.testing.assert_close(traced, loss)
        assert torch.equal(traced_labels, labels)
        ours, theirs = (torch.autograd.grad(value, given.logits)[0] for value in (traced, loss))
        torch.testing.assert_close(ours, theirs)
        assert ours.stride() == theirs.stride()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2


@slow_rungs_skip
def test_export(target):
    class Head(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.up = fastseg.nn.BilinearUpsample(scale_factor=4, backend=backend_of(target, "upsample_bilinear2d"))

        def forward(self, x):
            labels = fastseg.ops.upsample_argmax(x, (20, 24), backend=backend_of(target, "upsample_argmax"))
            return self.up(x), labels

    x = random_tensor((2, 8, 5, 6), torch.float32, device=target.device)
    program = torch.export.export(Head(), (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},))
    assert "fastseg.upsample_bilinear2d" in str(program.graph)
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    larger = torch.cat([x, x, x])
    for exported, eager in zip(torch.export.load(buffer).module()(larger), Head()(larger), strict=True):
        assert torch.equal(exported, eager)


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16], ids=short)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=short)
def test_autocast_gives_natives_dtypes(dtype, autocast, target):
    given = Loss(target, LOSSES["weights"], dtype)
    x, case = make(target, RESIZES["up"], dtype), RESIZES["up"]
    with torch.autocast(target.device, autocast):
        loss, y = given.run(), resize(target, x, case)
        assert loss.dtype == torch.float32
        like = native.upsample_bilinear2d(x, *case.arguments)
        assert y.dtype == like.dtype
        assert given.native().dtype == loss.dtype
    value, _ = given.wanted(dtype=torch.float32, roundoff=None)
    assert_within(loss.detach(), value, "loss")
    loss.backward()
    assert given.logits.grad.dtype == dtype
    (grad,) = torch.autograd.grad(y.float().sum(), x)
    assert grad.dtype == dtype


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_module_copies(clone, target):
    case, given = RESIZES["up"], Loss(target, LOSSES["everything"])
    up = fastseg.nn.BilinearUpsample(case.size, backend=backend_of(target, "upsample_bilinear2d"))
    criterion = fastseg.nn.UpsampleCrossEntropyLoss(given.weight, -1, label_smoothing=0.3, backend=given.backend)
    x = make(target, case)
    for module, arguments in ((up, (x,)), (criterion, (given.logits, given.target))):
        twin = clone(module)
        assert torch.equal(twin(*arguments), module(*arguments))
        assert repr(twin) == repr(module)


@pytest.mark.parametrize("sizes", [dict(size=(17, 13)), dict(size=9), dict(scale_factor=2), dict(scale_factor=(2, 3))])
@pytest.mark.parametrize("align_corners", [False, True])
def test_upsample_equals_torch(sizes, align_corners, target):
    x = make(target, RESIZES["up"])
    ours = fastseg.nn.BilinearUpsample(
        **sizes, align_corners=align_corners, backend=backend_of(target, "upsample_bilinear2d")
    )
    theirs = torch.nn.Upsample(**sizes, mode="bilinear", align_corners=align_corners)
    assert isinstance(ours, torch.nn.Upsample)
    for name in ("size", "scale_factor", "mode", "align_corners", "recompute_scale_factor"):
        assert getattr(ours, name) == getattr(theirs, name)
    scales = None if ours.scale_factor is None else (ours.scale_factor,) * 2
    scales = ours.scale_factor if isinstance(ours.scale_factor, tuple) else scales
    y = ours(x)
    assert_within(y.detach(), expected_upsample(x, y.shape[2:], scales, align_corners)[0], "output")
    assert y.shape == theirs(x).shape


def test_criterion_equals_torch(target):
    given = Loss(target, LOSSES["everything"])
    arguments = (given.weight, -1, "mean", 0.3)
    criterion = fastseg.nn.UpsampleCrossEntropyLoss(*arguments, backend=given.backend)
    assert list(criterion.state_dict()) == list(torch.nn.CrossEntropyLoss(given.weight).state_dict()) == ["weight"]
    given.assert_within_bound(criterion(given.logits, given.target))


# Promise 13: mistakes.


def assert_same_mistake(ours, theirs):
    with pytest.raises(Exception) as wanted:  # noqa: PT011  the type is what the test finds out
        theirs()
    with pytest.raises(type(wanted.value)) as found:
        ours()
    assert type(found.value) is type(wanted.value)
    # A TypeError goes on to list the arguments as they were passed, by name or by position.
    length = str(wanted.value).find("(") if isinstance(wanted.value, TypeError) else None
    assert str(found.value)[:length] == str(wanted.value)[:length]


BAD_RESIZES = {
    "neither": {},
    "both": dict(size=(4, 4), scale_factor=2.0),
    "zero size": dict(size=(0, 4)),
    "negative size": dict(size=(-1, 4)),
    "float size": dict(size=(2.5, 4)),
    "three sizes": dict(size=(4, 4, 4)),
    "three factors": dict(scale_factor=(2.0, 2.0, 2.0)),
    "vanishing factor": dict(scale_factor=0.01),
    "negative factor": dict(scale_factor=-1.0),
    "text": dict(size="4"),
    "integers": dict(input=torch.zeros(1, 2, 4, 4, dtype=torch.int64), size=(8, 8)),
    "two dimensions": dict(input=torch.zeros(4, 4), size=(8, 8)),
    "three dimensions": dict(input=torch.zeros(2, 4, 4), size=(8, 8)),
    "no channels": dict(input=torch.zeros(1, 0, 4, 4), size=(8, 8)),
    "no pixels": dict(input=torch.zeros(1, 2, 0, 4), size=(8, 8)),
    "a list": dict(input=[1.0], size=(8, 8)),
    "text for align_corners": dict(size=(8, 8), align_corners="yes"),
}


@pytest.mark.parametrize("bad", BAD_RESIZES)
def test_mistakes_of_a_resize_are_pytorchs(bad, target):
    backend = backend_of(target, "upsample_bilinear2d")
    arguments = dict(input=torch.zeros(1, 2, 4, 4)) | BAD_RESIZES[bad]
    if isinstance(arguments["input"], torch.Tensor):
        arguments["input"] = arguments["input"].to(target.device)
    assert_same_mistake(
        lambda: fastseg.ops.upsample_bilinear2d(**arguments, backend=backend),
        lambda: F.interpolate(**dict(align_corners=False, mode="bilinear") | arguments),
    )


BAD_LOSSES = {
    "target of another size": dict(target=torch.zeros(2, 6, 5, dtype=torch.int64)[:1]),
    "int32 target": dict(target=torch.zeros(2, 6, 5, dtype=torch.int32)),
    "float target": dict(target=torch.zeros(2, 6, 5)),
    "target without batch": dict(target=torch.zeros(6, 5, dtype=torch.int64)),
    "target that is None": dict(target=None),
    "weight of another size": dict(weight=torch.ones(4)),
    "weight of another dtype": dict(weight=torch.ones(3, dtype=torch.float64)),
    "unknown reduction": dict(reduction="median"),
    "smoothing over one": dict(label_smoothing=1.5),
    "logits of three dimensions": dict(logits=torch.zeros(3, 4, 4)),
    "integer logits": dict(logits=torch.zeros(2, 3, 4, 4, dtype=torch.int64)),
    "no classes": dict(logits=torch.zeros(2, 0, 4, 4)),
    "float ignore_index": dict(ignore_index=1.5),
}


@pytest.mark.parametrize("bad", BAD_LOSSES)
def test_mistakes_of_a_loss_are_pytorchs(bad, target):
    backend = backend_of(target, "upsample_cross_entropy")
    arguments = dict(
        logits=torch.zeros(2, 3, 4, 4), target=torch.zeros(2, 6, 5, dtype=torch.int64), weight=None,
        ignore_index=-100, reduction="mean", label_smoothing=0.0, align_corners=False,
    ) | BAD_LOSSES[bad]  # fmt: skip
    arguments = {k: v.to(target.device) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    assert_same_mistake(
        lambda: fastseg.ops.upsample_cross_entropy(**arguments, backend=backend),
        lambda: native.cross_entropy(**arguments),
    )


def test_mistakes_of_labels(target):
    backend = backend_of(target, "upsample_argmax")
    logits = torch.zeros(1, 257, 2, 2, device=target.device)
    with pytest.raises(ValueError, match="at most 256 classes for labels in torch.uint8, but got 257"):
        fastseg.ops.upsample_argmax(logits, (4, 4), dtype=torch.uint8, backend=backend)
    with pytest.raises(TypeError, match="to be torch.int64 or torch.uint8, but got torch.int32"):
        fastseg.ops.upsample_argmax(logits, (4, 4), dtype=torch.int32, backend=backend)
    for size in (None, (0, 4), (4, 4, 4), "4"):
        assert_same_mistake(
            lambda size=size: fastseg.ops.upsample_argmax(logits, size, backend=backend),
            lambda size=size: F.interpolate(logits, size, mode="bilinear", align_corners=False),
        )


def test_class_probabilities_run_native(target):
    given = Loss(target, LOSSES["plain"])
    shares = random_tensor((*given.logits.shape[:2], *IMAGE), torch.float32, device=target.device).softmax(1)
    loss = fastseg.ops.upsample_cross_entropy(given.logits, shares, backend=given.backend)
    scores = F.interpolate(given.logits, IMAGE, mode="bilinear")
    assert torch.equal(loss, F.cross_entropy(scores, shares))


def test_unknown_backends_are_refused(target):
    given = Loss(target, LOSSES["plain"])
    for call in (
        lambda: fastseg.ops.upsample_bilinear2d(given.logits, (4, 4), backend="gpu"),
        lambda: fastseg.ops.upsample_argmax(given.logits, (4, 4), backend="gpu"),
        lambda: given.run(backend="gpu"),
    ):
        with pytest.raises(ValueError, match="expected backend to be one of .* but got 'gpu'"):
            call()
