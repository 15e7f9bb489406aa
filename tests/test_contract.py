"""The promises, one section each, over every operator family and backend. The numbers are those of the README.

A rung of the ladder runs this file with other targets (conftest.py); a new family joins with one entry in families.py.
"""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fastseg
from fastseg.testing import (
    assert_no_less_accurate,
    assert_within,
    integer_tensor,
    random_tensor,
    strided_variants,
)
from tests.conftest import FEW_CASES, SLOW_RUNG, TARGETS, on_threads
from tests.families import FAMILIES, Family

DTYPES = [
    dtype
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64)
    if any(target.takes(dtype) for target in TARGETS)
]
LAYOUTS = [torch.contiguous_format, torch.channels_last]


def short(value) -> str:
    return str(value).removeprefix("torch.")


def cases(keep):
    return [pytest.param(f, c, id=f"{f.name}-{n}") for f in FAMILIES for n, c in f.cases.items() if keep(f, n, c)]


def is_told_by_others(family, name, case) -> bool:
    """What a slow rung leaves out: of operators that are made of others, cases beyond those that reach every path."""
    is_composed = family.name not in ("depthwise_conv2d", "dilated_conv2d")
    return SLOW_RUNG and is_composed and case.activation == "none" and case.batch > 0 and name not in family.key_cases


CASES = cases(lambda *one: not is_told_by_others(*one))
PLAIN = cases(lambda f, n, c: c.activation == "none" and c.batch > 0 and not is_told_by_others(f, n, c))
# gradcheck works in float64.
DIFFERENTIABLE = cases(lambda family, name, case: case.batch > 0) if torch.float64 in DTYPES else []
# Where cases are dear, these alone are for more than float32 accuracy: they reach every path of a kernel.
KEY = cases(lambda family, name, case: name in family.key_cases) if FEW_CASES else PLAIN


def with_dtypes(params, dtypes=DTYPES):
    """Each case in each dtype; where cases are dear only key cases in others than float32."""
    key = {param.id for param in KEY}
    return [
        pytest.param(*param.values, dtype, id=f"{param.id}-{short(dtype)}")
        for param in params
        for dtype in dtypes
        if dtype == torch.float32 or not FEW_CASES or param.id in key
    ]


def with_layouts(params):
    """Each of these in both layouts. On a slow rung contiguous tensors are for depthwise kernels, which read them.

    The others copy them first, which other promises show.
    """
    return [
        pytest.param(*param.values, layout, id=f"{param.id}-{short(layout)}")
        for param in params
        for layout in LAYOUTS
        if layout == torch.channels_last or not SLOW_RUNG or param.values[0].name == "depthwise_conv2d"
    ]


def families_with_layouts():
    return with_layouts([pytest.param(family, id=family.name) for family in FAMILIES])


# Draws over which promise 1 (b) takes the largest error.
DRAWS = 2 if SLOW_RUNG else 10
NAMES = ("output", *(f"grad of tensor {i}" for i in range(16)))
# How much larger than native's the error of each may be: gradients of weights are long sums.
TIMES = (2, 2, *(3,) * 15)


def make(family: Family, case, dtype, target, maker=random_tensor, layout=torch.contiguous_format, seed=0):
    if not target.takes(dtype):
        pytest.skip(f"{target} has no kernels for {short(dtype)}")
    tensors = family.make(case, dtype, maker, target.device, seed)
    return tensors[0].contiguous(memory_format=layout), *tensors[1:]


def gradients(y, tensors, grad_output, **options):
    return torch.autograd.grad(y, tensors, grad_output, allow_unused=False, **options)


def require_grad(tensors):
    return tuple(t.detach().requires_grad_() for t in tensors)


def random_like(y, seed=9):
    return random_tensor(tuple(y.shape), y.dtype, seed=seed, device=y.device)


# Promise 1: accuracy.


@pytest.mark.parametrize(("family", "case", "dtype", "layout"), with_layouts(with_dtypes(CASES)))
def test_forward_within_bound(family, case, dtype, layout, target):
    tensors = make(family, case, dtype, target, layout=layout)
    y = family.run(case, tensors, target.backend)
    assert y.dtype == dtype
    native = family.native(case, tensors)
    assert y.shape == native.shape
    if y.numel() > 0:
        assert all(y.is_contiguous(memory_format=f) == native.is_contiguous(memory_format=f) for f in LAYOUTS)
    assert_within(y, family.expected(case, tensors, None, target.roundoff(dtype))[0], "output")


@pytest.mark.parametrize(("family", "case", "dtype", "layout"), with_layouts(with_dtypes(PLAIN)))
def test_gradients_within_bound(family, case, dtype, layout, target):
    tensors = require_grad(make(family, case, dtype, target, layout=layout))
    y = family.run(case, tensors, target.backend)
    grad_output = random_like(y)
    wanted = family.expected(case, tensors, grad_output, target.roundoff(dtype))
    for name, grad, bound in zip(NAMES[1:], gradients(y, tensors, grad_output), wanted[1:], strict=False):
        assert_within(grad, bound, name)


# The interpreter multiplies as NumPy does: of its accuracy float32 tells as much as there is to tell.
@pytest.mark.parametrize(("family", "case", "dtype"), with_dtypes(KEY, DTYPES[: 1 if SLOW_RUNG else 3]))
def test_no_less_accurate_than_native(family, case, dtype, target):
    """The largest error over a few draws: of one alone, native's may be small by luck."""
    ours, theirs, exact = [], [], []
    for seed in range(DRAWS):
        tensors = require_grad(make(family, case, dtype, target, seed=10 * seed))
        y, native = family.run(case, tensors, target.backend), family.native(case, tensors)
        grad_output = random_like(y, seed=10 * seed + 9)
        ours.append((y.detach(), *gradients(y, tensors, grad_output)))
        theirs.append((native.detach(), *gradients(native, tensors, grad_output)))
        exact.append([wanted.value for wanted in family.expected(case, tensors, grad_output, None)])
    for name, own, other, value, times in zip(
        NAMES, zip(*ours, strict=True), zip(*theirs, strict=True), zip(*exact, strict=True), TIMES, strict=False
    ):
        assert_no_less_accurate(torch.stack(own), torch.stack(other), torch.stack(value), times, name)


TF32_CASES = cases(lambda family, name, case: family.takes_tf32 and name in family.key_cases)


@pytest.mark.parametrize(("family", "case", "layout"), with_layouts(TF32_CASES))
def test_tf32_within_bound(family, case, layout, target, tf32):
    tensors = require_grad(make(family, case, torch.float32, target, layout=layout))
    y = family.run(case, tensors, target.backend)
    grad_output = random_like(y)
    wanted = family.expected(case, tensors, grad_output, None, tf32=True)
    for name, result, bound in zip(NAMES, (y.detach(), *gradients(y, tensors, grad_output)), wanted, strict=False):
        assert_within(result, bound, name)


# Promise 2: exact on small integers.


def widened(tensors):
    """On a GPU native in 16 bits may run Winograd's algorithm, which is not exact: what is exact is its float64."""
    return tuple(t.double() for t in tensors) if tensors[0].is_cuda else tensors


@pytest.mark.parametrize(("family", "case", "dtype"), with_dtypes(KEY))
def test_exact_on_small_integers(family, case, dtype, target):
    tensors = require_grad(make(family, case, dtype, target, maker=integer_tensor))
    y, native = family.run(case, tensors, target.backend), family.native(case, widened(tensors))
    if float(native.detach().abs().max()) > 256 and dtype == torch.bfloat16:
        pytest.skip("the sums do not fit bfloat16")
    assert torch.equal(y, native.to(dtype))
    # Ones and minus ones, so that sums over all pixels still fit the dtype.
    grad_output = integer_tensor(tuple(y.shape), dtype, low=-1, high=1, seed=4, device=target.device)
    exact = gradients(native, tensors, grad_output.to(native.dtype))
    for name, ours, theirs in zip(NAMES[1:], gradients(y, tensors, grad_output), exact, strict=False):
        if float(theirs.abs().max()) <= 256 or dtype != torch.bfloat16:
            assert torch.equal(ours, theirs), name


# Promise 4: gradients.


@pytest.mark.parametrize(("family", "case"), DIFFERENTIABLE)
def test_gradcheck(family, case, target):
    tensors = require_grad(make(family, case, torch.float64, target))
    assert torch.autograd.gradcheck(lambda *t: family.run(case, t, target.backend), tensors, fast_mode=True)


# Second derivatives are made of the same operators: many tiles only take longer.
@pytest.mark.parametrize(("family", "case"), [p for p in DIFFERENTIABLE if "several-tiles" not in p.id])
def test_double_backward(family, case, target):
    tensors = require_grad(make(family, case, torch.float64, target))
    assert torch.autograd.gradgradcheck(lambda *t: family.run(case, t, target.backend), tensors, fast_mode=True)


@pytest.mark.parametrize("asked", [(0,), (1,), (2,), (0, 1), (1, 2)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS[1:] if SLOW_RUNG else LAYOUTS, ids=short)
@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_only_the_gradients_asked_for(family, asked, layout, target):
    case = family.cases["3x3"]
    tensors = make(family, case, torch.float32, target, layout=layout)
    tensors = tuple(t.detach().requires_grad_(i in asked) for i, t in enumerate(tensors))
    y = family.run(case, tensors, target.backend)
    grad_output = random_like(y)
    wanted = family.expected(case, tensors, grad_output, None)
    y.backward(grad_output)
    for i, tensor in enumerate(tensors):
        if i in asked:
            assert_within(tensor.grad, wanted[1 + i], NAMES[1 + i])
        else:
            assert tensor.grad is None


@pytest.mark.parametrize(("family", "layout"), families_with_layouts())
def test_strided_and_expanded_grad_output(family, layout, target):
    """After torch.cat gradients are strided views, after sum() they are expanded: gradcheck sees neither."""
    for case in (family.cases[name] for name in family.strided_cases[: 1 if SLOW_RUNG else 2]):
        tensors = require_grad(make(family, case, torch.float32, target, layout=layout))
        y = family.run(case, tensors, target.backend)
        views = strided_variants(random_like(y))
        views["expanded"] = random_like(y)[:, :1, :1, :1].expand_as(y)
        for name, grad_output in views.items():
            wanted = family.expected(case, tensors, grad_output, None)
            grads = gradients(y, tensors, grad_output, retain_graph=True)
            for what, grad, bound in zip(NAMES[1:], grads, wanted[1:], strict=False):
                assert_within(grad, bound, f"{what}, {name} grad_output")


@pytest.mark.parametrize("weight_layout", LAYOUTS, ids=short)
@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_grad_weight_has_the_parameters_strides(family, weight_layout, target):
    case = family.cases["3x3"]
    x, weight, *rest = make(family, case, torch.float32, target)
    tensors = require_grad((x, weight.contiguous(memory_format=weight_layout), *rest))
    y = family.run(case, tensors, target.backend)
    grad = gradients(y, tensors, random_like(y))[1]
    assert grad.stride() == tensors[1].stride()


# Promise 5: shapes.


@given(data=st.data())
@pytest.mark.parametrize(("family", "layout"), families_with_layouts())
def test_any_shape(family, layout, target, data):
    case = family.draw(data.draw, st.integers, st.sampled_from)
    tensors = require_grad(make(family, case, torch.float32, target, layout=layout))
    y = family.run(case, tensors, target.backend)
    grad_output = random_like(y)
    wanted = family.expected(case, tensors, grad_output, None)
    assert_within(y.detach(), wanted[0], "output")
    for name, grad, bound in zip(NAMES[1:], gradients(y, tensors, grad_output), wanted[1:], strict=False):
        assert_within(grad, bound, name)


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_empty_batch(family, dtype, target):
    case = family.cases["empty-batch"]
    tensors = require_grad(make(family, case, dtype, target))
    y = family.run(case, tensors, target.backend)
    assert y.shape == family.native(case, tensors).shape
    y.sum().backward()
    for tensor in tensors:
        assert tensor.grad.shape == tensor.shape
        assert not tensor.grad.any()


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_unbatched_input(family, target):
    case = family.cases["3x3"]
    x, *rest = make(family, case, torch.float32, target)
    y = family.run(case, (x[0], *rest), target.backend)
    assert torch.equal(y, family.run(case, (x[:1], *rest), target.backend)[0])


# Promise 6: memory formats.


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_any_strides(family, target):
    for case in (family.cases[name] for name in family.strided_cases[: 1 if SLOW_RUNG else None]):
        tensors = require_grad(make(family, case, torch.float32, target))
        for name, x in strided_variants(tensors[0].detach()).items():
            views = (x.requires_grad_(), *tensors[1:])
            y = family.run(case, views, target.backend)
            grad_output = random_like(y)
            wanted = family.expected(case, views, grad_output, None)
            assert_within(y.detach(), wanted[0], f"output, {name} input")
            for what, grad, bound in zip(NAMES[1:], gradients(y, views, grad_output), wanted[1:], strict=False):
                assert_within(grad, bound, f"{what}, {name} input")


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_expanded_input(family, target):
    case = family.cases["3x3"]
    x, *rest = make(family, case, torch.float32, target)
    tensors = require_grad((x[:, :1].expand_as(x), *rest))
    y = family.run(case, tensors, target.backend)
    assert_within(y.detach(), family.expected(case, tensors, None, None)[0], "output")


# Promise 7: nothing outside is written, no garbage is read.


@pytest.mark.parametrize(("family", "case", "layout"), with_layouts(KEY))
def test_every_element_is_written(family, case, layout, target, poison):
    tensors = require_grad(make(family, case, torch.float32, target, layout=layout))
    y = family.run(case, tensors, target.backend)
    assert not y.isnan().any()
    for name, grad in zip(NAMES[1:], gradients(y, tensors, random_like(y)), strict=False):
        assert not grad.isnan().any(), name


@pytest.mark.parametrize(("family", "case", "layout"), with_layouts(KEY))
def test_nothing_outside_is_read(family, case, layout, target):
    """Every tensor is a window into a buffer of NaN: one element read outside of it would show in the result."""

    def fenced(t):
        buffer = torch.full((t.numel() + 256,), torch.nan, dtype=t.dtype, device=t.device)
        return buffer[128:-128].as_strided(t.shape, t.stride(), 128).copy_(t)

    tensors = make(family, case, torch.float32, target, layout=layout)
    tensors = require_grad(tuple(fenced(t) for t in tensors))
    y = family.run(case, tensors, target.backend)
    assert not y.isnan().any()
    grad_output = fenced(random_like(y).contiguous(memory_format=layout))
    for name, grad in zip(NAMES[1:], gradients(y, tensors, grad_output), strict=False):
        assert not grad.isnan().any(), name


# Promise 8: non-finite values reach exactly where they belong.


@pytest.mark.parametrize("value", [torch.nan] if SLOW_RUNG else [torch.inf, torch.nan], ids=str)
@pytest.mark.parametrize("where", range(4), ids=["input", "weight", "bias", "grad_output"])
@pytest.mark.parametrize(("family", "case", "layout"), with_layouts(KEY))
def test_non_finite_values_stay_in_their_window(family, case, where, value, layout, target):
    tensors = [t.clone() for t in make(family, case, torch.float32, target, layout=layout)]
    if where < 3 and where >= len(tensors):
        pytest.skip("the case has no bias")
    shape = family.native(case, tensors).shape
    grad_output = random_tensor(tuple(shape), torch.float32, seed=9, device=target.device)
    # A corner: the place where padding must be skipped, not multiplied.
    struck = grad_output if where == 3 else tensors[where]
    struck[(0,) * struck.dim()] = value
    tensors = require_grad(tensors)
    y = family.run(case, tensors, target.backend)
    wanted = family.expected(case, tensors, grad_output, None)
    results = (y.detach(), *gradients(y, tensors, grad_output))
    for name, result, bound in zip(NAMES, results, wanted, strict=False):
        assert torch.equal(result.isfinite(), bound.value.isfinite()), name


# Promise 9: more than 2^31 elements, with the 64-bit path forced on small tensors here (on a GPU: test_gpu.py).


@pytest.mark.parametrize(("family", "case", "layout"), with_layouts(KEY))
def test_64_bit_indices(family, case, layout, target, monkeypatch):
    monkeypatch.setenv("FASTSEG_FORCE_INDEX64", "1")
    tensors = require_grad(make(family, case, torch.float32, target, layout=layout))
    y = family.run(case, tensors, target.backend)
    grad_output = random_like(y)
    wanted = family.expected(case, tensors, grad_output, None)
    assert_within(y.detach(), wanted[0], "output")
    for name, grad, bound in zip(NAMES[1:], gradients(y, tensors, grad_output), wanted[1:], strict=False):
        assert_within(grad, bound, name)


# Promise 10: determinism.


@pytest.mark.skipif(SLOW_RUNG, reason="the interpreter runs programs one after the other, in one thread")
@pytest.mark.parametrize(("family", "case", "layout"), with_layouts(KEY))
def test_bitwise_repeatable(family, case, layout, target):
    tensors = require_grad(make(family, case, torch.float32, target, layout=layout))

    def results():
        y = family.run(case, tensors, target.backend)
        return (y, *gradients(y, tensors, random_like(y)))

    first = results()
    with on_threads(1):
        second = results()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# Promise 13: errors.


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_unknown_names_are_refused(family, target):
    case = family.cases["3x3"]
    tensors = make(family, case, torch.float32, target)
    with pytest.raises(ValueError, match="expected backend to be one of .* but got 'gpu'"):
        family.run(case, tensors, "gpu")
    with pytest.raises(ValueError, match="expected activation to be one of .* but got 'tanh'"):
        family.run(replace(case, activation="tanh"), tensors, target.backend)


@pytest.mark.skipif(os.environ.get("FASTSEG_RUNG") == "gpu", reason="on a GPU every backend but cpu can run")
@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_a_named_backend_that_cannot_run_raises(family, target):
    case = family.cases["3x3"]
    tensors = family.make(case, torch.float64, random_tensor, target.device)
    with pytest.raises(fastseg.BackendError, match="backend 'triton' cannot run .*: "):
        family.run(case, tensors, "triton")
